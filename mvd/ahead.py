"""Compile the steps of a distillation ahead, beside the run that is going to take them.

torch.compile works in one thread of Python: more than a minute for the UNet, and as long again for
the rest of a step. But it keeps what it has made on disk. So several processes compile a share of a
step each, with weights that nobody has filled in, while the run takes uncompiled steps. Whenever
one of them has finished, the run calls torch.compile for the same share and finds the result on
disk. When all shares are there, its compiled steps begin.

The moments of all this depend on how busy the computer is, and each draws random numbers: one more
reason why a seed does not repeat bit for bit on a GPU.
"""
import contextlib
import copy
import json
import os
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from . import presets, sds
from .model import MVDream, Uninitialised, compile_network, read_config
from .tools.device import side_stream, tune_cuda, without_cudnn_search

COMMAND = [sys.executable, "-m", "mvd.ahead"]
# Memory of the GPU, in bytes, that a process and the run need. The run's is for its graph and for
# what it takes over beside it.
MEMORY_OF_WORKER = 3 << 30
MEMORY_OF_RUN = 8 << 30
# CUDA itself takes so much of a process's memory.
CONTEXT = 1 << 29
# PyTorch translates what a process has compiled into the GPU's language in so many more.
TRANSLATORS = 4
# A process that has not ended by then, in seconds, hangs.
PATIENCE = 600


class Worker(NamedTuple):
    """A process that compiles one share of a step, stage after stage."""
    process: subprocess.Popen
    share: tuple    # (part of the step, number, of how many), as of `shares`
    left: list      # Stages of which it has not been heard yet; `collect` takes them off


# ---- the run's side --------------------------------------------------------------------------

def shares(processes):
    """How so many processes share out a step: [(part, number, of how many)].

    Empty if they are too few for its three parts.
    """
    if processes >= 7:
        sizes = dict(field=1, encoder=2, unet=4)
    elif processes >= 3:
        sizes = dict(field=1, encoder=1, unet=1)
    else:
        sizes = {}
    return [(part, number, size) for part, size in sizes.items() for number in range(size)]


def spare_memory(device):
    """Bytes of the GPU that are free, and that a run does not need. Nothing is loaded yet."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - MEMORY_OF_RUN)


def room(device):
    """How many processes can compile beside a run on this computer? Each needs a core or two."""
    if sys.platform != "linux":
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(spare_memory(device) // MEMORY_OF_WORKER, cores // 2)


@contextlib.contextmanager
def workers(wanted, s, dtype, device):
    """Within this context processes compile for a run: [Worker], see `collect`.

    There is none if they are not `wanted`, or if the computer has no room for them: then the run
    compiles alone. s: DistillSettings; dtype, device: of the model.
    """
    planned = shares(room(device)) if wanted else []
    started = []
    try:
        if planned:
            job = dict(
                settings=asdict(s),
                config=presets.to_header(read_config(s.model)),
                dtype=str(dtype).removeprefix("torch."),
                device=str(device),
                # Should it need more than that, this process is to fail, and not the run.
                memory=spare_memory(device) // len(planned) - CONTEXT,
            )
        with contextlib.suppress(OSError):  # what is not started the run compiles itself
            for share in planned:
                started.append(Worker(start(dict(job, share=share)), share, sds.stages(s)))
        yield started
    finally:
        for process, _, _ in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.stdin.close()
            process.stdout.close()
            process.wait()


def start(job):
    """Start a process that reads this job: Popen.

    It ends when the run ends; Ctrl-C in the terminal reaches the run only.
    """
    process = subprocess.Popen(
        COMMAND,
        cwd=Path(__file__).parents[1],
        env=dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS=str(TRANSLATORS)),
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        process.stdin.write(json.dumps(job).encode() + b"\n")
    return process


def collect(started, stage):
    """The shares of this stage that have been compiled since the last call.

    Or given up: a process that has ended says so of all that it has left.
    """
    news = []
    for process, share, left in started:
        while stage in left and select.select([process.stdout], [], [], 0)[0]:
            os.read(process.stdout.fileno(), 1)
            if left.pop(0) == stage:
                news.append(share)
    return news


def take_over(distillation, share):
    """Make what a worker has compiled, or has given up, of this stage the run's own."""
    # A copy, since `begin` would change the step that the run still takes.
    apart = copy.copy(distillation)
    apart.begin(distillation.stage, compiled=True)
    compile_share(apart, *share)
    distillation.optimizer.zero_grad(set_to_none=True)  # the field is to learn nothing from it
    torch.cuda.empty_cache()


