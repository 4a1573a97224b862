"""The toy world: what its captions say, what its splits keep apart, where its things are, and the files it writes."""
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
from mvd.toyworld import world as toyworld
from mvd.toyworld.animals import PAINTS, SLOT
from mvd.cameras import orbit
from mvd.tools.errors import UserError
from mvd.toyworld.tracer import paint, render
from mvd.toyworld.solids import distance
from mvd.toyworld.world import (ACCESSORIES, COLOURS, NATURAL, ORIENTED, SUBJECTS, Item, Thing, build, captions, draw, pairs, palette,
                          plan, split, write)

PAIRS = [(s, a) for s in SUBJECTS for a in (None, *ACCESSORIES)]


def test_there_is_enough_to_see():
    assert len(SUBJECTS) >= 24 and len(ACCESSORIES) == 10 and len(COLOURS) == 12 and len(ORIENTED) >= 16
    assert ORIENTED <= set(SUBJECTS) and set(NATURAL) == set(SUBJECTS) and set(NATURAL.values()) <= set(COLOURS)
    colours = torch.tensor(list(COLOURS.values()))
    assert (torch.cdist(colours, colours) + torch.eye(12)).min() > 0.2


def test_splits_are_disjoint_and_balanced():
    of = {which: set(pairs(which)) for which in ("3d", "image", "never")}
    assert sum(map(len, of.values())) == len(set().union(*of.values())) == len(PAIRS)
    assert split("bulldog", "crown") == "image"
    assert all(split(subject, None) == "3d" for subject in SUBJECTS)
    dressed = 10 * len(SUBJECTS)
    for which, share in (("3d", 0.75), ("image", 0.15), ("never", 0.10)):
        count = Counter(split(s, a) for s, a in PAIRS if a)[which]
        assert abs(count / dressed - share) < 0.02
    for subject in SUBJECTS:
        count = Counter(split(subject, a) for a in ACCESSORIES)
        assert count["3d"] >= 7 and count["image"] >= 1 and count["never"] == 1
    for accessory in ACCESSORIES:
        count = Counter(split(s, accessory) for s in SUBJECTS)
        assert count["3d"] >= 16 and count["image"] >= 3 and count["never"] >= 2


def test_captions_mean_the_thing_and_use_known_words_only():
    seen, known = {}, set(MVDream.load("tiny").config.text.words)
    for subject, accessory in PAIRS:
        for colour in (None, *COLOURS):
            thing = Thing(subject, accessory, colour)
            said = captions(thing)
            assert len(set(said)) == len(said) == 4
            for caption in said:
                words = caption.replace(",", " ").split()
                assert caption == caption.lower() and set(words) <= known and set(subject.split()) <= set(words)
                assert set(words) & set(COLOURS) == ({colour} if colour else set())
                assert not accessory or accessory.split()[-1] in words
                assert seen.setdefault(caption, thing) == thing             # no caption stands for two things
    assert captions(Thing("bulldog", "crown", "red"))[:2] == ["a red bulldog wearing a crown", "bulldog wearing a crown, red"]
    assert captions(Thing("elephant"))[0] == "an elephant"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_everything_is_inside_the_cube_and_fills_it(subject):
    """Nothing on the faces of the cube, for many seeds; and among points in the cube, some far out are inside the thing."""
    cube = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0)) - 0.5
    faces = torch.cat([torch.where(torch.arange(3)[:, None] == axis, side, cube[:, :200]) for axis in range(3)
                       for side in (-0.5, 0.5)], 1)
    for accessory in (None, *list(ACCESSORIES)[len(subject) % 3::3]):
        shapes = build(subject, accessory, range(12))
        points = (faces - shapes.offset[..., None]) / shapes.scale[:, None, None]
        assert (distance(shapes, points) > 0).all()
        inside = cube[:, (distance(shapes, (cube - shapes.offset[..., None]) / shapes.scale[:, None, None]) < 0).any(0)]
        assert torch.linalg.vector_norm(inside, dim=0).max() < 0.475                # in a ball, so that no view cuts much off
        assert torch.linalg.vector_norm(inside, dim=0).max() > 0.34                 # and it is not lost in it


def test_a_seed_gives_the_same_proportions_in_any_batch():
    several, alone, again = (build("bulldog", "crown", seeds) for seeds in ([3, 8, 5], [8], [8]))
    points = torch.rand(1, 3, 200, generator=torch.Generator().manual_seed(0)) - 0.5

    def world(shapes, i):
        return distance(shapes, ((points - shapes.offset[i:i + 1, :, None]) / shapes.scale[i]).expand(len(shapes.scale), -1, -1))[i]

    assert torch.allclose(world(several, 1), world(alone, 0), atol=1e-5) and torch.equal(world(alone, 0), world(again, 0))
    assert (world(several, 0) - world(several, 2)).abs().max() > 0.01
    with pytest.raises(UserError, match="no 'dragon'"):
        build("dragon", None, [0])


