"""Where the work runs: the device, its number format, its random numbers, and steps captured as CUDA graphs."""
import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from .errors import UserError


def choose_device(name):
    """"auto" -> the best there is; else "cpu", "cuda", "cuda:1", "mps". Raises UserError if it is not there."""
    there = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), *["mps"] * torch.backends.mps.is_available(), "cpu"]
    name = there[0] if name == "auto" else name
    name = f"{name}:0" if f"{name}:0" in there else name                         # CUDA wants to know which
    if name not in there:
        raise UserError(f"there is no device {name!r} here; there is: {', '.join(there)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)                                            # its generator is the one that is saved
    return device


def choose_dtype(name, device):
    """"auto" -> bfloat16 on CUDA, else float32; or the dtype of that name."""
    return getattr(torch, name if name != "auto" else "bfloat16" if device.type == "cuda" else "float32")


def tune(tf32):
    """For steps whose shapes never change, on CUDA: cuDNN may try its algorithms. tf32: matrix products that are left in float32, such
    as the field's, may round to TF32."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


@contextlib.contextmanager
def untuned():
    """Within this context cuDNN tries no algorithms, whatever `tune` has said: for what runs once and is large, since some of them take
    tens of gigabytes for that."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def can_compile(device):
    """Whether torch.compile works here: on CUDA, with Triton, and what Triton needs, a C compiler and Python's header files."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0) or not importlib.util.find_spec("triton"):
        return False
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return any(map(shutil.which, compilers)) and any(
        Path(sysconfig.get_path("include", scheme), "Python.h").exists() for scheme in (sysconfig.get_default_scheme(), "posix_prefix"))


def random_state():
    """The state of PyTorch's own generators, of the CPU and of CUDA if there is one, to be saved in a checkpoint."""
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})}


def set_random_state(state):
    """Go on where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def load_optimizer(optimizer, state):
    """Give an optimizer its state_dict back. The settings, some of which are the device's, stay this one's: it may be another."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})


EAGER_CALLS = 3                                  # of a GraphedStep, before it is captured


class GraphedStep:
    """A step (a function of tensors that trains or predicts, and returns a tensor or None) whose launches cost nothing.

    On CUDA the first EAGER_CALLS calls run as they are, as the allocator, the compiler and the optimizer's state need; then the step is
    captured as a CUDA graph, and every later call copies its arguments to where the graph reads them, replays it, and returns the same
    tensor with new numbers; the step's Python runs no more. It must keep its shapes and never wait for the device. Elsewhere: just the
    step. Call it within `side_stream`, since the default stream cannot be captured.
    """

    def __init__(self, step, device):
        self.step, self.calls, self.cuda, self.graph = step, 0, device.type == "cuda", None

    def __call__(self, *arguments):
        self.calls += 1
        if not self.cuda or self.calls <= EAGER_CALLS:
            return self.step(*arguments)
        if self.graph is None:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), [argument.clone() for argument in arguments]
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.result = self.step(*self.inputs)
        for read, given in zip(self.inputs, arguments):
            read.copy_(given)
        self.graph.replay()
        return self.result


@functools.cache
def own_stream(device):
    """The stream of `side_stream`. There is one a device, since cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream(device):
    """On CUDA, work within this context runs on a stream of its own: after all that came before, and before all that follows."""
    if device.type != "cuda":
        yield
        return
    stream, before = own_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def keep_memory():
    """Tell the C library (glibc, so Linux) to keep freed memory instead of giving it back to the system after every operation: the
    page faults of asking for it again are half of the field's time on a CPU. Elsewhere: nothing happens."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)                                            # M_MMAP_THRESHOLD: use the heap up to 1 GiB
            libc.mallopt(-1, 2 ** 31 - 1)                                        # M_TRIM_THRESHOLD: do not shrink it
