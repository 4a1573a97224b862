"""How fast is every part, and how fast could it be?

    python -m mvd.bench                              # the tiny model, on whatever is here
    python -m mvd.bench --model sd21 --json          # the full size, random weights; one line of JSON a row

A part's floor is the time that its arithmetic takes at the speed of a large matrix product, and then its memory traffic at the speed
of a copy; both speeds are measured first. Operations are counted by PyTorch's FlopCounterMode; bytes are those that the hash grid must
move if nothing is cached: eight corners of two float32 a level and sample, read once and, for the gradient, read and written.
Milliseconds are medians. On CUDA every part is a captured graph, so launches cost nothing; with --compile, the networks and the
rendering are fused by torch.compile, and the first call of a part that needs them pays for that.
"""
import json
import time
from dataclasses import dataclass, field, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import cameras, model, render, sds
from .tools import cli
from .tools.device import EAGER_CALLS, GraphedStep, can_compile, choose_device, choose_dtype, side_stream, tune
from .model import MVDream


@dataclass
class Settings:
    """The flags."""
    model: str = field(default="tiny", metadata={"help": "tiny, sd21 (random weights of the full size), or the path of a checkpoint"})
    device: str = field(default="auto", metadata={"help": "cuda, mps or cpu; auto takes the best"})
    dtype: str = field(default="auto", metadata={"help": "of the model; auto: bfloat16 on cuda, else float32",
                                                 "choices": ("auto", "float32", "bfloat16", "float16")})
    compile: bool = field(default=True, metadata={"help": "fuse operations by torch.compile, on a GPU"})
    json: bool = field(default=False, metadata={"help": "print one line of JSON a row instead of a table"})


