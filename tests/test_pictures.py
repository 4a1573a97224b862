"""Pictures and turntables against what they should show, pixel by pixel."""
import numpy as np
import pytest
import torch
from PIL import Image

from mvd.tools import pictures
from toy_data import read_png


def test_grid():
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 4, 6) / 10
    sheet = pictures.grid(images, 3)
    assert sheet.shape == (3, 4 * 2 + 2, 6 * 3 + 4)
    places = [(0, 0), (0, 8), (0, 16), (6, 0), (6, 8)]
    for i, (y, x) in enumerate(places):
        assert (sheet[:, y:y + 4, x:x + 6] == i / 10).all()
    assert (sheet[:, 4:6] == 1).all(), "the gap between the rows is not white"
    assert (sheet[:, 6:, 16:] == 1).all(), "the empty place is not white"
    assert torch.equal(pictures.grid(images[:1], 1), images[0])


def test_png_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 5, 7), generator=generator) / 255
    pictures.save_png(tmp_path / "a.png", image)
    assert torch.equal(read_png(tmp_path / "a.png"), image)
    assert Image.open(tmp_path / "a.png").size == (7, 5)
    grey = torch.tensor([[-1.0, 0.5], [float("nan"), 2.0]], requires_grad=True)
    pictures.save_png(tmp_path / "b.png", grey)
    expected = torch.tensor([[0.0, 128], [0, 255]])
    assert torch.equal(read_png(tmp_path / "b.png")[0] * 255, expected)
    # No temporary file is left.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_views_are_numbered_files_that_keep_their_alpha(tmp_path):
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (11, 4, 5, 5), generator=generator) / 255
    folder = tmp_path / "deep" / "views"
    # Twice, since a run that is resumed writes over what it wrote.
    for some in (views.flip(0), views):
        names = pictures.save_views(folder, [pictures.to_pil(view) for view in some])
    assert names == [f"{k:03d}.png" for k in range(11)]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, view in zip(names, views):
        drawn = np.asarray(Image.open(folder / name))
        assert np.array_equal(drawn, (view * 255).round().byte().permute(1, 2, 0).numpy()), name


def test_turntable(tmp_path):
    shades = torch.linspace(0, 1, 7)
    frames = shades.view(7, 1, 1, 1).expand(7, 3, 16, 24)
    pictures.save_turntable(tmp_path / "t.webp", frames, seconds=1.0)
    durations = []
    with Image.open(tmp_path / "t.webp") as film:
        assert film.format == "WEBP"
        assert film.n_frames == 7
        assert film.info["loop"] == 0, "it does not play for ever"
        assert film.size == (24, 16)
        for i in range(7):
            film.seek(i)
            shade = np.asarray(film.convert("L")).mean() / 255
            assert shade == pytest.approx(shades[i].item(), abs=0.02)
            durations.append(film.info["duration"])
    assert sum(durations) == 1000
    assert set(durations) == {142, 143}


def test_depth_and_normal_pictures():
    depth = torch.tensor([[1.0, 2.0], [3.0, 99.0]]).expand(2, 1, 2, 2)
    opacity = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).expand(2, 1, 2, 2)
    picture = pictures.depth_picture(depth, opacity)
    assert picture.shape == (2, 3, 2, 2)
    assert picture.min() >= 0 and picture.max() <= 1
    light = picture[0].sum(0)
    assert light[0, 0] > light[0, 1] > light[1, 0], "near is not paler than far"
    assert (picture[:, :, 1, 1] == 1).all(), "nothing is not white"
    nearest = picture[0, :, 0, 0].tolist()
    farthest = picture[0, :, 1, 0].tolist()
    assert nearest == pytest.approx([1.0, 0.93, 0.68], abs=1e-3)
    assert farthest == pytest.approx([0.08, 0.07, 0.25], abs=1e-3)
    assert (pictures.depth_picture(depth, opacity * 0) == 1).all()

    normal = torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 2, 2)
    picture = pictures.normal_picture(normal, opacity[0])
    assert picture[:, 0, 0].tolist() == [0.5, 1.0, 0.0]
    assert (picture[:, 1, 1] == 1).all(), "nothing is not white"
