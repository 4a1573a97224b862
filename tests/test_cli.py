"""Flags from a dataclass; a user's mistake is one line and status 2, a bug is a traceback."""
import errno
import io
import os
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import distill
import dreambooth
import sample
import train
from mvd import bench
from mvd.data import __main__ as data_command
from mvd.metrics import command, identity
from mvd.tools import cli
from mvd.tools.cli import setting
from mvd.tools.device import LARGEST_SEED, check_seed
from mvd.tools.errors import UserError
from mvd.toyworld import dataset
from scripts import status


@dataclass
class Settings:
    prompt: str = setting(help="what to make, 100% yours", positional=True)
    steps: int = setting(500, "optimisation steps", min=1, max=10000)
    learning_rate: float = setting(1e-2, "of the grid", min=0.0)
    mode: str = setting("3d", "which network", choices=["3d", "2d"])
    shading: bool = setting(True, "light the object")
    out: str | None = setting(None, "folder of the run")
    guidance: float | None = setting(None, "guidance, the model's if left out")


# Every command, with what must be given.
COMMANDS = {
    "sample": (sample.main, ["a red car"]),
    "distill": (distill.main, ["a red car"]),
    "dreambooth": (dreambooth.main, ["photos", "--prompt", "[v] car"]),
    "train": (train.main, []),
    "toyworld": (dataset.main, ["--out", "data"]),
    "metrics": (command.main, ["--samples", "1"]),
    "identity": (identity.main, ["bulldog", "7"]),
    "bench": (bench.main, []),
    "data": (data_command.main, ["data"]),
}


@dataclass
class Seeded:
    seed: int = setting(0, "of everything random", min=0)


@dataclass
class Optionally:
    model: str = setting("tiny", "a name or a file", positional=True)
    resume: bool = setting(False, "go on")


def preset(**changes):
    """Defaults as a model's preset gives them."""
    return lambda flags: ('the preset "other"', changes)


def test_a_setting_that_no_script_has_is_named():
    with pytest.raises(UserError, match='the preset "other" sets budget, which this script'):
        cli.parse(Settings, ["a dog"], defaults=preset(budget=5, steps=7))


def test_parse():
    assert cli.parse(Settings, ["a dog"]) == Settings("a dog")
    flags = "--steps 7 a-dog --learning-rate=-0 --no-shading --mode 2d --out x --guidance -2.5"
    given = cli.parse(Settings, flags.split())
    assert given == Settings("a-dog", 7, 0.0, "2d", False, "x", -2.5)
    assert cli.parse(Optionally, []) == Optionally("tiny", False)
    assert cli.parse(Optionally, ["big", "--resume"]) == Optionally("big", True)


def test_a_preset_replaces_defaults_and_flags_replace_a_preset():
    other = preset(steps=20000, shading=False, mode="2d")
    found = cli.parse(Settings, ["a", "--mode", "3d"], defaults=other)
    assert found == Settings("a", 20000, mode="3d", shading=False)
    assert cli.parse(Optionally, [], defaults=preset(model="big")) == Optionally("big")


@pytest.mark.parametrize("flags, mode", [
    ([], "3d"),
    (["--mode", "2d"], "2d"),
    (["--mode=2d"], "2d"),
    (["--steps", "7", "--mode", "2d"], "2d"),
])
def test_a_preset_is_chosen_by_the_flags(flags, mode):
    """What names the model is read before all else, wherever it stands among the flags."""
    asked = []

    def by_mode(flags):
        asked.append(flags.mode)
        return "", {"steps": 3} if flags.mode == "2d" else {}

    found = cli.parse(Settings, ["a dog", *flags], defaults=by_mode)
    assert asked == [mode] and found.mode == mode
    assert found.steps == (7 if "7" in flags else 3 if mode == "2d" else 500)


