"""How fast is every part, and how fast could it be?

    python -m mvd.bench                              # the tiny model, on whatever is here
    python -m mvd.bench --model sd21 --json          # the full size, random weights; one JSON
                                                     # object per line
    python -m mvd.bench --out before                 # then change something, and:
    python -m mvd.bench --against before             # each part as a share of its time before
    python -m mvd.bench --plot cost.png              # cost against views, samples and rays

A part's floor is the time that its arithmetic takes at the speed of a large matrix product, plus
that of its memory traffic at the speed of a copy; both speeds are measured first. Operations are
counted by PyTorch's FlopCounterMode. Bytes are those that the hash grid must move if nothing is
cached: eight corners of two float32 per level and sample, read once and, for the gradient, read
and written. The floor of a start is the import of torch.

Milliseconds are medians. On CUDA every part is a captured graph, so launches cost nothing. With
--compile the networks and the rendering are fused by torch.compile, and the first call of a part
that needs them pays for that.
"""
import copy
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from . import cameras, model, presets, render, sds
from .model import MVDream
from .sds import DistillSettings
from .tools import cli, run
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
from .tools.errors import UserError
from .tools.files import write_atomic

# The columns of the table: key of a row, heading, width, format.
COLUMNS = (
    ("ms", "ms", 8, ".2f"),
    ("floor_ms", "floor", 8, ".2f"),
    ("share", "share", 6, ".0%"),
    ("of_before", "of before", 9, ".0%"),
    ("tflops", "TFLOP/s", 8, ".3g"),
    ("gb_per_s", "GB/s", 6, ".0f"),
    ("first_s", "first, s", 8, ".1f"),
    ("peak_gib", "GiB", 6, ".1f"),
)
# Whole samples that are timed: steps and sampler.
SAMPLES = ((50, "ddim"), (25, "dpm++"))
# The lines of the plot, and their colours.
LINES = {"step: views": "#1f5fa8", "field: samples": "#d1632b", "field: rays": "#2a8a4f"}
# The folder of the scripts.
ROOT = Path(__file__).parent.parent


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
    out: str | None = setting(None, "file for the same lines of JSON, which --against reads")
    against: str | None = setting(None, "file of an earlier --out, to compare with")
    plot: str | None = setting(None, "PNG file: cost against views, samples and rays")


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


def used_share(s, distillation, stage):
    """The share of a step's slots for samples that hold one: the rays may want fewer."""
    one = copy.copy(distillation)
    one.begin(stage)
    draws = one.draw()
    _, counts = render.march_rays(
        one.occupancy, *one.rays(draws), step=s.step_size, jitter=draws.jitter
    )
    return min(1.0, counts[:, -1].sum().item() / stage.budget)


def field_part(s, distillation, stage):
    """Rendering with its penalty, forward and backward, as one row of `parts`."""
    one = copy.copy(distillation)
    one.begin(stage, s.compile)
    draws = one.draw()

    def rendering():
        images, _, penalty = one.rendering(draws, one.sampling(draws))
        (images.sum() + penalty).backward()
        one.optimizer.zero_grad(set_to_none=True)
        return images

    views = s.views * stage.sets
    name = f"field, {stage.budget} samples of {views} views of {stage.size}²"
    return name, rendering, traffic(s, stage)


def network_parts(m, views):
    """UNet and autoencoder, for one set of views."""
    device, size = m.device, m.config.size
    # In memory they lie as a rendering does: channels last.
    images = torch.rand(1, views, size, size, 3, device=device).movedim(-1, -3).requires_grad_()
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
        latents = m.encode(2 * images - 1, encoder=m.vae.light)  # as a step does
        loss = latents.float().square().sum()
        return torch.autograd.grad(loss, images)[0]

    @torch.no_grad()
    def decode():
        return m.decode(z)

    yield f"UNet, {2 * views} views ({views}, both halves of guidance)", unet, 0
    encoder = "light encoder," if m.vae.light else "VAE, encoding"
    yield f"{encoder} {views} views of {size}² and its gradient", encode, 0
    yield f"VAE, decoding {views} views of {size}²", decode, 0


def new_field(m, s):
    """A Distillation at its start, with its occupancy grid."""
    m.to(memory_format=torch.channels_last)  # as distill.py does
    with torch.no_grad():
        context = m.embed([s.prompt, ""])
    distillation = sds.Distillation(s, m, context)
    for _ in range(3):
        distillation.occupancy.update(distillation.nerf.density, s.step_size, everywhere=True)
    return distillation