def test_the_body_wears_the_colour_and_the_crown_stays_gold():
    colours = palette(["red", "blue"])
    assert colours.shape == (2, len(PAINTS), 3) and 0 <= colours.min() and colours.max() <= 1
    assert torch.allclose(colours[:, SLOT["body"]], torch.tensor([COLOURS["red"], COLOURS["blue"]]))
    assert torch.allclose(colours[:, SLOT["gold"]], torch.tensor(PAINTS["gold"]).expand(2, 3))
    c2w, fov = orbit(15.0, torch.tensor([[0.0, 180.0]]), 1.4), torch.tensor([40.0])
    worn = [render(build("bulldog", accessory, [0]), c2w, fov, 64).slot[0, :, 0] for accessory in (None, "crown")]
    for view in (0, 1):                                             # gold above the head, from the front and from behind
        gold = (worn[1][view] == SLOT["gold"]).nonzero()
        assert len(gold) > 50 and not (worn[0][view] == SLOT["gold"]).any()
        assert gold[:, 0].float().mean() < (worn[1][view] == SLOT["body"]).nonzero()[:, 0].float().mean() - 10


def test_front_and_back_differ_where_we_say_so():
    c2w, fov = orbit(10.0, torch.tensor([[0.0, 180.0]]), 1.4), torch.tensor([40.0])
    for subject in SUBJECTS:
        front, back = paint(render(build(subject, None, [1]), c2w, fov, 48), palette([NATURAL[subject]]))[0]
        difference = (front - back).abs().sum(0).mean() / (front[3] + back[3]).mean()
        assert (difference > 0.10) if subject in ORIENTED else (difference < 0.45), (subject, difference)


# The data set on disk.

def test_a_plan_is_even_and_frontal_where_it_should_be():
    sets, images = plan("set", 600, 0), plan("image", 1200, 0)
    assert plan("set", 10, 0) == sets[:10] and plan("set", 10, 1) != sets[:10]
    assert len({item.seed for item in sets + images}) == 1800 and min(item.seed for item in sets + images) >= 1_000_000
    assert Counter(split(*item.pair) for item in sets) == {"3d": 600}
    assert Counter(split(*item.pair) for item in images) == {"3d": 600, "image": 600}
    counts = Counter(item.pair for item in sets)
    assert len(counts) == len(pairs("3d")) and max(counts.values()) - min(counts.values()) <= 1
    assert max(Counter(item.colour for item in sets).values()) < 2 * min(Counter(item.colour for item in sets).values())
    unsaid = [item for item in sets + images if not item.said]
    assert 0.16 < len(unsaid) / 1800 < 0.24
    assert 0.4 < sum(item.colour == NATURAL[item.pair[0]] for item in unsaid) / len(unsaid) < 0.7
    assert all(not set(" ".join(item.line()["captions"]).replace(",", "").split()) & set(COLOURS) for item in unsaid)
    assert all(0 <= item.azimuth < 11.25 for item in sets)
    turned = np.array([(item.azimuth + 180) % 360 - 180 for item in images])
    assert 0.82 < (abs(turned) < 60).mean() < 0.95 and abs(np.median(turned)) < 4 and (abs(turned) > 90).sum() > 40
    for item in sets + images:
        assert 0 <= item.elevation <= 30 and 15 <= item.fov <= 60
        assert 0.9 <= item.distance / (0.5 / math.tan(math.radians(item.fov / 2))) <= 1.1


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_files_show_what_the_index_says(tmp_path):
    write(tmp_path, objects=2, images=3, size=32)
    lines = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["set"] * 2 + ["image"] * 3
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert files == sorted(line["file"] for line in lines) and len(list(tmp_path.rglob("*"))) == 2 + 5 + 2
    items = plan("set", 2, 0) + plan("image", 3, 0)
    for line, item in zip(lines, items):
        strip, views = pixels(tmp_path / line["file"]), 32 if line["kind"] == "set" else 1
        assert strip.shape == (32, 32 * views, 4)
        assert line["captions"] == captions(Thing(*item.pair, item.colour if item.said else None))
        for view in (0, 5, 31) if views == 32 else (0,):                # rendered once more from the cameras in the index
            c2w = orbit(line["elevation"], line["azimuth"] + view * 11.25, line["distance"])[None, None]
            rgba = paint(render(build(*item.pair, [item.seed]), c2w, torch.tensor([line["fov"]]), 32), palette([item.colour]))
            expected = (rgba[0, 0].permute(1, 2, 0) * 255).numpy()
            assert np.abs(strip[:, view * 32:(view + 1) * 32] - expected).mean() < 1.5, line
    assert np.abs(pixels(tmp_path / "sets/000000.png")[:, :32] - pixels(tmp_path / "sets/000000.png")[:, 512:544]).mean() > 2


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    write(tmp_path / "whole", objects=1, images=5, size=16)
    save, saved = toyworld.save, []

    def dies(path, strip):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, strip)

    monkeypatch.setattr(toyworld, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", objects=1, images=5, size=16)
    assert not (tmp_path / "killed/index.jsonl").exists()
    done = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "killed").rglob("*.png")}
    assert len(done) == 3
    monkeypatch.setattr(toyworld, "save", save)
    write(tmp_path / "killed", objects=1, images=5, size=16)
    assert all(os.stat(path).st_mtime_ns == time for path, time in done.items())
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()
    write(tmp_path / "killed", objects=1, images=6, size=16)        # and it can grow
    assert len((tmp_path / "killed/index.jsonl").read_text().splitlines()) == 7


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
    command = [sys.executable, "-m", "mvd.toyworld", "--out", str(tmp_path), "--objects", "-3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_draw_gives_strips_of_the_right_size():
    item = Item("images/000000.png", ("cake", None), "teal", True, 5, 10.0, 20.0, 40.0, 1.4)
    assert draw([item, item], 16, "cpu").shape == (2, 16, 16, 4)
    assert draw([item._replace(file="sets/000000.png")], 16, "cpu").shape == (1, 16, 512, 4)
