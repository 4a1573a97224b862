"""Writing a data set of the toy world: sets of 32 views, single pictures, and their captions.

    python -m mvd.toyworld --out data/toy --objects 500

writes sets/*.png (32 views around an object, side by side), images/*.png (single pictures),
index.jsonl (one line per file: its captions and its camera) and settings.json (so that another run
does not mix sizes or seeds). mvd/data.py explains the format, cameras.py the axes. Cameras and the
32 views per object: MVDream, appendix.
"""
import functools
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from ..cameras import orbit
from ..tools import cli
from ..tools.device import choose_device
from ..tools.errors import UserError
from ..tools.files import write_atomic
from .shapes import DRAWS, build, palette
from .tracer import paint, trace
from .words import COLOURS, NATURAL, Thing, captions, pairs

# Views per set, evenly spaced around the object.
RENDERED_VIEWS = 32


class Item(NamedTuple):
    """One file of the data set, before it is drawn.

    file: such as "sets/000000.png". pair: (subject, accessory or None). said: whether the captions
    name the colour. seed: of the proportions. azimuth (of the first view), elevation, fov: degrees.
    """
    file: str
    pair: tuple
    colour: str
    said: bool
    seed: int
    azimuth: float
    elevation: float
    fov: float
    distance: float

    def index_entry(self):
        """What index.jsonl says of this file, a dict."""
        thing = Thing(*self.pair, self.colour if self.said else None)
        return {
            "file": self.file,
            "kind": "set" if self.file.startswith("sets") else "image",
            "captions": captions(thing),
            "elevation": self.elevation,
            "azimuth": self.azimuth,
            "fov": self.fov,
            "distance": self.distance,
        }


# ---- what to draw ----------------------------------------------------------------------------

