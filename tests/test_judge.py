"""The judge, judged: real renders must pass, and every kind of wrong picture must fail in its own way.

For speed the tests' judge has fewer captions and proportions than the real one, and keeps what it has drawn.
"""
import functools
import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mvd.metrics import judge as metrics
from mvd.toyworld import world as toyworld
from mvd.tools.errors import UserError
from mvd.metrics.judge import (SAMPLED, Cameras, at_scales, cut_out, distance, distractors, draw_things, judge_sets, name_colours,
                         read_prompt, real_views, row, summary, variety)
from mvd.toyworld.world import ACCESSORIES, COLOURS, SUBJECTS, Thing

THINGS = [Thing("bulldog", "crown", "red"), Thing("car", "party hat", "blue"), Thing("duck", "skateboard", "yellow"),
          Thing("lamp", "crown", "green")]                          # the last has no front


@pytest.fixture(scope="module", autouse=True)
def small_judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CAPTIONS", 12)
        patch.setattr(metrics, "INSTANCES", range(3))
        patch.setattr(metrics, "candidate_geometry", functools.cache(metrics.candidate_geometry))
        yield


@pytest.fixture(scope="module")
def real(small_judge):
    return real_views(THINGS, SAMPLED, seed=3)


def test_real_renders_are_recognised_from_every_side(real):
    rows = judge_sets(real, THINGS, SAMPLED)
    assert summary(rows) == {"n": 4, "r_precision": 1.0, "view_accuracy": 1.0, "janus_rate": 0.0}
    assert [r["nearest"] for r in rows] == THINGS
    assert rows[3]["right_views"] is None and rows[3]["janus"] is None


def test_wrong_captions_are_at_chance(real):
    assert summary(judge_sets(real.roll(1, 0), THINGS, SAMPLED))["r_precision"] <= 0.25
    assert summary(judge_sets(torch.rand_like(real), THINGS, SAMPLED))["r_precision"] <= 0.25


def test_views_in_another_order_fail_view_accuracy(real):
    rows = judge_sets(real.roll(1, 1), THINGS, SAMPLED)
    assert summary(rows)["view_accuracy"] == 0.0
    swapped = real[:, [0, 3, 2, 1]]                                 # left for right: half of the views are still right
    assert summary(judge_sets(swapped, THINGS, SAMPLED))["view_accuracy"] == 0.5


def test_a_second_face_is_a_janus(real):
    janus = real.clone()
    janus[:, 2] = real[:, 0]                                        # the front once more, where the back should be
    rows = judge_sets(janus, THINGS, SAMPLED)
    assert [r["janus"] for r in rows] == [True, True, True, None]
    assert [r["right_views"] for r in rows] == [0.75, 0.75, 0.75, None]


