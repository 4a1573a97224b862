"""Writing a data set of the toy world: sets of 32 views, single pictures, and their captions.

    python -m mvd.toyworld --out data/toy --objects 500

writes

    sets/000000/000.png ... 031.png     the views around an object, evenly and counter-clockwise
    sets/000000/transforms.json         their cameras, in the format of NeRF's synthetic scenes
    sets/captions.json                  {"000000": [wordings that mean the same], ...}
    images/000000.png ...               single pictures
    images/metadata.jsonl               a line each: {"file_name": "000000.png", "captions": [...]}
    settings.json                       so that another run does not mix sizes or seeds

All pictures are RGBA. cameras.py explains the axes. Cameras and the 32 views per object: MVDream,
appendix.
"""
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from ..cameras import orbit
from ..data.transforms import write_transforms
from ..tools import cli
from ..tools.device import check_seed, choose_device
from ..tools.errors import UserError
from ..tools.files import write_atomic
from ..tools.pictures import save_views
from .shapes import DRAWS, build, palette
from .tracer import paint, trace
from .words import COLOURS, NATURAL, Thing, captions, pairs

# Views per set, evenly spaced around the object.
RENDERED_VIEWS = 32
# Proportions with a smaller seed are left for judging (metrics/candidates.py).
FIRST_SEED = 1_000_000
# PyTorch's generator takes the last 32 bits of a seed: larger ones would be smaller ones again.
LAST_SEED = 2**32 - 1


class Item(NamedTuple):
    """One set or image of the data set, before it is drawn.

    kind: "set" or "image". name: such as "000000". pair: (subject, accessory or None). said:
    whether the captions name the colour. seed: of the proportions. azimuth (of the first view),
    elevation, fov: degrees.
    """
    kind: str
    name: str
    pair: tuple
    colour: str
    said: bool
    seed: int
    azimuth: float
    elevation: float
    fov: float
    distance: float

    @property
    def path(self):
        """Where it is: a folder of views such as "sets/000000", or a file, "images/000000.png"."""
        return f"sets/{self.name}" if self.kind == "set" else f"images/{self.name}.png"

    @property
    def captions(self):
        """The wordings that the data set has for it."""
        return captions(Thing(*self.pair, self.colour if self.said else None))


# ---- what to draw ----------------------------------------------------------------------------

def plan(kind, count, seed):
    """The first `count` Items of a kind, "set" or "image": the same for a seed, whatever the count.

    Each lap goes through all pairs in a new order, and each pair has its next colour in it, so
    that all are equally frequent. Every second image shows an "image" pair (words.split); the other
    images and all sets show "3d" pairs. Raises UserError for a seed that is none.
    """
    seed = check_seed(seed)
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
    without its rarest values.
    """
    number = seed * 1_000_000 + i
    if kind == "image":
        number += 500_000
    item_seed = FIRST_SEED + number % (LAST_SEED + 1 - FIRST_SEED)
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
        kind=kind, name=f"{i:06d}", pair=pair, colour=colour, said=said, seed=item_seed,
        azimuth=azimuth % 360, elevation=30 * u[3], fov=fov, distance=distance)


# ---- drawing ---------------------------------------------------------------------------------

def cameras_of(items):
    """The cameras of N Items of one kind: c2w [N, V, 4, 4], V = RENDERED_VIEWS or 1."""
    views = RENDERED_VIEWS if items[0].kind == "set" else 1
    azimuth = torch.tensor([item.azimuth for item in items])
    elevation = torch.tensor([item.elevation for item in items])
    distance = torch.tensor([item.distance for item in items])
    turn = torch.arange(views) * (360 / views)
    return orbit(elevation[:, None], azimuth[:, None] + turn, distance[:, None])


def draw_views(items, size, device):
    """The pictures of N Items of one pair and kind: RGBA, uint8 [N, V, size, size, 4] on the CPU.

    V is RENDERED_VIEWS for sets, 1 for images.
    """
    subject, accessory = items[0].pair
    shapes = build(subject, accessory, [item.seed for item in items], device)
    colours = palette([item.colour for item in items], device)
    fov = torch.tensor([item.fov for item in items])
    # [N, V, 4, H, W]
    rgba = paint(trace(shapes, cameras_of(items), fov, size), colours)
    rgba = (rgba * 255).round().to(torch.uint8)
    return rgba.permute(0, 1, 3, 4, 2).contiguous().cpu()


def save(path, pixels):
    """Save pixels, uint8 [H, W, 4], as a PNG file. Even if we are killed, no half file is left."""
    image = Image.fromarray(pixels.numpy())
    write_atomic(path, lambda file: image.save(file, format="png", compress_level=1))


def save_set(folder, pixels, c2w, fov):
    """Save views, uint8 [V, H, W, 4], and their cameras, c2w [V, 4, 4], as a folder.

    Even if we are killed, no half folder is left under this name. A flush to the disk for each of
    so many files would take longer than drawing them, so after a power cut files may be damaged.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    names = save_views(temporary, [Image.fromarray(view) for view in pixels.numpy()])
    write_transforms(temporary, names, c2w, fov, size=pixels.shape[1])
    temporary.rename(folder)


