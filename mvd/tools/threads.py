"""How torch's threads wait for each other.

OpenMP, which torch uses on a CPU, lets a thread that waits for another one spin: it wakes at once,
but takes a core. On a quiet machine that is a fifth faster. Beside other programs the threads spin
on cores that the thread they wait for has to share, and a step takes ten times as long. OpenMP asks
once, when torch is imported: so mvd/__init__.py imports this first, and every script mvd first.
"""
import os
import time
from pathlib import Path

LOOKS = 5  # a program that is at work is seen every time
PAUSE = 0.005  # seconds between two of them


def others_at_work(path="/proc/loadavg"):
    """How many threads of other programs want a core; 0 where the system does not say (Linux does).

    The file says "0.31 0.22 0.15 3/211 4711" when 3 of 211 threads want one, this one among them.
    """
    wanting = []
    for _ in range(LOOKS):
        try:
            running, _, _ = Path(path).read_text().split()[3].partition("/")
        except OSError:
            return 0
        wanting.append(int(running) - 1)
        time.sleep(PAUSE)
    return max(0, min(wanting))


def choose_how_to_wait():
    """Let threads sleep while they wait, if others want a quarter of the cores or more."""
    if 4 * others_at_work() >= (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