def test_scale_and_background_do_not_matter(real):
    smaller = F.pad(F.interpolate(real.flatten(0, 1), (54, 54), mode="bilinear", antialias=True), (5, 5, 5, 5), mode="replicate")
    assert summary(judge_sets(smaller.unflatten(0, (4, 4)), THINGS, SAMPLED))["r_precision"] == 1.0
    larger = real[..., 4:-4, 4:-4]                                  # as if from nearer
    assert summary(judge_sets(larger, THINGS, SAMPLED))["r_precision"] == 1.0
    _, background, foreground = cut_out(real)
    foreground = F.interpolate(foreground.flatten(0, 1), (64, 64)).unflatten(0, (4, 4))
    other = torch.where(foreground > 0, real, torch.rand(4, 4, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
    assert summary(judge_sets(other, THINGS, SAMPLED))["r_precision"] == 1.0


def test_colour_that_no_caption_named(real):
    open_colours = [thing._replace(colour=None) for thing in THINGS]
    assert name_colours(real, open_colours, SAMPLED) == THINGS
    assert name_colours(real, THINGS[::-1], SAMPLED) == THINGS[::-1]            # a named colour stays


def test_distractors(monkeypatch):
    monkeypatch.setattr(metrics, "CAPTIONS", 64)
    for thing in (THINGS[0], Thing("cake", None, "pink")):
        others = distractors(thing)
        assert len(others) == len(set(others)) == 63 and thing not in others
        for seed in range(20):
            assert sum(sum(a != b for a, b in zip(other, thing)) == 1 for other in distractors(thing, seed)) == 32
        assert all(o.subject in SUBJECTS and o.colour in COLOURS for o in others)
        assert all(o.accessory in (thing.accessory, *ACCESSORIES) for o in others)      # all name one, or it is the difference
        assert others == distractors(thing) != distractors(thing, seed=1)


def test_captions_to_judge():
    for split in ("3d", "image", "never"):
        things = draw_things(split, 24)
        assert len(set(things)) == 24 and all(toyworld.split(t.subject, t.accessory) == split for t in things)
        assert all(t.accessory and t.colour for t in things)
        assert len({t.subject for t in things}) >= 20               # not 24 bulldogs
        assert draw_things(split, 8) == things[:8] != draw_things(split, 8, seed=1)
    for count in (0, 10_000):
        with pytest.raises(UserError, match="captions"):
            draw_things("never", count)


def test_prompts_are_read_back():
    for thing in THINGS + [Thing("house"), Thing("ice cream", "umbrella"), Thing("elephant", None, "orange")]:
        assert all(read_prompt(f" {caption.capitalize()} ") == thing for caption in toyworld.captions(thing))
    with pytest.raises(UserError, match="a corgi"):
        read_prompt("a corgi")


def test_real_views_are_of_other_instances_cameras_and_backgrounds(monkeypatch):
    drawn, draw = [], metrics.geometry

    def recorded(thing, seeds, cameras, device, fov_deg, framing, size):
        drawn.extend(zip(seeds, fov_deg.tolist(), framing.tolist()))
        return draw(thing, seeds, cameras, device, fov_deg, framing, size)

    monkeypatch.setattr(metrics, "geometry", recorded)
    things = [THINGS[0], THINGS[3], THINGS[0], THINGS[0]._replace(colour="blue"), THINGS[3]]
    views = real_views(things, SAMPLED, seed=1, size=32)
    seeds, fov_deg, framing = map(set, zip(*drawn))
    assert len(seeds) == len(fov_deg) == len(framing) == 5
    assert 8 <= min(seeds) and max(seeds) < 1_000_000               # neither the judge's nor those of training
    assert all(15 <= fov <= 60 for fov in fov_deg) and all(0.9 <= far <= 1.1 for far in framing)
    _, background, _ = cut_out(views)
    assert len(background[:, 0, 0].unique()) == 5 and torch.equal(background[:, 0], background[:, 1])   # one grey a set
    assert torch.equal(views, real_views(things, SAMPLED, seed=1, size=32))


def test_distance_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    pictures, background, rgba = (torch.rand(shape, generator=generator) for shape in
                                  ((2, 3, 3, 4, 4), (2, 3, 3, 1, 1), (5, 3, 4, 4, 4)))
    foreground = (torch.rand(2, 3, 1, 4, 4, generator=generator) > 0.5).float()
    error, weight = distance(pictures, background, foreground, rgba)
    for m, k, v in np.ndindex(2, 5, 3):
        total = weights = 0.0
        for y, x in np.ndindex(4, 4):
            *rgb, alpha = rgba[k, v, :, y, x].tolist()
            either = max(alpha, foreground[m, v, 0, y, x].item())
            drawn = [c + (1 - alpha) * b for c, b in zip(rgb, background[m, v].flatten().tolist())]
            total += either * np.mean([(a - b) ** 2 for a, b in zip(drawn, pictures[m, v, :, y, x].tolist())])
            weights += either
        assert error[m, k, v].item() == pytest.approx(total, rel=1e-5)
        assert weight[m, k, v].item() == pytest.approx(weights, rel=1e-5)


def test_nearest_does_not_depend_on_how_much_fits_into_memory(real):
    cut, candidates = cut_out(real.repeat(20, 1, 1, 1, 1)), torch.rand(18, 4, 4, 32, 32)
    errors = metrics.nearest(cut, list(range(80)), candidates)
    expected, weight = distance(*cut_out(real), candidates)
    assert torch.allclose(errors, (expected.sum(2) / weight.sum(2)).amin(1).repeat(20))


def test_nearest_by_view_is_a_loop(real):
    cut, candidates = cut_out(real), torch.rand(6, 4, 4, 32, 32)
    confusion = metrics.nearest_by_view(cut, [2, 0], candidates)
    for i, m in enumerate((2, 0)):
        for view, azimuth in np.ndindex(4, 4):
            errors = []
            for k in range(6):
                error, weight = distance(*(part[m:m + 1, view:view + 1] for part in cut), candidates[k:k + 1, azimuth:azimuth + 1])
                errors.append((error / weight).item())
            assert confusion[i, view, azimuth].item() == pytest.approx(min(errors), rel=1e-5)


def test_cut_out():
    picture = torch.full((1, 2, 3, 64, 64), 0.3)
    picture[0, 1] = torch.tensor([0.1, 0.6, 0.9])[:, None, None]
    picture[..., 16:48, 16:64] = torch.tensor([0.9, 0.2, 0.4])[:, None, None]   # it may touch the border
    small, background, foreground = cut_out(picture)
    assert small.shape == (1, 2, 3, 32, 32) and foreground.shape == (1, 2, 1, 32, 32)
    assert torch.allclose(background[0, :, :, 0, 0], torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.6, 0.9]]))
    assert (foreground[..., 9:23, 9:] == 1).all()
    assert (foreground[..., :7, :] == 0).all() and (foreground[..., :, :7] == 0).all()


