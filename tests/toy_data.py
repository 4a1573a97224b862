"""A data folder in the layout that train.py reads: balls of two colours, drawn with Pillow, too small to learn much from."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}


def read_png(path):
    """-> [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


def view(colour, azimuth, size):
    """A ball with a white spot on the side at azimuth 0."""
    picture = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((size * 0.2, size * 0.2, size * 0.8, size * 0.8), fill=(*COLOURS[colour], 255))
    if azimuth < 90 or azimuth > 270:
        draw.ellipse((size * 0.4, size * 0.4, size * 0.6, size * 0.6), fill=(255, 255, 255, 255))
    return picture


def write(folder, size=128, items=2):
    folder, lines = Path(folder), []
    for kind in ("sets", "images"):
        (folder / kind).mkdir(parents=True)
    for i in range(items):
        colour = list(COLOURS)[i % 2]
        strip = Image.new("RGBA", (size * 32, size))
        for k in range(32):
            strip.paste(view(colour, k * 11.25, size), (k * size, 0))
        for file, picture, kind in ((f"sets/{i:06d}.png", strip, "set"), (f"images/{i:06d}.png", view(colour, 0, size), "image")):
            picture.save(folder / file)
            lines.append(dict(file=file, kind=kind, captions=[f"a {colour} ball", f"ball, {colour}"], elevation=10.0, azimuth=0.0,
                              fov=40.0, distance=1.4))
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
