"""Flags from a dataclass; a user's mistake is one line and status 2, a bug is a traceback."""
import errno
import signal
import threading
from dataclasses import dataclass

import pytest
import torch

from mvd.tools import cli
from mvd.tools.cli import setting
from mvd.tools.errors import UserError


@dataclass
class Settings:
    prompt: str = setting(help="what to make, 100% yours", positional=True)
    steps: int = setting(500, "optimisation steps", min=1, max=10000)
    learning_rate: float = setting(1e-2, "of the grid", min=0.0)
    mode: str = setting("3d", "which network", choices=["3d", "2d"])
    shading: bool = setting(True, "light the object")
    out: str | None = setting(None, "folder of the run")
    guidance: float | None = setting(None, "guidance, the model's if left out")


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


BUGS = [ValueError("a bug"), OSError(errno.EIO, "broken"), RuntimeError("a bug")]


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
