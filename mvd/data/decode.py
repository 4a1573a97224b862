"""Pictures as people store them: bytes of any kind -> uint8 RGBA of one size, or a reason why not.

Nothing is decoded half: a file that is damaged, cut short or would come out wrong (16-bit grey,
which Pillow clips to white) raises BadMember. A picture's size is checked by its header before
memory is taken for its pixels.

Colours are weighed by alpha when a picture is made smaller, so that none leaks in from what is
transparent.
"""
import contextlib
import io
import math
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from ..tools.errors import BadMember

# More pixels than this are not decoded. It is the number from which on Pillow warns.
MOST_PIXELS = 89_478_485
# What is tried, the commonest first. Pillow knows others, and runs Ghostscript for one of them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI")
# How a PNG begins.
PNG = b"\x89PNG\r\n\x1a\n"
# A colour or an alpha (of 255) counts as another one up to this difference.
TOLERANCE = 8
# What undoes each EXIF orientation (EXIF 2.3, tag 274).
ORIENTATION = 274
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---- opening ---------------------------------------------------------------------------------

@contextlib.contextmanager
def decoding():
    """Within this context whatever Pillow raises becomes BadMember, and it warns of nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadMember:
        raise
    except Image.DecompressionBombError as error:
        raise BadMember(too_large()) from error
    # Foreign bytes: OSError, SyntaxError, ValueError, EOFError, struct.error, and whatever else.
    except Exception as error:
        raise BadMember(f"cannot be decoded: {error or type(error).__name__}") from error


def too_large():
    return f"more than {MOST_PIXELS:,} pixels; make it smaller"


def open_picture(content):
    """A Pillow picture of the bytes `content`, checked by its header but not decoded yet.

    Raises BadMember if it is no picture, too large, or has pixels that eight bits cannot hold.
    """
    if not content:
        raise BadMember("the file is empty")
    with decoding():
        try:
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            begin = bytes(content[:16])
            raise BadMember(
                f"no picture of a kind that can be read (it begins with {begin!r})"
            ) from error
    if picture.width * picture.height > MOST_PIXELS:
        raise BadMember(too_large())
    if picture.mode.startswith(("I", "F")):
        raise BadMember(
            f"16-bit grey or float pixels (Pillow's mode {picture.mode}), which would come out "
            "white; save it with 8 bits a channel"
        )
    if content.startswith(PNG):
        check_sums(content)
    return picture


def check_sums(content):
    """Raise BadMember if a chunk of a PNG differs from its checksum.

    Pillow does not compare those of the pixels. What is cut short it notices.
    """
    content, place = memoryview(content), len(PNG)
    kind = b""
    while kind != b"IEND" and place + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + size
        wanted = content[end:end + 4]
        checksum = zlib.crc32(content[place + 4:end]).to_bytes(4, "big")
        if len(wanted) == 4 and wanted != checksum:
            raise BadMember("damaged: a checksum is wrong")
        place = end + 4


# ---- pixels ----------------------------------------------------------------------------------

def coloured(picture):
    """The picture as RGBA if it has transparency of any kind, else as RGB."""
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def turned(picture):
    """The picture as it is meant to be seen, by the orientation in its EXIF data."""
    try:
        orientation = picture.getexif().get(ORIENTATION)
    # The pixels are sound: as other viewers do, damaged EXIF data is not obeyed.
    except Exception:
        orientation = None
    turn = TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


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
        picture.load()
        picture = turned(coloured(picture))
        box = square(picture.size)
        planes = scaled(picture, box, size)
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
    picture = open_picture(content)
    with decoding():
        picture.load()
        picture = coloured(picture)
        if is_opaque(picture):
            picture = cut_out(picture.convert("RGB"), background, mask)
        planes = scaled(picture, square(picture.size, centre), size)
    if planes[3].max() <= TOLERANCE:
        raise BadMember("transparent all over")
    return planes


def is_opaque(picture):
    """Whether an RGB or RGBA picture has no transparent pixel."""
    return picture.mode == "RGB" or picture.getchannel("A").getextrema()[0] >= 255 - TOLERANCE


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
    picture.putalpha(Image.fromarray(alpha))
    if is_opaque(picture):
        raise BadMember("opaque all over: neither its mask nor the background's colour parts it")
    return picture


def read_mask(content, shape):
    """The alpha, uint8 [H, W], that a mask means. Raises BadMember if it has another size."""
    try:
        picture = open_picture(content)
        with decoding():
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