def parts(m, s):
    """All that is measured: (name, function, bytes that it must move).

    The whole steps come first, so that they pay for the compiler. m: MVDream; s: DistillSettings.
    """
    distillation = new_field(m, s)
    yield from step_parts(s, distillation)
    for stage in sds.stages(s):
        yield field_part(s, distillation, stage)
    yield from network_parts(m, s.views)


def operations(function):
    """The floating point operations of a call. PyTorch's counter lacks fused attention on CPUs."""
    def attention(query_shape, key_shape, value_shape, *arguments, **options):
        return sdpa_flop_count(query_shape, key_shape, value_shape)

    lacking = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=lacking) as counter:
        function()
    return counter.get_total_flops()


def count_operations(m, s):
    """{part: floating point operations}, counted before anything is compiled."""
    counts = {}
    for part, function, _ in parts(m, replace(s, compile=False)):
        counts[part] = operations(function)
    return counts


def sample_rows(m, prompt, flops, flops_per_s):
    """Rows of whole samples. flops: {part: operations}, with the UNet's and the decoder's."""
    unet = sum(count for part, count in flops.items() if part.startswith("UNet"))
    decoding = sum(count for part, count in flops.items() if part.startswith("VAE, decoding"))
    for steps, sampler in SAMPLES:
        times = []
        for _ in range(3):  # the first one pays for compiling
            begin = time.perf_counter()
            m.sample(prompt, steps=steps, sampler=sampler).cpu()
            times.append(time.perf_counter() - begin)
        name = "" if sampler == "ddim" else f" of {sampler}"
        part = f"sample, {steps} steps{name}, {cameras.VIEWS} views, decoded"
        ms, floor = 1000 * min(times[1:]), 1000 * (steps * unet + decoding) / flops_per_s
        yield dict(part=part, ms=ms, floor_ms=floor, share=floor / ms, first_s=times[0])


# ---- start-up --------------------------------------------------------------------------------

# The last one draws nothing: what wraps the time steps ends the process before the first of them.
FIRST_STEP = """
import sys, sample
from mvd import MVDream
MVDream.load(sys.argv[1]).sample(sys.argv[2], progress=lambda steps: sys.exit())
"""


def start_rows(name, prompt):
    """Rows of how long new processes take, on the CPU: the import of torch is what none avoids."""
    if Path(name).exists():
        name = Path(name).resolve()
    starts = {
        "start: import torch": ["-c", "import torch"],
        "start: sample.py --help": ["sample.py", "--help"],
        "start: sample.py up to its first step": ["-c", FIRST_STEP, name, prompt],
    }
    floor = None
    for part, arguments in starts.items():
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
            times.append(time.perf_counter() - begin)
        ms = 1000 * sorted(times)[1]
        floor = floor or ms
        yield dict(part=part, ms=ms, floor_ms=floor, share=floor / ms)


# ---- cost against size -----------------------------------------------------------------------

