"""Photos as people have them -> squares of one size: turned as EXIF says, cropped, with alpha or without.

A photo without alpha is cropped to the largest square in its middle. A cut-out is framed round its subject, unless it is
a square that already is; the frame may reach beyond the picture, where nothing is.
"""
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif")
FEWEST, MOST = 3, 20
CUT_OUT = (1.1, 1.6)                             # a cut-out's frame, as a multiple of its longer side: at least, at most


def crop_box(width, height, subject=None):
    """The square (left, top, right, bottom) that is kept of a picture, in pixels. subject: the box of what is not transparent.

    A cut-out that fills its square decently stays where it is; one that fills another picture decently keeps its longer side; a smaller
    or larger one gets a frame that suits it.
    """
    left, top, right, bottom = subject or (0, 0, width, height)
    side = min(width, height)
    if subject:
        extent = max(right - left, bottom - top)
        if width == height and CUT_OUT[0] * extent <= width <= CUT_OUT[1] * extent:
            return 0, 0, width, height
        side = round(min(max(width, height, CUT_OUT[0] * extent), CUT_OUT[1] * extent))
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return x, y, x + side, y + side


def open_photo(path, size):
    """A file -> uint8 [4, size, size], straight alpha. Raises UserError, with the file's name, if it cannot be read."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            brand = file.read(12)[4:]                                           # an ISO media file: its type, then its brand
        if path.suffix.lower() in (".heic", ".heif") or brand in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
            raise UserError(f"{path.name} is HEIC, which cannot be read here: export it as JPEG or PNG")
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:   # Pillow's SyntaxError: a broken PNG
        raise UserError(f"cannot read {path.name} ({error})") from error
    alpha = picture.getchannel("A")
    subject = None
    if alpha.getextrema()[0] < 255:
        subject = alpha.point(lambda a: 255 * (a >= 128)).getbbox()
        if subject is None:
            raise UserError(f"{path.name} is transparent all over")
    picture = picture.crop(crop_box(*picture.size, subject)).resize((size, size), Image.LANCZOS)   # which weighs colour by alpha
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def load(folder, size):
    """The photos of a folder, in the order of their names: (names, uint8 [N, 4, size, size]). One that cannot be read is left out,
    and a warning names it. Raises UserError unless 3 to 20 can."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: name one that holds {FEWEST} to {MOST} photos of one subject")
    names, pictures = [], []
    for path in sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."):
        try:
            pictures.append(open_photo(path, size))
            names.append(path.name)
        except UserError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
    if not FEWEST <= len(names) <= MOST:
        raise UserError(f"{folder} holds {len(names) or 'no'} photos that can be read (JPEG, PNG, WebP), but it takes {FEWEST} to {MOST} "
                        "of one subject")
    return names, torch.stack(pictures)
