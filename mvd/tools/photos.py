"""Pictures that others made: files of any kind -> pixels, as a careful viewer shows them.

Every command opens pictures here. Whatever a file holds beside its pixels, they come out with
eight bits per channel, in sRGB, and with the transparency that the file means; of an animation, or
of several pages, the first is taken. What cannot be shown so raises BadMember with the reason:
nothing is decoded half, and a picture's size is checked before memory is taken for its pixels.

Below that: the photos of one subject, which dreambooth.py learns.
"""
import contextlib
import io
import os
import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFilter, features

from .errors import BadMember, UserError

# The endings of pictures, in lower case. Where a name lacks its ending they are tried in turn.
SUFFIXES = (
    ".png", ".webp", ".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".avif", ".tif", ".tiff", ".bmp",
    ".gif", ".apng", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico",
    ".qoi")
# Those of pictures that cannot be shown. (Pillow would show the stamp in a raw photo.)
UNREADABLE = (
    ".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf",
    ".rw2", ".psd", ".svg", ".exr", ".hdr")
# What is tried, the commonest first; an old Pillow lacks some. It knows others, and runs another
# program, Ghostscript, for one of them.
KINDS = "JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 PPM ICO QOI TGA".split()
Image.init()
FORMATS = [kind for kind in KINDS if kind in Image.OPEN]
# More pixels than this are not decoded. It is the number from which on Pillow warns.
MOST_PIXELS = 89_478_485
# An alpha (of 255) up to this is transparent.
TOLERANCE = 8
# How a PNG begins; the chunks besides the pixels that its looks depend on; and what a PNG can do
# without where it is damaged.
PNG = b"\x89PNG\r\n\x1a\n"
LOOKS = {b"tRNS", b"gAMA", b"sRGB", b"iCCP", b"eXIf"}
SPARE = LOOKS - {b"tRNS"} | {
    b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs", b"bKGD", b"cHRM", b"sBIT", b"sPLT", b"hIST"}
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
# TIFF's tags BitsPerSample and PhotometricInterpretation, whose 0 means that 0 is white.
BITS, PHOTOMETRIC = 258, 262
FEWEST, MOST = 3, 20
# A picture of which no more than this share is transparent is a photo, not a cut-out; its border,
# which is this wide (of its longer side), may be.
LEAST_CLEAR, BORDER = 0.05, 0.02


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


def is_heic(begin):
    """Whether a file that begins so holds a picture as iPhones write it."""
    return begin[4:8] == b"ftyp" and begin[8:11] in (b"hei", b"hev", b"mif", b"msf")


def begins_as_picture(path):
    """Whether a file is a picture by how it begins, whatever its name."""
    try:
        with open(path, "rb") as file:
            begin = file.read(16)
    except OSError:
        return False
    tests = [Image.OPEN[kind][1] for kind in FORMATS]
    return is_heic(begin) or any(test(begin) for test in tests if test)


def open_picture(content):
    """A Pillow picture of the bytes `content`, checked by its header but not decoded yet.

    Raises BadMember if it is not a picture, or too large.
    """
    if not content:
        raise BadMember("the file is empty")
    begin = bytes(content[:32])
    is_png = begin.startswith(PNG)
    if is_png:
        content = bare_png(content)
    with decoding():
        try:
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            kind = "HEIC" if is_heic(begin) else f"it begins with {begin[:16]!r}"
            raise BadMember(
                f"no picture of a kind that can be read ({kind}); export it as JPEG or PNG"
            ) from error
    if picture.width * picture.height > MOST_PIXELS:
        raise BadMember(too_large())
    clear = picture.info.get("transparency")
    if is_png and clear is not None:
        picture.info["transparency"] = in_eight_bits(clear, picture.mode, depth=begin[24])
    return picture


def bare_png(content):
    """The bytes of a PNG without what says nothing of its looks, such as megabytes of text.

    Raises BadMember if a chunk differs from its checksum, unless the picture can do without it.
    (Pillow does not compare those of the pixels. What is cut short it notices.)
    """
    parts, place, kind = [PNG], len(PNG), b""
    while kind != b"IEND" and place + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place:place + 12 + size]
        whole = len(chunk) == 12 + size
        sound = not whole or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not sound and kind not in SPARE:
            raise BadMember("damaged: a checksum is wrong")
        # The names of chunks that no reader may pass over begin with a capital.
        if sound and (kind[:1].isupper() or kind in LOOKS):
            parts.append(chunk)
        place += 12 + size
    return b"".join(parts)


