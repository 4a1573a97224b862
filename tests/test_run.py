"""The run folder, the log, and files and checkpoints under mistakes, kills and full disks."""
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd.tools import cli, files, run
from mvd.tools.errors import UserError
from scripts import assert_same_state

REPOSITORY = Path(__file__).parent.parent


# ---- the folder ------------------------------------------------------------------------------


def test_slug():
    slug = run.slug("A bulldog, wearing a crown!")
    assert slug == "a-bulldog-wearing-a-crown"
    assert run.slug("Café ../../etc/passwd") == "cafe-etc-passwd"
    odd = ("", "狗", "...", "-" * 90, "x" * 200, "é" * 61, "ab " * 40, "\udcff")
    for text in odd:
        slug = run.slug(text)
        assert 1 <= len(slug) <= 60, f"{text!r}: {len(slug)} characters"
        assert slug.isascii() and slug == slug.lower(), f"{text!r} -> {slug!r}"
        assert slug.strip("-") == slug, f"{text!r} -> {slug!r}: a dash at an end"


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_open_run_never_overwrites(tmp_path):
    default = tmp_path / "runs" / "a-dog"
    config = {"prompt": "a dog", "steps": 5, "betas": (0.9, 0.99)}
    first = run.open_run(None, config, False, default)
    assert first == default
    assert settings_of(first) == {**config, "betas": [0.9, 0.99]}
    assert (first / "progress").is_dir()
    second = run.open_run(None, {**config, "steps": 6}, False, default)
    third = run.open_run(None, config, False, default)
    assert (second.name, third.name) == ("a-dog-2", "a-dog-3")
    assert settings_of(first)["steps"] == 5, "the second run changed the first one"

    named = run.open_run(str(tmp_path / "mine"), config, False, default)
    assert named == tmp_path / "mine"
    with pytest.raises(UserError, match="--resume"):
        run.open_run(str(named), config, False, default)


def test_a_folder_that_holds_no_run_can_be_used(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "cat.jpg").write_text("")
    assert not run.holds_run(folder)
    run.open_run(str(folder), {}, False)
    assert (folder / "cat.jpg").exists()
    assert run.holds_run(folder)


@pytest.mark.parametrize("name", run.RUN_FILES)
def test_one_file_of_a_run_is_enough_to_keep_its_folder(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="already holds a run"):
        run.open_run(str(tmp_path), {}, False)


def test_resume_wants_the_same_settings(tmp_path):
    default = tmp_path / "a-dog"
    config = {"prompt": "a dog", "steps": 5, "betas": (0.9, 0.99), "device": "cuda"}
    with pytest.raises(UserError, match="no run to resume"):
        run.open_run(None, config, True, default)
    assert not default.exists()
    run.open_run(None, config, False, default)
    (default / ".checkpoint.pt.123.tmp").write_text("half")

    elsewhere = {**config, "device": "cpu"}
    assert run.open_run(None, elsewhere, True, default) == default
    assert settings_of(default)["device"] == "cpu"
    assert not list(default.glob(".*")), "what a killed write left behind is still there"

    longer = {**config, "steps": 6}
    with pytest.raises(UserError, match="steps = 5, now it is 6"):
        run.open_run(None, longer, True, default)
    assert settings_of(default)["steps"] == 5
    found = run.open_run(None, longer, True, default, may_change=["steps"])
    assert found == default
    with pytest.raises(UserError, match="another version of mvd: only one knows seed"):
        run.open_run(str(default), {**longer, "seed": 1}, True)


def test_resume_finds_the_latest_run_with_these_settings(tmp_path):
    default = tmp_path / "a-dog"
    for seed in (0, 1, 1, 2):
        run.open_run(None, {"seed": seed}, False, default)
    found = []
    for seed in (0, 1, 2):
        folder = run.open_run(None, {"seed": seed}, True, default)
        found.append(folder.name)
    assert found == ["a-dog", "a-dog-3", "a-dog-4"]
    with pytest.raises(UserError, match="seed = 2, now it is 3"):
        run.open_run(None, {"seed": 3}, True, default)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\x00\xff"])
def test_resume_with_a_damaged_config(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match="config.json"):
        run.open_run(str(tmp_path), {"a": 1}, True)
    assert path.read_bytes() == text


