"""Pictures as people have them against what they show: colours, alpha, endings, damage, crops."""
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

from mvd.data.decode import decode_image, decode_view
from mvd.tools import photos
from mvd.tools.errors import BadMember, UserError
from mvd.tools.photos import crop_box, open_photo, open_picture, pixels_of, subject_of

# Top left, top right, bottom left, bottom right.
QUARTERS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def picture(size=64):
    """A square of four quarters, each of its own colour."""
    image = Image.new("RGB", (size, size))
    half = size // 2
    for i, colour in enumerate(QUARTERS):
        left = i % 2 * half
        top = i // 2 * half
        image.paste(colour, (left, top, left + half, top + half))
    return image


def quarters(rgba):
    """The colours in the middles of the four quarters, RGB."""
    n = rgba.shape[-1]
    near, far = n // 4, 3 * n // 4
    places = [(near, near), (near, far), (far, near), (far, far)]
    return [tuple(rgba[:3, y, x].tolist()) for y, x in places]


def test_every_exif_orientation_is_undone(tmp_path):
    """A camera that stores the picture turned says so in tag 274 (EXIF 2.3, table 4)."""
    stored_as = {
        1: None,
        2: Image.FLIP_LEFT_RIGHT,
        3: Image.ROTATE_180,
        4: Image.FLIP_TOP_BOTTOM,
        5: Image.TRANSPOSE,
        6: Image.ROTATE_90,
        7: Image.TRANSVERSE,
        8: Image.ROTATE_270,
    }
    for orientation, how in stored_as.items():
        exif = Image.Exif()
        exif[274] = orientation
        stored = picture()
        if how is not None:
            stored = stored.transpose(how)
        stored.save(tmp_path / "x.png", exif=exif)
        found = quarters(open_photo(tmp_path / "x.png", 32))
        assert found == QUARTERS, f"orientation {orientation}"


def test_a_photo_is_cropped_to_the_square_in_its_middle(tmp_path):
    assert crop_box(100, 40) == (30, 0, 70, 40)
    assert crop_box(40, 100) == (0, 30, 40, 70)
    assert crop_box(7, 7) == (0, 0, 7, 7)
    wide = Image.new("RGB", (128, 64), "white")
    wide.paste(picture(), (32, 0))
    wide.save(tmp_path / "wide.jpg", quality=100)
    found = quarters(open_photo(tmp_path / "wide.jpg", 32))
    # JPEG is not exact.
    difference = torch.tensor(found) - torch.tensor(QUARTERS)
    assert difference.abs().max() < 12


