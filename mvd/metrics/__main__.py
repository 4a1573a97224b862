"""python -m mvd.metrics: see command.py."""
from ..tools import cli
from .command import main

if __name__ == "__main__":
    cli.main(main)
