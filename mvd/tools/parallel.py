"""Several processes that train one model, as `torchrun` starts them.

    torchrun --nproc-per-node=8 train.py ...

Every process, a rank, has a device of its own and computes the gradients of its part of the
batch; `average` makes them the same on all. DistributedDataParallel would do that during
`backward`, but it does not see torch.autograd.grad; the gradients here lie in one flat tensor, for
which one all-reduce per step is fast enough.

Tensors on CUDA go through NCCL. What the processes agree on goes through Gloo on the CPU, so that
nobody waits for a GPU. In a process that was started without torchrun every function does what
one process needs, which is mostly nothing.
"""
import contextlib
import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .device import choose_device
from .errors import UserError

# How long a rank waits for the others: they may compile, encode the data or draw samples.
PATIENCE = datetime.timedelta(minutes=30)

# ---- who is who ------------------------------------------------------------------------------


def ranks():
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Return the number of this process, 0..ranks() - 1."""
    return int(os.environ.get("RANK", 0)) if ranks() > 1 else 0


def is_first():
    """Return whether this process writes the files and prints."""
    return rank() == 0


def restarted():
    """Return whether torchrun started these processes anew, after one had died."""
    return _restarts() > 0


def in_first_life(name, value):
    """The bool that the first process gave under this name before torchrun ever restarted it.

    Without a restart it is `value`.
    """
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return value
    store, _, _ = _store()
    if restarted():
        return store.check([name])
    if is_first() and value:
        store.set(name, "")
    return value


@functools.cache
def _store():
    """(What all processes of this run can write to, this one's number, their count).

    torchrun keeps it when it restarts the processes.
    """
    return next(rendezvous("env://", timeout=PATIENCE))


def _restarts():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

# ---- begin and end ---------------------------------------------------------------------------


def start(device_name):
    """Join the other processes; return this one's torch.device.

    device_name: "auto" and "cuda" are a GPU of its own for every process of a computer; else as
    for `choose_device`. Raises UserError.
    """
    if ranks() == 1:
        return choose_device(device_name)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    try:
        store, number, count = _store()
        # The addresses of dead processes may still be in it.
        store = dist.PrefixStore(f"life {_restarts()}", store)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    # A missing variable, or a computer that does not answer.
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"this process cannot join the {ranks()} of this run ({error}); start it with "
            "torchrun, and on several computers see that they reach each other") from error
    sys.excepthook = end_with_traceback
    return together(lambda: own_device(device_name))


def end_with_traceback(kind, error, trace):
    """What Python does with an exception that nobody caught; then the process ends."""
    sys.__excepthook__(kind, error, trace)
    end(1)


def own_device(name):
    """Return the torch.device of one of several processes. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device {name} is for one process; name cuda, cpu or auto")
    local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if name == "cuda" and local >= found > 0:
        raise UserError(
            f"there are more processes than GPUs here, which are {found}; "
            f"use torchrun --nproc-per-node={found}, or --device cpu")
    return choose_device(f"cuda:{local}" if name == "cuda" else name)


def finish():
    """Leave the other processes. Call it when all of them have come to their end.

    Not with NCCL: it would wait for the CUDA graphs that hold its calls, for ever.
    """
    if dist.is_initialized() and not torch.cuda.is_initialized():
        dist.destroy_process_group()


def end(status):
    """End this process with an exit status; 0: just return, if that is possible.

    A process that has used NCCL ends here and now, without Python's last steps, since these wait
    as `finish` would.
    """
    if dist.is_initialized() and torch.cuda.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)

# ---- numbers ---------------------------------------------------------------------------------


def average(tensor):
    """Replace a tensor, float32, by its mean over all ranks.

    On CUDA it may be captured in a graph, once it has been called without. The sums have the
    same order on all ranks, so all get the same bits.
    """
    if ranks() == 1:
        return
    if tensor.is_cuda:
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
    else:
        with _everybody():
            dist.all_reduce(tensor)
        tensor /= ranks()


def worst(code):
    """Return the largest of an integer over all ranks, such as the signal that came, or 0."""
    return -_least(-code)


def _least(number):
    if ranks() == 1:
        return number
    box = torch.tensor(number)
    with _everybody():
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
    return box.item()


@contextlib.contextmanager
def _everybody():
    """Within this context a rank that is missing is a UserError.

    Its own message says more. And if this process was told to end, too, that comes first: Python
    calls a signal's handler as soon as the wait is over.
    """
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "another process of this run has ended or does not answer; see what it printed, then "
            "go on with the same command and --resume") from error

def gathered(items):
    """The items of all ranks' lists in one list, in every rank."""
    if ranks() == 1:
        return items
    lists = [None] * ranks()
    with _everybody():
        dist.all_gather_object(lists, items)
    return [item for one in lists for item in one]

# ---- functions -------------------------------------------------------------------------------


def together(function):
    """Call function() in every process; return its result, here, when all have succeeded.

    If it fails anywhere, every process ends: the first that failed raises its error, so that one
    message is printed, and the others exit with status 2.
    """
    result = problem = None
    try:
        result = function()
    except Exception as error:
        problem = error
    failed = _least(ranks() if problem is None else rank())
    if failed == rank():
        raise problem
    if failed < ranks():
        raise SystemExit(2)
    return result


def first(function):
    """Call function() in the first process only; return its result in all of them.

    The others wait. Errors end all processes, as in `together`.
    """
    box = [together(lambda: function() if is_first() else None)]
    if ranks() > 1:
        with _everybody():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]