def catch_up(distillation, started):
    """Take over what has been compiled since the last call: is the whole stage compiled now?"""
    stage = distillation.stage
    for share in collect(started, stage):
        take_over(distillation, share)
    return not any(stage in worker.left for worker in started)


# ---- both sides: how a part is compiled ------------------------------------------------------

def unfilled(function, *arguments):
    """What a function would return, of the same shapes and layouts, but nothing is computed."""
    def allocate(x):
        return torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device=x.device, requires_grad=x.requires_grad
        )

    with FakeTensorMode(allow_non_fake_inputs=True):
        result = function(*arguments)
    return tree_map_only(torch.Tensor, allocate, result)


@contextlib.contextmanager
def only(network, number, count):
    """Within this context a compiled network runs a share of its pieces, and no others.

    These are, in the order of its calls, the pieces `number`, `number + count`, and so on. Where
    gradients are wanted, as in the encoder, a piece returns one tensor, and its way back is run at
    once, so that it is compiled, too.
    """
    programs = {name: getattr(network, name) for name in network.PIECES}
    called = []

    def choose(name, *arguments):
        called.append(name)
        if (len(called) - 1) % count != number:
            return unfilled(getattr(type(network), name), network, *arguments)
        result = programs[name](*arguments)
        if torch.is_grad_enabled():
            result.sum().backward()
            result = result.detach().requires_grad_()
        return result

    for name in programs:
        setattr(network, name, partial(choose, name))
    try:
        yield
    finally:
        for name, program in programs.items():
            setattr(network, name, program)


def compile_share(distillation, part, number, count):
    """Run a share of one part of a step, compiled, and its way back."""
    draws = distillation.draw()
    model = distillation.model
    if part == "field":
        images, _, penalty = distillation.rendering(draws)
        (images.sum() + penalty).backward()
    elif part == "encoder":
        images, _, _ = unfilled(distillation.render_images, draws)
        with only(model.vae.encoder, number, count):
            distillation.encode(images)
    else:
        side = model.config.size // model.latent_factor
        shape = (distillation.stage.sets, distillation.s.views, model.config.unet.in_channels)
        latents = torch.zeros(*shape, side, side, device=distillation.device)
        with only(model.unet, number, count):
            distillation.ask(latents, draws)


# ---- in a process of its own -----------------------------------------------------------------

def compile_stages(report, share, memory, settings, config, dtype, device):
    """Compile a share of a step for each stage, and call `report` after each.

    share: as of `shares`; memory: bytes; the others as `workers` makes them, which is JSON.
    """
    device, dtype = torch.device(device), getattr(torch, dtype)
    tune_cuda(tf32=dtype != torch.float32)
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
    with torch.device("meta"), Uninitialised():
        model = MVDream(presets.from_header(config)).to(dtype).requires_grad_(False).eval()
    part, _, _ = share
    if part == "encoder":
        compile_network(model.vae.to_empty(device=device).encoder)
    if part == "unet":
        compile_network(model.unet.to_empty(device=device))
    text = model.config.text
    context = torch.zeros(2, text.context_length, text.width, dtype=dtype, device=device)
    s = sds.DistillSettings(**settings)
    distillation = sds.Distillation(s, model, context)
    with side_stream(device), without_cudnn_search():  # what runs once is not worth it
        for stage in sds.stages(s):
            distillation.begin(stage, compiled=True)
            compile_share(distillation, *share)
            report()


def main():
    """A process: reads a job, compiles, and writes a byte after each stage.

    Its errors are thrown away: the run then compiles that share itself, and shows its own error. It
    ends when its stdin closes, which happens however the run ends.
    """
    done = os.dup(1)
    os.dup2(2, 1)  # what is printed goes where errors go: nowhere
    signal.alarm(PATIENCE)  # ends it
    job = json.loads(sys.stdin.buffer.readline())

    def end_with_the_run():
        os.read(0, 1)  # returns when nobody can write any more
        os.killpg(0, signal.SIGKILL)  # this process, and what it has started

    threading.Thread(target=end_with_the_run, daemon=True).start()
    compile_stages(lambda: os.write(done, b"."), **job)


if __name__ == "__main__":
    main()
