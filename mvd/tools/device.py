"""Where the work runs: device, number format, random numbers, steps captured as CUDA graphs."""
import contextlib
import ctypes
import functools
import importlib.util
import operator
import os
import shutil
import sys
import sysconfig
import threading
from pathlib import Path

import torch

from .errors import UserError

# ---- device and number format ----------------------------------------------------------------


def choose_device(name):
    """Return the torch.device of that name: "cpu", "cuda", "cuda:1", "mps".

    "auto" is the first GPU of CUDA, else the CPU. A Mac's GPU must be named: nobody has tried it,
    it has no float64, and its AdamW takes steps that it is told to skip. Raises UserError if the
    device is not available.
    """
    available = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available.append("cpu")
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        name = available[0]
    # CUDA needs to know which one.
    if f"{name}:0" in available:
        name = f"{name}:0"
    if name not in available:
        raise UserError(f"there is no device {name!r} here; there is: {', '.join(available)}")
    device = torch.device(name)
    if device.type == "cuda":
        # The current device's generator is the one that `random_state` saves.
        torch.cuda.set_device(device)
    return device


def choose_dtype(name, device):
    """Return the torch.dtype of that name, in which a model computes (`Rounded`, where it learns).

    "auto" is bfloat16 on CUDA, float16 on a card that only emulates bfloat16 (all before Ampere),
    else float32. float16 is the more exact of the two, but its numbers end at 65504; the largest
    that the shipped model meets is 160.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if ampere else torch.float16


def tune_cuda(*, tf32, search):
    """Make CUDA faster.

    tf32: float32 matrix products, such as the field's, may round their inputs to TF32. search:
    cuDNN tries all its algorithms for each convolution that it meets, for steps whose shapes never
    change. On an H100 that takes 10 to 20 s. Training then is 8% faster; the steps of a
    distillation, which compute no gradients of weights, are not.
    """
    torch.backends.cudnn.benchmark = search
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


@contextlib.contextmanager
def without_cudnn_search():
    """Within this context cuDNN tries no algorithms, even after `tune_cuda`.

    For what runs once and is large: some algorithms take tens of gigabytes when they are tried.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def can_compile(device):
    """Return whether torch.compile works here: on CUDA, with Triton and what Triton needs.

    Triton needs a C compiler and Python's header files.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    if not importlib.util.find_spec("triton"):
        return False
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return False
    schemes = (sysconfig.get_default_scheme(), "posix_prefix")
    folders = [sysconfig.get_path("include", scheme) for scheme in schemes]
    return any(Path(folder, "Python.h").exists() for folder in folders)


# What the errors say that have no type of their own, in small letters, of a GPU and of a computer:
# CUDA, cuBLAS, cuDNN, NCCL, Triton and MPS; PyTorch on Linux and on Windows.
GPU_IS_FULL = ("out of memory", "alloc_failed", "allocation_failed")
COMPUTER_IS_FULL = ("can't allocate memory", "not enough memory")


def without_memory(error):
    """Return what has no memory left, "the GPU" or "the computer", if an exception says so.

    Else None. The exceptions that led to it count, too: PyTorch may fail once more when it leaves
    the capture of a graph, or a compiler.
    """
    while error is not None:
        words = str(error).lower()
        runtime = isinstance(error, RuntimeError)
        if isinstance(error, MemoryError):
            return "the computer"
        if runtime and any(s in words for s in COMPUTER_IS_FULL):
            return "the computer"
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return "the GPU"
        if runtime and any(s in words for s in GPU_IS_FULL):
            return "the GPU"
        error = error.__cause__ or error.__context__
    return None


def keep_memory():
    """Tell the C library to keep freed memory instead of returning it to the system.

    Otherwise it returns memory after every operation, and the page faults of asking for it
    again are half of the field's time on a CPU. Does nothing without glibc (that is, off Linux).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        # Use the heap up to 1 GiB, and do not shrink it.
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)

# ---- random numbers: seeds, and what a checkpoint saves and restores --------------------------

# A bit of room below the largest int64, in which tensors hold seeds.
LARGEST_SEED = 2**63 - 2


