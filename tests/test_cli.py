"""Flags from a dataclass; a user's mistake is one line and status 2, a bug of ours is a traceback."""
import errno
import signal
from dataclasses import dataclass, field
from typing import Optional

import pytest
import torch

from mvd.tools import cli
from mvd.tools.errors import UserError


@dataclass
class Settings:
    prompt: str = field(metadata={"help": "what to make, 100% yours", "positional": True})
    steps: int = field(default=500, metadata={"help": "optimisation steps", "min": 1, "max": 10000})
    learning_rate: float = field(default=1e-2, metadata={"help": "of the grid", "min": 0.0})
    mode: str = field(default="3d", metadata={"help": "which network", "choices": ["3d", "2d"]})
    shading: bool = field(default=True, metadata={"help": "light the object"})
    out: Optional[str] = field(default=None, metadata={"help": "folder of the run"})
    guidance: Optional[float] = field(default=None, metadata={"help": "guidance, the model's if left out"})


@dataclass
class Optionally:
    model: str = field(default="tiny", metadata={"help": "a name or a file", "positional": True})
    resume: bool = field(default=False, metadata={"help": "go on"})


def test_a_setting_of_another_version_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="budget = 5, which this version does not know"):
        assert cli.parse(Settings, ["a dog"], defaults={"budget": 5, "steps": 7}).steps == 7


def test_parse():
    assert cli.parse(Settings, ["a dog"]) == Settings("a dog")
    given = cli.parse(Settings, ["--steps", "7", "a dog", "--learning-rate=-0", "--no-shading", "--mode", "2d",
                                 "--out", "x", "--guidance", "-2.5"])
    assert given == Settings("a dog", 7, 0.0, "2d", False, "x", -2.5)
    assert cli.parse(Optionally, []) == Optionally("tiny", False)
    assert cli.parse(Optionally, ["big", "--resume"]) == Optionally("big", True)
    other = {"steps": 20000, "shading": False, "mode": "2d"}
    assert cli.parse(Settings, ["a", "--mode", "3d"], defaults=other) == Settings("a", 20000, mode="3d", shading=False)
    assert cli.parse(Optionally, [], defaults={"model": "big"}) == Optionally("big")


@pytest.mark.parametrize("arguments, words", [
    ([], "prompt"),
    (["a", "--stepz", "3"], "--stepz"),
    (["a", "--step", "3"], "--step"),                                       # no abbreviations
    (["a", "dog"], "quotes"),
    (["a", "--steps", "many"], "--steps"),
    (["a", "--steps", "0"], "at least 1 and at most 10000, not 0"),
    (["a", "--steps", "10001"], "at most 10000"),
    (["a", "--learning-rate", "-1"], "at least 0.0"),
    (["a", "--learning-rate", "nan"], "--learning-rate"),
    (["a", "--guidance", "inf"], "finite"),
    (["a", "--mode", "4d"], "3d"),
])
def test_parse_mistakes_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Settings, arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_help_lists_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Settings, ["--help"], description="Makes a thing.")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "Makes a thing." in text
    for part in ("100% yours", "--learning-rate X", "of the grid (default: 0.01)", "(default: 500)", "--no-shading",
                 "light the object (default: on)", "{3d,2d}", "which network (default: 3d)", "folder of the run"):
        assert part in text
    assert "None" not in text


@pytest.mark.parametrize("error, status, words", [
    (UserError("no such\nmodel"), 2, "error: no such model\n"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ..."), 2, "error: the GPU has no memory"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: no space left"),
    (KeyboardInterrupt(), 130, ""),
])
def test_main_turns_what_users_can_mend_into_one_line(error, status, words, capsys):
    def script():
        raise error
    with pytest.raises(SystemExit) as end:
        cli.main(script)
    err = capsys.readouterr().err
    assert end.value.code == status and err.startswith(words) and err.count("\n") == bool(words)


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "broken"), RuntimeError("a bug")])
def test_main_lets_bugs_through(error):
    def script():
        raise error
    with pytest.raises(type(error)):
        cli.main(script)


def test_first_interrupt_sets_the_flag_and_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with cli.interrupt_flag() as flag:
        assert not flag.is_set()
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
