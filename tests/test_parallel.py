"""Two processes that agree on numbers, functions, errors and signals.

The processes are forks of this one, which start at once. They do what torchrun's do: the same
variables, Gloo, and the end of a script, `cli.main`.
"""
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mvd.tools import cli, parallel, run
from mvd.tools.errors import UserError

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads")

# ---- processes -------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become_script(function, variables, folder):
    """In a forked process: run function() as a script, and end. Never returns."""
    status = 1
    try:
        os.environ.update(variables)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        cli.main(function)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Script:
    """A function as a script in so many processes."""

    def __init__(self, function, count, folder, **more):
        self.folder = folder
        self.count = count
        self.pids = []
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        of_all = {"WORLD_SIZE": str(count), **place, **more}
        for rank in range(count):
            variables = {}
            if count > 1:
                variables = dict(of_all, RANK=str(rank), LOCAL_RANK=str(rank))
            (folder / str(rank)).mkdir()
            pid = os.fork()
            if pid == 0:
                become_script(function, variables, folder / str(rank))
            self.pids.append(pid)

    def wait_for(self, name, seconds=50):
        """Until every process has made the file of that name in its folder."""
        deadline = time.time() + seconds
        while not all((self.folder / str(r) / name).exists() for r in range(self.count)):
            assert time.time() < deadline, self.said("err")
            time.sleep(0.005)

    def send(self, number, *ranks):
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def end(self, seconds=50):
        """The exit statuses; minus the signal's number where one killed the process."""
        statuses, deadline, late = [], time.time() + seconds, False
        for pid in self.pids:
            found = 0
            while not found:
                found, status = os.waitpid(pid, os.WNOHANG)
                if not found and time.time() > deadline:
                    late = True
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.005)
            assert not late, f"it hangs; {self.said('err')}"
            statuses.append(os.waitstatus_to_exitcode(status))
        return statuses

    def said(self, stream):
        """What all processes printed to out or err, a text per process."""
        return [(self.folder / str(r) / stream).read_text() for r in range(self.count)]


@pytest.fixture
def script(tmp_path):
    """script(function, count) starts processes, each in a folder of its own.

    More arguments are variables of their environment.
    """
    started = []

    def script(function, count=2, **more):
        folder = tmp_path / str(len(started))
        folder.mkdir()

        def in_its_folder():
            os.chdir(folder / str(parallel.rank()))
            function()

        started.append(Script(in_its_folder, count, folder, **more))
        return started[-1]

    return script


def mark(name, text=""):
    """Make a file at once, with its text in it."""
    Path("half").write_text(str(text))
    os.replace("half", name)

# ---- numbers ---------------------------------------------------------------------------------


