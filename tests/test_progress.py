"""Rows of the log against numbers added by hand, and a network's operations against formulas."""
import copy

import pytest
import torch

from mvd.presets import PRESETS
from mvd.tools import progress
from mvd.tools.progress import Progress, operations_per_view, used_memory
from mvd.unet import MultiViewUNet
from mvd.vae import VAE

CPU = torch.device("cpu")
NAMES = {"objects": "multiview", "images": "single"}


def measured(errors, counts, norm=0.0, skipped=0.0):
    return torch.tensor([*errors, *counts, norm, skipped])


class Clock:
    """In place of the module `time`: it stands still until it is told otherwise."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


# ---- rows ------------------------------------------------------------------------------------

def test_a_row_has_the_means_of_all_examples_by_kind_and_quarter():
    rows = Progress(NAMES, CPU)
    rows.add("objects", measured([1, 2, 0, 4], [1, 1, 0, 2], norm=3.0), views=16)
    rows.add("objects", measured([3, 0, 0, 0], [4, 0, 0, 0], norm=1.0), views=16)
    rows.add("images", measured([0, 0, 6, 0], [0, 0, 8, 0], norm=5.0), views=16)
    row = rows.take()
    assert row["multiview"] == pytest.approx(10 / 8)
    assert row["multiview_by_noise"] == pytest.approx([4 / 5, 2.0, None, 2.0])
    assert row["single"] == pytest.approx(6 / 8)
    assert row["single_by_noise"] == [None, None, 0.75, None]
    assert row["gradient_norm"] == pytest.approx(3.0)
    assert "skipped" not in row and "share_of_speed" not in row and "memory_gib" not in row


def test_losses_without_a_time_have_no_quarters():
    rows = Progress(NAMES, CPU)
    rows.add("images", measured([6, 0, 0, 0], [4, 0, 0, 0]), views=4)
    row = rows.take()
    assert row["single"] == 1.5
    assert "single_by_noise" not in row
    assert "multiview" not in row, "a kind that did not occur has a loss"


def test_skipped_steps_are_counted_and_count_for_no_mean():
    rows = Progress(NAMES, CPU)
    rows.add("objects", measured([2, 0, 0, 0], [2, 0, 0, 0], norm=4.0), views=2)
    for kind in ("objects", "images"):
        rows.add(kind, measured([0] * 4, [0] * 4, 0.0, 1.0), views=2)
    row = rows.take()
    assert row["skipped"] == 2
    assert (row["multiview"], row["gradient_norm"]) == (1.0, 4.0)


def test_a_row_begins_where_the_last_one_ended(clock):
    rows = Progress(NAMES, CPU)
    rows.add("objects", measured([2, 2, 2, 2], [1, 1, 1, 1], 7.0, 1.0), views=8)
    clock.now += 1
    rows.take()
    rows.add("objects", measured([1, 1, 0, 0], [1, 1, 0, 0], 2.0), views=6)
    clock.now += 2
    expected = {
        "multiview": 1.0, "multiview_by_noise": [1.0, 1.0, None, None], "gradient_norm": 2.0,
        "views_per_s": 3.0,
    }
    assert rows.take() == expected


def test_pauses_do_not_count(clock):
    """Nor does the time from a row's end to the next one's begin count twice."""
    rows = Progress(NAMES, CPU, share=lambda views_per_s: views_per_s / 100)
    clock.now += 2
    for _ in range(3):
        rows.add("images", measured([1, 0, 0, 0], [1, 0, 0, 0]), views=10)
        with rows.pause():
            clock.now += 50
    clock.now += 1
    row = rows.take()
    assert row["views_per_s"] == pytest.approx(30 / 3)
    assert row["share_of_speed"] == pytest.approx(0.1)


@pytest.mark.gpu
def test_the_memory_of_the_card_is_all_that_is_in_use():
    device = torch.device("cuda")
    before = used_memory(device)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert used_memory(device) - before >= 2**30 * 0.9
    rows = Progress(NAMES, device)
    assert rows.take()["memory_gib"] >= 1
    del held


# ---- operations ------------------------------------------------------------------------------

def operations_of_layers(module, *inputs):
    """Two per product and sum in all convolutions and linear layers, as they run once."""
    counts = []

    def count(layer, _, result):
        weights = layer.weight.numel() // layer.weight.shape[0]
        counts.append(2 * result.numel() * weights)

    hooks = [layer.register_forward_hook(count) for layer in module.modules()
             if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def test_operations_are_three_times_those_of_a_forward_pass():
    """Once forward, twice backward. Attention's own products come on top, little in a small net."""
    config = copy.deepcopy(PRESETS["nano"].model)
    views, side = 4, config.size // 2 ** (len(config.vae.channel_mult) - 1)
    inputs = [
        torch.zeros(1, views, config.unet.in_channels, side, side),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, config.text.context_length, config.unet.context_dim),
        torch.zeros(1, views, config.unet.camera_dim),
    ]
    layers = 3 * operations_of_layers(MultiViewUNet(config.unet), *inputs) / views
    found = operations_per_view(config, views, encoding=False)
    assert 0.95 * layers < found < 1.5 * layers

    vae = VAE(config.vae)
    vae.forward = vae.encode
    pictures = torch.zeros(views, 3, config.size, config.size)
    encoder = operations_of_layers(vae, pictures) / views
    more = operations_per_view(config, views, encoding=True) - found
    assert 0.99 * encoder < more < 1.5 * encoder
