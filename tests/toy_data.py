"""A data folder in the layout that train.py reads: balls of two colours, drawn with Pillow.

It is too small to learn much from.
"""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mvd.cameras import orbit
from mvd.data.transforms import write_transforms
from mvd.tools.pictures import save_views

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
WHITE = (255, 255, 255, 255)


def read_png(path):
    """Return the picture [3, H, W] in [0, 1]."""
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def view(colour, azimuth, size):
    """Return a Pillow picture of a ball with a white spot on its front, at azimuth 0."""
    picture = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(picture)
    ball = [size * 0.2, size * 0.2, size * 0.8, size * 0.8]
    draw.ellipse(ball, fill=(*COLOURS[colour], 255))
    if azimuth < 90 or azimuth > 270:
        spot = [size * 0.4, size * 0.4, size * 0.6, size * 0.6]
        draw.ellipse(spot, fill=WHITE)
    return picture


def write(folder, size=128, items=2, views=32):
    """Write `items` sets of views and as many single images, with their captions and cameras."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    azimuths = torch.arange(views) * 360 / views
    captions = {}
    rows = []
    for i in range(items):
        name = f"{i:06d}"
        colour = list(COLOURS)[i % 2]
        captions[name] = [f"a {colour} ball", f"ball, {colour}"]
        pictures = [view(colour, azimuth, size) for azimuth in azimuths.tolist()]
        names = save_views(folder / "sets" / name, pictures)
        write_transforms(folder / "sets" / name, names, orbit(10.0, azimuths, 1.4), 40.0)
        view(colour, 0, size).save(folder / "images" / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "captions": captions[name]})
    (folder / "sets" / "captions.json").write_text(json.dumps(captions))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "images" / "metadata.jsonl").write_text(text)