def test_one_process_has_nobody_to_wait_for():
    assert (parallel.rank(), parallel.ranks(), parallel.is_first()) == (0, 1, True)
    assert parallel.start("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized(), "one process needs no group"
    tensor = torch.arange(3.0)
    parallel.average(tensor)
    assert tensor.tolist() == [0, 1, 2]
    assert [parallel.worst(code) for code in (0, 2, 15)] == [0, 2, 15]
    assert parallel.together(lambda: "a") == "a"
    assert parallel.first(lambda: "b") == "b"
    for call in (parallel.together, parallel.first):
        with pytest.raises(UserError, match="no data"):
            call(no_data)
    parallel.finish()


def no_data():
    raise UserError("there is no data")


def test_a_restart_is_noticed(monkeypatch):
    for count, restarted in (("0", False), ("1", True), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert parallel.restarted() == restarted
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert not parallel.restarted()


@dataclass
class Settings:
    steps: int = cli.setting(5, "steps", min=1)


@pytest.mark.parametrize("flags, status, stream", [("--steps 0", 2, "err"), ("--help", 0, "out")])
def test_one_process_of_several_says_what_the_command_line_is(flags, status, stream, script):
    two = script(lambda: cli.parse(Settings, flags.split()))
    assert two.end() == [status, status]
    first, second = two.said(stream)
    assert "--steps" in first and second == ""


def test_two_processes_agree(script):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 1000, generator=generator)

    def check():
        assert parallel.start("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
        rank = parallel.rank()
        assert (parallel.ranks(), parallel.is_first()) == (2, rank == 0)

        mine = parts[rank].clone()
        parallel.average(mine)
        torch.testing.assert_close(mine, parts.mean(0))
        torch.save(mine, "mean.pt")

        codes = [parallel.worst(code) for code in (0, rank, 1 - rank, 15 * rank, 2)]
        assert codes == [0, 1, 1, 15, 2]
        assert parallel.together(lambda: f"of {rank}") == f"of {rank}"
        calls = []
        assert parallel.first(lambda: calls.append(rank) or {"by": rank}) == {"by": 0}
        assert calls == ([0] if rank == 0 else []), "others than the first called it"
        warnings.warn("seen by both")
        parallel.finish()
        parallel.finish()

    two = script(check)
    assert two.end() == [0, 0], two.said("err")
    means = [(two.folder / rank / "mean.pt").read_bytes() for rank in "01"]
    assert means[0] == means[1], "the ranks have other bits"
    assert two.said("err") == ["warning: seen by both\n", ""]


def test_processes_started_anew_do_not_look_for_the_dead(script):
    """torchrun keeps the store through which they find each other."""
    def meet():
        parallel.start("cpu")
        assert parallel.worst(parallel.rank()) == 1
        mark("met")

    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    torchruns = dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none")
    for life in range(3):
        two = script(
            meet, MASTER_PORT=str(port), TORCHELASTIC_RESTART_COUNT=str(life), **torchruns)
        assert two.end() == [0, 0], two.said("err")
    del store

# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, failing", [
    ("together", (1,)),
    ("together", (0, 1)),
    ("first", (0,)),
])
def test_a_users_mistake_ends_all_with_one_line(name, failing, script):
    def check():
        parallel.start("cpu")

        def read():
            if parallel.rank() in failing:
                raise UserError(f"process {parallel.rank()} cannot read")

        getattr(parallel, name)(read)
        print("went on")

    two = script(check)
    assert two.end() == [2, 2]
    lines = [""] * 2
    lines[failing[0]] = f"error: process {failing[0]} cannot read\n"
    assert two.said("err") == lines
    assert two.said("out") == ["", ""]


