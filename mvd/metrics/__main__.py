"""python -m mvd.metrics: the command of `judge`."""
from ..tools import cli
from .judge import main

if __name__ == "__main__":
    cli.main(main)
