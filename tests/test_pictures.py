"""Pictures, turntables and charts against what they should show, pixel by pixel."""
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
    for i, (y, x) in enumerate([(0, 0), (0, 8), (0, 16), (6, 0), (6, 8)]):
        assert (sheet[:, y:y + 4, x:x + 6] == i / 10).all()
    assert (sheet[:, 4:6] == 1).all() and (sheet[:, 6:, 16:] == 1).all()
    assert torch.equal(pictures.grid(images[:1], 1), images[0])


def test_png_round_trip(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    pictures.save_png(tmp_path / "a.png", image)
    assert torch.equal(read_png(tmp_path / "a.png"), image)
    assert Image.open(tmp_path / "a.png").size == (7, 5)
    grey = torch.tensor([[-1.0, 0.5], [float("nan"), 2.0]], requires_grad=True)
    pictures.save_png(tmp_path / "b.png", grey)
    assert torch.equal(read_png(tmp_path / "b.png")[0] * 255, torch.tensor([[0.0, 128], [0, 255]]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_turntable(tmp_path):
    shades = torch.linspace(0, 1, 7)
    pictures.save_turntable(tmp_path / "t.webp", shades.view(7, 1, 1, 1).expand(7, 3, 16, 24), seconds=1.0)
    with Image.open(tmp_path / "t.webp") as film:
        assert film.format == "WEBP" and film.n_frames == 7 and film.info["loop"] == 0 and film.size == (24, 16)
        durations = []
        for i in range(7):
            film.seek(i)
            assert np.asarray(film.convert("L")).mean() / 255 == pytest.approx(shades[i].item(), abs=0.02)
            durations.append(film.info["duration"])
    assert sum(durations) == 1000 and set(durations) == {142, 143}


def test_depth_and_normal_pictures():
    depth = torch.tensor([[1.0, 2.0], [3.0, 99.0]]).expand(2, 1, 2, 2)
    opacity = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).expand(2, 1, 2, 2)
    picture = pictures.depth_picture(depth, opacity)
    assert picture.shape == (2, 3, 2, 2) and picture.min() >= 0 and picture.max() <= 1
    light = picture[0].sum(0)
    assert light[0, 0] > light[0, 1] > light[1, 0] and (picture[:, :, 1, 1] == 1).all()
    assert picture[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.93, 0.68], abs=1e-3)
    assert picture[0, :, 1, 0].tolist() == pytest.approx([0.08, 0.07, 0.25], abs=1e-3)
    assert (pictures.depth_picture(depth, opacity * 0) == 1).all()

    normal = torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 2, 2)
    picture = pictures.normal_picture(normal, opacity[0])
    assert picture[:, 0, 0].tolist() == [0.5, 1.0, 0.0] and (picture[:, 1, 1] == 1).all()


def _pixels(path, colour):
    """Rows and columns of the pixels that have nearly this colour."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.nonzero(np.abs(picture - colour).sum(-1) < 90)


def test_curve_follows_its_data(tmp_path):
    blue = [int(pictures.COLOURS[0][i:i + 2], 16) for i in (1, 3, 5)]
    for log_scale in (False, True):
        x = np.arange(30)
        pictures.save_curve(tmp_path / "c.png", {"loss": list(zip(x, 10.0 ** (-x / 10)))}, log_scale=log_scale)
        y, x = _pixels(tmp_path / "c.png", blue)
        y, x = y[y > 30], x[y > 30]                                 # below the legend
        at = [y[np.abs(x - column) <= 1].mean() for column in (100, 463, 840)]
        assert at[0] < at[1] < at[2]                                # it falls, straight only on the log scale
        bend = (at[0] + (at[2] - at[0]) * (463 - 100) / (840 - 100) - at[1]) / (at[2] - at[0])
        assert abs(bend) < 0.02 if log_scale else bend < -0.2
    assert Image.open(tmp_path / "c.png").size == (900, 480)


@pytest.mark.parametrize("points", [[], [(3, 0.5)], [(0, 0.0), (1, 0.0)], [(0, np.nan), (1, -1.0), (2, np.inf)],
                                    [(i, 1e-9 * i) for i in range(300)], [(0, 1e30), (1, 1e-30)], [(5, 2.0), (5, 3.0)]])
@pytest.mark.parametrize("log_scale", [False, True])
def test_curve_of_odd_data(points, log_scale, tmp_path):
    pictures.save_curve(tmp_path / "c.png", {"loss": points, "other": points[:1]}, log_scale=log_scale)
    assert Image.open(tmp_path / "c.png").size == (900, 480)


@pytest.mark.parametrize("low, high, log_scale, texts", [
    (0.0, 1.0, False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    (-3.0, 11950.0, False, ["0", "5,000", "10,000"]),
    (-2.1, 1.2, True, ["0.01", "0.1", "1", "10"]),
    (-1.0, 0.0, True, ["0.1", "0.2", "0.5", "1"]),
    (np.log10(2.0), np.log10(3.0), True, ["2", "2.2", "2.4", "2.6", "2.8", "3"]),
])
def test_ticks(low, high, log_scale, texts):
    ticks = pictures._ticks(low, high, log_scale)
    assert [text for _, text in ticks] == texts
    for position, text in ticks:
        value = float(text.replace(",", ""))
        assert position == pytest.approx(np.log10(value) if log_scale else value)
