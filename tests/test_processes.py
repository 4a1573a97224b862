"""train.py in several processes, and killed from outside: the results are the same."""
import atexit
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mvd.tools import run

TESTS = Path(__file__).parent


def stop(process):
    """End a process and what it has started, if the tests end early."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def start_trainings():
    """Start the trainings of processes.py: (Popen, their folder).

    conftest.py calls it before the first test, so that they run beside all others.
    """
    folder = tempfile.TemporaryDirectory(prefix="mvd-processes-")
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [sys.executable, str(TESTS / "processes.py"), folder.name]
    with open(Path(folder.name) / "output.txt", "w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    atexit.register(stop, process)
    return process, folder


@pytest.fixture(scope="module")
def folder():
    """The trainings of processes.py."""
    process, folder = start_trainings()
    path = Path(folder.name)
    assert process.wait(timeout=240) == 0, (path / "output.txt").read_text()[-6000:]
    yield path
    folder.cleanup()


def rows(folder, phase="unet"):
    return [row for row in run.read_log(folder / "log.jsonl") if row.get("phase") == phase]


def test_killed_three_times_a_run_ends_with_the_same_bits(folder):
    model = (folder / "whole" / "model.safetensors").read_bytes()
    killed = (folder / "killed" / "model.safetensors").read_bytes()
    assert killed == model, "a run that was killed and went on made something else"
    steps = [row["step"] for row in rows(folder / "killed")]
    assert steps == [row["step"] for row in rows(folder / "whole")], "the log has other rows"


@pytest.mark.parametrize("out", ["two", "parts"])
def test_a_batch_in_two_halves_trains_the_same(folder, out):
    """By two processes, or one after the other; losses to 1e-5, weights to 1e-4 of their change."""
    whole, halves = rows(folder / "one"), rows(folder / out)
    assert [row["step"] for row in halves] == [row["step"] for row in whole]
    for ours, theirs in zip(halves, whole):
        for name in ("multiview", "single"):
            assert (name in ours) == (name in theirs), "the halves have a batch of another kind"
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    start, end, other = [
        run.last_checkpoint(folder / name)["theta"] for name in ("start", "one", out)
    ]
    change = torch.linalg.vector_norm(end - start)
    apart = torch.linalg.vector_norm(other - end)
    assert change > 0.1, "20 steps have changed nothing"
    assert apart < 1e-4 * change, f"the weights are {apart / change:.1e} of their change apart"
