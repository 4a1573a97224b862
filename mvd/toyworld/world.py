"""A procedural world of captioned 3D things: what the tiny model is trained on, and what it is judged by.

A thing is a subject (subjects.py), perhaps an accessory, and a colour: "a red bulldog wearing a crown". Every seed
gives other proportions. The (subject, accessory) pairs fall into three splits, across all colours:
    "3d"     rendered from all sides (75%; every subject alone is here)
    "image"  shown as single pictures only, mostly from the front, as people take photos (15%)
    "never"  not shown at all (10%)
so that one can measure whether a model puts things together that it has only seen flat, or never.

    python -m mvd.toyworld --out data/toy --objects 500

writes sets/*.png (32 views round an object side by side), images/*.png (single pictures) and index.jsonl.
Cameras and the 32-view rule: MVDream §3.3 (see cameras.py for the axes).
"""
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple, Optional

import torch
from PIL import Image
from tqdm import tqdm

from ..tools import cli
from .accessories import ACCESSORIES
from .animals import PAINTS
from ..cameras import orbit
from ..tools.device import choose_device
from ..tools.errors import UserError
from ..tools.files import write_atomic
from .tracer import paint, render
from .solids import extent, pack, reach
from .subjects import ORIENTED, SUBJECTS  # noqa: F401 (ORIENTED is part of this module's surface)

COLOURS = {
    "red": (0.86, 0.13, 0.13), "orange": (0.98, 0.50, 0.08), "yellow": (0.98, 0.84, 0.15), "green": (0.22, 0.66, 0.24),
    "teal": (0.10, 0.62, 0.62), "blue": (0.16, 0.34, 0.86), "purple": (0.52, 0.22, 0.72), "pink": (0.98, 0.56, 0.74),
    "brown": (0.50, 0.30, 0.16), "black": (0.15, 0.15, 0.17), "white": (0.95, 0.95, 0.94), "grey": (0.56, 0.57, 0.60),
}
NATURAL = {                                  # what a subject tends to wear when nobody says a colour
    "bulldog": "brown", "cat": "orange", "rabbit": "white", "elephant": "grey", "pig": "pink", "lion": "yellow",
    "giraffe": "yellow", "penguin": "black", "duck": "yellow", "frog": "green", "turtle": "brown", "car": "red",
    "bus": "yellow", "train": "blue", "airplane": "white", "armchair": "red", "bed": "blue", "lamp": "yellow",
    "cake": "pink", "hamburger": "brown", "ice cream": "pink", "house": "white", "castle": "grey", "windmill": "white",
}
VIEWS = 32                                   # of a set, evenly round


class Thing(NamedTuple):
    """What a caption says. accessory is a key of ACCESSORIES or None, colour a key of COLOURS or None (not said)."""
    subject: str
    accessory: Optional[str] = None
    colour: Optional[str] = None


# ---------------------------------------------------------------------------------------------------------------------
# Words and splits

def captions(thing):
    """Four wordings of the same thing, lower case; without a colour where thing.colour is None."""
    subject, accessory, colour = thing
    name = f"{colour} {subject}" if colour else subject
    article = "an" if name[0] in "aeiou" else "a"
    if accessory is None:
        return [f"{article} {name}", name, f"a photo of {article} {name}",
                f"a {subject}, {colour}".replace("a a", "an a", 1) if colour else f"the {name}"]
    _, first, second = ACCESSORIES[accessory]
    last = f"{subject} {first}, {colour}" if colour else f"the {subject} {first}"
    return [f"{article} {name} {first}", last, f"{article} {name} {second}", f"a photo of {article} {name} {first}"]


def split(subject, accessory):
    """"3d", "image" or "never", for a pair in all colours.

    With s and a the places of subject and accessory in their tables, k = (3 s + 2 a + 2) mod 20 decides: below 2 never,
    below 5 image. Every subject has one pair that is never shown and one or two that are images; every accessory two or
    three and three or four. (bulldog, crown) is k = 2. A subject alone is always "3d".
    """
    if accessory is None:
        return "3d"
    k = (3 * list(SUBJECTS).index(subject) + 2 * list(ACCESSORIES).index(accessory) + 2) % 20
    return "never" if k < 2 else "image" if k < 5 else "3d"


def pairs(which):
    """All (subject, accessory or None) of a split, in a fixed order."""
    return [(s, a) for s in SUBJECTS for a in (None, *ACCESSORIES) if split(s, a) == which]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and colours