def plan(kind, count, seed):
    """The first `count` Items of a kind, "set" or "image": the same for a seed, whatever the count.

    Each lap goes through all pairs in a new order, and each pair has its next colour in it, so
    that all are equally frequent. Every second image shows an "image" pair (words.split); the other
    images and all sets show "3d" pairs.
    """
    tables = [pairs("3d")]
    if kind == "image":
        tables.append(pairs("image"))
    colours = list(COLOURS)
    items = []
    for i in range(count):
        table = tables[i % len(tables)]
        lap, turn = divmod(i // len(tables), len(table))
        place = shuffled(len(table), seed + lap)[turn]
        colour = colours[(5 * place + lap) % len(colours)]
        items.append(plan_item(kind, i, seed, table[place], colour))
    return items


@functools.cache
def shuffled(count, seed):
    """The numbers below `count` in random order, a list."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()


def plan_item(kind, i, seed, pair, colour):
    """The i-th Item of a kind: a caption with or without the colour, and a random camera.

    A fifth of the captions leave the colour out; half of those things then have their natural
    colour. Cameras of images look at the front: 85% have an azimuth from N(0, 25^2), in degrees,
    without its rarest values. Seeds of proportions are a million or more; smaller ones are left
    for judging.
    """
    item_seed = (seed + 1) * 1_000_000 + i
    if kind == "image":
        item_seed += 500_000
    # The first DRAWS numbers of this seed are the proportions (shapes.dice).
    generator = torch.Generator().manual_seed(item_seed)
    u = torch.rand(2 * DRAWS, generator=generator)[DRAWS:].tolist()

    said = u[0] >= 0.2
    natural = u[1] < 0.5
    if natural and not said:
        subject, _ = pair
        colour = NATURAL[subject]

    if kind == "set":
        azimuth = u[2] * 360 / RENDERED_VIEWS
    elif u[6] < 0.85:
        # erfinv turns a uniform number into a normal one.
        uniform = torch.tensor(0.999 * (2 * u[2] - 1))
        azimuth = 25 * math.sqrt(2) * torch.erfinv(uniform).item()
    else:
        azimuth = u[2] * 360
    fov = 15 + 45 * u[4]
    # At 0.5 / tan(fov / 2) the cube [-0.5, 0.5]^3 fills the picture.
    distance = (0.9 + 0.2 * u[5]) * 0.5 / math.tan(math.radians(fov / 2))
    return Item(
        file=f"{kind}s/{i:06d}.png", pair=pair, colour=colour, said=said, seed=item_seed,
        azimuth=azimuth % 360, elevation=30 * u[3], fov=fov, distance=distance)


# ---- drawing ---------------------------------------------------------------------------------

def draw_strips(items, size, device):
    """The pictures of N Items of one pair: RGBA, uint8 [N, size, V * size, 4] on the CPU.

    A strip holds V views side by side: RENDERED_VIEWS for sets, 1 for images.
    """
    views = RENDERED_VIEWS if items[0].file.startswith("sets") else 1
    azimuth = torch.tensor([item.azimuth for item in items])
    elevation = torch.tensor([item.elevation for item in items])
    fov = torch.tensor([item.fov for item in items])
    distance = torch.tensor([item.distance for item in items])
    turn = torch.arange(views) * (360 / views)
    # [N, V, 4, 4]
    c2w = orbit(elevation[:, None], azimuth[:, None] + turn, distance[:, None])

    subject, accessory = items[0].pair
    shapes = build(subject, accessory, [item.seed for item in items], device)
    colours = palette([item.colour for item in items], device)
    # [N, V, 4, H, W]
    rgba = paint(trace(shapes, c2w, fov, size), colours)
    rgba = (rgba * 255).round().to(torch.uint8)
    return rgba.permute(0, 3, 1, 4, 2).flatten(2, 3).cpu()


def save(path, pixels):
    """Save pixels, uint8 [H, W, 4], as a PNG file. Even if we are killed, no half file is left."""
    image = Image.fromarray(pixels.numpy())
    write_atomic(path, lambda file: image.save(file, format="png", compress_level=1))


def draw_files(items, out, size, device):
    """Draw Items of one pair and save them; returns their number."""
    for item, pixels in zip(items, draw_strips(items, size, device)):
        save(out / item.file, pixels)
    return len(items)


# ---- the whole data set ----------------------------------------------------------------------

def write(out, *, objects, images, size=128, seed=0, device="cpu"):
    """Render a data set into the folder `out`: `objects` sets and `images` single pictures.

    Files that exist are kept, so a killed run continues where it was, and a data set can grow.
    Raises UserError if `out` holds a data set of another size or seed, or cannot be written.
    """
    if objects < 0 or images < 0 or size < 1:
        raise UserError("--objects and --images cannot be negative, and --size is at least 1")
    out = Path(out)
    prepare_folder(out, {"size": size, "seed": seed})
    items = plan("set", objects, seed) + plan("image", images, seed)
    missing = [item for item in items if not (out / item.file).exists()]

    on_cpu = torch.device(device).type == "cpu"
    batches = in_batches(missing, on_cpu)
    draw = functools.partial(draw_files, out=out, size=size, device=device)
    bar = tqdm(total=len(items), initial=len(items) - len(missing), unit="file")
    with make_pool(on_cpu) as pool, bar:
        for done in pool.map(draw, batches):
            bar.update(done)

    lines = [json.dumps(item.index_entry()) + "\n" for item in items]
    write_atomic(out / "index.jsonl", "".join(lines).encode())


def prepare_folder(out, settings):
    """Make the folders, and settings.json, or check that those there are the same settings."""
    try:
        for folder in ("sets", "images"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; choose another --out") from error
    file = out / "settings.json"
    if not file.exists():
        write_atomic(file, json.dumps(settings).encode())
    elif json.loads(file.read_text()) != settings:
        raise UserError(
            f"{out} holds pictures of another size or seed than {settings}: choose another --out")


def in_batches(items, on_cpu):
    """Lists of Items of one kind and pair, each as long as is drawn well at once."""
    if on_cpu:
        most = {"sets": 1, "images": 16}
    else:
        most = {"sets": 32, "images": 512}
    groups = {}
    for item in items:
        folder, _ = item.file.split("/")
        groups.setdefault((folder, item.pair), []).append(item)
    batches = []
    for (folder, _), group in groups.items():
        for i in range(0, len(group), most[folder]):
            batches.append(group[i:i + most[folder]])
    return batches


def make_pool(on_cpu):
    """Workers that draw. Threads share CPU cores well; one process cannot keep a GPU busy.

    (Drawing is many small operations, and Python starts them one after the other.)
    """
    workers = min(os.cpu_count(), 16)
    if on_cpu:
        return ThreadPoolExecutor(workers, initializer=start_worker)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker)


def start_worker():
    """One thread per operation. A worker process ends with the process that started it."""
    torch.set_num_threads(1)
    command = multiprocessing.parent_process()
    if command is None:
        return

    def end_with_command():
        command.join()
        os._exit(1)

    Thread(target=end_with_command, daemon=True).start()


def main():
    """The command: render a data folder. Raises UserError."""
    parser = cli.Parser(
        prog="python -m mvd.toyworld", description="Render a data set of the toy world.")
    add = parser.add_argument
    add("--out", required=True, help="folder to write to; what is there already is kept")
    add("--objects", type=int, default=500, help="things seen from 32 sides")
    add("--images", type=int, help="single pictures (default: five times as many as objects)")
    add("--size", type=int, default=128, help="pixels along a side")
    add("--seed", type=int, default=0, help="another seed, other things")
    add("--device", default="auto", help="cuda, cpu, or auto: the best there is")
    flags = parser.parse_args()
    images = 5 * flags.objects if flags.images is None else flags.images
    write(
        flags.out, objects=flags.objects, images=images, size=flags.size, seed=flags.seed,
        device=choose_device(flags.device))
