"""Renders of candidates, and the distance of pictures from them, against plain loops."""
import numpy as np
import pytest
import torch

from mvd.metrics import candidates
from mvd.metrics.candidates import (
    SCALES,
    Cutouts,
    at_scales,
    cut_out,
    error_by_azimuth,
    error_of_sets,
    real_views,
    select,
    squared_error,
)
from small_judge import FOUR, THINGS


@pytest.fixture(scope="module")
def real():
    """[4, 4, 3, 64, 64]"""
    return real_views(THINGS, FOUR, seed=3)


def test_real_views_are_of_other_instances_cameras_and_backgrounds(monkeypatch):
    seeds, fovs, framings = [], [], []
    geometry = candidates.geometry

    def recorded(thing, its_seeds, cameras, device, *, fov_deg, framing, size):
        seeds.extend(its_seeds)
        fovs.extend(fov_deg.tolist())
        framings.extend(framing.tolist())
        return geometry(
            thing, its_seeds, cameras, device, fov_deg=fov_deg, framing=framing, size=size)

    monkeypatch.setattr(candidates, "geometry", recorded)
    blue = THINGS[0]._replace(colour="blue")
    things = [THINGS[0], THINGS[3], THINGS[0], blue, THINGS[3]]
    views = real_views(things, FOUR, seed=1, size=32)
    assert len(set(seeds)) == len(set(fovs)) == len(set(framings)) == 5, "each has its own"
    assert min(seeds) >= 8, "a real render has the proportions of a candidate"
    assert max(seeds) < 1_000_000, "a real render has proportions that training shows"
    assert all(15 <= fov <= 60 for fov in fovs)
    assert all(0.9 <= framing <= 1.1 for framing in framings)
    background = cut_out(views).background
    assert len(background[:, 0, 0].unique()) == 5, "each set has its own grey"
    assert torch.equal(background[:, 0], background[:, 1]), "all views of a set have the same"
    again = real_views(things, FOUR, seed=1, size=32)
    assert torch.equal(views, again), "the same seed gives other pictures"


def test_squared_error_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 3, 4, 4, generator=generator)
    background = torch.rand(2, 3, 3, 1, 1, generator=generator)
    rgba = torch.rand(5, 3, 4, 4, 4, generator=generator)
    foreground = (torch.rand(2, 3, 1, 4, 4, generator=generator) > 0.5).float()
    error, weight = squared_error(Cutouts(pictures, background, foreground), rgba)
    for m, k, v in np.ndindex(2, 5, 3):
        total = weights = 0.0
        behind = background[m, v].flatten().double().numpy()
        for y, x in np.ndindex(4, 4):
            rgb = rgba[k, v, :3, y, x].double().numpy()
            alpha = rgba[k, v, 3, y, x].item()
            either = max(alpha, foreground[m, v, 0, y, x].item())
            drawn = rgb + (1 - alpha) * behind
            apart = drawn - pictures[m, v, :, y, x].double().numpy()
            total += either * np.mean(apart ** 2)
            weights += either
        assert error[m, k, v].item() == pytest.approx(total, rel=1e-5)
        assert weight[m, k, v].item() == pytest.approx(weights, rel=1e-5)


def test_nearest_does_not_depend_on_how_much_fits_into_memory(real):
    rgba = torch.rand(18, 4, 4, 32, 32)
    errors = error_of_sets(cut_out(real.repeat(20, 1, 1, 1, 1)), rgba)
    error, weight = squared_error(cut_out(real), rgba)
    expected = (error.sum(2) / weight.sum(2)).amin(1)
    assert torch.allclose(errors, expected.repeat(20))


def test_error_by_azimuth_is_a_loop(real):
    rgba = torch.rand(6, 4, 4, 32, 32)
    cutouts = cut_out(real)
    confusion = error_by_azimuth(select(cutouts, [2, 0]), rgba)
    for i, m in enumerate((2, 0)):
        for view, azimuth in np.ndindex(4, 4):
            picture = [part[m:m + 1, view:view + 1] for part in cutouts]
            errors = []
            for k in range(6):
                candidate = rgba[k:k + 1, azimuth:azimuth + 1]
                error, weight = squared_error(Cutouts(*picture), candidate)
                errors.append((error / weight).item())
            assert confusion[i, view, azimuth].item() == pytest.approx(min(errors), rel=1e-5)


def test_cut_out():
    picture = torch.full((1, 2, 3, 64, 64), 0.3)
    picture[0, 1] = torch.tensor([0.1, 0.6, 0.9])[:, None, None]
    # It may touch the border.
    picture[..., 16:48, 16:64] = torch.tensor([0.9, 0.2, 0.4])[:, None, None]
    small, background, foreground = cut_out(picture)
    assert small.shape == (1, 2, 3, 32, 32)
    assert foreground.shape == (1, 2, 1, 32, 32)
    expected = torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.6, 0.9]])
    assert torch.allclose(background[0, :, :, 0, 0], expected)
    assert (foreground[..., 9:23, 9:] == 1).all(), "the thing is foreground"
    assert (foreground[..., :7, :] == 0).all(), "above it is background"
    assert (foreground[..., :, :7] == 0).all(), "left of it is background"


def test_scales():
    rgba = torch.zeros(2, 3, 4, 32, 32)
    rgba[..., 8:24, 8:24] = torch.tensor([0.2, 0.4, 0.6, 0.5])[:, None, None]
    before = rgba[:, :, 3].sum((2, 3))
    scaled = at_scales(rgba).unflatten(0, (len(SCALES), 2))
    for scale, pictures in zip(SCALES, scaled):
        alpha = pictures[:, :, 3]
        area = alpha.sum((2, 3))
        assert torch.allclose(area / before, torch.tensor(scale ** 2), rtol=0.05)
        colour = pictures[:, :, :3].sum((3, 4))
        premultiplied = area[..., None] * torch.tensor([0.2, 0.4, 0.6])
        assert torch.allclose(colour, premultiplied, rtol=1e-4), "colours are premultiplied"
        centre = (alpha * torch.arange(32)).sum((2, 3)) / area
        assert torch.allclose(centre, torch.tensor(15.5), atol=1e-3), "the middle stays"