def test_folder_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "sub", file / "sub" / "sub"):
        with pytest.raises(UserError, match="cannot"):
            run.open_run(str(place), {}, False)
    with pytest.raises(UserError, match="cannot"):
        run.open_run(None, {}, False, file / "a-dog")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(UserError, match="cannot"):
        run.open_run(None, {}, False, dangling / "a-dog")


def test_make_folder(tmp_path):
    picture = tmp_path / "a" / "b" / "picture.png"
    for _ in range(2):
        run.make_folder(picture)
    assert picture.parent.is_dir() and not picture.exists()
    run.make_folder("picture.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        run.make_folder(tmp_path / "file" / "picture.png")



def test_a_read_only_folder_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"cannot write to the folder {tmp_path}"):
        run.make_folder(tmp_path / "picture.png")


def test_free_file(tmp_path):
    """Never a file that is there; each call makes one, so two processes never get the same."""
    names = []
    (tmp_path / "a.v1-2.png").symlink_to(tmp_path / "nowhere")
    for _ in range(3):
        file = run.free_file(tmp_path / "a.v1.png")
        names.append(file.name)
        assert file.read_bytes() == b""
    assert names == ["a.v1.png", "a.v1-3.png", "a.v1-4.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/b.png"):
        run.free_file(tmp_path / "file" / "b.png")


FAILURES = [
    UserError("no"), OSError(errno.ENOSPC, "full"), RuntimeError("a bug"), SystemExit(2),
    KeyboardInterrupt(), cli.Terminated(), torch.cuda.OutOfMemoryError(),
]


def fails_at_the_start(folder, error, resume=False, work=lambda: None):
    out = run.open_run(str(folder), {"steps": 5}, resume)
    with pytest.raises(type(error)):
        with run.starting(out):
            work()
            raise error


@pytest.mark.parametrize("error", FAILURES)
def test_a_failed_start_leaves_no_run(error, tmp_path):
    folder = tmp_path / "new" / "run"
    fails_at_the_start(folder, error)
    assert not folder.exists(), "something is left"
    (folder / "progress").mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    fails_at_the_start(folder, error, work=lambda: run.log(folder / "log.jsonl", left_out="x"))
    assert (folder / "mine.txt").exists() and not run.holds_run(folder)
    run.open_run(str(folder), {"steps": 6}, False)


@pytest.mark.parametrize("error", FAILURES)
def test_a_run_that_has_done_something_stays(error, tmp_path):
    def works():
        run.log(tmp_path / "a" / "log.jsonl", step=1)

    fails_at_the_start(tmp_path / "a", error, work=works)
    fails_at_the_start(tmp_path / "a", error, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        run.open_run(str(tmp_path / "a"), {}, False)

    def saves():
        run.save_checkpoint(tmp_path / "b" / run.CHECKPOINT, {"step": 1})

    fails_at_the_start(tmp_path / "b", error, work=saves)
    fails_at_the_start(tmp_path / "b", error, resume=True)
    assert run.last_checkpoint(tmp_path / "b") == {"step": 1}
    with pytest.raises(UserError, match="already holds a run"):
        run.open_run(str(tmp_path / "b"), {}, False)


def test_only_the_first_process_tidies_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run.parallel, "is_first", lambda: False)
    fails_at_the_start(tmp_path, SystemExit(2))
    assert (tmp_path / "config.json").exists()

# ---- the log ---------------------------------------------------------------------------------


def steps_of(log):
    return [row["step"] for row in run.read_log(log)]


def test_log(tmp_path):
    path = tmp_path / "log.jsonl"
    # There is no log yet.
    run.truncate_log(path, 3)
    for step in range(6):
        loss = torch.tensor(step / 3)
        run.log(path, step=step, loss=loss, lr=np.float32(0.5))
        assert run.read_log(path)[-1] == {"step": step, "loss": loss.item(), "lr": 0.5}
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert steps_of(path) == [0, 1, 2, 3, 4, 5], "a line cut short is not left out"
    run.truncate_log(path, 4)
    run.log(path, step=4, loss=9)
    assert steps_of(path) == [0, 1, 2, 3, 4]
    assert run.read_log(path)[-1]["loss"] == 9
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        run.read_log(path)