def test_a_device_that_one_process_lacks_ends_all_with_one_line(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    two = script(lambda: parallel.start("cuda"))
    assert two.end() == [2, 2]
    first, second = two.said("err")
    assert first == "" and "--nproc-per-node=1" in second and second.count("\n") == 1
    named = script(lambda: parallel.start("cuda:0"))
    assert named.end() == [2, 2]
    first, second = named.said("err")
    assert "name cuda, cpu or auto" in first and second == ""


def test_a_bug_in_one_process_ends_all_with_its_traceback(script):
    def check():
        parallel.start("cpu")
        parallel.together(lambda: [1, 2][2 * parallel.rank()])

    two = script(check)
    assert two.end() == [2, 1]
    first, second = two.said("err")
    assert first == "" and "IndexError" in second


@pytest.mark.parametrize("death", ["bug", "kill"])
def test_the_others_end_when_one_is_gone(death, script):
    """Wherever it happens, without waiting half an hour."""
    def check():
        parallel.start("cpu")
        if parallel.rank() == 1:
            parallel.worst(0)
            if death == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a bug")
        while True:
            parallel.worst(0)

    two = script(check)
    assert two.end(10) == [2, 1 if death == "bug" else -signal.SIGKILL]
    line = two.said("err")[0]
    assert line.startswith("error: another process") and line.count("\n") == 1


def test_a_process_that_torchrun_did_not_start_is_told(script):
    def check():
        del os.environ["MASTER_ADDR"]
        parallel.start("cpu")

    one_of_two = script(check)
    assert one_of_two.end() == [2, 2]
    assert all("torchrun" in text and text.count("\n") == 1 for text in one_of_two.said("err"))

# ---- signals ---------------------------------------------------------------------------------


def endless():
    """A loop as the scripts have it: it saves at the step at which a signal was noticed."""
    parallel.start("cpu")
    with cli.interrupt_flag() as interrupted:
        for step in range(10 ** 6):
            time.sleep(0.001)
            code = parallel.worst(interrupted.code)
            if step == 5:
                mark("ready")
            if code:
                mark("saved", step)
                # Long enough for a second signal.
                time.sleep(0.1)
                raise cli.interruption(code)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_at_the_same_step(count, number, status, script):
    """Also if one process gets it alone, and if it comes again."""
    loop = script(endless, count)
    loop.wait_for("ready")
    loop.send(number, count - 1)
    loop.wait_for("saved")
    if number == signal.SIGTERM:
        loop.send(number, *range(count))
    assert loop.end() == [status] * count, loop.said("err")
    assert loop.said("err") == [""] * count
    steps = {(loop.folder / str(r) / "saved").read_text() for r in range(count)}
    assert len(steps) == 1, "they saved different steps"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_loop_ends_quietly(number, status, script):
    """While one process reads data and the other one waits for it."""
    def check():
        parallel.start("cpu")
        mark("ready")
        parallel.first(lambda: time.sleep(60))

    two = script(check)
    two.wait_for("ready")
    time.sleep(0.1)
    two.send(number, 1, 0)
    assert two.end(10) == [status, status], two.said("err")
    assert two.said("err") == ["", ""]


def test_a_second_ctrl_c_interrupts_at_once(script):
    def check():
        with cli.interrupt_flag() as interrupted:
            mark("ready")
            interrupted.wait()
            mark("noticed")
            time.sleep(60)

    one = script(check, 1)
    one.wait_for("ready")
    one.send(signal.SIGINT, 0)
    one.wait_for("noticed")
    one.send(signal.SIGINT, 0)
    assert one.end(5) == [130]

# ---- torchrun --------------------------------------------------------------------------------

def test_what_was_so_before_a_restart(monkeypatch):
    """torchrun's store tells the later lives of a process what the first one found."""
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert [parallel.in_first_life("a", value) for value in (True, False)] == [True, False]
    store = torch.distributed.HashStore()
    monkeypatch.setattr(parallel, "_store", lambda: (store, 0, 1))
    for life in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", life)
        assert parallel.in_first_life("a", life == "0"), f"forgotten in life {life}"
        assert not parallel.in_first_life("b", life != "0"), f"made up in life {life}"


# Sums random numbers, each a function of the step and the rank. In its first life the second
# process dies at step 12; "endless" goes on until a signal comes.
TRAINING = """
import os, signal, sys, time
from pathlib import Path
import torch
from mvd.tools import cli, parallel, run

def main():
    out, steps = Path(sys.argv[1]), 10 ** 6 if sys.argv[2] == "endless" else 30
    parallel.start("cpu")
    state = {"step": 0, "sum": torch.zeros(1000)}
    if parallel.restarted():
        state = run.last_checkpoint(out) or state
        (out / f"from{parallel.rank()}").write_text(str(state["step"]))
    with cli.interrupt_flag() as interrupted:
        for step in range(state["step"], steps):
            if sys.argv[2] == "die" and step == 12 and parallel.rank() and not parallel.restarted():
                os.kill(os.getpid(), signal.SIGKILL)
            torch.manual_seed(1000 * step + parallel.rank())
            number = torch.randn(1000)
            parallel.average(number)
            state = {"step": step + 1, "sum": state["sum"] + number}
            code = parallel.worst(interrupted.code)
            if (step + 1) % 5 == 0 and steps == 30 or code:
                parallel.first(lambda: run.save_checkpoint(out / run.CHECKPOINT, state))
            if step == 20:
                (out / f"ready{parallel.rank()}").touch()
            if code:
                (out / f"end{parallel.rank()}").write_text(f"{step + 1}")
                raise cli.interruption(code)
    parallel.finish()

cli.main(main)
"""


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(out, what) starts TRAINING in two processes, restarted once if one dies."""
    program = tmp_path / "training.py"
    program.write_text(TRAINING)
    started = []

    def torchrun(out, what):
        (tmp_path / out).mkdir()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "--max-restarts=1", program, tmp_path / out, what,
        ]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        started.append(process)
        return process

    yield torchrun
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_torchrun_goes_on_after_a_dead_process(torchrun, tmp_path):
    results = []
    for what in ("undisturbed", "die"):
        process = torchrun(what, what)
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        results.append(run.last_checkpoint(tmp_path / what))
    resumed = [(tmp_path / "die" / f"from{rank}").read_text() for rank in range(2)]
    assert resumed == ["10", "10"]
    assert results[0]["step"] == results[1]["step"] == 30
    assert torch.equal(results[0]["sum"], results[1]["sum"])


@pytest.mark.slow
def test_torchruns_sigterm_ends_in_a_checkpoint(torchrun, tmp_path):
    process = torchrun("out", "endless")
    ready = [tmp_path / "out" / f"ready{rank}" for rank in range(2)]
    while not all(path.exists() for path in ready):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)
    steps = [int((tmp_path / "out" / f"end{rank}").read_text()) for rank in range(2)]
    assert steps[0] == steps[1] == run.last_checkpoint(tmp_path / "out")["step"]
