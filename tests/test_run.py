"""Runs end whole: folders, files and checkpoints under mistakes, kills and full disks."""
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd.tools import cli, files, run
from mvd.tools.errors import UserError

REPOSITORY = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------- the run's folder


def test_slug():
    assert run.slug("A bulldog, wearing a crown!") == "a-bulldog-wearing-a-crown"
    assert run.slug("Café ../../etc/passwd") == "cafe-etc-passwd"
    for text in ("", "狗", "...", "-" * 90, "x" * 200, "é" * 61, ("ab " * 40), "\udcff"):
        slug = run.slug(text)
        assert 1 <= len(slug) <= 60 and slug.isascii() and slug == slug.lower() and slug.strip("-") == slug


def test_open_run_never_overwrites(tmp_path):
    default = tmp_path / "runs" / "a-dog"
    config = {"prompt": "a dog", "steps": 5, "betas": (0.9, 0.99)}
    first = run.open_run(None, config, False, default)
    assert first == default and json.loads((first / "config.json").read_text()) == {**config, "betas": [0.9, 0.99]}
    assert (first / "progress").is_dir()
    second = run.open_run(None, {**config, "steps": 6}, False, default)
    third = run.open_run(None, config, False, default)
    assert (second.name, third.name) == ("a-dog-2", "a-dog-3")
    assert json.loads((first / "config.json").read_text())["steps"] == 5

    named = run.open_run(str(tmp_path / "mine"), config, False, default)
    assert named == tmp_path / "mine"
    with pytest.raises(UserError, match="--resume"):
        run.open_run(str(named), config, False, default)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_text("")              # a folder that holds no run is fine
    run.open_run(str(tmp_path / "pictures"), config, False, default)
    assert (tmp_path / "pictures" / "cat.jpg").exists()


def test_resume_wants_the_same_settings(tmp_path):
    default, config = tmp_path / "a-dog", {"prompt": "a dog", "steps": 5, "betas": (0.9, 0.99), "device": "cuda"}
    with pytest.raises(UserError, match="no run to resume"):
        run.open_run(None, config, True, default)
    assert not default.exists()
    run.open_run(None, config, False, default)
    (default / ".checkpoint.safetensors.123.tmp").write_text("half")
    assert run.open_run(None, {**config, "device": "cpu"}, True, default) == default
    assert json.loads((default / "config.json").read_text())["device"] == "cpu"
    assert not list(default.glob(".*"))                             # what a killed write left behind is gone
    with pytest.raises(UserError, match="steps = 5, now it is 6"):
        run.open_run(None, {**config, "steps": 6}, True, default)
    assert json.loads((default / "config.json").read_text())["steps"] == 5
    assert run.open_run(None, {**config, "steps": 6}, True, default, may_change=["steps"]) == default
    with pytest.raises(UserError, match="seed = nothing, now it is 1"):
        run.open_run(str(default), {**config, "steps": 6, "seed": 1}, True)


def test_resume_finds_the_latest_run_with_these_settings(tmp_path):
    default = tmp_path / "a-dog"
    for seed in (0, 1, 1, 2):
        run.open_run(None, {"seed": seed}, False, default)
    found = [run.open_run(None, {"seed": seed}, True, default).name for seed in (0, 1, 2)]
    assert found == ["a-dog", "a-dog-3", "a-dog-4"]
    with pytest.raises(UserError, match="seed = 2, now it is 3"):
        run.open_run(None, {"seed": 3}, True, default)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
def test_resume_with_a_damaged_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        run.open_run(str(tmp_path), {"a": 1}, True)
    assert (tmp_path / "config.json").read_text() == text


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "sub", tmp_path / "file" / "sub" / "sub"):
        with pytest.raises(UserError, match="cannot"):
            run.open_run(str(place), {}, False)
    with pytest.raises(UserError, match="cannot"):
        run.open_run(None, {}, False, tmp_path / "file" / "a-dog")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(UserError, match="cannot"):
        run.open_run(None, {}, False, tmp_path / "dangling" / "a-dog")


def test_make_folder(tmp_path):
    for _ in range(2):
        run.make_folder(tmp_path / "a" / "b" / "picture.png")
    assert (tmp_path / "a" / "b").is_dir() and not (tmp_path / "a" / "b" / "picture.png").exists()
    run.make_folder("picture.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        run.make_folder(tmp_path / "file" / "picture.png")


def test_log(tmp_path):
    path = tmp_path / "log.jsonl"
    run.truncate_log(path, 3)                                       # no log yet
    for step in range(6):
        run.log(path, step=step, loss=torch.tensor(step / 3), lr=np.float32(0.5))
        assert run.read_log(path)[-1] == {"step": step, "loss": torch.tensor(step / 3).item(), "lr": 0.5}
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in run.read_log(path)] == [0, 1, 2, 3, 4, 5]
    run.truncate_log(path, 4)
    run.log(path, step=4, loss=9)
    assert [row["step"] for row in run.read_log(path)] == [0, 1, 2, 3, 4] and run.read_log(path)[-1]["loss"] == 9
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        run.read_log(path)

# ---------------------------------------------------------------------------------------------------- atomic files