def test_scales():
    rgba = torch.zeros(2, 3, 4, 32, 32)
    rgba[..., 8:24, 8:24] = torch.tensor([0.2, 0.4, 0.6, 0.5])[:, None, None]
    scaled = at_scales(rgba).unflatten(0, (len(metrics.SCALES), 2))
    for scale, candidates in zip(metrics.SCALES, scaled):
        area = candidates[:, :, 3].sum((2, 3)) / rgba[:, :, 3].sum((2, 3))
        assert torch.allclose(area, torch.tensor(scale ** 2), rtol=0.05)
        assert torch.allclose(candidates[:, :, :3].sum((3, 4)), candidates[:, :, 3].sum((2, 3))[..., None] *
                              torch.tensor([0.2, 0.4, 0.6]), rtol=1e-4)         # colours are premultiplied
        centre = (candidates[:, :, 3] * torch.arange(32)).sum((2, 3)) / candidates[:, :, 3].sum((2, 3))
        assert torch.allclose(centre, torch.tensor(15.5), atol=1e-3)


def test_variety():
    views = torch.full((3, 4, 3, 64, 64), 0.4)
    views[:, :, :, 16:48, 16:48] = torch.tensor([0.9, 1.0, 1.0])[:, None, None, None, None]
    views[1:] = torch.where(views[1:] == 0.4, 0.7, views[1:])                   # another background is no variety
    assert variety(views[1:]) == pytest.approx(0.0, abs=1e-6)
    inner, edge = 0.1 ** 2 * 14 ** 2 / 32 ** 2, 0.1 ** 2 * 20 ** 2 / 32 ** 2
    assert inner ** 0.5 * 2 / 3 < variety(views) < edge ** 0.5 * 2 / 3 * 3      # two of three pairs differ, by 0.1 within


def test_verdict_and_summary():
    errors = torch.linspace(1, 2, 12)
    captions = [THINGS[0]] + distractors(THINGS[0])
    right = row(captions, errors, 1 - torch.eye(4), SAMPLED)
    assert right == {"thing": THINGS[0], "nearest": THINGS[0], "recognised": True, "right_views": 1.0, "janus": False}
    wrong = row(captions, errors.flip(0), 1 - torch.eye(4).roll(2, 1), SAMPLED)
    assert not wrong["recognised"] and wrong["janus"] and wrong["right_views"] == 0
    flat = row([THINGS[3]] + captions[1:], errors, torch.zeros(4, 4), SAMPLED)
    assert summary([right, wrong, flat]) == {"n": 3, "r_precision": 2 / 3, "view_accuracy": 0.5, "janus_rate": 0.0}
    assert summary([flat]) == {"n": 1, "r_precision": 1.0, "view_accuracy": None, "janus_rate": None}
    eight = Cameras(15.0, tuple(100 + 45.0 * v for v in range(8)))              # front nearest to view 6, back to view 2
    confusion = torch.ones(8, 8)
    confusion[2, 6] = 0.5
    assert row(captions, errors, confusion, eight)["janus"]


