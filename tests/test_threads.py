"""How threads wait: beside other programs they sleep, on a quiet machine they spin."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvd.tools import threads

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def waiting(monkeypatch):
    """waiting(others, cores) is OMP_WAIT_POLICY after the choice, None if there is none."""
    def waiting(others, cores):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setattr(threads, "others_at_work", lambda: others)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        threads.choose_how_to_wait()
        return os.environ.get("OMP_WAIT_POLICY")

    return waiting


@pytest.mark.parametrize(
    "others, cores, policy",
    [(0, 2, None), (1, 2, "passive"), (2, 2, "passive"), (1, 8, None), (2, 8, "passive")])
def test_threads_sleep_beside_others(waiting, others, cores, policy):
    assert waiting(others, cores) == policy


def test_what_the_user_says_counts(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(threads, "others_at_work", lambda: 99)
    threads.choose_how_to_wait()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_others_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "PAUSE", 0)
    file = tmp_path / "loadavg"
    file.write_text("0.31 0.22 0.15 3/211 4711\n")
    assert threads.others_at_work(file) == 2, "this thread is not another"
    assert threads.others_at_work(tmp_path / "nothing") == 0


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="only Linux says it")
def test_a_busy_program_is_seen():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert threads.others_at_work() >= 1, "a program at work was not seen"
    finally:
        busy.kill()
        busy.wait()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "distill.py", "dreambooth.py"])
def test_every_script_imports_mvd_before_torch(script):
    lines = (REPOSITORY / script).read_text().splitlines()
    first = [line for line in lines if line.startswith(("import mvd", "import torch", "from mvd"))]
    assert first[0].startswith("import mvd"), f"{script} imports torch before mvd"
