"""Photos as people have them: EXIF, crops, alpha, what cannot be read, and how many."""
import pytest
import torch
from PIL import Image, ImageDraw

from mvd.tools import photos
from mvd.tools.errors import UserError
from mvd.tools.photos import crop_box, open_photo

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


def test_a_cut_out_is_framed_round_its_subject():
    # Framed well: it stays as it is, also where the subject is not in the middle.
    assert crop_box(100, 100, (20, 10, 80, 90)) == (0, 0, 100, 100)
    assert crop_box(100, 100, (5, 12, 75, 92)) == (0, 0, 100, 100)
    # Small and aside: 1.6 times its 40 pixels.
    assert crop_box(100, 60, (70, 10, 90, 50)) == (48, -2, 112, 62)
    # Cut tight: room all round.
    assert crop_box(60, 40, (0, 0, 60, 40)) == (-3, -13, 63, 53)
    small = crop_box(100, 60, (70, 10, 90, 50))
    tall = crop_box(33, 81, (3, 3, 33, 80))
    for left, top, right, bottom in (small, tall):
        assert right - left == bottom - top, "the frame is not a square"


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


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1", "I;16"])
def test_any_kind_of_picture_becomes_rgba(mode, tmp_path):
    file = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        white = Image.new("I;16", (50, 40), 65535)
    else:
        white = Image.new("RGB", (50, 40), "white").convert(mode)
    white.save(file)
    assert open_photo(file, 16).float().mean() > 250


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
    # These are not even tried.
    (tmp_path / "notes.txt").write_text("not a photo, and not meant as one")
    picture().save(tmp_path / ".hidden.png")

    names, rgba = photos.load(tmp_path, 32)
    assert names == ["good0.jpeg", "good1.jpeg", "good2.jpeg"]
    assert rgba.shape == (3, 4, 32, 32)
    lines = sorted(str(w.message) for w in recwarn)
    assert len(lines) == 5
    assert all("left out" in line for line in lines)
    reasons = {
        "IMG_1.HEIC": "export it as JPEG",
        "renamed.jpg": "HEIC",
        "cut.JPG": "cannot read",
        "page.png": "cannot read",
        "nothing.png": "transparent all over",
    }
    for name, reason in reasons.items():
        found = [line for line in lines if name in line and reason in line]
        assert len(found) == 1, f"no warning names {name} and says {reason!r}"


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
