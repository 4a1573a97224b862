"""Compile the steps of a distillation ahead, beside the run that is going to take them.

torch.compile works in one thread of Python: more than a minute for the UNet, and as long again for
the rest of a step. But it keeps what it has made on disk. So two processes compile the two halves
of a step, with weights that nobody has filled in, while the run takes uncompiled steps. When both
have compiled the first stage, the run calls torch.compile itself and finds the result on disk; when
it comes to the second stage, likewise.

The moment depends on how busy the computer is: one more reason why a seed does not repeat bit for
bit on a GPU.
"""
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import torch

from . import presets, sds
from .model import MVDream, Uninitialised, compile_network
from .tools.device import side_stream, tune_cuda

COMMAND = [sys.executable, "-m", "mvd.ahead"]
# Free memory of the GPU, in bytes, that the two processes and the run need; and cores.
MEMORY = 12 << 30
CORES = 8


def has_room(device):
    """Can this computer compile beside a run?"""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < CORES:
        return False
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free >= MEMORY


@contextlib.contextmanager
def workers(wanted, s, config, context, progress):
    """Within this context two processes compile for a run: [Popen], see `ready`.

    There is none if they are not `wanted`, or if the computer has no room for them: then the run
    compiles alone. s: DistillSettings; config: ModelConfig; context as of `sds.Distillation`;
    progress: the share of the run that is done.
    """
    stages = sds.stages(s)
    if progress >= s.fine_from:
        stages = stages[1:]
    job = dict(
        stages=stages,
        settings=asdict(s),
        config=presets.to_header(config),
        shape=context.shape,
        dtype=str(context.dtype).removeprefix("torch."),
        device=str(context.device),
    )
    processes = []
    try:
        if wanted and has_room(context.device):
            for half in HALVES:
                processes.append(start(dict(job, half=half)))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        wait(processes)


def start(job):
    """Start a process that reads this job: Popen.

    It ends when the run ends; Ctrl-C in the terminal reaches the run only.
    """
    process = subprocess.Popen(
        COMMAND,
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    return process


def ready(processes, last):
    """Has each process compiled its first stage (`last`: its last one), or ended?"""
    if last:
        return all(process.poll() is not None for process in processes)
    return all(select.select([process.stdout], [], [], 0)[0] for process in processes)


def wait(processes):
    """Wait until all is compiled: some seconds, as a rule, and a few minutes at most."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=180)


# ---- in a process of its own -----------------------------------------------------------------

def compile_encoding(distillation):
    """The first half of a step and its way back: render and encode."""
    vae = distillation.model.vae.to_empty(device=distillation.device)
    compile_network(vae.encoder)
    images, _, penalty = distillation.rendering(distillation.draw())
    latents = distillation.encode(images)
    (latents.sum() + penalty).backward()


def compile_unet(distillation):
    """The second half: what the UNet says of the latents."""
    model, device = distillation.model, distillation.device
    compile_network(model.unet.to_empty(device=device))
    side = model.config.size // model.latent_factor
    shape = (distillation.stage.sets, distillation.s.views, model.config.unet.in_channels)
    latents = torch.zeros(*shape, side, side, device=device)
    distillation.ask(latents, distillation.draw())


HALVES = {"encoding": compile_encoding, "unet": compile_unet}


def compile_stages(report, half, stages, settings, config, shape, dtype, device):
    """Compile half of a step for each stage, and call `report` after each.

    half: a name in HALVES; shape, dtype, device: of the context; the others as `workers` makes
    them, which is JSON.
    """
    device, dtype = torch.device(device), getattr(torch, dtype)
    tune_cuda(tf32=dtype != torch.float32)
    if device.type == "cuda":
        # Should it need more than a third of that, this process is to fail, and not the run.
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / 3 / total), device)
    with torch.device("meta"), Uninitialised():
        model = MVDream(presets.from_header(config)).to(dtype).requires_grad_(False).eval()
    context = torch.zeros(shape, dtype=dtype, device=device)
    distillation = sds.Distillation(sds.DistillSettings(**settings), model, context)
    with side_stream(device):
        for stage in stages:
            distillation.begin(sds.Stage(*stage), compiled=True)
            HALVES[half](distillation)
            report()


def main():
    """A process: reads a job, compiles, and writes a byte after each stage.

    Its errors are thrown away: the run then compiles that half itself, and shows its own error. It
    ends when its stdin closes, which happens however the run ends.
    """
    done = os.dup(1)
    os.dup2(2, 1)  # stderr leads nowhere
    job = json.loads(sys.stdin.buffer.readline())

    def end_with_the_run():
        os.read(0, 1)  # returns when nobody can write any more
        os._exit(1)

    threading.Thread(target=end_with_the_run, daemon=True).start()
    compile_stages(lambda: os.write(done, b"."), **job)


if __name__ == "__main__":
    main()