def in_eight_bits(clear, mode, depth):
    """The transparent colour of a PNG as its decoded pixels have it; Pillow gives the file's."""
    if mode == "RGB" and depth == 16:
        return tuple(value >> 8 for value in clear)
    return clear * 255 // (2**depth - 1) if mode == "L" else clear


# ---- pixels ----------------------------------------------------------------------------------

def shown(picture):
    """An opened picture as it is meant to be seen: `pixels_of` it, turned by its EXIF data."""
    pixels = pixels_of(picture)
    try:
        orientation = picture.getexif().get(ORIENTATION)
    # The pixels are sound: as other viewers do, damaged EXIF data is not obeyed.
    except Exception:
        orientation = None
    turn = TURNS.get(orientation)
    return pixels if turn is None else pixels.transpose(turn)


@decoding()
def pixels_of(picture):
    """An opened picture, decoded: RGBA if it has transparency of any kind, else RGB.

    Eight bits per channel, in sRGB. Raises BadMember.
    """
    picture.load()
    profile, power = picture.info.get("icc_profile"), power_of(picture.info)
    if picture.mode.startswith(("I", "F")):
        picture, power = eight_bits(picture, power), 1.0
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    # What a profile may speak of.
    channels = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")
    transform = to_srgb(profile, channels) if profile else None
    if not transform and power == 1.0:
        return picture if picture.mode == mode else picture.convert(mode)
    colours = picture.convert(channels)
    if transform:
        colours = ImageCms.applyTransform(colours, transform)
    if power != 1.0:
        table = [round(255 * (value / 255) ** power) for value in range(256)]
        colours = colours.point(table * len(colours.getbands()))
    colours = colours.convert("RGB")
    if mode == "RGBA":
        colours.putalpha(picture.convert("RGBA").getchannel("A"))
    return colours


def power_of(info):
    """The power that makes sRGB of pixels in [0, 1], by the gAMA of a PNG; 1.0 if there is none.

    A profile, or the word that it is sRGB, goes before that.
    """
    gamma = info.get("gamma", 0.0)
    if "srgb" in info or "icc_profile" in info or not 0.1 < gamma < 10:
        return 1.0
    power = 1 / (2.2 * gamma)
    # Less nobody sees.
    return power if abs(power - 1) > 0.05 else 1.0


@lru_cache(maxsize=16)
def to_srgb(profile, mode):
    """Pillow's transform from a mode (L, RGB, CMYK) to sRGB, by the bytes of an ICC profile.

    None if it changes nothing, as sRGB's own; or if the profile is of no use, so that viewers do
    not obey it: it is damaged, or speaks of another kind of pixels.
    """
    if not features.check("littlecms2"):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    # A ramp of all greys, or six levels of each colour.
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode != "L":
        levels = 51 * np.indices((6, 6, 6), np.uint8).reshape(3, 6, 36)
        ramp = Image.merge("RGB", [Image.fromarray(level) for level in levels]).convert(mode)
    before = np.asarray(ramp.convert("RGB")).astype(int)
    after = np.asarray(ImageCms.applyTransform(ramp, transform))
    return transform if np.abs(after - before).max() > 2 else None


def eight_bits(picture, power):
    """A picture of grey pixels with more than eight bits as one with eight: L, or LA.

    power: of what is in [0, 1], where 1 is white. Raises BadMember.
    """
    values = np.asarray(picture).astype(np.float32)
    tags = picture.tag_v2 if picture.format == "TIFF" else {}
    if picture.mode.startswith("I;"):
        white = 2 ** tags.get(BITS, (16,))[0] - 1
    else:
        white = white_of(values) if tags or picture.mode == "F" else 65535
    levels = (values / white).clip(0, 1)
    if tags.get(PHOTOMETRIC) == 0:
        levels = 1 - levels
    grey = Image.fromarray((255 * levels**power).round().astype(np.uint8))
    clear = picture.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def white_of(values):
    """What is white in pixels whose kind does not say it: 1, 255 or 65535. Raises BadMember.

    A few pixels may be brighter, or below black.
    """
    if np.isfinite(values).all():
        black, bright = np.quantile(values, (0.01, 0.99))
        for white in (1, 255, 65535):
            if black >= 0 and bright <= white:
                return white
    raise BadMember(
        f"32-bit pixels from {values.min():.4g} to {values.max():.4g}, of which nothing says what "
        "is white; save it with 8 bits a channel")


