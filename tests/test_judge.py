"""The judge, judged: real renders must pass, and every kind of wrong picture must fail in its own
way.

For speed the tests' judge has fewer captions and proportions than the real one (small_judge.py).
"""
import pytest
import torch
import torch.nn.functional as F

from mvd.metrics import distractors
from mvd.metrics.candidates import Cameras, cut_out, real_views
from mvd.metrics.judge import judge_sets, name_colours, summary, variety, verdict
from small_judge import FOUR, THINGS, make_small


@pytest.fixture(scope="module", autouse=True)
def small_judge():
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        yield


@pytest.fixture(scope="module")
def real(small_judge):
    """[4, 4, 3, 64, 64]"""
    return real_views(THINGS, FOUR, seed=3)


def scores(views):
    """The summary of four sets of views, as if they were asked to show THINGS."""
    return summary(judge_sets(views, THINGS, FOUR))


def test_real_renders_are_recognised_from_every_side(real):
    verdicts = judge_sets(real, THINGS, FOUR)
    perfect = {"n": 4, "r_precision": 1.0, "view_accuracy": 1.0, "janus_rate": 0.0}
    assert summary(verdicts) == perfect
    assert [v["nearest"] for v in verdicts] == THINGS
    lamp = verdicts[3]
    assert lamp["right_views"] is None and lamp["janus"] is None, "a lamp has no front"


def test_wrong_captions_are_at_chance(real):
    assert scores(real.roll(1, 0))["r_precision"] <= 0.25
    assert scores(torch.rand_like(real))["r_precision"] <= 0.25


def test_views_in_another_order_fail_view_accuracy(real):
    assert scores(real.roll(1, 1))["view_accuracy"] == 0.0
    mirrored = real[:, [0, 3, 2, 1]]
    assert scores(mirrored)["view_accuracy"] == 0.5, "left for right: half are still right"


def test_a_second_face_is_a_janus(real):
    janus = real.clone()
    # The front once more, where the back should be.
    janus[:, 2] = real[:, 0]
    verdicts = judge_sets(janus, THINGS, FOUR)
    assert [v["janus"] for v in verdicts] == [True, True, True, None]
    assert [v["right_views"] for v in verdicts] == [0.75, 0.75, 0.75, None]


def test_scale_and_background_do_not_matter(real):
    small = F.interpolate(real.flatten(0, 1), (54, 54), mode="bilinear", antialias=True)
    smaller = F.pad(small, (5, 5, 5, 5), mode="replicate").unflatten(0, (4, 4))
    assert scores(smaller)["r_precision"] == 1.0
    # As if from nearer.
    larger = real[..., 4:-4, 4:-4]
    assert scores(larger)["r_precision"] == 1.0

    foreground = cut_out(real).foreground.flatten(0, 1)
    foreground = F.interpolate(foreground, (64, 64)).unflatten(0, (4, 4))
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(4, 4, 3, 1, 1, generator=generator)
    elsewhere = torch.where(foreground > 0, real, colours)
    assert scores(elsewhere)["r_precision"] == 1.0


def test_colour_that_no_caption_named(real):
    open_colours = [thing._replace(colour=None) for thing in THINGS]
    assert name_colours(real, open_colours, FOUR) == THINGS
    reverse = THINGS[::-1]
    assert name_colours(real, reverse, FOUR) == reverse, "a colour that is named stays"


def test_variety():
    views = torch.full((3, 4, 3, 64, 64), 0.4)
    colours = torch.tensor([0.9, 1.0, 1.0])[:, None, None, None, None]
    views[:, :, :, 16:48, 16:48] = colours
    # Another background is not variety.
    views[1:] = torch.where(views[1:] == 0.4, 0.7, views[1:])
    assert variety(views[1:]) == pytest.approx(0.0, abs=1e-6)
    # Two of three pairs differ, by 0.1 within the square, whose edge is uncertain.
    inner = 0.1 ** 2 * 14 ** 2 / 32 ** 2
    edge = 0.1 ** 2 * 20 ** 2 / 32 ** 2
    assert inner ** 0.5 * 2 / 3 < variety(views) < edge ** 0.5 * 2 / 3 * 3


def test_verdict_and_summary():
    errors = torch.linspace(1, 2, 12)
    captions = [THINGS[0], *distractors(THINGS[0])]
    right = verdict(captions, errors, 1 - torch.eye(4), FOUR)
    assert right == {
        "thing": THINGS[0],
        "nearest": THINGS[0],
        "recognised": True,
        "right_views": 1.0,
        "janus": False,
    }
    wrong = verdict(captions, errors.flip(0), 1 - torch.eye(4).roll(2, 1), FOUR)
    assert not wrong["recognised"] and wrong["janus"] and wrong["right_views"] == 0
    no_front = [THINGS[3], *captions[1:]]
    flat = verdict(no_front, errors, torch.zeros(4, 4), FOUR)
    means = {"n": 3, "r_precision": 2 / 3, "view_accuracy": 0.5, "janus_rate": 0.0}
    assert summary([right, wrong, flat]) == means
    nothing = {"n": 1, "r_precision": 1.0, "view_accuracy": None, "janus_rate": None}
    assert summary([flat]) == nothing


def test_front_and_back_are_the_nearest_views():
    # The front is nearest to view 6, the back to view 2.
    eight = Cameras(15.0, tuple(100 + 45.0 * view for view in range(8)))
    confusion = torch.ones(8, 8)
    confusion[2, 6] = 0.5
    captions = [THINGS[0], *distractors(THINGS[0])]
    assert verdict(captions, torch.linspace(1, 2, 12), confusion, eight)["janus"]
