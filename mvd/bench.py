"""How fast is every part, and how fast could it be?

    python -m mvd.bench                              # the tiny model, on whatever is here
    python -m mvd.bench --model sd21 --json          # the full size, random weights; one JSON
                                                     # object per line

A part's floor is the time that its arithmetic takes at the speed of a large matrix product, plus
that of its memory traffic at the speed of a copy; both speeds are measured first. Operations are
counted by PyTorch's FlopCounterMode. Bytes are those that the hash grid must move if nothing is
cached: eight corners of two float32 per level and sample, read once and, for the gradient, read
and written.

Milliseconds are medians. On CUDA every part is a captured graph, so launches cost nothing. With
--compile the networks and the rendering are fused by torch.compile, and the first call of a part
that needs them pays for that.
"""
import copy
import json
import time
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import cameras, model, presets, render, sds
from .model import MVDream
from .sds import DistillSettings
from .tools import cli
from .tools.cli import setting
from .tools.device import (
    EAGER_CALLS,
    GraphedStep,
    can_compile,
    choose_device,
    choose_dtype,
    side_stream,
    tune_cuda,
)

# The columns of the table: key of a row, heading, width, format.
COLUMNS = (
    ("ms", "ms", 8, ".2f"),
    ("floor_ms", "floor", 8, ".2f"),
    ("share", "share", 6, ".0%"),
    ("tflops", "TFLOP/s", 8, ".3g"),
    ("gb_per_s", "GB/s", 6, ".0f"),
    ("first_s", "first, s", 8, ".1f"),
    ("peak_gib", "GiB", 6, ".1f"),
)