def test_a_run_prints_what_is_not_its_default_and_why(capsys):
    other = preset(steps=20000, mode="2d", learning_rate=0.25)
    flags = ["a dog", "--no-shading", "--mode=3d", "--out=my runs"]
    given = cli.parse(Settings, flags, defaults=other)
    cli.print_changes(given, *other(given))
    assert capsys.readouterr().out.splitlines() == [
        'settings from the preset "other": --steps 20000 --learning-rate 0.25',
        "settings from the command line: --mode 3d --no-shading --out 'my runs'",
    ]
    cli.print_changes(cli.parse(Settings, ["a dog"]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments, words", [
    ([], "prompt"),
    (["a", "--stepz", "3"], "--stepz"),
    (["a", "--step", "3"], "--step"),  # no abbreviations
    (["a", "dog"], "quotes"),
    (["a", "--steps", "many"], "--steps"),
    (["a", "--steps", "0"], "at least 1 and at most 10000, not 0"),
    (["a", "--steps", "10001"], "at most 10000"),
    (["a", "--learning-rate", "-1"], "at least 0.0"),
    (["a", "--learning-rate", "nan"], "--learning-rate"),
    (["a", "--guidance", "inf"], "finite"),
    (["a", "--mode", "4d"], "3d"),
    (["a", "--mode"], "--mode"),
])
def test_parse_mistakes_are_one_line(arguments, words, capsys):
    for defaults in (None, preset(steps=9)):
        with pytest.raises(SystemExit) as end:
            cli.parse(Settings, arguments, defaults=defaults)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err


# ---- seeds: one rule everywhere ---------------------------------------------------------------

@pytest.mark.parametrize("text, seed", [
    ("7", 7), (" 7 ", 7), ("+7", 7), ("-0", 0), ("007", 7), ("1_000", 1000), ("\u0663", 3),
    ("4294967296", 2**32), ("9223372036854775806", 2**63 - 2),
])
def test_a_seed_is_what_python_takes_for_a_whole_number(text, seed):
    assert cli.parse(Seeded, [f"--seed={text}"]).seed == seed
    assert check_seed(seed) == check_seed(np.uint64(seed)) == check_seed(torch.tensor(seed)) == seed


NO_SEEDS = ("-1", "-1_000", "9223372036854775807", "18446744073709551615", "9" * 400, "9" * 5000,
            "1e3", "1.0", "0x10", "1__0", "nan", "inf", "", "\u00b2")


@pytest.mark.parametrize("text", NO_SEEDS)
def test_anything_else_is_no_seed(text, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Seeded, [f"--seed={text}"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: argument --seed") and err.count("\n") == 1


@pytest.mark.parametrize("seed", [
    -1, 2**63 - 1, 2**64, 10**400, True, False, 1.0, 1.5, None, "1", np.float32(1), np.bool_(True),
    np.int8(-1), torch.tensor(1.0), float("nan"),
])
def test_anything_else_is_no_seed_for_python_either(seed):
    with pytest.raises(UserError, match=f"whole number from 0 to {LARGEST_SEED}, not"):
        check_seed(seed)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in (
    "identity", "bench", "data")])
