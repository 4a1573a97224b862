"""mvd.data.loader: the same examples for any number of workers, bad members, signals, memory."""
import gc
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mvd import cameras
from mvd.data import images, loader
from mvd.data.loader import Examples, Request, Tally, batches, read_everything
from mvd.data.objects import find_objects
from mvd.data.shards import Records
from mvd.tools.errors import BadMember, UserError

ROOT = Path(__file__).parent.parent
SIZE, VIEWS = 8, 4
LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")


# ---- a data set that tells where each pixel comes from ---------------------------------------

def picture_of(item, view=0):
    """uint8 [4, SIZE, SIZE], each item and view another."""
    return np.full((4, SIZE, SIZE), [[[item % 256]], [[item // 256]], [[view]], [[255]]], np.uint8)


class Images:
    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)

    def __len__(self):
        return self.count

    def name(self, item):
        return f"{item}.jpg"

    def captions(self, item):
        return [f"image {item}", f"picture {item}"]

    def picture(self, item, size):
        if item in self.bad:
            raise BadMember("cut short")
        return picture_of(item)


class Objects:
    """Each object has 8 views on an even orbit; those of `few` have two, far from an even set."""

    def __init__(self, count, bad=(), bad_views=(), missing=(), few=(), silent=()):
        self.count, self.bad, self.bad_views = count, set(bad), set(bad_views)
        self.missing, self.few, self.silent = set(missing), set(few), set(silent)

    def __len__(self):
        return self.count

    def name(self, item):
        return f"object {item}"

    def captions(self, item):
        return [] if item in self.silent else [f"thing {item}"]

    def read(self, item):
        if item in self.bad:
            raise BadMember("no cameras")
        azimuth = np.arange(2 if item in self.few else 8) * 45.0
        elevation = np.full(len(azimuth), float(item % 90))
        missing = [("lost.png", "not there")] if item in self.missing else []
        return SimpleNamespace(
            item=item, name=self.name(item), azimuth=azimuth, elevation=elevation,
            c2w=cameras.orbit(elevation, azimuth), left_out=missing,
            names=[f"{view}.png" for view in range(len(azimuth))])

    def pictures(self, rendered, which, size):
        if any((rendered.item, view) in self.bad_views for view in which):
            raise BadMember("broken data")
        return np.stack([picture_of(rendered.item, view) for view in which])


def examples_of(objects, photos, **settings):
    return Examples(objects, photos, size=SIZE, views=VIEWS, bound=30.0, seed=5, **settings)


def alternating(size=3):
    """Endless requests: objects, images, objects, …"""
    for i in itertools.count():
        places = tuple(range(i // 2 * size, (i // 2 + 1) * size))
        yield Request("images" if i % 2 else "objects", places)


def first(count, examples, workers, context=None):
    """The first batches of `alternating`, as what can be compared with ==."""
    answers = batches(examples, alternating(), workers, context)
    return [
        (batch.kind, batch.rgba.tolist(), None if batch.camera is None else batch.camera.tolist(),
         batch.captions, batch.items, batch.left_out, batch.tried)
        for batch in itertools.islice(answers, count)
    ]


# ---- the sequence ----------------------------------------------------------------------------

def test_each_picture_caption_and_camera_belongs_to_its_item():
    examples = examples_of(Objects(300), Images(300))
    answers = batches(examples, alternating(), workers=0)
    for batch in itertools.islice(answers, 6):
        word = "thing" if batch.kind == "objects" else "image|picture"
        V = VIEWS if batch.kind == "objects" else 1
        assert batch.rgba.shape == (3, V, 4, SIZE, SIZE) and batch.rgba.dtype == torch.uint8
        for k, item in enumerate(batch.items):
            name, number = batch.captions[k].split()
            assert name in word and int(number) == item, "a caption of another item"
            view = batch.rgba[k, :, 2, 0, 0].tolist()
            wanted = torch.stack([torch.from_numpy(picture_of(item, v)) for v in view])
            assert torch.equal(batch.rgba[k], wanted), "pixels of another item"
            if batch.kind == "objects":
                assert [(v - view[0]) % 8 for v in view] == [0, 2, 4, 6], "no even set"
                c2w = cameras.orbit(float(item % 90), torch.tensor(view) * 45.0)
                camera = cameras.extrinsics(c2w)
                torch.testing.assert_close(batch.camera[k], camera, atol=1e-6, rtol=0)
        assert batch.camera is not None or batch.kind == "images"
        assert batch.left_out == [] and batch.tried == 3 * V


def test_an_epoch_has_every_chosen_item_once_with_varying_wordings_and_first_views():
    chosen = {"images": torch.tensor([2, 3, 5, 7, 11, 13, 17, 19])}
    examples = examples_of(Objects(9), Images(20), chosen=chosen)
    batch = examples[Request("images", tuple(range(16)))]
    for epoch in batch.items[:8], batch.items[8:]:
        assert sorted(epoch) == chosen["images"].tolist(), "not each chosen image once"
    assert batch.items[:8] != batch.items[8:], "both epochs in one order"
    assert {text.split()[0] for text in batch.captions} == {"image", "picture"}
    batch = examples[Request("objects", tuple(range(45)))]
    assert sorted(batch.items[:9]) == list(range(9)), "not each object once"
    assert set(batch.rgba[:, 0, 2, 0, 0].tolist()) == set(range(8)), "some views never come first"


def test_examples_depend_on_the_seed_and_on_the_place_alone():
    both = Objects(50, bad=range(0, 50, 7)), Images(50, bad=range(0, 50, 6))
    examples = examples_of(*both)
    for kind in "objects", "images":
        whole = examples[Request(kind, tuple(range(20)))]
        parts = [examples[Request(kind, places)] for places in ((17, 18, 19), tuple(range(17)))]
        assert whole.items == parts[1].items + parts[0].items, "the batch changes the items"
        assert torch.equal(whole.rgba, torch.cat([parts[1].rgba, parts[0].rgba]))
        assert whole.captions == parts[1].captions + parts[0].captions
    request = Request("images", tuple(range(20)))
    orders = [
        Examples(None, Images(50), size=SIZE, views=VIEWS, bound=30.0, seed=seed)[request].items
        for seed in (5, 6)
    ]
    assert orders[0] != orders[1], "the seed has no effect"


@pytest.mark.parametrize("workers", [1, 2])
def test_forked_workers_give_the_same_sequence_and_reports(workers):
    objects = Objects(40, bad=[1, 5], bad_views=[(i, 3) for i in range(20)], missing=range(30))
    examples = examples_of(objects, Images(40, bad=range(10)))
    here = first(12, examples, workers=0)
    assert any(batch[5] for batch in here), "the test wants bad members"
    assert first(12, examples, workers) == here


def test_spawned_workers_give_the_same_sequence():
    """Takes 4 s: a new Python imports torch."""
    examples = examples_of(Objects(40, bad=[1, 5]), Images(40, bad=range(10)))
    assert first(6, examples, 1, "spawn") == first(6, examples, workers=0)


def test_a_loader_leaves_the_random_numbers_of_its_caller_alone():
    state = torch.random.get_rng_state()
    first(2, examples_of(Objects(9), Images(9)), workers=1)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- bad members -----------------------------------------------------------------------------

def test_a_bad_item_is_reported_and_another_takes_its_place():
    bad = {3, 4}
    examples = examples_of(Objects(30, bad=bad), Images(30, bad=bad))
    for kind, name, pictures in ("objects", "object {}", VIEWS), ("images", "{}.jpg", 1):
        reason = "no cameras" if kind == "objects" else "cut short"
        batch = examples[Request(kind, tuple(range(30)))]
        good = examples_of(Objects(30), Images(30))[Request(kind, tuple(range(30)))]
        assert not bad & set(batch.items)
        kept = [a for a, b in zip(batch.items, good.items) if b not in bad]
        assert kept == [b for b in good.items if b not in bad], "a bad item moves the others"
        assert {*batch.left_out} == {(name.format(i), reason, pictures) for i in bad}
        assert batch.tried == pictures * (30 + len(batch.left_out))


def test_a_bad_view_is_named_and_a_missing_one_counts_as_one_of_all_views():
    every = [(0, view) for view in range(8)]
    examples = examples_of(Objects(6, bad_views=every, missing=[1]), None)
    batch = examples[Request("objects", tuple(range(6)))]
    assert 0 not in batch.items
    views = [entry for entry in batch.left_out if entry[0].startswith("object 0/")]
    assert len(views) >= VIEWS and {entry[1:] for entry in views} == {("broken data", 1)}
    missing = [entry for entry in batch.left_out if entry[0].startswith("object 1")]
    assert {*missing} == {("object 1/lost.png", "not there", VIEWS / 8)}
    assert batch.tried == VIEWS * 7 + len(missing) * VIEWS / 8 + VIEWS * (len(views) // VIEWS - 1)


def test_an_object_without_a_caption_is_bad():
    batch = examples_of(Objects(4, silent=[2]), None)[Request("objects", tuple(range(4)))]
    assert 2 not in batch.items and {*batch.left_out} == {("object 2", "no caption", VIEWS)}


def test_an_object_without_an_even_set_is_named_but_is_not_bad():
    batch = examples_of(Objects(4, few=[2]), None)[Request("objects", tuple(range(4)))]
    assert 2 not in batch.items
    assert {*batch.left_out} == {("object 2", "no 4 views within 30° of an even set", 0)}
    assert batch.tried == 4 * VIEWS


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_used_the_error_is_one_line_with_reasons(workers):
    examples = examples_of(None, Images(30, bad=range(30)))
    answers = batches(examples, iter([Request("images", (0,))]), workers)
    with pytest.raises(UserError, match=r"100 in a row cannot be used: \d+.jpg \(cut") as error:
        next(answers)
    text = str(error.value)
    assert "\n" not in text and text.count("cut short") == 10 and "more" in text


def entries(count, start=0):
    return [(f"{i}.jpg", "cut short", 1) for i in range(start, start + count)]


def test_five_percent_may_be_bad_and_not_more():
    for total, tried in (100, 100), (10_000, 200), (10_000, 1000), (10_000, 4000):
        most = {100: 5, 200: 50, 1000: 50, 4000: 200}[tried]
        tally = Tally(total)
        assert tally.add(entries(most), tried) == entries(most)
        with pytest.raises(UserError, match=rf"{most + 1} of {max(tried, min(total, 1000))} pic"):
            tally.add(entries(1, start=most), 0)


def test_a_name_counts_once_however_often_it_comes():
    tally = Tally(100)
    assert tally.add(entries(5), 50) == entries(5)
    assert tally.add(entries(5) + entries(1), 5000) == []
    with pytest.raises(UserError, match="6 of 100") as error:
        tally.add(entries(1, start=50), 5000)
    assert "50.jpg (cut short)" in str(error.value)
    # What is not bad does not count.
    assert Tally(100).add([("a", "no set", 0), *entries(5)], 100)


# ---- everything at once ----------------------------------------------------------------------

def everything(objects, photos, workers=0, **more):
    return read_everything(
        objects, photos, size=SIZE, views=VIEWS, bound=30.0, workers=workers, **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_held_in_order_without_what_is_bad(workers):
    bad_views = [(2, 5), (3, 0)]
    objects = Objects(70, bad=[1], bad_views=bad_views, missing=[4], few=[6], silent=[9])
    photos = Images(150, bad=[0, 149])
    read = []
    held = everything(objects, photos, workers, progress=read.append)

    kept = [item for item in range(70) if item not in (1, 6, 9)]
    seen = [(i, v) for i in kept for v in range(8) if (i, v) not in bad_views]
    wanted = np.stack([picture_of(*one) for one in seen])
    assert np.array_equal(held.views.numpy(), wanted), "views differ"
    c2w = torch.stack([cameras.orbit(float(i % 90), 45.0 * v) for i, v in seen])
    torch.testing.assert_close(held.camera, cameras.extrinsics(c2w), atol=1e-6, rtol=0)
    assert held.object_names == [f"object {i}" for i in kept]
    assert held.object_captions == [[f"thing {i}"] for i in kept]
    assert len(held.first_set) == len(kept) + 1
    for i, item in enumerate(kept):
        sets = held.sets[held.first_set[i]:held.first_set[i + 1]]
        even = [[(v + k) % 8 for k in (0, 2, 4, 6)] for v in range(8) if (item, v) in seen]
        found = [[seen[view] for view in row] for row in sets.tolist()]
        assert {one for row in found for one, _ in row} == {item}, "a set of two objects"
        if item not in (2, 3):
            assert [[view for _, view in row] for row in found] == even
    assert held.sets.dtype == torch.int64 and held.sets.shape[1] == VIEWS

    good = range(1, 149)
    assert np.array_equal(held.images.numpy(), np.stack([picture_of(i) for i in good]))
    assert held.image_names == [f"{i}.jpg" for i in good]
    assert held.image_captions == [photos.captions(i) for i in good]
    assert set(held.left_out) == {
        ("object 1", "no cameras", 8), ("object 2/5.png", "broken data", 1),
        ("object 3/0.png", "broken data", 1), ("object 4/lost.png", "not there", 1),
        ("object 6", "no 4 views within 30° of an even set", 0), ("object 9", "no caption", 8),
        ("0.jpg", "cut short", 1), ("149.jpg", "cut short", 1)}
    # Object 6 has two views. Pictures that are left out are done, too.
    assert sum(read) == 8 * len(kept) + 2 + 150, "the bar does not end at its end"


def test_bad_images_of_one_name_under_two_paths_all_count(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8), "red").save(tmp_path / folder / f"{i}.png")
            (tmp_path / folder / f"{i}.txt").write_text("red")
        (tmp_path / folder / "0.png").write_bytes(b"cut")
        (tmp_path / folder / "1.txt").unlink()
    found, founds = images.find_images([tmp_path / "a", tmp_path / "b"])
    assert [one.left_out for one in founds] == [
        [(f"{tmp_path}/{folder}/1.png", "no caption", 1)] for folder in "ab"]
    part = loader.read_images(found, range(len(found)), SIZE, VIEWS)
    left_out = founds[0].left_out + founds[1].left_out + part.left_out
    tally = Tally(40)
    with pytest.raises(UserError, match="4 of 40 pictures"):
        tally.add(left_out, 40)
    assert {name for name, *_ in left_out} == {
        f"{tmp_path}/{folder}/{i}.png" for folder in "ab" for i in (0, 1)}


def test_one_kind_may_be_missing():
    held = everything(None, Images(3))
    assert held.views.shape == (0, 4, SIZE, SIZE) and held.sets.shape == (0, VIEWS)
    assert held.first_set.tolist() == [0] and len(held.images) == 3
    held = everything(Objects(2), None)
    assert held.images.shape == (0, 4, SIZE, SIZE) and held.first_set.tolist() == [0, 8, 16]


def test_everything_stops_where_more_than_five_percent_are_bad():
    assert len(everything(None, Images(100, bad=range(5))).images) == 95
    with pytest.raises(UserError, match="6 of 100 pictures cannot be used, more than 5%: 0.jpg"):
        everything(None, Images(100, bad=range(6)))
    # An object counts with its views.
    assert len(everything(Objects(20, bad=[3]), None).object_names) == 19
    with pytest.raises(UserError, match="16 of 160 pictures"):
        everything(Objects(20, bad=[3, 4]), None)


def test_files_are_read_as_they_lie(tmp_path):
    """Written as other tests say; here a folder of images and two objects go through it all."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 16, 16, 4), np.uint8)
    pixels[:, 0, :, 3] = 0
    c2w = cameras.orbit(10.0, torch.arange(4) * 90.0, 2.0)
    for i in range(2):
        folder = tmp_path / "objects" / str(i)
        folder.mkdir(parents=True)
        (folder / "caption.txt").write_text(f"a thing {i}")
        for view in range(4):
            Image.fromarray(np.roll(pixels[view], i, 1)).save(folder / f"{view}.png")
        frames = [{"file_path": f"{view}.png", "transform_matrix": c2w[view].tolist()}
                  for view in range(4)]
        text = json.dumps({"camera_angle_x": 0.7, "frames": frames})
        (folder / "transforms.json").write_text(text)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(6):
        Image.fromarray(pixels[i, :, :, :3]).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"a photo {i}")

    found = find_objects([tmp_path / "objects"])[0], images.find_images([photos])[0]
    held = read_everything(*found, size=16, views=4, bound=30.0, workers=1)
    assert held.left_out == [] and held.object_captions == [["a thing 0"], ["a thing 1"]]
    rgba = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(held.images[:, :3], rgba[:, :3]) and (held.images[:, 3] == 255).all()
    wanted = torch.cat([rgba[:4], rgba[:4].roll(1, 3)])
    assert torch.equal(held.views[:, 3], wanted[:, 3])
    camera = cameras.extrinsics(c2w).repeat(2, 1)
    torch.testing.assert_close(held.camera, camera, atol=1e-5, rtol=0)

    examples = Examples(*found, size=16, views=4, bound=30.0, seed=0)
    for kind, views in ("objects", held.views.unflatten(0, (2, 4))), ("images", held.images):
        batch = next(batches(examples, iter([Request(kind, (0, 1))]), workers=1))
        for item, rgba, text in zip(batch.items, batch.rgba, batch.captions):
            assert text == ("a thing " if kind == "objects" else "a photo ") + str(item)
            same = (rgba[:, None] == views[item].view(1, -1, 4, 16, 16)).flatten(2).all(2)
            assert same.any(1).all(), "pixels of another item"


# ---- processes -------------------------------------------------------------------------------

class Pids(Images):
    """Each caption is the number of the process that has read it."""

    def captions(self, item):
        return [str(os.getpid())]


class Suicides(Images):
    def picture(self, item, size):
        os.kill(os.getpid(), signal.SIGKILL)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end(workers):
    """Whether they have ended. A busy machine takes its time; a worker that is left never ends."""
    end = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, workers))


def test_a_worker_outlives_the_signals_that_stop_a_run():
    requests = (Request("images", (i,)) for i in itertools.count())
    answers = batches(examples_of(None, Pids(9)), requests, 1)
    worker = int(next(answers).captions[0])
    assert worker != os.getpid(), "nothing was read in a worker"
    for number in signal.SIGTERM, signal.SIGINT:
        os.kill(worker, number)
        time.sleep(0.1)
        for _ in range(2 * loader.PREFETCH):
            assert next(answers).captions == [str(worker)]


@pytest.mark.parametrize("error", [
    BrokenPipeError(), ConnectionResetError(), EOFError(), ValueError("a bug")])
def test_a_worker_is_silent_when_its_parent_ends_in_the_middle_of_a_question(error, capsys):
    loader.silent_if_left(type(error), error, None)
    assert ("a bug" in capsys.readouterr().err) == isinstance(error, ValueError)


def test_a_worker_that_dies_ends_the_run_with_one_line():
    answers = batches(examples_of(None, Suicides(9)), iter([Request("images", (0,))]), 1)
    with pytest.raises(UserError, match="a process that reads data has died .*enlarge /dev/shm"):
        next(answers)


@LINUX
@pytest.mark.parametrize("way", ["dropped", "garbage", "error"])
def test_workers_end_with_their_iterator(way):
    requests = (Request("images", (i,)) for i in itertools.count())
    pids = Pids(9, bad=range(9) if way == "error" else ())
    # Those of an earlier test may still be ending.
    others = multiprocessing.active_children()
    answers = batches(examples_of(None, pids), requests, 1)
    worker, = set(multiprocessing.active_children()).difference(others)
    assert alive(worker.pid)
    if way == "error":
        with pytest.raises(UserError) as error:
            next(answers)
        del answers  # but not the error, whose traceback holds much of it
    else:
        cycle = [answers]
        del answers
        if way == "garbage":
            cycle.append(cycle)
        del cycle
        gc.collect()
    assert wait_for_the_end([worker.pid]), "the worker goes on alone"


# A run that prints its workers' numbers, then waits in the middle of a batch.
RUN = """
    import itertools, sys, time
    sys.path[:0] = [{root!r}, {tests!r}]
    from test_loader import Pids, examples_of, Request, batches
    requests = (Request("images", (i,)) for i in itertools.count())
    answers = batches(examples_of(None, Pids(9)), requests, 2)
    try:
        print(*{{next(answers).captions[0] for _ in range(8)}}, flush=True)
        for _ in answers:
            time.sleep(0.01)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture
def run():
    """A process group of a run with two workers: (Popen, their numbers)."""
    code = textwrap.dedent(RUN).format(root=str(ROOT), tests=str(ROOT / "tests"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    workers = [int(number) for number in process.stdout.readline().split()]
    assert len(workers) == 2, "no two workers"
    yield process, workers
    process.kill()
    process.communicate()


@LINUX
@pytest.mark.slow
def test_ctrl_c_to_the_whole_group_ends_all_without_a_traceback(run):
    process, workers = run
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "", errors
    assert wait_for_the_end(workers), "workers go on alone"


@LINUX
@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(run):
    process, workers = run
    process.kill()
    assert wait_for_the_end(workers), "workers go on alone"


# ---- memory ----------------------------------------------------------------------------------

class Listed(images.Images):
    """Images that are listed, with captions, but have no files; captions tell the memory."""

    def __init__(self, count):
        lines = (images.line_of(f"{i:09}.jpg", None, "texts", ["a picture"]) for i in range(count))
        super().__init__(["nowhere"], [Records(lines)])
        self.asked = 0

    def captions(self, item):
        assert super().captions(item) == ["a picture"]
        self.asked += 1
        return [f"{own_memory():.0f}" if self.asked == 20 * 64 else "a picture"]

    def picture(self, item, size):
        assert self.name(item) == f"nowhere/{item:09}.jpg"
        return picture_of(item)


def own_memory():
    """The memory of this process that it shares with no other, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@LINUX
@pytest.mark.slow
def test_a_spawned_workers_own_memory_does_not_grow_with_the_number_of_files():
    used = {}
    for count in 1000, 1_000_000:
        requests = (Request("images", tuple(range(i, i + 64))) for i in itertools.count(0, 64))
        answers = batches(examples_of(None, Listed(count)), requests, 1, "spawn")
        used[count] = int(next(itertools.islice(answers, 19, None)).captions[-1])
        del answers
    assert abs(used[1_000_000] - used[1000]) < 100, f"MiB of its own: {used}"