def dice(seeds):
    """u(low, high) -> one number for each seed, [N]: always the same first, second, ... numbers for a seed."""
    table = torch.stack([torch.rand(8, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
    draws = iter(table.unbind(1))
    return lambda low, high: low + (high - low) * next(draws)


def build(subject, accessory, seeds, device="cpu", accessory_slots=0):
    """N objects of one pair, one a seed -> Shapes inside [-0.5, 0.5]^3, the front to +x.

    A seed decides the proportions, and nothing else does: the colour is the palette's. accessory_slots: the first slot of the
    accessory's colours, where they are not the subject's.
    """
    if subject not in SUBJECTS or accessory not in (None, *ACCESSORIES):
        raise UserError(f"the toy world has no {subject!r} with {accessory!r}; subjects: {', '.join(SUBJECTS)}; "
                        f"accessories: {', '.join(ACCESSORIES)}")
    n = len(seeds)
    parts, hat = SUBJECTS[subject](dice(seeds))
    if accessory:
        worn = ACCESSORIES[accessory][0](hat, *extent(parts, n))
        parts = parts + [part._replace(slot=part.slot + accessory_slots) for part in worn]
    low, high = extent(parts, n)
    middle = (low + high) / 2
    scale = 0.46 / reach(parts, n, middle)                   # a ball of 0.46: hardly ever cut off by the picture's edge
    return pack(parts, n, offset=-scale[:, None] * middle, scale=scale, device=device)


def palette(colours, device="cpu"):
    """Names of COLOURS, N of them -> what each slot looks like, [N, slots, 3] in [0, 1]."""
    body = torch.tensor([COLOURS[c] for c in colours])
    cream = torch.tensor([1.0, 0.95, 0.86])
    fixed = torch.tensor([rgb for rgb in PAINTS.values() if rgb]).expand(len(colours), -1, 3)
    return torch.cat([torch.stack([body, 0.62 * body, 0.45 * body + 0.55 * cream], 1), fixed], 1).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Writing a data set

class Item(NamedTuple):
    """One file of the data set, before it is drawn."""
    file: str                                # "sets/000000.png"
    pair: tuple                              # (subject, accessory or None)
    colour: str
    said: bool                               # does the caption say the colour?
    seed: int                                # of the proportions
    azimuth: float                           # degrees; of the first view
    elevation: float
    fov: float
    distance: float

    def line(self):
        """Its line of index.jsonl."""
        kind = "set" if self.file.startswith("sets") else "image"
        said = captions(Thing(*self.pair, self.colour if self.said else None))
        return {"file": self.file, "kind": kind, "captions": said, "elevation": self.elevation, "azimuth": self.azimuth,
                "fov": self.fov, "distance": self.distance}


def plan(kind, count, seed):
    """The first `count` items of a kind ("set" or "image"): always the same for a seed, whatever the count.

    Pairs come in shuffled rounds, each round in the next colour, so that all are spread evenly. Every second image is
    of an "image" pair. A fifth of the captions leave the colour out; half of those things then wear their natural colour.
    Proportions come from seeds of a million and more; smaller ones are left for judging.
    """
    items, orders, tables = [], {}, [pairs("3d")] if kind == "set" else [pairs("3d"), pairs("image")]
    for i in range(count):
        number = (seed + 1) * 1_000_000 + i + (500_000 if kind == "image" else 0)
        table = tables[i % len(tables)]
        round, turn = divmod(i // len(tables), len(table))
        if (len(table), round) not in orders:
            shuffle = torch.Generator().manual_seed(seed + round)
            orders[len(table), round] = torch.randperm(len(table), generator=shuffle).tolist()
        place = orders[len(table), round][turn]
        colour = list(COLOURS)[(5 * place + round) % len(COLOURS)]
        u = torch.rand(16, generator=torch.Generator().manual_seed(number))[8:].tolist()     # the first 8 are build's
        said, natural = u[0] >= 0.2, u[1] < 0.5
        if kind == "set":
            azimuth = u[2] * 360 / VIEWS
        elif u[6] < 0.85:
            azimuth = 25 * math.sqrt(2) * torch.erfinv(torch.tensor(0.999 * (2 * u[2] - 1))).item()  # N(0, 25)
        else:
            azimuth = u[2] * 360
        fov = 15 + 45 * u[4]
        if natural and not said:
            colour = NATURAL[table[place][0]]
        distance = (0.9 + 0.2 * u[5]) * 0.5 / math.tan(math.radians(fov / 2))
        items.append(Item(f"{kind}s/{i:06d}.png", table[place], colour, said, number, azimuth % 360, 30 * u[3], fov,
                          distance))
    return items


def draw(items, size, device):
    """Items of one pair -> RGBA strips, uint8 [N, size, views*size, 4] on the CPU: 32 views for sets, 1 for images."""
    views = VIEWS if items[0].file.startswith("sets") else 1
    azimuth, elevation, fov, distance = (torch.tensor([getattr(item, name) for item in items]) for name in
                                         ("azimuth", "elevation", "fov", "distance"))
    turn = torch.arange(views) * (360 / views)
    c2w = orbit(elevation[:, None], azimuth[:, None] + turn, distance[:, None])                     # [N, V, 4, 4]
    shapes = build(*items[0].pair, [item.seed for item in items], device)
    rgba = paint(render(shapes, c2w, fov, size), palette([item.colour for item in items], device))  # [N, V, 4, H, W]
    return (rgba * 255).round_().to(torch.uint8).permute(0, 3, 1, 4, 2).flatten(2, 3).cpu()


def save(path, pixels):
    """pixels uint8 [H, W, 4] -> a PNG file that is there whole or not at all."""
    write_atomic(path, lambda file: Image.fromarray(pixels.numpy()).save(file, format="png", compress_level=1))


def draw_files(batch, out, size, device):
    """Draw items of one pair and save them; returns their number."""
    for item, pixels in zip(batch, draw(batch, size, device)):
        save(out / item.file, pixels)
    return len(batch)


def start_worker():
    """One thread an operation; and if the command that started this process is killed, the process goes too."""
    torch.set_num_threads(1)
    command = multiprocessing.parent_process()
    if command:
        Thread(target=lambda: (command.join(), os._exit(1)), daemon=True).start()


def write(out, objects, images, size=128, seed=0, device="cpu"):
    """Render the data set into `out`; files that are there already are kept, so a killed run goes on where it was.

    Raises UserError if `out` holds a set of another size or seed, or cannot be written.
    """
    if objects < 0 or images < 0 or size < 1:
        raise UserError("--objects and --images cannot be negative, and --size is at least 1")
    out, settings = Path(out), {"size": size, "seed": seed}
    try:
        for folder in ("sets", "images"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    if not (out / "settings.json").exists():
        write_atomic(out / "settings.json", json.dumps(settings).encode())
    elif json.loads((out / "settings.json").read_text()) != settings:
        raise UserError(f"{out} holds pictures of another size or seed than {settings}: choose another --out")

    items = plan("set", objects, seed) + plan("image", images, seed)
    groups = {}
    for item in items:
        if not (out / item.file).exists():
            groups.setdefault((item.file.split("/")[0], item.pair), []).append(item)
    on_cpu = torch.device(device).type == "cpu"
    most = {"sets": 1, "images": 16} if on_cpu else {"sets": 32, "images": 512}                    # objects at once
    batches = [group[i:i + most[folder]] for (folder, _), group in groups.items()
               for i in range(0, len(group), most[folder])]

    # Drawing is many small operations. Threads share the cores well; a GPU is busy only if several processes feed it.
    workers = min(os.cpu_count(), 16)
    make_pool = ThreadPoolExecutor if on_cpu else partial(ProcessPoolExecutor,
                                                            mp_context=multiprocessing.get_context("spawn"))
    with make_pool(workers, initializer=start_worker) as pool:
        with tqdm(total=len(items), initial=len(items) - sum(map(len, batches)), unit="file") as bar:
            for done in pool.map(partial(draw_files, out=out, size=size, device=device), batches):
                bar.update(done)
    write_atomic(out / "index.jsonl", "".join(json.dumps(item.line()) + "\n" for item in items).encode())


def main():
    """The command: render a data folder. Raises UserError."""
    parser = cli.Parser(prog="python -m mvd.toyworld", description="Render a data set of the toy world.")
    parser.add_argument("--out", required=True, help="folder to write to; what is there already is kept")
    parser.add_argument("--objects", type=int, default=500, help="things seen from 32 sides")
    parser.add_argument("--images", type=int, help="single pictures (default: five times as many as objects)")
    parser.add_argument("--size", type=int, default=128, help="pixels along a side")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other things")
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: the best there is")
    flags = parser.parse_args()
    images = 5 * flags.objects if flags.images is None else flags.images
    write(flags.out, flags.objects, images, flags.size, flags.seed, choose_device(flags.device))
