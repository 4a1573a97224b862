"""Tests marked `gpu` are skipped without CUDA, those marked `slow` unless `-m` says something.

    python -m pytest -q tests -m slow

Those marked exercise(N) grade exercise N of `python -m mvd.exercises`: `-m exercise` runs all of
them, `--exercise N` those of one.

The scripts of the root folder can be imported.
"""
import os
import signal
import sys
import warnings
from pathlib import Path

# The tests, and the processes that they start, see the same whatever is set outside: another
# model hub or none, proxies, warnings that are hidden or errors, a place among torchrun's ranks.
OUTSIDE = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PYTHONWARNINGS", "PYTHONOPTIMIZE",
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)
for name in list(os.environ):
    if name.upper() in OUTSIDE or name.startswith(("HF_", "TORCHELASTIC_")):
        del os.environ[name]
# In the background of a shell Ctrl-C is ignored, also by what is started there.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Threads that wait leave the cores to others. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# What these helpers assert is checked even where Python leaves assertions out (-O).
pytest.register_assert_rewrite("layouts", "rendered", "scripts", "small_judge", "toy_data")
sys.path.insert(0, str(Path(__file__).parent.parent))
# The tensors of the tests are small: several threads would only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--exercise", type=int, metavar="N", help="run only the tests that grade exercise N")


def pytest_configure(config):
    if sys.warnoptions:  # of PYTHONWARNINGS
        sys.warnoptions.clear()
        warnings.resetwarnings()
        warnings.simplefilter("ignore", ResourceWarning)
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes long, and runs only with -m slow")
    config.addinivalue_line("markers", "exercise(N, ...): grades these of mvd.exercises")
    # As if the command line said so.
    config.option.markexpr = config.option.markexpr or "not slow"


def grades(item):
    """The numbers of the exercises that a test grades."""
    return [number for mark in item.iter_markers("exercise") for number in mark.args]


def pytest_collection_modifyitems(config, items):
    number = config.getoption("exercise")
    if number is not None:
        items[:] = [item for item in items if number in grades(item)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    """Start the trainings that test_processes.py waits for, to run beside the other tests."""
    for item in session.items:
        if item.module.__name__ == "test_processes" and not session.config.option.collectonly:
            item.module.start_trainings()
            break
