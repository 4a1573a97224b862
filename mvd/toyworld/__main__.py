"""python -m mvd.toyworld: render a data folder."""
from ..tools import cli
from .dataset import main

if __name__ == "__main__":
    cli.main(main)
