"""Training pictures: bytes of any kind -> uint8 RGBA of one size, or BadMember with the reason.

`tools/photos.py` opens them. Colours are weighed by alpha when a picture is made smaller, so that
none leaks in from what is transparent.
"""
import math

import numpy as np
from PIL import Image

from ..tools.errors import BadMember
from ..tools.photos import TOLERANCE, decoding, open_picture, pixels_of, shown

# A render of which less than this share is transparent has no background cut away.
LEAST_CLEAR = 0.005


# ---- pixels ----------------------------------------------------------------------------------

def scaled(picture, box, size):
    """The square `box` (left, top, right, bottom) of RGB or RGBA as uint8 [4, size, size].

    Straight alpha; beyond the picture it is transparent (RGBA) or black (RGB). Pixels of the same
    size are not touched; those of a whole multiple are averaged.
    """
    if box != (0, 0, *picture.size):
        picture = picture.crop(box)
    side, kernel = picture.width, Image.Resampling.BICUBIC
    if side != size and picture.mode == "RGBA":
        # RGBa: colours multiplied by alpha. Where these end a bicubic kernel would overshoot.
        picture, kernel = picture.convert("RGBa"), Image.Resampling.HAMMING
    if side % size:
        picture = picture.resize((size, size), kernel, reducing_gap=3.0)
    elif side > size:
        picture = picture.reduce(side // size)
    planes = np.empty((4, size, size), np.uint8)
    planes[3] = 255
    for plane, band in zip(planes, picture.split()):
        plane[:] = np.asarray(band)
    if picture.mode == "RGBa":
        divide_by_alpha(planes)
    return planes


def divide_by_alpha(planes):
    """Make premultiplied colours straight, in place: uint8 [4, H, W]. Pillow rounds down here."""
    alpha = planes[3]
    partly = (alpha > 0) & (alpha < 255)
    weight = alpha[partly].astype(np.uint16)
    colours = planes[:3, partly].astype(np.uint16)
    # Rounded by themselves, a colour can be above its alpha.
    planes[:3, partly] = ((colours * 255 + weight // 2) // weight).clip(max=255)


def decode_image(content, size):
    """A captioned image as uint8 [4, size, size]: turned by its EXIF data, its middle square.

    Straight alpha, 255 where there is none. Raises BadMember.
    """
    picture = open_picture(content)
    with decoding():
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, but not below what is asked for.
        picture.draft("RGB", (size, size))
        picture = shown(picture)
        planes = scaled(picture, square(picture.size), size)
    if planes[3].max() <= TOLERANCE:
        raise BadMember("transparent all over")
    return planes


def square(shape, centre=None):
    """The square of the shorter side of (width, height) round a point (x, y), or the middle."""
    side = min(shape)
    x, y = centre or (shape[0] / 2, shape[1] / 2)
    # Rounded; half a pixel is rounded down.
    left, top = math.ceil(x - side / 2 - 0.5), math.ceil(y - side / 2 - 0.5)
    return left, top, left + side, top + side


# ---- renders ---------------------------------------------------------------------------------

def decode_view(content, size, *, background=None, mask=None, centre=None):
    """A render as uint8 [4, size, size] with straight alpha. Raises BadMember.

    A picture that has no transparency needs `mask`, the bytes of a grey picture of the same size
    (black is transparent), or `background` (r, g, b) of 0..255: what has this colour and is
    connected with the border becomes transparent. Of a picture that is not square, the square
    round `centre` is taken, the camera's principal point (x, y) in pixels, with the shorter side.
    EXIF data is not obeyed: cameras belong to the pixels as they are stored.
    """
    picture = pixels_of(open_picture(content))
    with decoding():
        if is_opaque(picture):
            picture = cut_out(picture.convert("RGB"), background, mask)
        planes = scaled(picture, square(picture.size, centre), size)
    if planes[3].max() <= TOLERANCE:
        raise BadMember("transparent all over")
    return planes


def is_opaque(picture):
    """Whether an RGB or RGBA picture has no transparent pixels but a few, or a soft border."""
    if picture.mode == "RGB":
        return True
    inside = np.asarray(picture.getchannel("A"))[1:-1, 1:-1]
    return np.count_nonzero(inside < 255 - TOLERANCE) <= LEAST_CLEAR * inside.size


def cut_out(picture, background, mask):
    """An RGB picture with the alpha of its mask or of the background's colour. Raises BadMember."""
    if mask is not None:
        alpha = read_mask(mask, picture.size)
    elif background is not None:
        colours = np.asarray(picture).astype(np.int16)
        alike = (np.abs(colours - np.array(background, np.int16)) <= TOLERANCE).all(-1)
        alpha = np.where(connected_with_border(alike), 0, 255).astype(np.uint8)
    else:
        raise BadMember(
            "no transparency: render it with a transparent background, or name the colour of its "
            "background with --background"
        )
    if alpha.min() >= 255 - TOLERANCE:
        raise BadMember("opaque all over: neither its mask nor the background's colour parts it")
    picture.putalpha(Image.fromarray(alpha))
    return picture


def read_mask(content, shape):
    """The alpha, uint8 [H, W], that a mask means. Raises BadMember if it has another size."""
    try:
        picture = pixels_of(open_picture(content))
        mask = np.asarray(picture.convert("L"))
    except BadMember as error:
        raise BadMember(f"its mask: {error}") from error
    if picture.size != shape:
        raise BadMember("its mask has {}x{} pixels, but the picture has {}x{}".format(
            *picture.size, *shape))
    # Some masks say 1, not 255, for what is there.
    return mask * np.uint8(255) if mask.max() == 1 else mask


def connected_with_border(there):
    """Which pixels of a mask [H, W] are connected with its border, through others of the mask.

    The pixels of each row fall into runs. Those that touch the border are reached, and from
    them, again and again, the runs that overlap one in the row above or below.
    """
    begins = there.copy()
    begins[:, 1:] &= ~there[:, :-1]
    # Runs are numbered from 1 on; 0 is what is not in the mask.
    run = np.cumsum(begins, dtype=np.int32).reshape(there.shape) * there
    reached = np.zeros(int(run.max()) + 1, bool)
    for edge in (run[0], run[-1], run[:, 0], run[:, -1]):
        reached[edge] = True
    # Each pair of runs that overlap, at the pixel where the overlap begins.
    overlap = there[:-1] & there[1:] & (begins[:-1] | begins[1:])
    above, below = run[:-1][overlap], run[1:][overlap]
    before, now = -1, np.count_nonzero(reached)
    while now > before:
        reached[below[reached[above]]] = True
        reached[above[reached[below]]] = True
        before, now = now, np.count_nonzero(reached)
    reached[0] = False
    return reached[run]
