"""What is decided before torch is imported: threads that wait sleep, and Ctrl-C is quiet."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mvd.tools import threads

REPOSITORY = Path(__file__).parent.parent
COMMANDS = ["metrics", "data", "toyworld", "bench", "tour", "exercises", "tools.convert"]
SCRIPTS = ["train.py", "sample.py", "distill.py", "dreambooth.py"]


def test_threads_sleep_while_they_wait(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    threads.spin_then_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert 5000 <= int(os.environ["GOMP_SPINCOUNT"]) <= 20000, "they spin too long, or hardly"


def test_what_the_user_says_counts(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    threads.spin_then_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.fixture
def start(tmp_path):
    """start(*arguments) starts a command that imports a stand-in for torch.

    It prints how threads wait by then, and waits for what comes.
    """
    lines = "import os, time", "print(os.environ.get('OMP_WAIT_POLICY'), flush=True)"
    (tmp_path / "torch.py").write_text("\n".join([*lines, "time.sleep(60)"]))
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    variables.pop("OMP_WAIT_POLICY", None)
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=REPOSITORY, env=variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize("script", [*SCRIPTS, *COMMANDS])
def test_a_command_while_it_imports_torch(script, start):
    """The threads' way to wait is set by then, and Ctrl-C ends it without a traceback."""
    process = start(*([script] if script in SCRIPTS else ["-m", f"mvd.{script}"]))
    waiting = process.stdout.readline().strip()
    assert waiting == "passive", f"{script} imports torch before mvd"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