@pytest.mark.parametrize("seed", ["-1", "9223372036854775807", "1.5"])
def test_every_command_refuses_them_in_one_line(name, seed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main, flags = COMMANDS[name]
    assert status(lambda: main([*flags, "--seed", seed])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: argument --seed") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "something was made"


def test_a_whole_number_without_a_bound_has_one(capsys):
    """Whatever it is for: a tensor could not hold it."""
    for kind, text in ((int, "9223372036854775807"), (int, "1" + "0" * 400)):
        with pytest.raises(cli.argparse.ArgumentTypeError, match="at most 9223372036854775806"):
            cli.converter(kind, {"min": 1})(text)
    with pytest.raises(cli.argparse.ArgumentTypeError, match="must be at least 1, not 0$"):
        cli.converter(int, {"min": 1})("0")


# ---- what --help prints ----------------------------------------------------------------------

def printed_help(capsys, description, defaults=None):
    with pytest.raises(SystemExit) as end:
        cli.parse(Settings, ["--help"], description, defaults)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_each_flag_with_its_default(capsys):
    text = " ".join(printed_help(capsys, "Makes a thing.").split())
    parts = (
        "Makes a thing.",
        "100% yours",
        "--learning-rate X",
        "of the grid (default: 0.01)",
        "(default: 500)",
        "--no-shading",
        "light the object (default: on)",
        "{3d,2d}",
        "which network (default: 3d)",
        "folder of the run",
    )
    for part in parts:
        assert part in text, f"--help does not say {part!r}"
    assert "None" not in text


def test_help_shows_what_will_run_keeps_its_lines_and_rounds(capsys):
    other = preset(steps=9, learning_rate=0.0067658234670659265)
    text = printed_help(capsys, "Makes a thing.\n\n    make --this\n    make --that", other)
    assert "\n    make --this\n    make --that\n" in text
    assert "(default: 9)" in text and "(default: 0.006766)" in text


@pytest.mark.parametrize("error, status, words", [
    (UserError("no such\nmodel"), 2, "error: no such model\n"),
    (torch.cuda.OutOfMemoryError("CUDA ..."), 2, "error: the GPU has no memory"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: no space left"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2,
     "error: cannot use a/b: Permission denied\n"),
    (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "error: cannot use a/b: Read-only"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 2, "error: cannot use aaa: File "),
    (KeyboardInterrupt(), 130, ""),
    (cli.Terminated(), 143, ""),
    (cli.interruption(signal.SIGINT), 130, ""),
    (cli.interruption(signal.SIGTERM), 143, ""),
])
def test_main_turns_what_users_can_mend_into_one_line(error, status, words, capsys):
    def script():
        raise error
    with pytest.raises(SystemExit) as end:
        cli.main(script)
    err = capsys.readouterr().err
    assert end.value.code == status and err.startswith(words) and err.count("\n") == bool(words)


BUGS = [ValueError("a bug"), OSError(errno.EIO, "broken"), RuntimeError("a bug"),
        PermissionError(errno.EPERM, "of no file"), BrokenPipeError(errno.EPIPE, "another pipe")]


@pytest.mark.parametrize("error", BUGS)
def test_main_lets_bugs_through(error):
    def script():
        raise error
    with pytest.raises(type(error)):
        cli.main(script)


def test_first_interrupt_sets_the_flag_and_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with cli.interrupt_flag() as flag:
        assert not flag.is_set()
        assert flag.code == 0
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set() and flag.code == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def keep_sigterm():
    """SIGTERM fails the test, as it would end the script; afterwards it is as before."""
    def killed(number, frame):
        pytest.fail("SIGTERM is not ignored")

    before = signal.signal(signal.SIGTERM, killed)
    yield killed
    signal.signal(signal.SIGTERM, before)


def test_sigterm_sets_the_flag_and_is_ignored_from_then_on(keep_sigterm):
    with cli.interrupt_flag():
        pass
    assert signal.getsignal(signal.SIGTERM) is keep_sigterm, "no signal came, yet it has changed"
    with cli.interrupt_flag() as flag:
        signal.raise_signal(signal.SIGTERM)
        assert flag.is_set() and flag.code == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert flag.code == signal.SIGTERM, "Ctrl-C afterwards does not change how the run ends"
    signal.raise_signal(signal.SIGTERM)


def test_sigterm_outside_of_a_loop_ends_quietly(keep_sigterm, capsys):
    """And is ignored while the script ends."""
    cleared = []

    def script():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleared.append(True)

    with pytest.raises(SystemExit) as end:
        cli.main(script)
    signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143 and capsys.readouterr().err == ""
    assert cleared, "the second signal came through"


def test_a_script_leaves_sigterm_as_it_was(keep_sigterm):
    cli.main(lambda: None)
    assert signal.getsignal(signal.SIGTERM) is keep_sigterm


def test_another_thread_than_the_main_one_gets_no_signals():
    """Python allows handlers in the main thread only."""
    flags = []

    def script():
        with cli.interrupt_flag() as flag:
            flags.append((flag.is_set(), flag.code))

    thread = threading.Thread(target=cli.main, args=(script,))
    thread.start()
    thread.join()
    assert flags == [(False, 0)]


@pytest.mark.parametrize("before", [signal.SIG_IGN, None])
def test_a_signal_that_is_ignored_or_not_pythons_is_left_alone(before, monkeypatch):
    """SIG_IGN: nohup, and what a shell starts in its background. None: a program round Python."""
    changed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: before)
    monkeypatch.setattr(signal, "signal", lambda *given: changed.append(given))
    with cli.interrupt_flag() as flag:
        assert not flag.is_set()
    cli.main(lambda: None)
    assert changed == []


# ---- warnings --------------------------------------------------------------------------------

@pytest.mark.parametrize("action", ["ignore", "error", "default"])
def test_a_warning_is_printed_whatever_pythonwarnings_says(action, capsys):
    """And again when the command is called again in the same process."""
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        show = warnings.showwarning
        for _ in range(2):
            cli.main(lambda: warnings.warn("left\nout"))
            assert capsys.readouterr().err == "warning: left out\n"
        assert warnings.showwarning is show and warnings.filters[0][0] == action


# ---- consoles --------------------------------------------------------------------------------

class Consoles:
    """stdout and stderr as Python makes them, with these encodings, into files or elsewhere."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.made = []

    def put(self, name, encoding="utf-8", file=None):
        """Put a stream to `file`, a descriptor, or to a file in the place of sys.<name>."""
        if file is None:
            file = os.open(self.folder / name, os.O_CREAT | os.O_WRONLY)
        raw = io.BufferedWriter(io.FileIO(file, "w"))
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = io.TextIOWrapper(raw, encoding, errors, line_buffering=name == "stderr")
        self.monkeypatch.setattr(sys, name, stream)
        self.made.append(stream)
        return stream

    def read(self, name):
        return (self.folder / name).read_bytes()


@pytest.fixture
def consoles(tmp_path):
    # Of its own: it ends before pytest's capturing looks for its streams.
    with pytest.MonkeyPatch.context() as patch:
        consoles = Consoles(tmp_path, patch)
        yield consoles
    for stream in consoles.made:
        stream.close()  # as at the interpreter's end: nothing is left that could not be printed


def without_reader():
    """The end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "latin-1", "utf-8"])
