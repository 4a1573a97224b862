"""The toy world: what captions say, what splits keep apart, where things are, what is written.

Tests count what is in the tables, so that they hold for a new animal, accessory or colour.
"""
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvd import MVDream
from mvd.cameras import orbit
from mvd.tools.errors import UserError
from mvd.toyworld import (
    ACCESSORIES, COLOURS, NATURAL, ORIENTED, PAINTS, RENDERED_VIEWS, SLOT, SUBJECTS, Item, Thing,
    build, captions, dataset, draw_strips, pairs, palette, plan, split, write,
)
from mvd.toyworld.solids import signed_distance
from mvd.toyworld.tracer import paint, trace

PAIRS = [(subject, accessory) for subject in SUBJECTS for accessory in (None, *ACCESSORIES)]
FRONT_AND_BACK = torch.tensor([[0.0, 180.0]])


# ---- words -----------------------------------------------------------------------------------

def test_there_is_enough_to_see():
    assert len(SUBJECTS) >= 24
    assert len(ACCESSORIES) >= 10
    assert len(COLOURS) >= 12
    assert len(ORIENTED) >= 16
    assert ORIENTED <= set(SUBJECTS)
    assert set(NATURAL) == set(SUBJECTS), "every subject needs a natural colour"
    assert set(NATURAL.values()) <= set(COLOURS), "a natural colour must be one of COLOURS"
    colours = torch.tensor(list(COLOURS.values()))
    apart = torch.cdist(colours, colours) + torch.eye(len(COLOURS))
    assert apart.min() > 0.2, "two colours look alike"


def test_splits_are_disjoint_and_balanced():
    of = {which: set(pairs(which)) for which in ("3d", "image", "never")}
    found = [pair for pairs_of_split in of.values() for pair in pairs_of_split]
    assert len(found) == len(PAIRS)
    assert set(found) == set(PAIRS)
    assert split("bulldog", "crown") == "image"
    assert all(split(subject, None) == "3d" for subject in SUBJECTS)
    dressed = len(ACCESSORIES) * len(SUBJECTS)
    counts = Counter(split(*pair) for pair in PAIRS if pair[1])
    for which, share in (("3d", 0.75), ("image", 0.15), ("never", 0.10)):
        assert abs(counts[which] / dressed - share) < 0.02, which


def test_every_subject_and_every_accessory_is_in_every_split():
    # words.split repeats after ten accessories and after twenty subjects.
    tens = len(ACCESSORIES) // 10
    for subject in SUBJECTS:
        count = Counter(split(subject, a) for a in ACCESSORIES)
        assert count["3d"] >= 7 * tens, subject
        assert count["image"] >= tens, subject
        assert count["never"] >= tens, subject
        assert count["never"] <= math.ceil(len(ACCESSORIES) / 10), subject
    twenties = len(SUBJECTS) // 20
    for accessory in ACCESSORIES:
        count = Counter(split(s, accessory) for s in SUBJECTS)
        assert count["3d"] >= 2 * len(SUBJECTS) // 3, accessory
        assert count["image"] >= 3 * twenties, accessory
        assert count["never"] >= 2 * twenties, accessory


def test_captions_mean_the_thing_and_use_known_words_only():
    seen = {}
    known = set(MVDream.load("tiny").config.text.words)
    for subject, accessory in PAIRS:
        for colour in (None, *COLOURS):
            thing = Thing(subject, accessory, colour)
            said = captions(thing)
            assert len(set(said)) == len(said) == 4
            for caption in said:
                words = set(caption.replace(",", " ").split())
                assert caption == caption.lower()
                assert words <= known, "the shipped model does not know a new word"
                assert set(subject.split()) <= words
                assert words & set(COLOURS) == ({colour} if colour else set())
                assert not accessory or accessory.split()[-1] in words
                meaning = seen.setdefault(caption, thing)
                assert meaning == thing, f"{caption!r} means two things"
    first, second, _, _ = captions(Thing("bulldog", "crown", "red"))
    assert first == "a red bulldog wearing a crown"
    assert second == "bulldog wearing a crown, red"
    assert captions(Thing("elephant"))[0] == "an elephant"


# ---- shapes and colours ----------------------------------------------------------------------