# ---- atomic files ----------------------------------------------------------------------------


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_write_atomic(tmp_path):
    path = tmp_path / "result"
    files.write_atomic(path, b"one")
    files.write_atomic(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two" and names_in(tmp_path) == ["result"]
    mode = path.stat().st_mode & 0o777
    assert mode == 0o666 & ~current_umask(), "not readable as any other file is"


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError()])
def test_failed_write_leaves_the_earlier_file(error, tmp_path):
    path = tmp_path / "result"
    files.write_atomic(path, b"earlier")

    def write(file):
        file.write(b"half of it")
        raise error

    with pytest.raises(type(error)):
        files.write_atomic(path, write)
    assert names_in(tmp_path) == ["result"]
    assert path.read_bytes() == b"earlier"


def test_full_disk(tmp_path, monkeypatch, capsys):
    """The disk is found full only when the data are flushed to it."""
    path = tmp_path / run.CHECKPOINT
    run.save_checkpoint(path, {"a": torch.ones(3), "step": 1})

    def fsync(descriptor):
        raise FULL

    def save():
        run.save_checkpoint(path, {"a": torch.zeros(3), "step": 2})

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(SystemExit) as end:
        cli.main(save)
    assert end.value.code == 2
    assert "no space left" in capsys.readouterr().err
    assert names_in(tmp_path) == [run.CHECKPOINT]
    assert run.load_checkpoint(path)["step"] == 1


