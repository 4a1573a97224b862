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
from mvd.data import find_images, find_objects
from mvd.metrics import candidates
from mvd.tools.errors import UserError
from mvd.toyworld import (
    ACCESSORIES, COLOURS, NATURAL, ORIENTED, PAINTS, RENDERED_VIEWS, SLOT, SUBJECTS, Item, Thing,
    build, captions, dataset, draw_views, pairs, palette, plan, split, write,
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
        said = " ".join(item.captions)
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed: two sets and five images."""
    folder = tmp_path_factory.mktemp("toy") / "whole"
    write(folder, objects=2, images=5, size=32)
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_metadata(folder):
    """{file name: captions} of the images."""
    lines = (folder / "images/metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["file_name"]: row["captions"] for row in rows}


def assert_shows(path, item, c2w, fov):
    """The picture is what the camera sees of the Item, rendered once more."""
    drawn = pixels(path)
    assert drawn.shape == (32, 32, 4)
    c2w = torch.as_tensor(c2w, dtype=torch.float32)[None, None]
    buffers = trace(build(*item.pair, [item.seed]), c2w, torch.tensor([fov]), 32)
    rgba = paint(buffers, palette([item.colour]))[0, 0]
    expected = (rgba.permute(1, 2, 0) * 255).numpy()
    assert np.abs(drawn - expected).mean() < 1.5, f"{path} shows something else"


def test_there_is_a_folder_of_views_for_each_set_and_a_file_for_each_image(whole):
    views = [f"{k:03d}.png" for k in range(RENDERED_VIEWS)]
    wanted = {"settings.json", "sets/captions.json", "images/metadata.jsonl"}
    wanted |= {f"sets/{i:06d}/{name}" for i in range(2) for name in [*views, "transforms.json"]}
    wanted |= {f"images/{i:06d}.png" for i in range(5)}
    assert files_of(whole) == wanted


def test_views_and_cameras_of_a_set_agree_with_the_plan(whole):
    said = json.loads((whole / "sets/captions.json").read_text())
    assert list(said) == ["000000", "000001"]
    for item in plan("set", 2, 0):
        folder = whole / "sets" / item.name
        thing = Thing(*item.pair, item.colour if item.said else None)
        assert said[item.name] == captions(thing)
        scene = json.loads((folder / "transforms.json").read_text())
        fov = math.degrees(scene["camera_angle_x"])
        assert fov == pytest.approx(item.fov, rel=1e-5)
        frames = scene["frames"]
        assert [frame["file_path"] for frame in frames] == [
            f"{k:03d}.png" for k in range(RENDERED_VIEWS)]
        for k, frame in enumerate(frames):
            c2w = np.array(frame["transform_matrix"])
            x, y, z = c2w[:3, 3]
            distance = math.hypot(x, y, z)
            assert distance == pytest.approx(item.distance, rel=1e-5)
            assert math.degrees(math.asin(z / distance)) == pytest.approx(item.elevation, rel=1e-5)
            azimuth = math.degrees(math.atan2(y, x)) % 360
            assert azimuth == pytest.approx(item.azimuth + k * 360 / RENDERED_VIEWS, rel=1e-5)
            if k in (0, 5, RENDERED_VIEWS - 1):
                assert_shows(folder / frame["file_path"], item, c2w, fov)
    front, back = pixels(folder / "000.png"), pixels(folder / "016.png")
    assert np.abs(front - back).mean() > 2, "the views of a set are all the same"


def test_images_agree_with_the_plan(whole):
    said = read_metadata(whole)
    assert list(said) == [f"{i:06d}.png" for i in range(5)]
    for item in plan("image", 5, 0):
        thing = Thing(*item.pair, item.colour if item.said else None)
        assert said[f"{item.name}.png"] == captions(thing)
        c2w = orbit(item.elevation, item.azimuth, item.distance)
        assert_shows(whole / f"images/{item.name}.png", item, c2w, item.fov)


def test_training_reads_what_was_written(whole):
    objects, (found,) = find_objects([whole / "sets"])
    assert len(objects) == 2 and found.left_out == []
    for i, item in enumerate(plan("set", 2, 0)):
        assert objects.name(i) == f"{whole}/sets/{item.name}"
        assert objects.captions(i) == item.captions
        views = objects.read(i)
        azimuth = item.azimuth + np.arange(RENDERED_VIEWS) * 360 / RENDERED_VIEWS
        wanted = dict(
            azimuth=azimuth, elevation=item.elevation, fov=item.fov, distance=item.distance)
        for name, value in wanted.items():
            np.testing.assert_allclose(getattr(views, name), value, rtol=1e-5, err_msg=name)
        read = objects.pictures(views, [0, 5], 32)
        for planes, name in zip(read, ("000.png", "005.png")):
            path = whole / "sets" / item.name / name
            assert np.array_equal(planes.transpose(1, 2, 0), pixels(path)), path
    images, (found,) = find_images([whole / "images"])
    assert found.left_out == []
    items = plan("image", 5, 0)
    assert [images.captions(i) for i in range(len(images))] == [item.captions for item in items]


def assert_same_folder(folder, other):
    assert files_of(folder) == files_of(other)
    for name in files_of(other):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_killed_within_a_set_leaves_no_half_set(whole, tmp_path, monkeypatch):
    save_views = dataset.save_views

    def dies(folder, pictures):
        if "000001" in folder.name:
            save_views(folder, pictures[:17])
            raise KeyboardInterrupt
        return save_views(folder, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "save_views", dies)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, objects=2, images=0, size=32)
    assert len(list(tmp_path.glob("sets/*/016.png"))) > 0, "the case shows nothing"
    there = {path.name for path in tmp_path.glob("sets/[!.]*")}
    assert there <= {"000000"}, "a half set, or captions of a half data set"
    # A file that a kill cut short while it was written.
    (tmp_path / "images/.000000.png.1.tmp").write_bytes(b"half")
    write(tmp_path, objects=2, images=5, size=32)
    assert_same_folder(tmp_path, whole)


def test_a_killed_run_goes_on_where_it_was_and_a_data_set_can_grow(whole, tmp_path, monkeypatch):
    save = dataset.save
    saved = []

    def dies(path, pixels):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, objects=0, images=5, size=32)
    assert not list(tmp_path.glob("*/metadata.jsonl")) + list(tmp_path.glob("*/captions.json"))
    done = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob("images/*.png")}
    assert 3 <= len(done) < 5

    write(tmp_path, objects=1, images=5, size=32)
    assert json.loads((tmp_path / "sets/captions.json").read_text()).keys() == {"000000"}
    for path in tmp_path.glob("sets/000000/*"):
        done[path] = os.stat(path).st_mtime_ns
    write(tmp_path, objects=2, images=5, size=32)
    for path, time in done.items():
        assert os.stat(path).st_mtime_ns == time, f"{path} was drawn again"
    assert_same_folder(tmp_path, whole)


@pytest.mark.parametrize("kind", ["set", "image"])
@pytest.mark.parametrize("seed", [0, 1, 4293, 4294, 4295, 2**32 - 1, 2**40, 2**62, 2**63 - 2])
def test_no_proportions_of_the_judge_are_in_the_data(kind, seed):
    """As PyTorch's generator takes them, which reads the last 32 bits of a seed."""
    judges = {*candidates.CANDIDATE_SEEDS, *candidates.REAL_SEEDS}
    found = set()
    for i in (0, 1, 467_296, 499_999, 500_000, 934_592, 967_295, 967_296, 999_999, 10**6, 10**9):
        item = dataset.plan_item(kind, i, seed, ("bulldog", None), "red")
        found.add(item.seed % 2**32)
    assert not judges & found and min(found) >= 10**6
    assert len(found) == 11, "two items are the same"
    torch.manual_seed(3)
    same = torch.rand(2)
    torch.manual_seed(3 + 2**32)
    assert torch.equal(torch.rand(2), same), "it reads more bits: seeds need not be folded"


def test_the_data_of_a_small_seed_stay_as_they_are():
    """The shipped model has seen those of seed 0."""
    for seed in (0, 1, 7, 4000):
        assert [item.seed for item in plan("set", 3, seed)] == [
            (seed + 1) * 10**6 + i for i in range(3)]
        assert [item.seed for item in plan("image", 3, seed)] == [
            (seed + 1) * 10**6 + 500_000 + i for i in range(3)]


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, True, 0.0, "0"])
def test_what_is_no_seed_is_refused(seed, tmp_path):
    with pytest.raises(UserError, match="a seed is a whole number"):
        write(tmp_path / "new", objects=1, images=1, size=8, seed=seed)
    assert not (tmp_path / "new").exists()