def test_write_atomic(tmp_path):
    path = tmp_path / "result"
    files.write_atomic(path, b"one")
    files.write_atomic(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two" and [p.name for p in tmp_path.iterdir()] == ["result"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()         # readable like any other file


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_failed_write_leaves_the_earlier_file(error, tmp_path):
    files.write_atomic(tmp_path / "result", b"earlier")

    def writer(file):
        file.write(b"half of it")
        raise error
    with pytest.raises(type(error)):
        files.write_atomic(tmp_path / "result", writer)
    assert [p.name for p in tmp_path.iterdir()] == ["result"] and (tmp_path / "result").read_bytes() == b"earlier"


def test_full_disk(tmp_path, monkeypatch, capsys):
    """The disk is found full only when the data are flushed to it."""
    run.save_checkpoint(tmp_path / "checkpoint.safetensors", {"a": torch.ones(3), "step": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: run.save_checkpoint(tmp_path / "checkpoint.safetensors", {"a": torch.zeros(3), "step": 2}))
    assert end.value.code == 2 and "no space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert run.load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 1


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "x", tmp_path / "missing" / "x", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot write"):
            files.write_atomic(place, b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]

# ---------------------------------------------------------------------------------------------------- checkpoints


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


def test_nested_round_trip(tmp_path):
    shared = torch.tensor(1e-3)
    state = {
        "tensors": {dtype: torch.arange(6).to(getattr(torch, dtype)).view(2, 3) for dtype in
                    ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")},
        "odd": [torch.tensor(3.5), torch.zeros(0, 4), torch.randn(4, 3).t(), torch.randn(2, 3, 4, 4).to(
            memory_format=torch.channels_last), torch.ones(3).expand(2, 3), torch.nn.Parameter(torch.ones(2)).data],
        "groups": [{"lr": shared, "betas": (0.9, 0.99), "params": [0, 1]}, {"lr": shared, "params": []}],
        0: {1: "one", "1": "text", -5: None}, "": {"": torch.ones(1)},
        "a/b": torch.tensor(1.0), "a": {"b": torch.tensor(2.0), "b'": torch.tensor(3.0)},
        "numbers": [1, True, 0.1, 1e-300, float("inf"), float("nan"), 2 ** 70, -0.0],
        "empty": [{}, [], ()], "text": "ünï \"quoted\" / \n", "tensor": {"tensor": "tensor", "dict": [["list", 1]]},
        "generator": torch.Generator().manual_seed(3).get_state(), "python": random.getstate(),
    }
    run.save_checkpoint(tmp_path / "c.safetensors", state)
    loaded = run.load_checkpoint(tmp_path / "c.safetensors")
    assert_same(state, loaded)
    random.setstate(loaded["python"])
    loaded["tensors"]["float32"].add_(1)                            # loaded tensors are ours to change
    assert_same(state, run.load_checkpoint(tmp_path / "c.safetensors"))


def test_numpy_numbers_come_back_as_numbers(tmp_path):
    numbers = {"a": np.float32(0.1), "b": np.int64(2 ** 62), "c": np.bool_(True)}
    run.save_checkpoint(tmp_path / "c.safetensors", numbers)
    loaded = run.load_checkpoint(tmp_path / "c.safetensors")
    assert loaded == {"a": float(np.float32(0.1)), "b": 2 ** 62, "c": True} and type(loaded["b"]) is int
    with pytest.raises(TypeError):
        run.save_checkpoint(tmp_path / "c.safetensors", {"a": object()})
    assert run.load_checkpoint(tmp_path / "c.safetensors") == loaded


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_adamw_continues_bit_identically(lr, tmp_path):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.1}]
        return model, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), eps=1e-15), torch.Generator().manual_seed(1)

    def train(model, optimizer, generator, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(16, 5, generator=generator)).square().mean().backward()
            optimizer.step()

    straight = start()
    train(*straight, 20)
    model, optimizer, generator = start()
    train(model, optimizer, generator, 12)
    run.save_checkpoint(tmp_path / "c.safetensors", {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                                     "generator": generator.get_state(), "step": 12})
    state = run.load_checkpoint(tmp_path / "c.safetensors")
    model, optimizer, generator = start()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    train(model, optimizer, generator, 20 - state["step"])
    assert_same(straight[0].state_dict(), model.state_dict())
    assert_same(straight[1].state_dict(), optimizer.state_dict())


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "c.safetensors"
    run.save_checkpoint(path, {"a": torch.randn(100), "step": 1})
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:40], whole[:-1], whole + b"x", b"\xff" * 100, b"PK\x03\x04" + whole):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="c.safetensors"):
            run.load_checkpoint(path)
    files.write_safetensors(path, {"a": torch.ones(2)}, {"format": "pt"})
    with pytest.raises(UserError, match="c.safetensors is not a checkpoint"):
        run.load_checkpoint(path)
    for place in (tmp_path / "missing", tmp_path, path / "sub"):
        with pytest.raises(UserError):
            run.load_checkpoint(place)


def test_killed_while_writing_checkpoints(tmp_path):
    """SIGKILL at any moment leaves a checkpoint that loads, whole: all its numbers are of one step."""
    script = """if True:
        import sys, torch
        from mvd.tools import run
        for step in range(10 ** 9):
            run.save_checkpoint(sys.argv[1], {"a": [torch.full((100_000,), float(step))] * 4, "step": step})
            run.log(sys.argv[2], step=step)
    """
    path, log = tmp_path / "checkpoint.safetensors", tmp_path / "log.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, path, log], cwd=REPOSITORY)
    try:
        while not log.exists() and process.poll() is None:
            time.sleep(0.02)
        for wait in np.random.default_rng(0).uniform(0, 0.02, 15):
            process.send_signal(signal.SIGSTOP)                     # what is found now is what a kill would leave
            state = run.load_checkpoint(path)
            assert all((tensor == state["step"]).all() for tensor in state["a"])
            process.send_signal(signal.SIGCONT)
            time.sleep(wait)
    finally:
        process.kill()
        process.wait()
    state = run.load_checkpoint(path)
    assert all((tensor == state["step"]).all() for tensor in state["a"]) and state["step"] > 0
    steps = [row["step"] for row in run.read_log(log)]
    assert steps == list(range(len(steps))) and state["step"] - len(steps) in (-1, 0)