def measure(function, device, seconds=1.0):
    """(median milliseconds of a call, seconds of the first call, peak GiB of GPU memory): repeated for about so many seconds."""
    cuda, times = device.type == "cuda", []
    wait = torch.cuda.synchronize if cuda else torch.mps.synchronize if device.type == "mps" else lambda: None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def timed(step):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - begin

    with side_stream(device):
        step = GraphedStep(function, device)
        first = timed(step)
        for _ in range(EAGER_CALLS if cuda else 1):                              # until it is captured, or warm
            timed(step)
        begin = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < seconds:
            times.append(timed(step))
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None
    return 1000 * sorted(times)[len(times) // 2], first, peak


def speeds(device, dtype):
    """What a torch.device can do in a dtype: (floating point operations a second of a large matrix product, bytes a second of a large
    copy)."""
    side, long = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    here, there = torch.ones(2, long // 4, device=device).unbind()
    product, copy = (measure(function, device)[0] / 1000 for function in (lambda: a @ b, lambda: there.copy_(here)))
    return 2 * side ** 3 / product, 2 * long / copy


def parts(m, s, device):
    """What is measured: (name, function, bytes that it must move), the whole steps first, so that they pay for the compiler. m: MVDream,
    s: sds.Settings."""
    stages = sds.stages(s)
    nerf, occupancy, optimizer = sds.make_field(s, device)
    for _ in range(3):
        occupancy.update(nerf.density, s.step_size, everywhere=True)
    schedule = sds.Schedule(device)
    schedule.set(s, 0.5)
    with torch.no_grad():
        context = m.embed([s.prompt, ""])                                        # [2, L, D]
    corners = s.levels * 8 * 2 * 4                                               # bytes of a sample's corners

    for shading in (False, True):
        for stage in stages:
            yield (f"step, {4 * stage.sets} views of {stage.size}²{', shaded' * shading}",
                   sds.make_step(replace(s, shading=shading), m, nerf, occupancy, optimizer, context, schedule, stage),
                   3 * corners * stage.budget)

    for stage in stages:
        c2w, fov = sds.draw_cameras(stage.sets, sds.VIEWS, device)
        origins, directions = (v.reshape(-1, 3) for v in cameras.rays(c2w, fov[:, None].expand(stage.sets, sds.VIEWS), stage.size))
        renderer = torch.compile(render.render, dynamic=False) if s.compile else render.render
        offsets = render.draw_offsets(len(origins), device)

        def rendering(stage=stage, origins=origins, directions=directions, renderer=renderer, offsets=offsets):
            seen = renderer(nerf, occupancy, origins, directions, origins.new_ones(3), stage.budget, s.step_size, *offsets)
            seen.rgb.sum().backward()
            optimizer.zero_grad(set_to_none=True)
            return seen.rgb
        yield f"field, {stage.budget} samples of {4 * stage.sets} views of {stage.size}²", rendering, 3 * corners * stage.budget

    size = m.config.size
    images = torch.rand(1, sds.VIEWS, 3, size, size, device=device, requires_grad=True)
    with torch.no_grad():
        z = m.encode(2 * images - 1).float()                                     # [1, V, c, h, w]
    x, camera = torch.randn(2, *z.shape[1:], device=device), torch.randn(2, sds.VIEWS, 16, device=device)
    t = torch.full((2,), 500, device=device)
    yield "UNet, 8 views (4, both halves of guidance)", torch.no_grad()(lambda: m.unet(x, t, context, camera)), 0

    yield (f"VAE, encoding 4 views of {size}² and its gradient",
           lambda: torch.autograd.grad(m.encode(2 * images - 1).float().square().sum(), images)[0], 0)
    yield f"VAE, decoding 4 views of {size}²", torch.no_grad()(lambda: m.decode(z)), 0


def main():
    """The command: a line for every part as it is measured, then notes on what could not be."""
    flags = cli.parse(Settings, description=__doc__)
    begin = time.time()
    device = choose_device(flags.device)
    dtype = choose_dtype(flags.dtype, device)
    tune(tf32=dtype != torch.float32)                                            # as distill.py
    torch.manual_seed(0)
    if flags.model == "sd21" or flags.model == "tiny" and not model.TINY.exists():
        with torch.device(device):
            m = MVDream.random(flags.model)
        m = m.to(dtype)
        notes = ["the weights are random"]
    else:
        m, notes = MVDream.load(flags.model, device, dtype), []
    compiled = flags.compile and can_compile(device)
    if flags.compile and not compiled:
        notes.append("nothing is compiled: that takes CUDA, Triton and a C compiler")
    prompt = " ".join(m.config.text.words[-2:]) or "a bulldog"                   # words that the model knows
    s = cli.parse(sds.Settings, [prompt], defaults={**m.config.distill, "compile": compiled})
    loaded = time.time() - begin
    flops_per_s, bytes_per_s = speeds(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    notes.append(f"{name}, {str(dtype).removeprefix('torch.')}, {flops_per_s / 1e12:.3g} TFLOP/s, {bytes_per_s / 1e9:.3g} GB/s; the "
                 f"model was there after {loaded:.1f} s")

    counts = []
    for part, function, traffic in parts(m, replace(s, compile=False), device):  # before anything is compiled
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    if compiled:
        m.compile_networks()
    if not flags.json:
        print(f"{'part':<50} {'ms':>8} {'floor':>8} {'share':>6} {'TFLOP/s':>8} {'GB/s':>6} {'first, s':>8} {'GiB':>6}")

    def show(row):
        """One line, as soon as it is known."""
        if flags.json:
            print(json.dumps(row), flush=True)
            return
        numbers = [f"{row[key]:{width}{form}}" if row.get(key) else f"{'-':>{width}}" for key, width, form in (
            ("ms", 8, ".2f"), ("floor_ms", 8, ".2f"), ("share", 6, ".0%"), ("tflops", 8, ".3g"), ("gb_per_s", 6, ".0f"),
            ("first_s", 8, ".1f"), ("peak_gib", 6, ".1f"))]
        print(f"{row['part']:<50} {' '.join(numbers)}", flush=True)

    for (part, function, traffic), flops in zip(list(parts(m, s, device)), counts):
        try:
            ms, first, peak = measure(function, device)
        except torch.cuda.OutOfMemoryError:
            notes.append(f"{part}: not enough GPU memory")
            continue
        floor = 1000 * (flops / flops_per_s + traffic / bytes_per_s)
        show({"part": part, "ms": ms, "floor_ms": floor, "share": floor / ms, "tflops": flops / ms / 1e9,
              "gb_per_s": traffic / ms / 1e6, "first_s": first, "peak_gib": peak})
    times = []
    for _ in range(3):                                                           # the first pays for compiling
        begin = time.time()
        m.sample(prompt).cpu()
        times.append(time.time() - begin)
    show({"part": "sample, 50 steps, 4 views, decoded", "ms": 1000 * min(times[1:]), "first_s": times[0]})
    for note in notes:
        print(json.dumps({"note": note}) if flags.json else note)


if __name__ == "__main__":
    cli.main(main)