def test_a_disk_that_fills_up_while_torch_saves(tmp_path):
    """torch.save itself would end in a RuntimeError, which looks like a bug of ours."""
    resource = pytest.importorskip("resource")
    path = tmp_path / run.CHECKPOINT
    run.save_checkpoint(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.save_checkpoint(path, {"a": torch.zeros(10 ** 6), "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == [run.CHECKPOINT]
    assert run.load_checkpoint(path)["step"] == 1


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in ("file/x", "missing/x", "folder"):
        with pytest.raises(UserError, match="cannot write"):
            files.write_atomic(tmp_path / place, b"")
    assert names_in(tmp_path) == ["file", "folder"]

# ---- the checkpoints -------------------------------------------------------------------------


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16,
          torch.int64, torch.int32, torch.uint8, torch.bool)


def nested_state():
    """Every kind of content and nesting that a checkpoint may have."""
    lr = torch.tensor(1e-3)
    pictures = torch.randn(2, 3, 4, 4)
    odd_tensors = [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.randn(4, 3).t(),
        pictures.to(memory_format=torch.channels_last),
        torch.ones(3).expand(2, 3),
        torch.nn.Parameter(torch.ones(2)).data,
    ]
    groups = [
        {"lr": lr, "betas": (0.9, 0.99), "params": [0, 1]},
        {"lr": lr, "params": []},
    ]
    return {
        "tensors": {str(d): torch.arange(6).to(d).view(2, 3) for d in DTYPES},
        "odd": odd_tensors,
        "groups": groups,
        0: {1: "one", "1": "text", -5: None},
        "": {"": torch.ones(1)},
        "a/b": torch.tensor(1.0),
        "a": {"b": torch.tensor(2.0), "b'": torch.tensor(3.0)},
        "numbers": [1, True, 0.1, 1e-300, float("inf"), float("nan"), 2 ** 70, -0.0],
        "empty": [{}, [], ()],
        "text": "ünï \"quoted\" / \n",
        "tensor": {"tensor": "tensor", "dict": [["list", 1]]},
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "python": random.getstate(),
    }


def test_nested_round_trip(tmp_path):
    path, state = tmp_path / "c.pt", nested_state()
    run.save_checkpoint(path, state)
    loaded = run.load_checkpoint(path)
    assert_same_state(state, loaded)
    random.setstate(loaded["python"])
    # What is loaded may be changed; the file stays as it is.
    loaded["tensors"]["torch.float32"].add_(1)
    assert_same_state(state, run.load_checkpoint(path))


class Training:
    """A small network under AdamW, with its own random numbers."""

    def __init__(self, lr):
        torch.manual_seed(0)
        first, last = torch.nn.Linear(5, 7), torch.nn.Linear(7, 2)
        self.model = torch.nn.Sequential(first, torch.nn.ReLU(), last)
        groups = [
            {"params": first.parameters()},
            {"params": last.parameters(), "weight_decay": 0.1},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), eps=1e-15)
        self.generator = torch.Generator().manual_seed(1)

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            x = torch.randn(16, 5, generator=self.generator)
            self.model(x).square().mean().backward()
            self.optimizer.step()

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def set_state(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_adamw_continues_bit_identically(lr, tmp_path):
    straight = Training(lr)
    straight.train(20)
    killed = Training(lr)
    killed.train(12)
    run.save_checkpoint(tmp_path / "c.pt", {**killed.state(), "step": 12})

    state = run.load_checkpoint(tmp_path / "c.pt")
    resumed = Training(lr)
    resumed.set_state(state)
    resumed.train(20 - state["step"])
    assert_same_state(straight.model.state_dict(), resumed.model.state_dict())
    assert_same_state(straight.optimizer.state_dict(), resumed.optimizer.state_dict())


def refusal(path):
    """The error with which loading a file ends; it is of one line and names the file."""
    with pytest.raises(UserError) as error:
        run.load_checkpoint(path)
    line = str(error.value)
    assert str(path) in line and "\n" not in line
    assert "--resume" in line, f"does not say what to do: {line}"
    return line


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    state = {"a": torch.randn(100), "step": 1}
    run.save_checkpoint(path, state)
    whole = path.read_bytes()
    cut = [whole[:length] for length in (0, 4, 40, len(whole) // 2, len(whole) - 1)]
    for damaged in (*cut, b"\xff" * 100, b"PK\x03\x04" + whole):
        path.write_bytes(damaged)
        refusal(path)
    # A byte after the end does no harm.
    path.write_bytes(whole + b"x")
    assert_same_state(run.load_checkpoint(path), state)


def test_a_flipped_byte_never_ends_in_a_traceback(tmp_path):
    """It is refused, or it hits a number or padding, which nobody can see."""
    path = tmp_path / "c.pt"
    run.save_checkpoint(path, {"a": torch.randn(3), "step": 1})
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 255
        path.write_bytes(damaged)
        try:
            run.load_checkpoint(path)
        except UserError:
            pass


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_foreign_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"
    files.write_safetensors(path, {"a": torch.ones(2)}, {"format": "pt"})
    assert "not a checkpoint of a run" in refusal(path)
    more_than_tensors = {"a": object()}, {"a": np.float32(1)}, {"a": Bomb()}
    for content in (torch.ones(2), [1, 2], *more_than_tensors):
        torch.save(content, path)
        refusal(path)
    assert not Path("exploded").exists(), "loading an untrusted file ran its code"
    for place in (tmp_path / "missing", tmp_path, path / "sub"):
        refusal(place)


def test_last_checkpoint(tmp_path):
    assert run.last_checkpoint(tmp_path) is None
    old = tmp_path / "checkpoint.safetensors"
    old.write_bytes(b"as earlier versions wrote it")
    words = "checkpoint.safetensors was written by an older version of mvd.*another --out"
    with pytest.raises(UserError, match=words):
        run.open_run(str(tmp_path), {}, True)
    with pytest.raises(UserError, match="already holds a run"):
        run.open_run(str(tmp_path), {}, False)
    run.save_checkpoint(tmp_path / run.CHECKPOINT, {"step": 3})
    assert run.last_checkpoint(tmp_path) == {"step": 3}


NEW, _, BEFORE = run.CHECKPOINTS


def save(folder, *steps):
    for step in steps:
        tensors = [torch.full((1000,), float(step)) for _ in range(4)]
        run.save_checkpoint(folder / run.CHECKPOINT, {"a": tensors, "step": step})


def damage(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def last_step(folder):
    """The step of the last checkpoint, all of whose numbers must be of that step."""
    state = run.last_checkpoint(folder)
    for tensor in state["a"]:
        assert (tensor == state["step"]).all(), "the checkpoint mixes two steps"
    return state["step"]


def test_the_last_two_checkpoints_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert names_in(tmp_path) == [BEFORE, run.CHECKPOINT]
    steps = [run.load_checkpoint(tmp_path / name)["step"] for name in names_in(tmp_path)]
    assert steps == [2, 3]
    (tmp_path / run.CHECKPOINT).unlink()
    assert last_step(tmp_path) == 2


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path):
    save(tmp_path, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_step(tmp_path) == 2
    damage(tmp_path / run.CHECKPOINT)
    with pytest.warns(UserWarning, match=f"{run.CHECKPOINT} cannot .* on from {BEFORE}") as all_:
        assert last_step(tmp_path) == 1
    assert len(all_) == 1 and "\n" not in str(all_[0].message)
    damage(tmp_path / BEFORE)
    with pytest.raises(UserError, match=f"{run.CHECKPOINT} is missing, damaged"):
        run.last_checkpoint(tmp_path)
    (tmp_path / BEFORE).unlink()
    with pytest.raises(UserError, match=f"{run.CHECKPOINT} is missing, damaged"):
        run.last_checkpoint(tmp_path)


def test_a_full_disk_keeps_both_checkpoints(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)

    def fsync(descriptor):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(OSError):
            save(tmp_path, 3)
    assert names_in(tmp_path) == [BEFORE, run.CHECKPOINT]
    assert last_step(tmp_path) == 2
    save(tmp_path, 3)
    damage(tmp_path / run.CHECKPOINT)
    with pytest.warns(UserWarning):
        assert last_step(tmp_path) == 2


# The moments at which a kill may come: before and after each of these calls of `save_checkpoint`.
CALLS = ["fsync", "replace", "replace", "replace"]
MOMENTS = [(call, after) for call in range(len(CALLS)) for after in (False, True)]


def save_and_die(folder, step, call, after):
    """Save in a forked process that is killed before or after call number `call` of CALLS."""
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        return
    try:
        made = []
        for name in set(CALLS):
            def call_or_die(*arguments, name=name, function=getattr(os, name)):
                made.append(name)
                now = len(made) == call + 1
                if now and not after:
                    die()
                function(*arguments)
                if now:
                    die()

            setattr(os, name, call_or_die)
        save(folder, step)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("call, after", MOMENTS)
def test_a_kill_at_any_moment_of_saving_loses_nothing(call, after, damaged, tmp_path):
    """Nor does it if the last checkpoint was damaged and the run went on from the one before."""
    run.open_run(str(tmp_path), {}, False)
    save(tmp_path, 1, 2)
    if damaged:
        damage(tmp_path / run.CHECKPOINT)
    save_and_die(tmp_path, 3, call, after)
    complete = (call, after) >= (1, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert last_step(tmp_path) == (3 if complete else 1 if damaged else 2)
    # The next kill may come as soon as the run goes on. Then there may be one call less.
    run.open_run(str(tmp_path), {}, True)
    assert not list(tmp_path.glob(".*")), "what a killed write left behind is still there"
    save_and_die(tmp_path, 4, min(call, 2), after)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert last_step(tmp_path) == (4 if complete else 1 if damaged else 2)
    save(tmp_path, 5)
    assert last_step(tmp_path) == 5
    assert set(names_in(tmp_path)) >= {BEFORE, run.CHECKPOINT} and NEW not in names_in(tmp_path)


WRITER = """
import sys
import torch
from mvd.tools import run
for step in range(10 ** 9):
    full = torch.full((100_000,), float(step))
    run.save_checkpoint(sys.argv[1], {"a": [full.clone() for _ in range(4)], "step": step})
    run.log(sys.argv[2], step=step)
"""


def test_killed_while_writing_checkpoints(tmp_path):
    """SIGKILL at any moment leaves a whole checkpoint: all its numbers are of one step."""
    path, log = tmp_path / run.CHECKPOINT, tmp_path / "log.jsonl"
    command = [sys.executable, "-c", WRITER, path, log]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        while not log.exists() and process.poll() is None:
            time.sleep(0.02)
        for wait in np.random.default_rng(0).uniform(0, 0.02, 15):
            # What is found while the process is stopped is what a kill would leave.
            process.send_signal(signal.SIGSTOP)
            last_step(tmp_path)
            process.send_signal(signal.SIGCONT)
            time.sleep(wait)
    finally:
        process.kill()
        process.wait()
    last = last_step(tmp_path)
    assert last > 0
    logged = steps_of(log)
    assert logged == list(range(len(logged)))
    assert last - len(logged) in (-1, 0), "the log and the checkpoint disagree"


def test_a_number_that_is_not_finite_stops_a_run(tmp_path):
    run.check_finite(tmp_path, 7, "try less", loss=0.0, gradient=1e30)
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="step 7, whose loss is .*no checkpoint yet; try less"):
            run.check_finite(tmp_path, 7, "try less", loss=number)
    run.save_checkpoint(tmp_path / run.CHECKPOINT, {"step": 5})
    with pytest.raises(UserError, match="gradient is nan; the last good state is in .*checkpoint"):
        run.check_finite(tmp_path, 7, "try less", loss=1.0, gradient=math.nan)
