"""Pictures of a run: PNG files, sheets of images, the turntable, depth and normals in colour.

Images are tensors [3, H, W] in [0, 1], the top row first. Files are written whole or not at
all (files.py), but for those of `save_views`.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .errors import UserError
from .files import write_atomic

# White pixels between the images of a sheet.
GAP = 2


def grid(images, columns):
    """A white sheet with images [N, 3, H, W] row by row, GAP pixels apart: [3, H', W']."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet_height = rows * (height + GAP) - GAP
    sheet_width = columns * (width + GAP) - GAP
    sheet = images.new_ones(3, sheet_height, sheet_width)
    for i, image in enumerate(images):
        y = i // columns * (height + GAP)
        x = i % columns * (width + GAP)
        sheet[:, y:y + height, x:x + width] = image
    return sheet


def to_pil(image):
    """A Pillow picture of an image [3, H, W], [4, H, W] (with alpha) or [H, W] (grey).

    What lies outside [0, 1] is clamped, NaN is black.
    """
    image = image.detach().float().cpu().nan_to_num()
    pixels = (image.clamp(0, 1) * 255).round().byte()
    if pixels.dim() == 3:
        pixels = pixels.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def check_numbers(images, advice="its weights may be damaged"):
    """Raise UserError if pictures that a model drew are NaN, which would be shown as black."""
    if images.isnan().any():
        raise UserError(f"the model's pictures are not numbers (NaN): {advice}")


def save_png(path, image):
    """Write an image [3, H, W] or [H, W] (grey) as PNG; clamp it to [0, 1]."""
    picture = to_pil(image)
    write_atomic(path, lambda file: picture.save(file, "PNG"))


def save_views(folder, pictures):
    """Write Pillow pictures as 000.png, 001.png, ... into a folder, and return their names.

    The folder is made if it is not there. Unlike the other files here one of these may be half
    written after a kill: what lists them, such as transforms.json, is to be written after them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{k:03d}.png" for k in range(len(pictures))]
    for name, picture in zip(names, pictures):
        # A data set has 100,000 of them: level 1 takes half the time.
        picture.save(folder / name, compress_level=1)
    return names


def save_turntable(path, frames, seconds=4.0):
    """Write frames [N, 3, H, W] as an animated WebP that plays them in `seconds`, for ever.

    WebP, because GIF has only 256 colours, which gives bands in the shading, and APNG is
    seven times larger.
    """
    first, *others = [to_pil(frame) for frame in frames]
    # Durations are whole milliseconds; rounded ends add up to `seconds`.
    ends = np.arange(len(frames) + 1) * 1000 * seconds / len(frames)
    durations = np.diff(np.round(ends).astype(int)).tolist()

    def save(file):
        first.save(
            file, "WEBP", save_all=True, append_images=others,
            loop=0, quality=90, duration=durations)
    write_atomic(path, save)


# Five colours of a depth picture, from near to far.
DEPTH_COLOURS = [
    [1.00, 0.93, 0.68],
    [0.96, 0.62, 0.36],
    [0.75, 0.29, 0.44],
    [0.40, 0.15, 0.47],
    [0.08, 0.07, 0.25],
]


def depth_picture(depth, opacity):
    """Depth in colour, [..., 3, H, W] in [0, 1]: near is pale, far is dark, nothing is white.

    depth [..., 1, H, W]: the mean distance along the ray of what is seen. opacity
    [..., 1, H, W] in [0, 1]. The colours are stretched from the nearest to the farthest
    solid pixel of all views together.
    """
    solid = depth[opacity > 0.5]
    near, far = 0.0, 1.0
    if solid.numel():
        near, far = solid.min(), solid.max()
    ramp = torch.tensor(DEPTH_COLOURS, device=depth.device)    # [5, 3]
    # 0 is the first colour, 4 the last; colours are linear in between.
    place = ((depth - near) / (far - near + 1e-6)).clamp(0, 1)
    place = place.squeeze(-3) * 4    # [..., H, W]
    low = place.long().clamp(max=3)
    fraction = (place - low)[..., None]
    rgb = torch.lerp(ramp[low], ramp[low + 1], fraction)    # [..., H, W, 3]
    return 1 - opacity + opacity * rgb.movedim(-1, -3)


def normal_picture(normal, opacity):
    """Normals in colour, [..., 3, H, W] in [0, 1]: x, y, z as red, green, blue.

    normal [..., 3, H, W]: unit vectors in the world. opacity [..., 1, H, W] in [0, 1];
    nothing is white.
    """
    return 1 - opacity + opacity * (normal + 1) / 2
