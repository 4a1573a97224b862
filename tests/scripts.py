"""What the tests of the scripts share: a small model's file, a command in this process, and kills."""
import contextlib

import pytest

from mvd.tools import cli, run
from test_model import random_model


class Killed(BaseException):
    """As abrupt as a kill can be inside one process: nothing catches it."""


@contextlib.contextmanager
def killed_after(monkeypatch, when):
    """The run in this context must die right after it logged a row for which when(row) is true."""
    log = run.log

    def log_then_die(path, **row):
        log(path, **row)
        if when(row):
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", log_then_die)
        with pytest.raises(Killed):
            yield


def saved_model(folder, config):
    """The file of a model of random weights."""
    random_model(config).save(folder / "small.safetensors")
    return folder / "small.safetensors"


def status(main):
    """The exit status of a script's main function, run as the script does."""
    try:
        cli.main(main)
    except SystemExit as end:
        return end.code
    return 0
