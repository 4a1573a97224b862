"""Pictures of all kinds against float64 arithmetic and against what was drawn; bad ones say why."""
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mvd.data import decode
from mvd.data.decode import decode_image, decode_view
from mvd.tools.errors import BadMember

RED, GREEN, BLUE, YELLOW = (250, 10, 10), (10, 240, 10), (10, 10, 230), (240, 240, 10)
QUARTERS = [RED, GREEN, BLUE, YELLOW]
WHITE = (255, 255, 255)


def encoded(picture, kind="PNG", **options):
    """The bytes of a Pillow picture."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def drawn(width=64, height=None):
    """Four quarters, each of its own colour: RGB."""
    height = height or width
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate(QUARTERS):
        left, top = i % 2 * (width // 2), i // 2 * (height // 2)
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def quarters(planes):
    """The colours in the middles of the four quarters [4, 3] of uint8 [4, H, W]."""
    near, far = planes.shape[-1] // 4, planes.shape[-1] * 3 // 4
    places = [(near, near), (near, far), (far, near), (far, far)]
    return np.array([planes[:3, y, x] for y, x in places]).astype(int)


def noise(size, channels, seed=0):
    """A picture of random but smooth colours, uint8 [size, size, channels]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, channels)).astype(np.uint8)
    bands = [
        Image.fromarray(coarse[..., k]).resize((size, size), Image.Resampling.BICUBIC)
        for k in range(channels)
    ]
    return np.stack([np.asarray(band) for band in bands], -1)


def fails(function, content, *words, **options):
    """Check that it raises BadMember with these words in its text, and warns of nothing."""
    with warnings.catch_warnings(record=True) as warned, pytest.raises(BadMember) as problem:
        warnings.simplefilter("always")
        function(content, 32, **options)
    assert not warned, f"it warns: {warned[0].message}"
    text = str(problem.value)
    assert all(word in text for word in words), f"the reason {text!r} does not say {words}"
    assert "\n" not in text


# ---- kinds of pictures -----------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000"])
def test_every_kind_of_file_shows_what_was_drawn(kind):
    planes = decode_image(encoded(drawn(), kind), 32)
    assert planes.shape == (4, 32, 32) and planes.dtype == np.uint8
    assert np.abs(quarters(planes) - QUARTERS).max() < 30, f"{kind} has other colours"
    assert (planes[3] == 255).all(), f"{kind} without transparency is transparent"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB", "RGBA", "LA", "YCbCr"])