def check_seed(seed):
    """Return a seed as an int. Raises UserError for anything but 0, 1, ..., LARGEST_SEED.

    Whole numbers of NumPy and PyTorch are some; True and 1.0 are none.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number <= LARGEST_SEED:
        raise UserError(f"a seed is a whole number from 0 to {LARGEST_SEED}, not {seed!r}")
    return number


def random_state():
    """Return the states of PyTorch's generators, of the CPU and of a GPU if there is one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state):
    """Continues the random numbers from a `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def load_optimizer(optimizer, state):
    """Restores an optimizer from its state_dict, except for its settings.

    Some settings belong to the device (capturable), which may be another one now.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**state, "param_groups": groups})

# ---- CUDA graphs -----------------------------------------------------------------------------

# So many calls of a GraphedStep run eagerly before it is captured; one will do if nothing learns.
EAGER_CALLS = 3
# Held while a graph is captured, and by a thread that draws random numbers beside such steps: while
# a graph is captured, nobody else can.
UNDISTURBED = threading.Lock()


class GraphedStep:
    """A step that is captured as a CUDA graph, so that launching its kernels costs nothing.

    step: a function of tensors that trains or predicts, and returns a tensor, a tuple of them or
    None. Its shapes must not change, and it must never wait for the device.

    On CUDA the first `eager` calls run as they are, as the allocator, the compiler and the
    optimizer's state need. Then the step is captured, or later, if another thread holds
    UNDISTURBED. From then on a call copies its arguments to where the graph reads them, replays the
    graph, and returns the same tensor with new numbers; the step's Python code does not run any
    more. On other devices every call runs the step itself. Call it within `side_stream`, since the
    default stream cannot be captured.

    pool: steps that never run at the same time may share their memory: they get the same
    `torch.cuda.graph_pool_handle()`.
    """

    def __init__(self, step, device, pool=None, eager=EAGER_CALLS):
        self.step = step
        self.pool = pool
        self.eager = eager
        self.cuda = device.type == "cuda"
        self.calls = 0
        self.graph = None

    def __call__(self, *arguments):
        self.calls += 1
        if self.graph is None:
            ready = self.cuda and self.calls > self.eager
            if not ready or not UNDISTURBED.acquire(blocking=False):
                return self.step(*arguments)
            try:
                self.capture(arguments)
            finally:
                UNDISTURBED.release()
        for read, given in zip(self.inputs, arguments):
            read.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result

    def capture(self, arguments):
        """Record the step as a graph, with copies of these tensors as what it reads."""
        self.inputs = [argument.clone() for argument in arguments]
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # Other threads (NCCL's, the one that pins batches) may go on while this one captures.
        mode = "thread_local"
        with torch.cuda.graph(
            self.graph, pool=self.pool, stream=stream, capture_error_mode=mode
        ):
            self.result = self.step(*self.inputs)


# The number of the stream of a second thread, see `stream_of`.
THREAD = 3


@functools.cache
def stream_of(device, number=0):
    """Return the stream of `side_stream`, 0 or THREAD, or one of `side_by_side`, 1 and 2.

    They are always the same, since cuBLAS keeps a workspace for every stream that it has seen.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream(device, number=0):
    """On CUDA, work within this context runs on a stream of its own.

    It runs after all work that was launched before, and before all that is launched later. number:
    THREAD in a second thread.
    """
    if device.type != "cuda":
        yield
        return
    stream = stream_of(device, number)
    before = torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def side_by_side(function, inputs):
    """Return [function(x) for x in inputs]. On CUDA two calls run at a time, and so do their ways
    back: while the one waits for memory, the other computes.

    function: of a tensor, and returns a tensor.
    """
    device = inputs[0].device
    if device.type != "cuda" or len(inputs) == 1:
        return [function(x) for x in inputs]
    here = torch.cuda.current_stream(device)
    streams = [stream_of(device, 1), stream_of(device, 2)]
    for stream in streams:
        stream.wait_stream(here)
    results = []
    for number, x in enumerate(inputs):
        stream = streams[number % 2]
        with torch.cuda.stream(stream):
            result = function(x)
        # Else the memory of x could be used anew before this stream has read it, and that of the
        # result before the caller's stream has.
        x.record_stream(stream)
        result.record_stream(here)
        results.append(result)
    for stream in streams:
        here.wait_stream(stream)
    return results