def sizes(s, distillation):
    """What the plot is made of: (line, size, function, share of the slots that are used).

    Whole steps of more and more sets of views; the field with more and more samples; and with more
    and more rays for the same samples. Whatever was compiled before is forgotten, since PyTorch
    gives up after eight shapes.
    """
    coarse = sds.stages(s)[0]
    for sets in (1, 2, 4):
        torch.compiler.reset()
        one = copy.copy(distillation)
        one.begin(coarse._replace(sets=sets, budget=coarse.budget // coarse.sets * sets), s.compile)
        one.anneal(0.5)
        yield "step: views", sets * s.views, one.step, used_share(s, distillation, one.stage)
    for k in range(-3, 4):
        stage = coarse._replace(budget=int(coarse.budget * 2.0**k))
        yield "field: samples", stage.budget, *field_point(s, distillation, stage)
    for k in range(-1, 3):
        stage = coarse._replace(size=int(coarse.size * 2.0**k))
        rays = s.views * stage.sets * stage.size**2
        yield "field: rays", rays, *field_point(s, distillation, stage)


def field_point(s, distillation, stage):
    """(function, share of the slots that are used) of the field at one size."""
    torch.compiler.reset()
    _, function, _ = field_part(s, distillation, stage)
    return function, used_share(s, distillation, stage)


def size_rows(s, distillation):
    """Rows of the plot, as they are measured."""
    for line, size, function, used in sizes(s, distillation):
        ms, first, peak = measure(function, distillation.device)
        row = dict(part=f"{line}, {size}", line=line, size=size, ms=ms, used=used)
        yield dict(row, first_s=first, peak_gib=peak)


def draw_plot(rows):
    """A Pillow picture: milliseconds against the share of each line's largest size."""
    width, height, left, top, right, bottom = 900, 480, 70, 40, 876, 430
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    most = max(row["ms"] for row in rows)

    def place(share, ms):
        return left + share * (right - left), bottom - ms / most * (bottom - top)

    for k in range(5):
        x, y = place(k / 4, k / 4 * most)
        draw.line([(left, y), (right, y)], "#dddddd")
        draw.text((left - 8, y), f"{k / 4 * most:.4g}", "black", font, "rm")
        draw.text((x, bottom + 8), f"{k / 4:g}", "black", font, "mt")
    draw.text((8, 8), "milliseconds", "black", font)
    draw.text(((left + right) / 2, height - 8), "share of the largest", "black", font, "mb")
    for i, (line, colour) in enumerate(LINES.items()):
        points = [row for row in rows if row["line"] == line]
        largest = max(row["size"] for row in points)
        path = [place(row["size"] / largest, row["ms"]) for row in points]
        draw.line(path, colour, width=2)
        for (x, y), row in zip(path, points):
            # Hollow: the rays want fewer samples than there are slots.
            fill = colour if row["used"] == 1 else "white"
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill, colour, 2)
        label = f"{line}, up to {largest:,}"
        draw.text((190 + 240 * i, 8), label, colour, font)
    return picture


# ---- the command -----------------------------------------------------------------------------

def is_random(name):
    """Are the weights of this model made here? Those of "sd21" would have to be downloaded."""
    return name == "sd21" or (name == "tiny" and not model.TINY.exists())


def load(flags, device, dtype):
    """The model that the flags name, and a note if its weights are random."""
    if not is_random(flags.model):
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


def read_before(path):
    """{part: milliseconds} of an earlier --out. Raises UserError for another file."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        return {line["part"]: line["ms"] for line in lines if "note" not in line}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by bench --out ({error})") from error


def part_rows(m, s, counts, speed, notes):
    """Rows of the parts of a step. What does not fit into the GPU is noted. speed: see `speeds`."""
    flops_per_s, bytes_per_s = speed
    for part, function, moved in list(parts(m, s)):
        try:
            ms, first, peak = measure(function, m.device)
        except torch.cuda.OutOfMemoryError:
            notes.append(f"{part}: not enough GPU memory")
            continue
        flops = counts[part]
        floor = 1000 * (flops / flops_per_s + moved / bytes_per_s)
        row = {"part": part, "ms": ms, "floor_ms": floor, "share": floor / ms}
        row.update(tflops=flops / ms / 1e9, gb_per_s=moved / ms / 1e6)
        row.update(first_s=first, peak_gib=peak)
        yield row


def rows(m, s, flags, counts, speed, notes):
    """All rows, dicts, as they are measured."""
    yield from part_rows(m, s, counts, speed, notes)
    yield from sample_rows(m, s.prompt, counts, speed[0])
    if not is_random(flags.model):
        yield from start_rows(flags.model, s.prompt)
    if not flags.plot:
        return
    for row in size_rows(s, new_field(m, s)):
        yield row
        if row["used"] < 1:
            notes.append(f"{row['part']}: only {row['used']:.0%} of the slots hold a sample; "
                         "the rays want no more")


def main(argv=None):
    """The command: a line for every part as it is measured, then notes. Raises UserError."""
    flags = cli.parse(BenchSettings, argv, __doc__)
    before = read_before(flags.against) if flags.against else {}
    for path in (flags.out, flags.plot):
        if path:
            run.make_folder(path)
    begin = time.time()
    device = choose_device(flags.device)
    dtype = choose_dtype(flags.dtype, device)
    tune_cuda(tf32=dtype != torch.float32, search=False)  # as distill.py
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
    lines = []
    for row in rows(m, s, flags, counts, (flops_per_s, bytes_per_s), notes):
        if row["part"] in before:
            row["of_before"] = row["ms"] / before[row["part"]]
        show(row, flags.json)
        lines.append(row)
    for note in notes:
        print(json.dumps({"note": note}) if flags.json else note)
        lines.append({"note": note})
    if flags.out:
        write_atomic(flags.out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    if flags.plot:
        picture = draw_plot([row for row in lines if "line" in row])
        write_atomic(flags.plot, lambda file: picture.save(file, "PNG"))


if __name__ == "__main__":
    cli.main(main)
