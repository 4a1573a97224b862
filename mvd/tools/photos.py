"""Loads, orients and crops photos: files -> squares of one size, with alpha.

A photo without transparent pixels is cropped to the largest square in its middle. A
cut-out, which has some, is framed round its subject, perhaps beyond the picture's edge.
"""
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif")
FEWEST, MOST = 3, 20


def crop_box(width, height, subject=None):
    """The square that is kept of a picture: (left, top, right, bottom) in pixels.

    subject: the box round what is not transparent, or None. A cut-out's frame measures 1.1 to
    1.6 times the longer side of its subject. A square picture that does stays as it is; else
    the picture's longer side, within these bounds, is laid round the subject.
    """
    left, top, right, bottom = subject or (0, 0, width, height)
    side = min(width, height)
    if subject:
        extent = max(right - left, bottom - top)
        if width == height and 1.1 * extent <= side <= 1.6 * extent:
            return 0, 0, width, height
        side = round(min(max(width, height, 1.1 * extent), 1.6 * extent))
    x = (left + right - side) // 2
    y = (top + bottom - side) // 2
    return x, y, x + side, y + side


def open_photo(file, size):
    """A photo as uint8 [4, size, size], straight alpha, turned as its EXIF data says.

    Raises UserError, with the file's name, if the photo cannot be read or shows nothing.
    """
    name = Path(file).name
    try:
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    # Pillow raises SyntaxError for a broken PNG file.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read {name} ({error}); if it is HEIC, export it as JPEG or PNG") from error
    alpha = picture.getchannel("A")
    subject = None
    if alpha.getextrema()[0] < 255:
        subject = alpha.point(lambda a: 255 * (a >= 128)).getbbox()
        if subject is None:
            raise UserError(f"{name} is transparent all over")
    picture = picture.crop(crop_box(picture.width, picture.height, subject))
    # Pillow weighs colours by alpha: none leaks in from what is transparent.
    picture = picture.resize((size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def load(folder, size):
    """The photos of a folder, sorted by name: (names, uint8 [N, 4, size, size]).

    A photo that cannot be read is left out with a warning that names it. Raises UserError
    unless 3 to 20 photos can be read.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"there is no folder {folder}: "
            f"name one that holds {FEWEST} to {MOST} photos of one subject")
    names, pictures = [], []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            pictures.append(open_photo(path, size))
            names.append(path.name)
        except UserError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
    if not FEWEST <= len(names) <= MOST:
        raise UserError(
            f"{folder} holds {len(names) or 'no'} photos that can be read (JPEG, PNG, WebP), "
            f"but it takes {FEWEST} to {MOST} of one subject")
    return names, torch.stack(pictures)
