"""What the tests of the scripts share: a small model's file, runs that are killed, and states."""
import contextlib

import pytest
import torch

from mvd.tools import cli, run
from test_model import random_model


class Killed(BaseException):
    """As abrupt as a kill can be inside one process: nothing catches it."""


@contextlib.contextmanager
def killed_after(monkeypatch, when):
    """The run in this context must die right after it logs a row for which when(row) is true."""
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
    """Return the path of the file of a model with random weights."""
    path = folder / "small.safetensors"
    random_model(config).save(path)
    return path


def status(main):
    """Return the exit status of a script's main function, run as the script runs it."""
    try:
        cli.main(main)
    except SystemExit as end:
        return end.code
    return 0


def assert_same_state(a, b, place="the state"):
    """Nested dicts, lists and tuples of tensors and numbers are equal, bits, types and order."""
    assert type(a) is type(b), f"{place}: {type(a).__name__} became {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{place}: another dtype or shape"
        assert torch.equal(a, b), f"{place}: another value"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{place}: other keys"
        for key in a:
            assert_same_state(a[key], b[key], f"{place}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{place}: another length"
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{place}[{i}]")
    else:
        both_nan = a != a and b != b
        assert a == b or both_nan, f"{place}: {a!r} became {b!r}"
