"""How torch's threads wait for each other.

OpenMP, which torch uses on a CPU, lets a thread that waits for another one spin. Beside other
programs the threads spin on cores that the thread they wait for has to share, and a step takes five
to ten times as long. Another program may come at any time, but OpenMP asks only once, when torch is
imported: so mvd/__init__.py imports this first, and every script mvd first.
"""
import os


def sleep_while_waiting():
    """Let threads sleep while they wait, unless the environment says what they do."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