@dataclass
class BenchSettings:
    """The flags."""
    model: str = setting(
        "tiny", "tiny, sd21 (random weights of the full size), or the path of a checkpoint"
    )
    device: str = setting("auto", "cuda, cpu, or mps (untested); auto: cuda, else cpu")
    dtype: str = setting(
        "auto",
        "of the model; auto: bfloat16 on cuda (float16 before Ampere), else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = setting(True, "fuse operations by torch.compile, on a GPU")
    json: bool = setting(False, "print one line of JSON per row instead of a table")


# ---- measuring -------------------------------------------------------------------------------

def wait_for(device):
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(function, device, seconds=1.0):
    """Call a function again and again for about so many seconds.

    Returns (median milliseconds per call, seconds of the first call, peak GiB of GPU memory).
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def timed(step):
        wait_for(device)
        begin = time.perf_counter()
        step()
        wait_for(device)
        return time.perf_counter() - begin

    times = []
    with side_stream(device):
        step = GraphedStep(function, device)
        first = timed(step)
        for _ in range(EAGER_CALLS if cuda else 1):  # until it is captured, or warm
            timed(step)
        begin = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < seconds:
            times.append(timed(step))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return 1000 * sorted(times)[len(times) // 2], first, peak


def speeds(device, dtype):
    """What the device can do: (operations per second of a large matrix product, bytes per second
    of a large copy)."""
    cuda = device.type == "cuda"
    side, size = (8192, 1 << 30) if cuda else (1024, 1 << 26)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    here, there = torch.ones(2, size // 4, device=device).unbind()
    product, _, _ = measure(lambda: a @ b, device)
    copy, _, _ = measure(lambda: there.copy_(here), device)
    return 2 * side**3 / (product / 1000), 2 * size / (copy / 1000)


# ---- what is measured ------------------------------------------------------------------------

def step_parts(s, distillation):
    """Whole steps, with and without shading: (name, function, bytes that it must move)."""
    for shading in (False, True):
        for stage in sds.stages(s):
            # A shallow copy: its own settings and stage, but the same field and optimizer.
            one = copy.copy(distillation)
            one.s = replace(s, shading=shading)
            one.begin(stage, s.compile)
            one.anneal(0.5)
            name = f"step, {s.views * stage.sets} views of {stage.size}²"
            yield name + (", shaded" if shading else ""), one.step, traffic(s, stage)


def traffic(s, stage):
    """Bytes that the hash grid moves in a step.

    Eight corners of two float32 per level and sample: read, and for the gradient read and written.
    """
    corners = s.levels * 8 * 2 * 4
    return 3 * corners * stage.budget


def field_part(s, distillation, stage):
    """The field alone, forward and backward, as one row of `parts`."""
    device = distillation.device
    c2w, fov = sds.draw_cameras(stage.sets, s.views, device)
    fov = fov[:, None].expand(stage.sets, s.views)
    origins, directions = cameras.rays(c2w, fov, stage.size)
    origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
    jitter, phase = render.draw_jitter(len(origins), device)
    render_rays = render.render_rays
    if s.compile:
        render_rays = torch.compile(render_rays, dynamic=False)

    def rendering():
        seen = render_rays(
            distillation.nerf,
            distillation.occupancy,
            origins,
            directions,
            origins.new_ones(3),
            budget=stage.budget,
            step=s.step_size,
            jitter=jitter,
            phase=phase,
        )
        seen.rgb.sum().backward()
        distillation.optimizer.zero_grad(set_to_none=True)
        return seen.rgb

    views = s.views * stage.sets
    name = f"field, {stage.budget} samples of {views} views of {stage.size}²"
    return name, rendering, traffic(s, stage)


def network_parts(m, views):
    """UNet and autoencoder, for one set of views."""
    device, size = m.device, m.config.size
    images = torch.rand(1, views, 3, size, size, device=device, requires_grad=True)
    with torch.no_grad():
        z = m.encode(2 * images - 1).float()  # [1, V, c, h, w]
        context = m.embed(["", ""])  # [2, L, D]
    x = torch.randn(2, *z.shape[1:], device=device)
    camera = torch.randn(2, views, 16, device=device)
    t = torch.full((2,), 500, device=device)

    @torch.no_grad()
    def unet():
        return m.unet(x, t, context, camera)

    def encode():
        loss = m.encode(2 * images - 1).float().square().sum()
        return torch.autograd.grad(loss, images)[0]

    @torch.no_grad()
    def decode():
        return m.decode(z)

    yield f"UNet, {2 * views} views ({views}, both halves of guidance)", unet, 0
    yield f"VAE, encoding {views} views of {size}² and its gradient", encode, 0
    yield f"VAE, decoding {views} views of {size}²", decode, 0


def parts(m, s):
    """All that is measured: (name, function, bytes that it must move).

    The whole steps come first, so that they pay for the compiler. m: MVDream; s: DistillSettings.
    """
    with torch.no_grad():
        context = m.embed([s.prompt, ""])
    distillation = sds.Distillation(s, m, context)
    for _ in range(3):
        distillation.occupancy.update(distillation.nerf.density, s.step_size, everywhere=True)
    yield from step_parts(s, distillation)
    for stage in sds.stages(s):
        yield field_part(s, distillation, stage)
    yield from network_parts(m, s.views)


def count_operations(m, s):
    """Floating point operations of each part, counted before anything is compiled."""
    counts = []
    for _, function, _ in parts(m, replace(s, compile=False)):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    return counts


def time_samples(m, prompt):
    """Seconds of three samples; the first one pays for compiling."""
    times = []
    for _ in range(3):
        begin = time.time()
        m.sample(prompt).cpu()
        times.append(time.time() - begin)
    return times


# ---- the command -----------------------------------------------------------------------------

def load(flags, device, dtype):
    """The model that the flags name, and a note if its weights are random."""
    random = flags.model == "sd21" or (flags.model == "tiny" and not model.TINY.exists())
    if not random:
        return MVDream.load(flags.model, device, dtype), []
    with torch.device(device):
        m = MVDream.random(flags.model)
    return m.to(dtype), ["the weights are random"]


def show(row, as_json):
    """Print one row, as soon as it is known."""
    if as_json:
        print(json.dumps(row), flush=True)
        return
    cells = []
    for key, _, width, form in COLUMNS:
        cells.append(f"{row[key]:{width}{form}}" if row.get(key) else f"{'-':>{width}}")
    print(f"{row['part']:<50} {' '.join(cells)}", flush=True)


def describe(device, dtype, flops_per_s, bytes_per_s, seconds):
    """A note on the machine and its measured speeds."""
    name = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return (
        f"{name}, {str(dtype).removeprefix('torch.')}, {flops_per_s / 1e12:.3g} TFLOP/s, "
        f"{bytes_per_s / 1e9:.3g} GB/s; the model was loaded after {seconds:.1f} s"
    )


def main(argv=None):
    """The command: a line for every part as it is measured, then notes."""
    flags = cli.parse(BenchSettings, argv, __doc__)
    begin = time.time()
    device = choose_device(flags.device)
    dtype = choose_dtype(flags.dtype, device)
    tune_cuda(tf32=dtype != torch.float32)  # as distill.py
    torch.manual_seed(0)
    m, notes = load(flags, device, dtype)
    compiled = flags.compile and can_compile(device)
    if flags.compile and not compiled:
        notes.append("nothing is compiled: that takes CUDA, Triton and a C compiler")
    prompt = " ".join(m.config.text.words[-2:]) or "a bulldog"  # words that the model knows
    _, changes = presets.settings_for("distill", m.config)
    s = replace(DistillSettings(prompt), **changes, compile=compiled)
    loaded = time.time() - begin
    flops_per_s, bytes_per_s = speeds(device, dtype)
    notes.append(describe(device, dtype, flops_per_s, bytes_per_s, loaded))

    counts = count_operations(m, s)
    if compiled:
        m.compile_networks()
    if not flags.json:
        headings = [f"{heading:>{width}}" for _, heading, width, _ in COLUMNS]
        print(f"{'part':<50} {' '.join(headings)}")
    for (part, function, moved), flops in zip(list(parts(m, s)), counts):
        try:
            ms, first, peak = measure(function, device)
        except torch.cuda.OutOfMemoryError:
            notes.append(f"{part}: not enough GPU memory")
            continue
        floor = 1000 * (flops / flops_per_s + moved / bytes_per_s)
        row = {"part": part, "ms": ms, "floor_ms": floor, "share": floor / ms}
        row.update(tflops=flops / ms / 1e9, gb_per_s=moved / ms / 1e6)
        row.update(first_s=first, peak_gib=peak)
        show(row, flags.json)
    times = time_samples(m, prompt)
    part = f"sample, 50 steps, {cameras.VIEWS} views, decoded"
    show({"part": part, "ms": 1000 * min(times[1:]), "first_s": times[0]}, flags.json)
    for note in notes:
        print(json.dumps({"note": note}) if flags.json else note)


if __name__ == "__main__":
    cli.main(main)