def test_what_a_console_does_not_have_is_printed_as_its_number(encoding, consoles):
    text = "λ‖θ x̂₀ 128² … 狗 🐶 café \udcff"
    before = [consoles.put(name, encoding) for name in ("stdout", "stderr")]

    def script():
        print(text)
        warnings.warn(text)
        for _ in tqdm([1], desc=text, mininterval=0):
            pass
        raise UserError(text)

    assert status(script) == 2
    assert [sys.stdout, sys.stderr] == before, "the streams are not as they were"
    expected = text.encode(encoding, "backslashreplace")
    assert consoles.read("stdout").split(b"\n")[0].rstrip() == expected
    err = consoles.read("stderr")
    assert b"warning: " + expected in err and b"error: " + expected in err
    assert err.count(expected) > 2, "not on the bar"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_can_be_printed_in_ascii(name, consoles):
    consoles.put("stdout", "ascii")
    assert status(lambda: COMMANDS[name][0](["--help"])) == 0
    assert b"usage:" in consoles.read("stdout")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("names", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_the_work_goes_on_when_nobody_reads(names, unbuffered, consoles):
    """As behind `| head -1` and `| true`."""
    for name in ("stdout", "stderr"):
        stream = consoles.put(name, file=without_reader() if name in names else None)
        stream.reconfigure(write_through=unbuffered)
    done = []

    def script():
        for step in tqdm(range(20), mininterval=0):
            print("x" * 10_000, flush=step % 2 == 0)
        warnings.warn("a warning")
        done.append(True)

    assert status(script) == 0 and done
    if "stdout" not in names:
        assert consoles.read("stdout") == 20 * (b"x" * 10_000 + os.linesep.encode())
    if "stderr" not in names:
        err = consoles.read("stderr")
        assert b"20/20" in err and b"warning: a warning" in err

    def fails():
        print("x" * 10_000)
        raise UserError("a mistake")

    assert status(fails) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("end, code, words", [
    (None, 2, b"error: the disk is full"),
    (SystemExit(0), 2, b"error: the disk is full"),
    (SystemExit(3), 3, b""),
    (UserError("a mistake"), 2, b"error: a mistake\n"),
])
def test_a_full_disk_behind_stdout_is_told_when_the_work_is_done(end, code, words, consoles):
    consoles.put("stdout", file=os.open("/dev/full", os.O_WRONLY))
    consoles.put("stderr")
    done = []

    def script():
        print("x" * 10_000, flush=True)
        done.append(True)
        if end:
            raise end

    assert status(script) == code and done
    assert consoles.read("stderr").startswith(words)


def test_closed_and_foreign_streams(monkeypatch):
    """None: as Python has them when they are closed (`>&-`). StringIO: a notebook, for example."""
    def script():
        print("printed")
        for _ in tqdm([1], mininterval=0):
            warnings.warn("warned")

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert status(script) == 0 and sys.stdout is None
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert status(script) == 0
    assert out.getvalue() == "printed\n" and "warning: warned\n" in err.getvalue()