def test_every_mode_of_pixels_is_right(mode):
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    image = drawn() if mode not in ("1", "L", "LA") else drawn().convert("L")
    expected = quarters(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    if mode == "1":
        image, expected = Image.new("1", (64, 64), 1), np.full((4, 3), 255)
    # Without a compression Pillow 11.3 writes a YCbCr TIFF that nothing reads right.
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    found = quarters(decode_image(encoded(image.convert(mode), kind, **options), 32))
    assert np.abs(found - expected).max() < 12, f"{mode} has other colours"


def test_a_cmyk_jpeg_is_not_inverted():
    found = quarters(decode_image(encoded(drawn(128).convert("CMYK"), "JPEG", quality=95), 32))
    assert np.abs(found - QUARTERS).max() < 12


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_alpha(mode):
    """PNG's tRNS: one colour of a palette, of grey or of RGB is transparent."""
    image = Image.new(mode, (32, 32), {"P": 1, "L": 77, "RGB": (1, 2, 3)}[mode])
    if mode == "P":
        image.putpalette([9, 8, 7, 0, 0, 0])
    clear = {"P": 0, "L": 7, "RGB": (9, 8, 7)}[mode]
    image.paste(clear, (0, 0, 32, 16))
    content = encoded(image, transparency=clear)
    for function in (decode_image, decode_view):
        planes = function(content, 32)
        assert (planes[3, :16] == 0).all(), f"{function.__name__}: {mode} is opaque"
        assert (planes[3, 16:] == 255).all()


def test_grey_with_alpha_and_sixteen_bit_rgba_are_right():
    pixels = np.zeros((16, 16, 2), np.uint8)
    pixels[4:12, 4:12] = 90, 255
    planes = decode_view(encoded(Image.fromarray(pixels, "LA")), 16)
    assert (planes[:3, 4:12, 4:12] == 90).all()
    assert (planes[3] == pixels[..., 1]).all()
    rows = np.zeros((16, 16, 4), ">u2")
    rows[4:12, 4:12] = 100 * 257, 200 * 257, 30 * 257, 65535
    planes = decode_view(png_of(rows, depth=16, colour=6), 16)
    assert planes[:, 8, 8].tolist() == [100, 200, 30, 255], "16-bit RGBA"
    assert planes[3, 0, 0] == 0


def png_of(rows, depth, colour, width=None, height=None):
    """The bytes of a PNG with these samples, written without Pillow."""
    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    size = struct.pack(">II", width or rows.shape[1], height or rows.shape[0])
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = chunk(b"IHDR", size + bytes([depth, colour, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_undone(kind):
    """A camera that stores the picture turned says so in tag 274 (EXIF 2.3, table 4)."""
    turn = Image.Transpose
    stored_as = {
        1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }
    for orientation, how in stored_as.items():
        exif = Image.Exif()
        exif[274] = orientation
        stored = drawn(128) if how is None else drawn(128).transpose(how)
        content = encoded(stored, kind, exif=exif)
        found = quarters(decode_image(content, 32))
        assert np.abs(found - QUARTERS).max() < 30, f"{kind}, orientation {orientation}"
    if kind == "PNG":
        # A render's camera belongs to the pixels as they are stored.
        stored.putalpha(Image.new("L", (128, 128), 200))
        found = quarters(decode_view(encoded(stored, exif=exif), 128))
        assert (found == quarters(np.asarray(stored).transpose(2, 0, 1))).all()


def test_damaged_exif_data_does_not_cost_the_picture():
    content = encoded(drawn(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert np.abs(quarters(decode_image(content, 32)) - QUARTERS).max() < 30


# ---- sizes -----------------------------------------------------------------------------------

def test_the_middle_square_is_taken():
    wide = Image.new("RGB", (200, 64), "white")
    wide.paste(drawn(), (68, 0))
    tall = Image.new("RGB", (64, 129), "white")
    tall.paste(drawn(), (0, 32))
    for image in (wide, tall):
        planes = decode_image(encoded(image), 64)
        assert (planes[:3] == np.asarray(drawn()).transpose(2, 0, 1)).all()
    turned = encoded(wide, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"
                     b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    found = quarters(decode_image(turned, 32))
    clockwise = [BLUE, RED, YELLOW, GREEN]
    assert np.abs(found - clockwise).max() < 12, "a wide photo that was turned"


@pytest.mark.parametrize("side", [64, 128, 130, 200, 511, 512, 1024, 40])
def test_a_jpeg_decoded_small_looks_like_the_whole_one(side):
    """Pillow's draft must not go below the size that is asked for, or leave out a part."""
    pixels = noise(side, 3)
    content = encoded(Image.fromarray(pixels), "JPEG", quality=95)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    expected = np.asarray(whole.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    error = np.abs(decode_image(content, 64)[:3].astype(int) - expected)
    assert error.mean() < 1.5 and error.max() < 20, f"{side}: off by {error.mean():.2f}"


def averaged(rgba, factor):
    """float64 [4, h, w] of uint8 [H, W, 4]: colours (weighed by alpha, 0 where it is 0), alpha."""
    rgba = rgba.astype(np.float64)
    weight = rgba[..., 3:]
    blocks = np.concatenate([rgba[..., :3] * weight, weight], -1)
    n = len(rgba) // factor
    blocks = blocks.reshape(n, factor, n, factor, 4).mean((1, 3))
    colours = np.divide(blocks[..., :3], blocks[..., 3:], out=np.zeros((n, n, 3)),
                        where=blocks[..., 3:] > 0)
    return np.concatenate([colours, blocks[..., 3:]], -1).transpose(2, 0, 1)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_render_is_made_smaller_as_float64_does(factor):
    pixels = noise(32 * factor, 4, seed=factor)
    # Transparent pixels of a loud colour, which must not leak in.
    pixels[:, :13] = 255, 0, 255, 0
    planes = decode_view(encoded(Image.fromarray(pixels)), 32).astype(np.float64)
    exact = averaged(pixels, factor)
    assert np.abs(planes[3] - exact[3]).max() < 0.6, "alpha is not rounded to the nearest"
    # Over any background; eight bits of premultiplied colour are rounded twice.
    for background in (0.0, 255.0):
        over = [p[:3] * p[3] / 255 + background * (1 - p[3] / 255) for p in (planes, exact)]
        error = over[0] - over[1]
        assert np.abs(error).max() < 2, f"off by {np.abs(error).max():.2f}"
        assert abs(error.mean()) < 0.15, f"rounded to one side: {error.mean():.3f} on average"


def test_another_size_keeps_colours_apart_from_what_is_transparent():
    pixels = np.zeros((100, 100, 4), np.uint8)
    pixels[..., :3] = WHITE
    pixels[20:80, 30:70] = 10, 20, 200, 255
    planes = decode_view(encoded(Image.fromarray(pixels)), 64).astype(int)
    seen = planes[:3, planes[3] > 64] - np.array([[10], [20], [200]])
    assert np.abs(seen).max() < 12, "the white of transparent pixels leaks in"
    assert planes[3, 32, 32] == 255 and planes[3, 2, 2] == 0
    assert abs(planes[3].sum() / 255 - 0.6 * 0.4 * 64 * 64) < 8, "its area has changed"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_picture_of_the_right_size_is_untouched_to_the_bit(kind):
    pixels = noise(32, 4)
    pixels[:5] = 17, 34, 51, 0
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(pixels), kind, **options)
    for function in (decode_image, decode_view):
        planes = function(content, 32)
        assert (planes == pixels.transpose(2, 0, 1)).all(), function.__name__
        assert planes.flags.writeable and planes.flags.c_contiguous


def test_a_render_that_is_not_square_is_cut_round_its_principal_point():
    pixels = noise(48, 4)[:32]                # 48 wide, 32 high
    pixels[..., 3] |= 16
    pixels[0, 0, 3] = 0
    content = encoded(Image.fromarray(pixels))
    planes = pixels.transpose(2, 0, 1)
    assert (decode_view(content, 32) == planes[:, :, 8:40]).all(), "its middle"
    assert (decode_view(content, 32, centre=(20.2, 15.9)) == planes[:, :, 4:36]).all()
    beyond = decode_view(content, 32, centre=(40, 12))
    assert (beyond[:, 4:, :24] == planes[:, :28, 24:]).all()
    assert (beyond[3, :4] == 0).all() and (beyond[3, :, 24:] == 0).all(), "beyond it is opaque"


# ---- cutting out -----------------------------------------------------------------------------

def ball(size=64):
    """A red disc with a white spot, on white: RGB, and where the disc is, bool [H, W]."""
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    there = x**2 + y**2 < (size * 0.4)**2
    pixels = np.full((size, size, 3), 255, np.uint8)
    pixels[there] = 200, 30, 30
    pixels[x**2 + y**2 < (size * 0.1)**2] = WHITE
    return pixels, there


def test_the_background_is_cut_away_but_not_what_it_surrounds():
    pixels, there = ball()
    pixels[0] = 250    # not quite white
    content = encoded(Image.fromarray(pixels))
    planes = decode_view(content, 64, background=WHITE)
    assert (planes[3] == np.where(there, 255, 0)).all(), "the white spot is not of the background"
    assert (planes[:3].transpose(1, 2, 0) == pixels).all()
    # An opaque RGBA picture is one without transparency.
    content = encoded(Image.fromarray(pixels).convert("RGBA"))
    assert (decode_view(content, 64, background=WHITE) == planes).all()
    fails(decode_view, content, "no transparency", "--background")
    fails(decode_view, content, "opaque all over", background=(0, 0, 255))
    fails(decode_view, encoded(Image.new("RGB", (9, 9), WHITE)), "transparent all over",
          background=WHITE)


def test_a_few_transparent_pixels_cut_nothing_out():
    pixels, there = ball()
    picture = Image.fromarray(pixels).convert("RGBA")
    wanted = np.where(there, 255, 0)
    for place in ((0, 0), (63, 5), (32, 32)):
        picture.putpixel(place, (255, 255, 255, 0))
    content = encoded(picture)
    assert (decode_view(content, 64, background=WHITE)[3] == wanted).all()
    assert (decode_view(content, 64, mask=encoded(Image.fromarray(wanted.astype(np.uint8))))[3]
            == wanted).all()
    fails(decode_view, content, "no transparency", "--background")
    # Nor does a border that is soft.
    soft = np.dstack([pixels, np.full((64, 64), 120, np.uint8)])
    soft[1:-1, 1:-1, 3] = 255
    assert (decode_view(encoded(Image.fromarray(soft)), 64, background=WHITE)[3] == wanted).all()
    # Corners are more than that.
    full = Image.fromarray(np.dstack([pixels, np.full((64, 64), 255, np.uint8)]))
    full.paste((0, 0, 0, 0), (0, 0, 8, 8))
    assert np.count_nonzero(decode_view(encoded(full), 64, background=WHITE)[3] == 0) == 64


@pytest.mark.parametrize("kind, values", [("PNG", np.uint16), ("TIFF", np.int32)])
def test_a_mask_of_more_bits_is_as_grey_as_it_looks(kind, values):
    pixels, there = ball()
    mask = encoded(Image.fromarray((there * 20_000 + 9_000).astype(values)), kind)
    alpha = decode_view(encoded(Image.fromarray(pixels)), 64, mask=mask)[3]
    assert np.abs(alpha - np.where(there, 29_000 / 257, 9_000 / 257)).max() <= 1


def reached_slowly(there):
    """connected_with_border by one pixel at a time."""
    height, width = there.shape
    waiting = [(y, x) for y in range(height) for x in range(width)
               if there[y, x] and (y in (0, height - 1) or x in (0, width - 1))]
    reached = np.zeros_like(there)
    while waiting:
        y, x = waiting.pop()
        if 0 <= y < height and 0 <= x < width and there[y, x] and not reached[y, x]:
            reached[y, x] = True
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return reached


def test_the_flood_from_the_border_reaches_what_a_slow_one_does():
    dice = np.random.default_rng(0)
    for share in (0.0, 0.4, 0.55, 0.6, 0.7, 0.9, 1.0):
        there = dice.random((37, 41)) < share
        assert (decode.connected_with_border(there) == reached_slowly(there)).all(), share
    spiral = np.ones((41, 41), bool)
    for k in range(2, 20, 4):
        spiral[k, k:41 - k] = spiral[41 - k - 1, k:41 - k] = False
        spiral[k:41 - k, k] = spiral[k:41 - k, 41 - k - 1] = False
        spiral[k + 1 + k % 8, k] = True
    assert (decode.connected_with_border(spiral) == reached_slowly(spiral)).all(), "a spiral"
    assert decode.connected_with_border(np.ones((1, 1), bool)).all()


def test_a_mask_gives_the_alpha():
    pixels, there = ball()
    content = encoded(Image.fromarray(pixels))
    soft = np.where(there, 255, 0).astype(np.uint8)
    soft[32, 32] = 100
    planes = decode_view(content, 64, mask=encoded(Image.fromarray(soft)), background=WHITE)
    assert (planes[3] == soft).all()
    ones = encoded(Image.fromarray(there.astype(np.uint8)))
    bits = encoded(Image.fromarray(there))
    for mask in (ones, bits):
        assert (decode_view(content, 64, mask=mask)[3] == np.where(there, 255, 0)).all()
    fails(decode_view, content, "mask has 9x9", "64x64", mask=encoded(Image.new("L", (9, 9))))
    fails(decode_view, content, "mask", "begins with", mask=b"<html>")
    fails(decode_view, content, "mask", "cannot be decoded", mask=bits[:60])
    fails(decode_view, content, "transparent all over", mask=encoded(Image.new("L", (64, 64))))
    fails(decode_view, content, "opaque all over", mask=encoded(Image.new("L", (64, 64), 255)))


def test_a_picture_with_nothing_to_see_is_bad():
    clear = encoded(Image.new("RGBA", (64, 64), (255, 255, 255, 0)))
    for function in (decode_image, decode_view):
        fails(function, clear, "transparent all over")


# ---- bad files -------------------------------------------------------------------------------

@pytest.mark.parametrize("function", [decode_image, decode_view])
def test_a_damaged_file_says_what_is_wrong_with_it(function):
    jpeg = encoded(Image.fromarray(noise(128, 3)), "JPEG", quality=95)
    png = encoded(Image.fromarray(noise(128, 4)))
    webp = encoded(Image.fromarray(noise(128, 4)), "WEBP", lossless=True)
    gif = encoded(drawn(128), "GIF")
    half = len(png) // 2
    flipped = png[:half] + bytes([png[half] ^ 255]) + png[half + 1:]
    damaged = {
        "half a JPEG": jpeg[:len(jpeg) // 2], "a JPEG 2 bytes short": jpeg[:-2],
        "half a PNG": png[:half],
        "half a WebP": webp[:len(webp) // 2], "half a GIF": gif[:len(gif) // 2],
    }
    for content in damaged.values():
        fails(function, content, "cannot be decoded")
    fails(function, flipped, "damaged: a checksum is wrong")
    fails(function, b"", "empty")
    fails(function, b"<!DOCTYPE html><html>not found</html>", "no picture", "<!DOCTYPE html>")
    fails(function, png[:20], "cannot be decoded")
    fails(function, b"BM", "no picture")
    fails(function, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture")


def test_a_png_with_any_byte_changed_shows_what_it_did_or_is_bad():
    """Of plain pictures, Pillow decodes a quarter of these to other colours."""
    png = encoded(drawn(256))
    whole, bad = decode_image(png, 32), 0
    for place in range(8, len(png), len(png) // 150):
        content = bytearray(png)
        content[place] ^= 1 << place % 8
        try:
            assert np.array_equal(decode_image(bytes(content), 32), whole), f"byte {place}"
        except BadMember:
            bad += 1
    assert bad > 140, "damage is overlooked"
    # What follows a whole picture is not of it.
    assert np.array_equal(decode_image(png + b"\0\0\0\4more and more", 32), whole)


@pytest.mark.parametrize("function", [decode_image, decode_view])
def test_too_many_pixels_are_refused_by_the_header(function):
    row = np.zeros((1, 1, 4), np.uint8)
    for width, height in [(30_000, 30_000), (15_000, 15_000), (12_000, 12_000),
                          (2**31 - 1, 2**31 - 1)]:
        fails(function, png_of(row, 8, 6, width, height), "pixels")
    # One that is just small enough fails for its missing pixels only.
    fails(function, png_of(row, 8, 6, 9_459, 9_459), "cannot be decoded")


def test_random_bytes_raise_nothing_else():
    """Any picture with any bytes changed is decoded or bad; other exceptions are ours."""
    dice = np.random.default_rng(0)
    pixels = Image.fromarray(noise(24, 4))
    for kind in ("PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG"):
        whole = encoded(pixels if kind != "JPEG" else pixels.convert("RGB"), kind)
        for _ in range(60):
            content = bytearray(whole)
            for place in dice.integers(0, len(content), 4):
                content[place] = dice.integers(256)
            for function in (decode_image, decode_view):
                try:
                    assert function(bytes(content), 16).shape == (4, 16, 16)
                except BadMember:
                    pass