def distances(shapes, points):
    """Signed distance of each object at world points [3, P] or [N, 3, P]: [N, P]."""
    local = (points - shapes.offset[..., None]) / shapes.scale[:, None, None]
    return signed_distance(shapes, local)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_everything_is_inside_the_cube_and_fills_it(subject):
    """Nothing is on the faces of the cube, for many seeds, and something is far out in it."""
    generator = torch.Generator().manual_seed(0)
    cube = torch.rand(3, 4000, generator=generator) - 0.5
    faces = []
    for axis in range(3):
        for side in (-0.5, 0.5):
            on_face = cube[:, :200].clone()
            on_face[axis] = side
            faces.append(on_face)
    faces = torch.cat(faces, 1)
    for accessory in (None, *list(ACCESSORIES)[len(subject) % 3::3]):
        shapes = build(subject, accessory, range(12))
        assert (distances(shapes, faces) > 0).all(), f"{accessory}: on a face of the cube"
        inside = (distances(shapes, cube) < 0).any(0)
        far = torch.linalg.vector_norm(cube[:, inside], dim=0).max()
        assert far < 0.475, f"{accessory}: outside the ball, so that pictures cut it off"
        assert far > 0.34, f"{accessory}: too small"


def test_a_seed_gives_the_same_proportions_in_any_batch():
    several = build("bulldog", "crown", [3, 8, 5])
    alone = build("bulldog", "crown", [8])
    again = build("bulldog", "crown", [8])
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(1, 3, 200, generator=generator) - 0.5
    of_several = distances(several, points)
    of_alone = distances(alone, points)[0]
    assert torch.allclose(of_several[1], of_alone, atol=1e-5)
    assert torch.equal(of_alone, distances(again, points)[0])
    difference = (of_several[0] - of_several[2]).abs()
    assert difference.max() > 0.01, "two seeds give the same shape"
    with pytest.raises(UserError, match="no 'dragon'"):
        build("dragon", None, [0])


def test_the_body_wears_the_colour_and_the_crown_stays_gold():
    colours = palette(["red", "blue"])
    assert colours.shape == (2, len(PAINTS), 3)
    assert 0 <= colours.min() and colours.max() <= 1
    body = torch.tensor([COLOURS["red"], COLOURS["blue"]])
    assert torch.allclose(colours[:, SLOT["body"]], body)
    gold = torch.tensor(PAINTS["gold"]).expand(2, 3)
    assert torch.allclose(colours[:, SLOT["gold"]], gold)

    c2w = orbit(15.0, FRONT_AND_BACK, 1.4)
    fov = torch.tensor([40.0])
    bare = trace(build("bulldog", None, [0]), c2w, fov, 64).slot[0, :, 0]
    crowned = trace(build("bulldog", "crown", [0]), c2w, fov, 64).slot[0, :, 0]
    assert not (bare == SLOT["gold"]).any()
    for view in (0, 1):
        gold_rows = (crowned[view] == SLOT["gold"]).nonzero()[:, 0].float()
        body_rows = (crowned[view] == SLOT["body"]).nonzero()[:, 0].float()
        assert len(gold_rows) > 50
        assert gold_rows.mean() < body_rows.mean() - 10, "the crown is not above the body"


def test_front_and_back_differ_where_we_say_so():
    """One limit parts them: the cake differs by 0.20, the castle by 0.25."""
    c2w = orbit(10.0, FRONT_AND_BACK, 1.4)
    fov = torch.tensor([40.0])
    for subject in SUBJECTS:
        buffers = trace(build(subject, None, [1]), c2w, fov, 48)
        front, back = paint(buffers, palette([NATURAL[subject]]))[0]
        difference = (front - back).abs().sum(0).mean()
        difference /= (front[3] + back[3]).mean()
        if subject in ORIENTED:
            assert difference > 0.225, f"{subject} has no front"
        else:
            assert difference < 0.225, f"{subject} has a front"


# ---- the data set on disk --------------------------------------------------------------------

def test_a_plan_is_even():
    sets = plan("set", 600, 0)
    images = plan("image", 1200, 0)
    assert plan("set", 10, 0) == sets[:10]
    assert plan("set", 10, 1) != sets[:10]
    seeds = {item.seed for item in sets + images}
    assert len(seeds) == 1800
    assert min(seeds) >= 1_000_000, "smaller seeds are left for judging"
    assert Counter(split(*item.pair) for item in sets) == {"3d": 600}
    assert Counter(split(*item.pair) for item in images) == {"3d": 600, "image": 600}
    counts = Counter(item.pair for item in sets)
    assert len(counts) == len(pairs("3d"))
    assert max(counts.values()) - min(counts.values()) <= 1
    colours = Counter(item.colour for item in sets).values()
    assert max(colours) < 2 * min(colours)


def test_a_plan_leaves_the_colour_out_of_some_captions():
    items = plan("set", 600, 0) + plan("image", 1200, 0)
    unsaid = [item for item in items if not item.said]
    assert 0.16 < len(unsaid) / 1800 < 0.24
    natural = [item for item in unsaid if item.colour == NATURAL[item.pair[0]]]
    assert 0.4 < len(natural) / len(unsaid) < 0.7
    for item in unsaid:
        said = " ".join(item.index_entry()["captions"])
        words = said.replace(",", "").split()
        assert not set(words) & set(COLOURS), item