def test_a_start_that_fails_is_in_nobodys_way(tmp_path, monkeypatch):
    """Another size or seed is fine as long as nothing is drawn."""
    def fails(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "draw_files", fails)
        with pytest.raises(MemoryError):
            write(tmp_path, objects=1, images=0, size=10**5)
    assert (tmp_path / "settings.json").exists()
    write(tmp_path, objects=0, images=1, size=8, seed=3)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"size": 8, "seed": 3}
    with pytest.raises(UserError, match="another size or seed"):
        write(tmp_path, objects=0, images=1, size=16, seed=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/settings.json").write_text('{"editor": 4}')
    with pytest.raises(UserError, match="another size or seed"):
        write(tmp_path / "mine", objects=0, images=1, size=16)


def test_mistakes_are_told_in_one_line_and_change_nothing(whole, tmp_path):
    before = {path: os.stat(path).st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(UserError, match="another size or seed"):
        write(whole, objects=2, images=5, size=16)
    with pytest.raises(UserError, match="000001 is none of so many --objects"):
        write(whole, objects=1, images=5, size=32)
    with pytest.raises(UserError, match="000004.png is none of so many"):
        write(whole, objects=2, images=4, size=32)
    with pytest.raises(UserError, match="cannot write"):
        write(whole / "settings.json/below", objects=0, images=1, size=32)
    with pytest.raises(UserError, match="negative"):
        write(tmp_path / "other", objects=-1, images=1)
    assert not (tmp_path / "other").exists()
    assert {path: os.stat(path).st_mtime_ns for path in whole.rglob("*")} == before


def test_a_folder_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"size": 16, "seed": 0}')
    (tmp_path / "index.jsonl").write_text("")
    with pytest.raises(UserError, match="older version of mvd.*choose another --out"):
        write(tmp_path, objects=1, images=1, size=16)
    assert files_of(tmp_path) == {"settings.json", "index.jsonl"}
    # And one of a run that was killed before it wrote the index.
    (tmp_path / "index.jsonl").unlink()
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/000000.png").write_bytes(b"")
    with pytest.raises(UserError, match="000000.png is none"):
        write(tmp_path, objects=1, images=1, size=16)


def test_the_command_exits_with_2_on_a_mistake(tmp_path):
    command = [sys.executable, "-m", "mvd.toyworld", "--objects", "-3"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True,
        cwd=Path(__file__).parents[1])
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_views_have_the_right_size():
    item = Item(
        "image", "000000", ("cake", None), "teal", said=True, seed=5,
        azimuth=10.0, elevation=20.0, fov=40.0, distance=1.4)
    assert draw_views([item, item], 16, "cpu").shape == (2, 1, 16, 16, 4)
    in_set = item._replace(kind="set")
    assert draw_views([in_set], 16, "cpu").shape == (1, RENDERED_VIEWS, 16, 16, 4)
