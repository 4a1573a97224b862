"""A data folder in the layout that train.py reads: balls of two colours, drawn with Pillow.

It is too small to learn much from.
"""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

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


def strip(colour, size, views):
    """Return the views of a whole orbit, side by side."""
    picture = Image.new("RGBA", (size * views, size))
    for k in range(views):
        picture.paste(view(colour, k * 360 / views, size), (k * size, 0))
    return picture


def write(folder, size=128, items=2, views=32):
    """Write `items` sets of views, as many single images, and index.jsonl."""
    folder = Path(folder)
    (folder / "sets").mkdir(parents=True)
    (folder / "images").mkdir()
    lines = []
    for i in range(items):
        colour = list(COLOURS)[i % 2]
        pictures = {"set": strip(colour, size, views), "image": view(colour, 0, size)}
        for kind, picture in pictures.items():
            file = f"{kind}s/{i:06d}.png"
            picture.save(folder / file)
            lines.append({
                "file": file,
                "kind": kind,
                "captions": [f"a {colour} ball", f"ball, {colour}"],
                "elevation": 10.0,
                "azimuth": 0.0,
                "fov": 40.0,
                "distance": 1.4,
            })
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "index.jsonl").write_text(text)
