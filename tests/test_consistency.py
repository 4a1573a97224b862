"""The consistency figure: one thing from eight sides scores well, two things in turn do not."""
import math

import pytest
import torch

from mvd.metrics import consistency
from mvd.metrics.candidates import SIZE, real_views
from mvd.metrics.consistency import CAMERAS, psnr_of_predictions
from small_judge import THINGS

# A fifth of what the figure is made with, for speed. With all steps the sets lie further apart.
STEPS = 60


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    monkeypatch.setattr(consistency, "STEPS", STEPS)


def car(colour="blue", seed=3):
    """[1, 8, 3, 64, 64]; another seed has other proportions, too."""
    return real_views([THINGS[1]._replace(colour=colour)], CAMERAS, seed=seed)


def in_turns(views, other):
    """The views, but every other one from `other`."""
    mixed = views.clone()
    mixed[:, 1::2] = other[:, 1::2]
    return mixed


@pytest.mark.slow
def test_two_things_in_turn_are_less_consistent_than_one():
    real = car()
    sets = [real, real.roll(2, 1), in_turns(real, car(seed=5)), in_turns(real, car("yellow"))]
    one, turned, two_instances, two_colours = psnr_of_predictions(torch.cat(sets)).tolist()
    assert one > 16, f"a consistent set is predicted at {one:.1f} dB only"
    assert turned == pytest.approx(one, abs=1), "a thing that is turned by 90 degrees"
    assert two_instances < one - 3 and two_colours < one - 3


def test_a_figure_depends_on_its_own_set_alone(monkeypatch):
    monkeypatch.setattr(consistency, "STEPS", 8)
    real, other = car(), car("yellow", seed=4)
    before = torch.get_rng_state()
    first, _, again = psnr_of_predictions(torch.cat([real, other, real])).tolist()
    assert first == again, "every fit starts from the same field, with the same random numbers"
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are his"


def test_the_figure_is_the_psnr_of_what_was_not_seen(monkeypatch):
    """With a field that always shows the same grey cloud, the figure by hand."""
    fits = []
    shown = torch.zeros(4, 4, SIZE, SIZE)
    shown[:, 3, :16] = 0.5  # the upper half, half opaque
    shown[:, :3, :16] = 0.2

    class Cloud:
        def __init__(self, device):
            pass

        def fit(self, c2w, cutouts):
            fits.append((c2w, cutouts.rgb))

        def predict(self, c2w):
            assert len(fits) % 2 == 0 or not torch.equal(c2w, fits[-1][0])
            return shown

    monkeypatch.setattr(consistency, "Fitter", Cloud)
    views = torch.full((1, 8, 3, SIZE, SIZE), 0.4)
    views[:, :, :, 24:, 8:24] = 0.9  # the thing; the border stays background where it is
    views[:, :, :, -1] = 0.4
    figure = psnr_of_predictions(views).item()

    cloud = (0.2 + 0.5 * 0.4 - 0.4) ** 2 * 0.5 * 16 * SIZE
    thing = (0.4 - 0.9) ** 2 * 7 * 16
    weight = 0.5 * 16 * SIZE + 7 * 16
    assert figure == pytest.approx(-10 * math.log10((cloud + thing) / weight), abs=1e-3)
    (even, pictures), (odd, _) = fits
    every_other = torch.stack([even, odd], 1).flatten(0, 1)
    azimuth = torch.atan2(every_other[:, 1, 3], every_other[:, 0, 3]).rad2deg() % 360
    torch.testing.assert_close(azimuth, torch.arange(8) * 45.0, atol=1e-3, rtol=0)
    assert pictures.shape == (4, 3, SIZE, SIZE)


def test_blank_pictures_are_not_consistent(monkeypatch):
    monkeypatch.setattr(consistency, "STEPS", 2)
    assert psnr_of_predictions(torch.full((1, 8, 3, SIZE, SIZE), 0.4)).tolist() == [0]


@pytest.mark.gpu
def test_a_gpu_finds_the_same_within_a_decibel():
    sets = torch.cat([car(), in_turns(car(), car("yellow"))])
    on_gpu = psnr_of_predictions(sets.cuda()).cpu()
    torch.testing.assert_close(on_gpu, psnr_of_predictions(sets), atol=1.0, rtol=0)