def test_cameras_of_a_plan_are_frontal_where_they_should_be():
    sets = plan("set", 600, 0)
    images = plan("image", 1200, 0)
    assert all(0 <= item.azimuth < 360 / RENDERED_VIEWS for item in sets)
    turned = np.array([(item.azimuth + 180) % 360 - 180 for item in images])
    assert 0.82 < (abs(turned) < 60).mean() < 0.95
    assert abs(np.median(turned)) < 4
    assert (abs(turned) > 90).sum() > 40
    for item in sets + images:
        assert 0 <= item.elevation <= 30
        assert 15 <= item.fov <= 60
        fills_the_picture = 0.5 / math.tan(math.radians(item.fov / 2))
        assert 0.9 <= item.distance / fills_the_picture <= 1.1


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_files_show_what_the_index_says(tmp_path):
    write(tmp_path, objects=2, images=3, size=32)
    lines = (tmp_path / "index.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["kind"] for entry in entries] == ["set"] * 2 + ["image"] * 3
    pictures = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert pictures == {entry["file"] for entry in entries}
    # And 2 folders, index.jsonl, settings.json.
    assert len(list(tmp_path.rglob("*"))) == len(entries) + 2 + 2
    items = plan("set", 2, 0) + plan("image", 3, 0)
    for entry, item in zip(entries, items):
        views = RENDERED_VIEWS if entry["kind"] == "set" else 1
        strip = pixels(tmp_path / entry["file"])
        assert strip.shape == (32, 32 * views, 4)
        thing = Thing(*item.pair, item.colour if item.said else None)
        assert entry["captions"] == captions(thing)
        # Some views are rendered once more, from the cameras in the index.
        for view in (0, 5, views - 1) if views > 1 else (0,):
            azimuth = entry["azimuth"] + view * 360 / RENDERED_VIEWS
            c2w = orbit(entry["elevation"], azimuth, entry["distance"])[None, None]
            fov = torch.tensor([entry["fov"]])
            buffers = trace(build(*item.pair, [item.seed]), c2w, fov, 32)
            rgba = paint(buffers, palette([item.colour]))[0, 0]
            expected = (rgba.permute(1, 2, 0) * 255).numpy()
            drawn = strip[:, view * 32:(view + 1) * 32]
            assert np.abs(drawn - expected).mean() < 1.5, entry
    strip = pixels(tmp_path / "sets/000000.png")
    front, back = strip[:, :32], strip[:, 512:544]
    assert np.abs(front - back).mean() > 2, "the views of a set are all the same"


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    write(whole, objects=1, images=5, size=16)
    save = dataset.save
    saved = []

    def dies(path, strip):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, strip)

    monkeypatch.setattr(dataset, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        write(killed, objects=1, images=5, size=16)
    assert not (killed / "index.jsonl").exists()
    done = {path: os.stat(path).st_mtime_ns for path in killed.rglob("*.png")}
    assert len(done) == 3

    monkeypatch.setattr(dataset, "save", save)
    write(killed, objects=1, images=5, size=16)
    for path, time in done.items():
        assert os.stat(path).st_mtime_ns == time, f"{path} was drawn again"
    for path in whole.rglob("*.*"):
        other = killed / path.relative_to(whole)
        assert path.read_bytes() == other.read_bytes(), path
    # It can also grow.
    write(killed, objects=1, images=6, size=16)
    assert len((killed / "index.jsonl").read_text().splitlines()) == 7


def test_mistakes_are_told_in_one_line(tmp_path):
    write(tmp_path / "data", objects=0, images=1, size=16)
    with pytest.raises(UserError, match="other size or seed|another size or seed"):
        write(tmp_path / "data", objects=0, images=1, size=32)
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "data/index.jsonl/below", objects=0, images=1, size=16)
    with pytest.raises(UserError, match="negative"):
        write(tmp_path / "other", objects=-1, images=1)
    assert not (tmp_path / "other").exists()


def test_the_command_exits_with_2_on_a_mistake(tmp_path):
    command = [sys.executable, "-m", "mvd.toyworld", "--objects", "-3"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True,
        cwd=Path(__file__).parents[1])
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_strips_have_the_right_size():
    item = Item(
        "images/000000.png", ("cake", None), "teal", said=True, seed=5,
        azimuth=10.0, elevation=20.0, fov=40.0, distance=1.4)
    assert draw_strips([item, item], 16, "cpu").shape == (2, 16, 16, 4)
    in_set = item._replace(file="sets/000000.png")
    assert draw_strips([in_set], 16, "cpu").shape == (1, 16, 16 * RENDERED_VIEWS, 4)
