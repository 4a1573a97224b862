"""Trainings in processes of their own, for test_processes.py: `python processes.py FOLDER`.

It has imported everything once and starts each training by fork, which takes no time. (pytest
itself cannot: its threads would not survive.) The results are in the folders.
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

import toy_data
import train
from mvd import MVDream, fit
from mvd.tools import cli, run
from test_parallel import free_port
from test_train import blank

SHORT = """--preset nano --device cpu --copies 1 --vae-batch 4 --sample-every 9 --save-every 2
    --workers 0 --size 32""".split()


def start(folder, out, *flags, **variables):
    """Begin a training into folder / out in a new process; returns its number."""
    process = os.fork()
    if process:
        return process
    os.environ.update(variables)
    status = 1
    try:
        places = ["--data", str(folder / "data"), "--out", str(folder / out)]
        cli.main(lambda: train.main([*places, *SHORT, *flags]))
        status = 0
    finally:
        os._exit(status)


def finish(*processes):
    """Wait for processes; their exit statuses, of a killed one the negative signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def wait_for_rows(process, log, count):
    """Wait until a run has written so many rows of its log, or has ended."""
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if len(run.read_log(log)) >= count:
            return
        time.sleep(0.001)


def killed_thrice(folder):
    """A whole run, and one that is killed at three random moments and goes on each time.

    A moment is some time after a row of its log, of which it writes 16: a computer is not equally
    fast all the time.
    """
    steps = ["--vae-steps", "6", "--steps", "10", "--batch", "1"]
    assert finish(start(folder, "whole", *steps)) == [0]
    moments = random.Random(0)
    resume, statuses = [], []
    for count in sorted(moments.sample(range(1, 13), 3)):
        process = start(folder, "killed", *steps, *resume)
        wait_for_rows(process, folder / "killed" / "log.jsonl", count)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        statuses += finish(process)
        resume = ["--resume"]
    assert -signal.SIGKILL in statuses, "each run had ended before it was killed"
    assert finish(start(folder, "killed", *steps, *resume)) == [0]


def split(folder):
    """20 steps by one process, by two with half the batch each, and by one in two parts."""
    trained = str(folder / "whole" / "model.safetensors")
    steps = ["--autoencoder", trained, "--steps", "20"]
    still = ["--autoencoder", trained, "--steps", "1", "--lr", "0"]
    assert finish(start(folder, "start", *still, "--batch", "4")) == [0]
    assert finish(start(folder, "one", *steps, "--batch", "4")) == [0]
    assert finish(start(folder, "parts", *steps, "--batch", "2", "--accumulate", "2")) == [0]
    port = str(free_port())
    ranks = []
    for rank in "01":
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        ranks.append(start(
            folder, "two", *steps, "--batch", "2", MASTER_ADDR="localhost", MASTER_PORT=port,
            **place,
        ))
    assert finish(*ranks) == [0, 0]


if __name__ == "__main__":
    fit.LOG_EVERY = 1
    MVDream.sample = blank
    here = Path(sys.argv[1])
    toy_data.write(here / "data", size=32, views=8)
    killed_thrice(here)
    split(here)