# ---- command line ----------------------------------------------------------------------------------------------------------

def run_main(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["metrics", *flags, "--device", "cpu"])
    metrics.main()
    return capsys.readouterr().out


def save_run(folder, thing, mode="3d", size=40, shown=None):
    """What distill.py leaves of a run that was asked for `thing`; its pictures are of that, or of what is `shown`."""
    cameras = Cameras(15.0, (0.0, 90.0, 180.0, 270.0), 40.0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"prompt": toyworld.captions(thing)[0], "mode": mode}))
    shown = shown or thing._replace(colour=thing.colour or "teal")
    views = real_views([shown], cameras, size=size)[0]
    save_file({"rgb": views, "elevation": torch.tensor(15.0), "azimuth": torch.tensor(cameras.azimuth), "fov": torch.tensor(40.0),
               "distance": torch.tensor(2.5)}, folder / "views.safetensors")


def test_distilled_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(metrics, "CAPTIONS", 4)
    save_run(tmp_path / "a", Thing("bulldog", "crown"))
    save_run(tmp_path / "b", Thing("lamp", "crown", "green"), mode="2d", size=48, shown=Thing("bus", "cloud", "pink"))
    lines = run_main(monkeypatch, capsys, str(tmp_path / "a"), str(tmp_path / "b"), "--json").splitlines()
    by_mode = {line["mode"]: line for line in map(json.loads, lines)}
    assert by_mode["3d"] == {"split": "image", "mode": "3d", "n": 1, "r_precision": 1.0, "ceiling": 1.0, "view_accuracy": 1.0,
                             "view_ceiling": 1.0, "janus_rate": 0.0, "janus_ceiling": 0.0}
    assert by_mode["2d"]["split"] == toyworld.split("lamp", "crown") and by_mode["2d"]["view_accuracy"] is None
    assert (by_mode["2d"]["r_precision"], by_mode["2d"]["ceiling"]) == (0.0, 1.0)
    table = run_main(monkeypatch, capsys, str(tmp_path / "a"))
    assert "recognised" in table and "r_precision" in table and "1.000" in table


def test_samples_of_a_perfect_model(monkeypatch, capsys):
    def sample(prompts, elevation, seed):
        assert elevation == 15.0
        return real_views([read_prompt(prompt) for prompt in prompts], SAMPLED, seed=seed + 50)

    monkeypatch.setattr(metrics, "CAPTIONS", 4)
    monkeypatch.setattr(metrics.MVDream, "load", lambda name, device, dtype: types.SimpleNamespace(sample=sample))
    lines = [json.loads(line) for line in run_main(monkeypatch, capsys, "--samples", "1", "--variety", "1", "--json").splitlines()]
    assert [line["split"] for line in lines] == ["3d", "image", "never"]
    assert all(line["n"] == line["r_precision"] == line["ceiling"] == 1 for line in lines)
    assert all(0.6 < line["variety"] < 1.6 for line in lines)


@pytest.mark.parametrize("flags", [(), ("--samples", "0"), ("--samples", "1", "runs/a"), ("nowhere",)])
def test_mistakes_of_the_user(monkeypatch, capsys, flags):
    monkeypatch.setattr(metrics.MVDream, "load", lambda name, device, dtype: None)
    with pytest.raises(UserError):
        run_main(monkeypatch, capsys, *flags)


def test_a_run_that_is_no_toy(monkeypatch, capsys, tmp_path):
    save_run(tmp_path / "a", THINGS[3])
    (tmp_path / "a" / "config.json").write_text('{"prompt": "a corgi astronaut"}')
    with pytest.raises(UserError, match="no caption of the toy world"):
        run_main(monkeypatch, capsys, str(tmp_path / "a"))
    (tmp_path / "training").mkdir()                                              # left out, as `runs/*` may name it
    with pytest.raises(UserError, match="no caption of the toy world"):
        run_main(monkeypatch, capsys, str(tmp_path / "training"), str(tmp_path / "a"))
    assert "left out" in capsys.readouterr().err
    (tmp_path / "a" / "views.safetensors").unlink()
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match="no finished run"):
        run_main(monkeypatch, capsys, str(tmp_path / "a"))