# ---- photos of one subject -------------------------------------------------------------------

def subject_of(picture):
    """The box (left, top, right, bottom) round a cut-out's subject; None if it is a photo.

    picture: RGB or RGBA. What makes a cut-out is a share of transparent pixels: not a few of them,
    nor a border that is soft, or corners that are round. Specks beside the subject are not of it.
    Raises BadMember if there is nothing to see.
    """
    if picture.mode == "RGB":
        return None
    # In cells, 128 or more along the longer side, which are looked at on average.
    side = max(1, max(picture.size) // 128)
    cells = picture.getchannel("A").reduce(side)
    most = cells.getextrema()[1]
    if most <= TOLERANCE:
        raise BadMember("transparent all over")
    seen = cells.point(lambda value: 255 * (value >= most / 2))
    border = max(1, round(BORDER * max(seen.size)))
    inside = np.asarray(seen)[border:-border, border:-border]
    if np.count_nonzero(inside == 0) <= LEAST_CLEAR * inside.size:
        return None
    # A single speck does not count: the median with its neighbours removes it.
    box = seen.filter(ImageFilter.MedianFilter(3)).getbbox() or seen.getbbox()
    left, top, right, bottom = [side * edge for edge in box]
    return left, top, min(right, picture.width), min(bottom, picture.height)


def crop_box(width, height, subject=None):
    """The square that is kept of a picture: (left, top, right, bottom) in pixels.

    subject: the box round the subject of a cut-out, or None for a photo: then it is the largest
    square in the middle. A cut-out's square measures 1.1 to 1.6 times the longer side of its
    subject. It lies round the picture if all sides of that do, else round the subject, perhaps
    beyond the picture's edge; within these bounds it is as large as the picture's longer side.
    """
    left, top, right, bottom = subject or (0, 0, width, height)
    side = min(width, height)
    if subject:
        extent = max(right - left, bottom - top)
        longer = max(width, height)
        if 1.1 * extent <= side and longer <= 1.6 * extent:
            left, top, right, bottom = 0, 0, width, height
        side = round(min(max(longer, 1.1 * extent), 1.6 * extent))
    x = (left + right - side) // 2
    y = (top + bottom - side) // 2
    return x, y, x + side, y + side


def open_photo(file, size):
    """A photo as uint8 [4, size, size], straight alpha.

    Raises UserError, with the file's name, if it cannot be read or shows nothing.
    """
    file = Path(file)
    try:
        picture = open_picture(file.read_bytes())
        if picture.format == "TIFF" and file.suffix.lower() in UNREADABLE:
            raise BadMember("a raw photo; export it as JPEG or PNG")
        picture = shown(picture)
        subject = subject_of(picture)
    except OSError as error:
        raise UserError(f"cannot read {file.name}: {error.strerror}") from error
    except BadMember as problem:
        raise UserError(f"cannot read {file.name}: {problem}") from problem
    picture = picture.crop(crop_box(picture.width, picture.height, subject))
    # Pillow weighs colours by alpha: none leaks in from what is transparent.
    picture = picture.convert("RGBA").resize((size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def may_be_photo(path):
    """Whether a file has the name of a picture, or is one.

    A folder is not, nor a pipe: reading it would wait for ever. A broken link may be: it is named.
    """
    if path.name.startswith(".") or (os.path.exists(path) and not os.path.isfile(path)):
        return False
    return path.suffix.lower() in SUFFIXES + UNREADABLE or begins_as_picture(path)


def load(folder, size):
    """The photos of a folder, sorted by name: (names, uint8 [N, 4, size, size]).

    A photo that cannot be read is left out with a warning that names it. Raises UserError
    unless 3 to 20 photos can be read.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"there is no folder {folder}: "
            f"name one that holds {FEWEST} to {MOST} photos of one subject")
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    names, pictures = [], []
    for path in filter(may_be_photo, paths):
        try:
            pictures.append(open_photo(path, size))
            names.append(path.name)
        except UserError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
    if not FEWEST <= len(names) <= MOST:
        raise UserError(
            f"{folder} holds {len(names) or 'no'} photos that can be read (JPEG, PNG, WebP …), "
            f"but it takes {FEWEST} to {MOST} of one subject")
    return names, torch.stack(pictures)
