"""How torch's threads wait for each other.

OpenMP, which torch uses on a CPU, lets a thread that waits for another one spin. Beside other
programs the threads spin on cores that the thread they wait for has to share, and a step takes five
to ten times as long. A thread that sleeps at once wakes late: a step on quiet cores takes a fifth
longer. So a thread spins for a moment, then sleeps. OpenMP asks only once, when torch is imported:
so mvd/__init__.py imports this first, and every script mvd first.
"""
import os


def spin_then_sleep():
    """Waiting threads spin for a moment, then sleep, unless the environment says otherwise."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        # Turns of an empty loop.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