def draw_files(items, out, size, device):
    """Draw Items of one pair and kind, and save them; returns their number."""
    for item, pixels, c2w in zip(items, draw_views(items, size, device), cameras_of(items)):
        if item.kind == "set":
            save_set(out / item.path, pixels, c2w, item.fov)
        else:
            save(out / item.path, pixels[0])
    return len(items)


# ---- the whole data set ----------------------------------------------------------------------

def write(out, *, objects, images, size=128, seed=0, device="cpu"):
    """Render a data set into the folder `out`: `objects` sets and `images` single pictures.

    What exists is kept, so a killed run continues where it was, and a data set can grow. Raises
    UserError if `out` holds a data set of another size or seed, a larger one or one of an older
    version, or cannot be written.
    """
    if objects < 0 or images < 0 or size < 1:
        raise UserError("--objects and --images cannot be negative, and --size is at least 1")
    out = Path(out)
    sets = plan("set", objects, seed)
    singles = plan("image", images, seed)
    items = sets + singles
    prepare_folder(out, {"size": size, "seed": seed}, items)
    missing = [item for item in items if not (out / item.path).exists()]

    on_cpu = torch.device(device).type == "cpu"
    batches = in_batches(missing, on_cpu)
    draw = functools.partial(draw_files, out=out, size=size, device=device)
    bar = tqdm(total=len(items), initial=len(items) - len(missing), unit="item")
    with make_pool(on_cpu) as pool, bar:
        for done in pool.map(draw, batches):
            bar.update(done)

    wordings = {item.name: item.captions for item in sets}
    write_atomic(out / "sets/captions.json", json.dumps(wordings).encode())
    rows = [{"file_name": f"{item.name}.png", "captions": item.captions} for item in singles]
    lines = [json.dumps(row) + "\n" for row in rows]
    write_atomic(out / "images/metadata.jsonl", "".join(lines).encode())


def prepare_folder(out, settings, items):
    """Check what is in `out`, make the folders and settings.json, and remove what is half written.

    Nothing may be there that is none of the Items, since it would have no caption. Raises
    UserError, and then has changed nothing.
    """
    file = out / "settings.json"
    content = json.dumps(settings).encode()
    pictures = [*out.glob("sets/[!.]*"), *out.glob("images/[!.]*.png")]
    if (out / "index.jsonl").exists():
        raise UserError(
            f"{out} was made by an older version of mvd (index.jsonl): choose another --out")
    earlier = file.read_bytes() if file.exists() else content
    # A start that has drawn nothing is in nobody's way.
    replaceable = not pictures and re.fullmatch(rb'{"size": \d+, "seed": \d+}', earlier)
    if earlier != content and not replaceable:
        raise UserError(
            f"{out} holds pictures of another size or seed than {settings}: choose another --out")
    planned = {out / item.path for item in items}
    for path in pictures:
        if path not in planned and path.name != "captions.json":
            raise UserError(
                f"{path} is none of so many --objects and --images: "
                "ask for more, or choose another --out")
    try:
        for folder in ("sets", "images"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; choose another --out") from error
    write_atomic(file, content)
    for leftover in [*out.glob("sets/.*.tmp"), *out.glob("images/.*.tmp")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def in_batches(items, on_cpu):
    """Lists of Items of one kind and pair, each as long as is drawn well at once."""
    if on_cpu:
        most = {"set": 1, "image": 16}
    else:
        most = {"set": 32, "image": 512}
    groups = {}
    for item in items:
        groups.setdefault((item.kind, item.pair), []).append(item)
    batches = []
    for (kind, _), group in groups.items():
        for i in range(0, len(group), most[kind]):
            batches.append(group[i:i + most[kind]])
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


def main(argv=None):
    """The command: render a data folder. Raises UserError."""
    count = cli.converter(int, {"min": 0})
    parser = cli.Parser(
        prog="python -m mvd.toyworld", description="Render a data set of the toy world.")
    add = parser.add_argument
    add("--out", required=True, help="folder to write to; what is there already is kept")
    add("--objects", type=count, default=500, help="things seen from 32 sides")
    add("--images", type=count, help="single pictures (default: five times as many as objects)")
    add("--size", type=cli.converter(int, {"min": 1}), default=128, help="pixels along a side")
    add("--seed", type=count, default=0, help="another seed, other things")
    add("--device", default="auto", help="cuda, cpu, or auto: the best there is")
    flags = parser.parse_args(argv)
    images = 5 * flags.objects if flags.images is None else flags.images
    write(
        flags.out, objects=flags.objects, images=images, size=flags.size, seed=flags.seed,
        device=choose_device(flags.device))