@pytest.mark.parametrize("width, height", [(128, 64), (256, 64), (64, 192), (65, 64)])
def test_a_picture_of_any_shape_is_one_photo(width, height, tmp_path):
    image = Image.new("RGB", (width, height), "white")
    image.paste(picture(), ((width - 64) // 2, (height - 64) // 2))
    image.save(tmp_path / "x.png")
    assert quarters(open_photo(tmp_path / "x.png", 64)) == QUARTERS


def test_a_cut_out_is_framed_round_its_subject():
    # Framed well: it stays as it is, also where the subject is not in the middle.
    assert crop_box(100, 100, (20, 10, 80, 90)) == (0, 0, 100, 100)
    assert crop_box(100, 100, (5, 12, 75, 92)) == (0, 0, 100, 100)
    # A pixel more or less on one side changes little, where the subject is aside, too.
    for box in ((20, 10, 80, 90), (5, 12, 75, 92)):
        for size in ((100, 99), (99, 100), (101, 100), (100, 103)):
            moved = torch.tensor(crop_box(*size, box)) - torch.tensor(crop_box(100, 100, box))
            assert moved.abs().max() <= 3, f"{size} is framed otherwise than (100, 100)"
    # Small and aside: 1.6 times its 40 pixels.
    assert crop_box(100, 60, (70, 10, 90, 50)) == (48, -2, 112, 62)
    # Cut tight: room all round.
    assert crop_box(60, 40, (0, 0, 60, 40)) == (-3, -13, 63, 53)
    small = crop_box(100, 60, (70, 10, 90, 50))
    tall = crop_box(33, 81, (3, 3, 33, 80))
    for left, top, right, bottom in (small, tall):
        assert right - left == bottom - top, "the frame is not a square"


def with_alpha(alpha):
    """A red picture with this alpha, uint8 or bool [H, W]."""
    alpha = np.asarray(alpha)
    alpha = Image.fromarray(alpha if alpha.dtype == np.uint8 else alpha.astype(np.uint8) * 255)
    image = Image.new("RGBA", alpha.size, (200, 30, 30, 255))
    image.putalpha(alpha)
    return image


def places(side):
    """x and y of the middles of pixels, -1 to 1: float64 [side, side] each."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    return x, y


@pytest.mark.parametrize("side", [64, 250, 1000])
def test_a_share_of_transparent_pixels_makes_a_cut_out(side):
    x, y = places(side)
    far = np.maximum(abs(x), abs(y))
    corner = np.hypot(np.maximum(abs(x) - 0.8, 0), np.maximum(abs(y) - 0.8, 0))
    soft = (255 * np.minimum(1, (1 - far) * side / 4)).astype(np.uint8)
    specks = np.ones((side, side), bool)
    specks[::17, ::13] = False
    scratch = np.ones((side, side), bool)
    scratch[side // 3, :] = False
    one = np.ones((side, side), bool)
    one[0, 0] = False
    whole = np.full((side, side), 255, np.uint8)
    for name, alpha in {
        "opaque": whole, "nearly opaque": whole - 1, "half transparent all over": whole // 2,
        "one pixel": one, "specks": specks, "a scratch": scratch, "a soft border": soft,
        "round corners": corner < 0.2, "a thin border": far < 0.964,
    }.items():
        assert subject_of(with_alpha(alpha)) is None, f"a photo: {name}"
    slack = max(1, side // 128)
    for name, there, box in (
        ("a disc", np.hypot(x, y) < 1, (-1, -1, 1, 1)),
        ("a small disc", np.hypot(x - 0.3, y) < 0.4, (-0.1, -0.4, 0.7, 0.4)),
        ("a box", far < 0.9, (-0.9, -0.9, 0.9, 0.9)),
        ("a tall box", (abs(x) < 0.5) & (abs(y) < 0.98), (-0.5, -0.98, 0.5, 0.98)),
        ("a ghost", np.where(far < 0.5, 90, 0).astype(np.uint8), (-0.5, -0.5, 0.5, 0.5)),
    ):
        found = subject_of(with_alpha(there))
        assert found is not None, f"a cut-out: {name}"
        expected = (np.array(box) + 1) / 2 * side
        assert np.abs(found - expected).max() <= slack + 1, name


def test_specks_are_not_of_the_subject():
    x, y = places(512)
    there = np.where(np.hypot(x, y) < 0.4, 255, 0).astype(np.uint8)
    alone = subject_of(with_alpha(there))
    there[4:8, 4:8] = there[500, 500] = 255
    assert subject_of(with_alpha(there)) == alone
    # But a thin line, with nothing beside it, is one.
    line = np.zeros((512, 512), np.uint8)
    line[100:400, 250] = 255
    left, top, right, bottom = subject_of(with_alpha(line))
    assert left <= 250 < right and abs(top - 100) < 8 and abs(bottom - 400) < 8
    with pytest.raises(BadMember, match="transparent all over"):
        subject_of(with_alpha(there // 64))


def test_a_photo_with_a_few_transparent_pixels_is_cropped_as_one(tmp_path):
    wide = Image.new("RGBA", (128, 64), "white")
    wide.paste(picture(), (32, 0))
    wide.putpixel((0, 0), (0, 0, 0, 0))
    wide.save(tmp_path / "x.png")
    rgba = open_photo(tmp_path / "x.png", 64)
    assert quarters(rgba) == QUARTERS and (rgba[3] == 255).all()


def test_colour_does_not_leak_from_what_is_transparent(tmp_path):
    image = Image.new("RGBA", (256, 256), (255, 255, 255, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((64, 64, 191, 191), fill=(10, 20, 200, 255))
    image.save(tmp_path / "x.png")
    rgba = open_photo(tmp_path / "x.png", 64)
    assert rgba.shape == (4, 64, 64)
    assert rgba.dtype == torch.uint8
    # Where alpha is less, eight bits of colour are few.
    there = rgba[3] > 64
    assert 0.2 < there.float().mean() < 0.6
    assert rgba[3, 0, 0] == 0
    # Lanczos rings a little; white would be 200 off.
    difference = rgba[:3, there].float() - torch.tensor([10.0, 20, 200])[:, None]
    assert difference.abs().max() < 30


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, recwarn):
    for i in range(3):
        picture().save(tmp_path / f"good{i}.jpeg")
    whole = (tmp_path / "good0.jpeg").read_bytes()
    heic = b"\0\0\0\x18ftypheic" + bytes(50)
    (tmp_path / "cut.JPG").write_bytes(whole[:200])
    (tmp_path / "IMG_1.HEIC").write_bytes(heic)
    (tmp_path / "renamed.jpg").write_bytes(heic)
    (tmp_path / "page.png").write_text("<html>not found</html>")
    Image.new("RGBA", (9, 9)).save(tmp_path / "nothing.png")
    # A raw photo is a TIFF file that begins with a stamp of the photo.
    picture().save(tmp_path / "DSC_1.NEF", "TIFF")
    (tmp_path / "logo.svg").write_text("<svg/>")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "IMG_2").write_bytes(heic)
    # These are not meant as photos.
    (tmp_path / "notes.txt").write_text("not a photo, and not meant as one")
    (tmp_path / "IMG_1.MOV").write_bytes(b"\0\0\0\x14ftypqt  " + bytes(50))
    (tmp_path / "README").write_text("photos of my dog")
    (tmp_path / "folder.png").mkdir()
    picture().save(tmp_path / ".hidden.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")

    names, rgba = photos.load(tmp_path, 32)
    assert names == ["good0.jpeg", "good1.jpeg", "good2.jpeg"]
    assert rgba.shape == (3, 4, 32, 32)
    lines = sorted(str(w.message) for w in recwarn)
    assert len(lines) == 9, lines
    assert all("left out" in line for line in lines)
    reasons = {
        "IMG_1.HEIC": "export it as JPEG",
        "renamed.jpg": "HEIC",
        "cut.JPG": "cannot read",
        "page.png": "cannot read",
        "nothing.png": "transparent all over",
        "DSC_1.NEF": "raw photo",
        "logo.svg": "no picture of a kind",
        "link.png": "No such file",
        "IMG_2": "HEIC",
    }
    for name, reason in reasons.items():
        found = [line for line in lines if name in line and reason in line]
        assert len(found) == 1, f"no warning names {name} and says {reason!r}"


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(photos.Path, "iterdir", refused)
    with pytest.raises(UserError, match="cannot list the folder .*Permission denied"):
        photos.load(tmp_path, 32)


def test_too_few_too_many_and_no_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        photos.load(tmp_path / "none", 32)
    with pytest.raises(UserError, match="holds no photos.*3 to 20"):
        photos.load(tmp_path, 32)
    for i in range(2):
        picture(8).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="holds 2 photos.*3 to 20"):
        photos.load(tmp_path, 32)
    for i in range(2, 21):
        picture(8).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="holds 21 photos.*3 to 20"):
        photos.load(tmp_path, 32)


# ---- whatever a file holds -------------------------------------------------------------------

def encoded(image, kind="PNG", **options):
    """The bytes of a Pillow picture."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, body):
    """A chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


def png(rows, width, depth, colour, *chunks):
    """The bytes of a PNG with these samples, uint8 or >u2 [H, ...], and chunks before them."""
    size = struct.pack(">II", width, len(rows))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = chunk(b"IHDR", size + bytes([depth, colour, 0, 0, 0]))
    return photos.PNG + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(rows, bits, photometric):
    """The bytes of a grey TIFF of 64 pixels along a side."""
    data = rows.tobytes()
    tags = {256: 64, 257: 64, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 64,
            279: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    place = struct.pack("<I", 8 + len(data))
    return b"II*\0" + place + data + struct.pack("<H", len(tags)) + fields + bytes(4)


def packed_12(levels):
    """Levels in [0, 1] as two samples of 12 bits in three bytes: uint8 [H, W * 3 / 2]."""
    values = np.rint(levels * 4095).astype(int)
    first, second = values[:, 0::2], values[:, 1::2]
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, -1).reshape(len(values), -1).astype(np.uint8)


# A dark half above a bright one: what a viewer shows as 64 and 191.
LEVELS = np.repeat([0.25, 0.75], 32)[:, None].repeat(64, 1)
SPARK = np.where(np.arange(4096).reshape(64, 64) == 77, 30.0, LEVELS)
SIXTEEN = np.rint(LEVELS * 65535)
DEEP = {
    "16-bit PNG": encoded(Image.fromarray(SIXTEEN.astype(np.uint16))),
    "16-bit TIFF": encoded(Image.fromarray(SIXTEEN.astype(np.uint16)), "TIFF"),
    "big-endian TIFF": encoded(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"),
    "TIFF whose 0 is white": tiff((65535 - SIXTEEN).astype("<u2"), 16, 0),
    "12-bit TIFF": tiff(packed_12(LEVELS), 12, 1),
    "32-bit TIFF of 16": encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"),
    "32-bit TIFF of 8": encoded(Image.fromarray(np.rint(LEVELS * 255).astype(np.int32)), "TIFF"),
    "float TIFF": encoded(Image.fromarray(LEVELS.astype(np.float32)), "TIFF"),
    "float TIFF with a spark": encoded(Image.fromarray(SPARK.astype(np.float32)), "TIFF"),
    "float TIFF up to 255": encoded(Image.fromarray((LEVELS * 255).astype(np.float32)), "TIFF"),
    "16-bit PGM": b"P5 64 64 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "10-bit PGM": b"P5 64 64 1023\n" + np.rint(LEVELS * 1023).astype(">u2").tobytes(),
    "16-bit JPEG 2000": encoded(Image.fromarray(SIXTEEN.astype(np.uint16)), "JPEG2000"),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_as_bright_as_they_look(name, tmp_path):
    (tmp_path / "x").write_bytes(DEEP[name])
    for planes in (open_photo(tmp_path / "x", 64).numpy(), decode_image(DEEP[name], 64),
                   decode_view(DEEP[name], 64, background=(64, 64, 64))):
        # The spark is one pixel.
        off = np.abs(planes[:3] - np.rint(LEVELS * 255)) > 1
        assert off.any(0).sum() <= ("spark" in name), "it is darker or brighter"


@pytest.mark.parametrize("values", [
    LEVELS - 0.5, LEVELS * 1e6, np.where(LEVELS > 0.5, np.nan, LEVELS)])
def test_pixels_that_have_no_white_are_refused(values):
    with pytest.raises(BadMember, match="nothing says what is white; save it with 8 bits"):
        pixels_of(open_picture(encoded(Image.fromarray(values.astype(np.float32)), "TIFF")))


def test_any_mode_of_pixels_is_right():
    """Those that Pillow can save are in test_decode.py."""
    colour = (200, 80, 40)
    plain, srgb = Image.new("RGB", (8, 8), colour), ImageCms.createProfile("sRGB")
    lab = ImageCms.profileToProfile(plain, srgb, ImageCms.createProfile("LAB"), outputMode="LAB")
    found = pixels_of(open_picture(encoded(lab, "TIFF"))).getpixel((4, 4))
    assert np.abs(np.subtract(found, colour)).max() <= 2
    for image in (plain.quantize(2), *map(plain.convert, ("HSV", "YCbCr", "CMYK", "RGBX"))):
        shown = pixels_of(image)
        assert shown.mode == "RGB"
        assert np.abs(np.subtract(shown.getpixel((4, 4)), colour)).max() <= 4, image.mode
    half = Image.new("PA", (8, 8), (0, 99))
    half.putpalette(colour)
    assert pixels_of(open_picture(encoded(half, "TIFF"))).getpixel((4, 4)) == (*colour, 99)


def grey_4(clear):
    """A 4-bit grey PNG with the levels 5 and 10, one of which is transparent."""
    rows = np.repeat([0x55, 0xAA], 4)[:, None].repeat(4, 1).astype(np.uint8)
    return png(rows, 8, 4, 0, chunk(b"tRNS", struct.pack(">H", clear)))


def deep(colours, clear):
    """A 16-bit PNG of two colours (grey or RGB), one above the other, one of them transparent."""
    rows = np.repeat(np.array(colours, ">u2"), 4, 0)[:, None].repeat(8, 1)
    kind = 2 if rows.ndim == 3 else 0
    return png(rows, 8, 16, kind, chunk(b"tRNS", np.array(clear, ">u2").tobytes()))


@pytest.mark.parametrize("content, colour", [
    (grey_4(5), (170, 170, 170)),
    (deep([20_000, 30_000], 20_000), (117, 117, 117)),
    (deep([(4660, 32769, 65285), (100 * 257, 200 * 257, 0)], (4660, 32769, 65285)), (100, 200, 0)),
])
def test_the_transparent_colour_of_a_png_of_any_depth(content, colour):
    shown = np.asarray(pixels_of(open_picture(content)))
    assert (shown[:4, :, 3] == 0).all() and (shown[4:, :, 3] == 255).all()
    assert (shown[4:, :, :3] == colour).all()


# ---- colours ---------------------------------------------------------------------------------

# The primaries of Display P3 and of sRGB in XYZ under D50, in columns.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657],
               [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061],
                 [0.01392, 0.09708, 0.71410]])


def icc(gamma, primaries=None):
    """An ICC profile (version 2) of RGB with these primaries, or of grey."""
    fixed = lambda values: np.rint(np.multiply(values, 65536)).astype(">i4").tobytes()
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    white = [0.9642, 1.0, 0.8249]
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(white)}
    for k, name in enumerate(b"rgb" if primaries is not None else b""):
        tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(primaries[:, k])
        tags[bytes([name]) + b"TRC"] = curve
    if primaries is None:
        tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        place = 132 + 12 * len(tags) + len(body)
        table += name + struct.pack(">II", place, len(content))
        body += content
    space = b"GRAY" if primaries is None else b"RGB "
    head = bytes(4) + b"\x02\x40\0\0" + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    head = (head + bytes(28) + fixed(white)).ljust(124, b"\0")
    return struct.pack(">I", 128 + len(table) + len(body)) + head + table + body


def as_srgb(linear):
    """Light in [0, 1] as sRGB writes it, 0 to 255 (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def colours(seed=0):
    """Random colours: uint8 [32, 32, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_profile_is_obeyed_as_float64_does(kind, tmp_path):
    rgb, profile = colours(), icc(2.2, P3)
    linear = (rgb / 255) ** (563 / 256) @ P3.T @ np.linalg.inv(SRGB).T
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(rgb), kind, icc_profile=profile, **options)
    (tmp_path / "x").write_bytes(content)
    for planes in (open_photo(tmp_path / "x", 32).numpy(), decode_image(content, 32)):
        error = np.abs(planes[:3].transpose(1, 2, 0) - as_srgb(linear))
        assert error.max() < 3, f"{kind}: off by {error.max():.1f}"
    assert np.abs(rgb - as_srgb(linear)).max() > 20, "the profile changes nothing"


def test_a_profile_leaves_alpha_and_speaks_of_palettes_and_grey():
    rgb, profile = colours(), icc(1.0, SRGB)
    alpha = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    image = Image.fromarray(np.dstack([rgb, alpha]))
    shown = np.asarray(pixels_of(open_picture(encoded(image, icc_profile=profile))))
    assert (shown[..., 3] == alpha).all()
    assert np.abs(shown[..., :3] - as_srgb(rgb / 255)).max() < 2
    flat = Image.new("P", (8, 8))
    flat.putpalette([64, 128, 192])
    shown = pixels_of(open_picture(encoded(flat, icc_profile=profile))).getpixel((4, 4))
    assert np.abs(shown - as_srgb(np.array([64, 128, 192]) / 255)).max() < 2
    for mode in ("L", "LA"):
        grey = Image.new(mode, (8, 8), 64 if mode == "L" else (64, 99))
        shown = pixels_of(open_picture(encoded(grey, icc_profile=icc(1.0)))).getpixel((4, 4))
        assert abs(shown[0] - as_srgb(np.array(64 / 255))) < 2 and shown[3:] in ((), (99,))


def test_profiles_that_change_nothing_or_are_of_no_use_are_passed_over():
    rgb = Image.fromarray(colours())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert photos.to_srgb(srgb, "RGB") is None, "time is lost with pictures that are sRGB already"
    for profile in (srgb, b"junk" * 99, icc(1.0), b""):
        shown = pixels_of(open_picture(encoded(rgb, icc_profile=profile)))
        assert shown.tobytes() == rgb.tobytes(), "a pixel has changed"
    grey = rgb.convert("L")
    shown = pixels_of(open_picture(encoded(grey, icc_profile=icc(1.0, P3))))
    assert shown.tobytes() == grey.convert("RGB").tobytes()


@pytest.mark.parametrize("gamma, power", [
    (45_455, 1), (46_000, 1), (100_000, 1 / 2.2), (55_556, 1.8 / 2.2), (0, 1), (1, 1)])
def test_the_gamma_of_a_png_is_obeyed(gamma, power):
    """PNG specification, 13.13: the file's samples are light to the power gamma / 100,000."""
    rgb, said = colours(), chunk(b"gAMA", struct.pack(">I", gamma))
    expected = 255 * (rgb / 255) ** power
    shown = np.asarray(pixels_of(open_picture(png(rgb, 32, 8, 2, said))))
    assert np.abs(shown - expected).max() <= 0.5
    plain = np.asarray(pixels_of(open_picture(png(rgb, 32, 8, 2, said, chunk(b"sRGB", b"\0")))))
    assert (plain == rgb).all(), "sRGB goes before gAMA"
    deep = rgb[..., 0].astype(">u2") * 257
    shown = np.asarray(pixels_of(open_picture(png(deep, 32, 16, 0, said))))
    assert np.abs(shown - expected[..., :1]).max() <= 0.5


# ---- several pictures in a file, and what lies beside the pixels -----------------------------

@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_of_several_pictures_in_a_file_the_first_is_taken(kind, tmp_path):
    green = Image.new("RGB", (64, 64), "green")
    (tmp_path / "x").write_bytes(encoded(picture(), kind, save_all=True, append_images=[green]))
    found = torch.tensor(quarters(open_photo(tmp_path / "x", 32)))
    assert (found - torch.tensor(QUARTERS)).abs().max() < 40


def test_of_an_icon_the_largest_is_taken(tmp_path):
    picture().save(tmp_path / "x.ico", sizes=[(16, 16), (64, 64)])
    assert open_picture((tmp_path / "x.ico").read_bytes()).size == (64, 64)
    assert quarters(open_photo(tmp_path / "x.ico", 64)) == QUARTERS


def test_what_lies_beside_the_pixels_does_not_cost_the_picture():
    text = PngImagePlugin.PngInfo()
    for packed in (True, False):
        text.add_text("prompt", "x" * 3_000_000, zip=packed)
        text.add_itxt("workflow", "é" * 1_500_000, zip=packed)
    plain = encoded(picture())
    header, rest = plain[:33], plain[33:]
    broken = bytearray(chunk(b"tEXt", b"Software\0of somebody"))
    broken[-1] ^= 1
    profile = bytearray(chunk(b"iCCP", b"P3\0\0" + zlib.compress(icc(2.2, P3))))
    profile[-1] ^= 1
    for name, content in {
        "megabytes of text": encoded(picture(), pnginfo=text),
        "a broken text": header + broken + rest,
        "a broken profile": header + profile + rest,
        "a chunk of another program": header + chunk(b"caBX", bytes(99)) + rest,
        "text after the pixels": plain[:-12] + broken + plain[-12:],
        "more after the end": plain + broken,
    }.items():
        shown = pixels_of(open_picture(content))
        assert shown.tobytes() == picture().tobytes(), name


def test_damage_to_what_a_picture_shows_is_named():
    flat = picture().quantize(4)
    content = encoded(flat, transparency=0)
    for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
        damaged = bytearray(content)
        damaged[content.index(kind) + 5] ^= 1
        with pytest.raises(BadMember, match="damaged|decoded"):
            pixels_of(open_picture(bytes(damaged)))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        content = encoded(picture(), kind)
        with pytest.raises(BadMember):
            pixels_of(open_picture(content[:len(content) * 2 // 3]))


# ---- endings ---------------------------------------------------------------------------------

KINDS = {
    "JPEG": ("jpg", "JPEG", "jfif", "Jpe"), "PNG": ("png", "PNG", "apng"), "WEBP": ("webp",),
    "TIFF": ("tif", "TIFF"), "AVIF": ("avif",), "BMP": ("bmp",), "GIF": ("gif", "GIF"),
    "JPEG2000": ("jp2", "j2k"), "PPM": ("ppm",), "TGA": ("tga",), "ICO": ("ico",), "QOI": ("qoi",),
    "MPO": ("mpo",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_read_whatever_its_ending(kind, tmp_path):
    content = encoded(picture(), kind)
    names = [f"{k}.{ending}" for k, ending in enumerate(KINDS[kind])]
    if kind != "TGA":    # which says nowhere what it is
        names += ["a.jpg", "b.PNG_large", "c.txt", "d"]
    for name in names:
        (tmp_path / name).write_bytes(content)
    for name in names:
        assert photos.may_be_photo(tmp_path / name), f"{name} is passed over"
        found = torch.tensor(quarters(open_photo(tmp_path / name, 64)))
        assert (found - torch.tensor(QUARTERS)).abs().max() < 40, name
