"""Backgrounds, colours, rows of tokens, and posteriors, each against its formula."""
import math

import pytest
import torch

from mvd import data
from mvd.text import TextConfig, TextTower

WORDS = ("3d", "a", "asset", "ball", "blue", "red")


def small_tower():
    """A text tower that knows six words."""
    config = TextConfig(
        width=8, heads=1, layers=1, unused_layers=0, output_dim=None, context_length=10,
        words=WORDS,
    )
    return TextTower(config)


# ---- captions --------------------------------------------------------------------------------

def test_fewer_captions_are_repeated():
    tower = small_tower()
    table = data.token_table(tower, [["red ball", "ball, red", "red"], ["blue ball"]])
    assert table.shape == (2, 3, 10)
    assert torch.equal(table[0], tower.tokenize(["red ball", "ball, red", "red"]))
    assert torch.equal(table[1], tower.tokenize(["blue ball"]).expand(3, -1))


def test_token_table_adds_the_suffix():
    tower = small_tower()
    table = data.token_table(tower, [["a red ball", "ball, red"]], ", 3d asset")
    expected = tower.tokenize(["a red ball, 3d asset", "ball, red, 3d asset"])
    assert torch.equal(table[0], expected)


# ---- pictures --------------------------------------------------------------------------------

def test_on_grey_is_alpha_compositing():
    rgba = torch.zeros(2, 4, 1, 1, dtype=torch.uint8)
    # Red, one fifth opaque.
    rgba[:, 0] = 255
    rgba[:, 3] = 51
    grey = torch.tensor([0.5, 1.0])
    picture = (data.on_grey(rgba, grey)[:, :, 0, 0] + 1) / 2
    expected = torch.tensor([[0.6, 0.4, 0.4], [1.0, 0.8, 0.8]])
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)


def dice_of(count):
    return data.Dice(0, torch.tensor(0), torch.arange(count))


def source_and_power(channel, before):
    """From which of the three channels `before` one was made, and by which power of it."""
    fits = []
    for index, source in enumerate(before):
        middling = (source > 0.2) & (source < 0.8)
        logarithm = channel[middling].clamp(min=1e-9).log()
        powers = logarithm / source[middling].log()
        spread = powers.std() / powers.mean()
        fits.append((spread.item(), powers.mean().item(), index))
    spread, power, index = min(fits)
    assert spread < 0.05, "no power of any channel gives these values"
    return index, power


def test_recolour_mixes_the_colours_and_nothing_else():
    """Each picture has one order of its colours and one power of each; its alpha stays."""
    torch.manual_seed(0)
    rgba = torch.randint(256, (64, 4, 5, 5), dtype=torch.uint8)
    assert torch.equal(data.recolour(rgba, dice_of(64), 0.0), rgba)
    other = data.recolour(rgba, dice_of(64), 1.0)
    assert other.dtype == torch.uint8
    assert torch.equal(other[:, 3], rgba[:, 3]), "the alpha channel has changed"

    orders, powers = set(), []
    rgb_before, rgb_after = rgba[:, :3].double() / 255, other[:, :3].double() / 255
    for before, after in zip(rgb_before, rgb_after):
        order = []
        for channel in after:
            index, power = source_and_power(channel, before)
            order.append(index)
            powers.append(math.log(power))
        assert sorted(order) == [0, 1, 2], "a channel was used twice"
        orders.add(tuple(order))
    assert len(orders) == 6, "some order never came"
    assert -1.25 < min(powers) < -1 and 1 < max(powers) < 1.25, "not from e^-1.2 to e^1.2"


def test_a_share_of_the_pictures_is_recoloured():
    rgba = torch.randint(256, (400, 4, 3, 3), dtype=torch.uint8)
    for share in (0.25, 0.5):
        changed = (data.recolour(rgba, dice_of(400), share) != rgba).flatten(1).any(1)
        assert abs(changed.float().mean() - share) < 0.1
    half = data.recolour(rgba, dice_of(400))
    assert torch.equal(half, data.recolour(rgba, dice_of(400), 0.5)), "it is not half by default"
    part = data.recolour(rgba[:7], dice_of(7))
    assert torch.equal(part, half[:7]), "a picture depends on what else is in the batch"


def test_every_order_of_colours_is_as_frequent_among_those_that_are_recoloured():
    """Red, which is 0 or 255 to any power, turns green and blue in a sixth of the cases each."""
    red = torch.zeros(4000, 4, 1, 1, dtype=torch.uint8)
    red[:, 0] = red[:, 3] = 255
    other = data.recolour(red, dice_of(4000))[:, :3, 0, 0].float().mean(0) / 255
    torch.testing.assert_close(other, torch.tensor([4.0, 1.0, 1.0]) / 6, rtol=0, atol=0.03)


# ---- posteriors ------------------------------------------------------------------------------

class Echo:
    """In place of the autoencoder: the mean is the picture, the deviation is 0.1 everywhere."""

    def __init__(self):
        self.batches = []

    def encode(self, images):
        self.batches.append(len(images))
        return images, torch.full_like(images, 2 * math.log(0.1))


def test_posteriors_are_the_mean_and_the_deviation():
    torch.manual_seed(0)
    rgba = torch.randint(256, (3, 4, 2, 2), dtype=torch.uint8)
    grey = torch.tensor([0.0, 0.5, 1.0])
    found = data.posteriors_of(Echo(), rgba, grey)
    assert found.dtype == torch.float32
    mean, std = found.chunk(2, dim=1)
    torch.testing.assert_close(mean, data.on_grey(rgba, grey))
    torch.testing.assert_close(std, torch.full_like(std, 0.1))


@pytest.mark.parametrize("pixels, batches", [(4 * 5, [5, 5, 2]), (1, [1] * 12), (2**23, [12])])
def test_many_pictures_are_encoded_some_at_a_time(pixels, batches):
    """Over the greys that they were given, without gradients, in half precision."""
    torch.manual_seed(0)
    rgba = torch.randint(256, (12, 4, 2, 2), dtype=torch.uint8)
    grey, echo = torch.rand(12, requires_grad=True), Echo()
    found = data.encode_posteriors(echo, rgba, grey, pixels)
    assert echo.batches == batches
    assert found.dtype == torch.float16 and not found.requires_grad
    assert torch.equal(found, data.posteriors_of(Echo(), rgba, grey).half())


def test_a_sample_has_the_posteriors_mean_and_deviation():
    torch.manual_seed(0)
    mean = torch.full((20000, 1, 1, 1), 3.0)
    std = torch.full((20000, 1, 1, 1), 0.5)
    z = data.sample_posterior(torch.cat([mean, std], 1).half())
    assert z.dtype == torch.float32
    assert abs(z.mean() - 3) < 0.02
    assert abs(z.std() - 0.5) < 0.02


def test_the_noise_of_a_sample_can_be_given():
    mean, std, noise = torch.randn(3, 2, 5, 3, 4, 4)
    z = data.sample_posterior(torch.cat([mean, std], 2), noise)
    torch.testing.assert_close(z, mean + std * noise)


def test_indices_are_of_their_counts():
    torch.manual_seed(0)
    counts = [1, 3, 10]
    for count, drawn in zip(counts, data.draw_indices(counts, 200, "cpu"), strict=True):
        assert drawn.shape == (200,) and drawn.dtype == torch.int64
        assert drawn.unique().tolist() == list(range(count)), "an index is wrong or never comes"
