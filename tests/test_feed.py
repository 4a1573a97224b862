"""Which batch comes when; batches from memory and from files whose numbers say what they are."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from mvd import data
from mvd.data.feed import FromFiles, FromMemory, Plan
from mvd.data.loader import Batch, Held
from test_latents import small_tower

SHARES = {"objects": 0.7, "images": 0.3}
SIZES = {"objects": 2, "images": 6}
PICTURES = {"objects": 3, "images": 1}
VIEWS = 3


def plan_of(steps, seed=0, accumulate=1, rank=0, ranks=1, sizes=SIZES, shares=SHARES):
    return Plan(seed, shares, sizes, steps, PICTURES, accumulate, rank, ranks)


# ---- which batch comes when ------------------------------------------------------------------

def test_the_kinds_have_their_shares_in_an_order_without_memory():
    kinds = torch.tensor([kind == "objects" for kind in plan_of(20000).kinds]).double()
    assert abs(kinds.mean() - 0.7) < 0.015
    after = torch.corrcoef(torch.stack([kinds[:-1], kinds[1:]]))[0, 1]
    assert abs(after) < 0.03, "a step's kind says what the next one is"


def test_kinds_belong_to_the_seed_and_the_step_alone():
    kinds = plan_of(300).kinds
    assert plan_of(100).kinds == kinds[:100], "a longer run begins otherwise"
    assert plan_of(300, accumulate=4, rank=2, ranks=3).kinds == kinds, "ranks do not agree"
    assert plan_of(300, seed=1).kinds != kinds


@pytest.mark.parametrize("shares, expected", [
    ({"objects": 1.0, "images": 0.0}, {"objects"}),
    ({"objects": 0.0, "images": 1.0}, {"images"}),
    ({"images": 0.3}, {"images"}),
])
def test_what_has_no_share_never_comes(shares, expected):
    sizes = {kind: SIZES[kind] for kind in shares}
    assert set(plan_of(500, shares=shares, sizes=sizes).kinds) == expected


def test_shares_need_not_add_up_to_one():
    kinds = plan_of(20000, shares={"objects": 3, "images": 1}).kinds
    assert abs(kinds.count("objects") / 20000 - 0.75) < 0.015


RANKS_AND_PARTS = [(1, 1), (1, 4), (2, 1), (4, 1), (2, 2), (3, 5)]


@pytest.mark.parametrize("ranks, accumulate", RANKS_AND_PARTS)
def test_all_parts_together_are_the_sequence_without_a_gap(ranks, accumulate):
    """Of each kind: over the steps, and within each step as examples from 0 on."""
    plans = [plan_of(40, accumulate=accumulate, rank=rank, ranks=ranks) for rank in range(ranks)]
    seen = {kind: [] for kind in SHARES}
    for step, kind in enumerate(plans[0].kinds):
        examples, places = [], []
        for plan in plans:
            for part in range(accumulate):
                examples += plan.examples(kind, part).tolist()
                places += plan.places(step, part).tolist()
        whole = ranks * accumulate * SIZES[kind]
        assert examples == list(range(whole)), f"step {step}: an example is missing or comes twice"
        seen[kind] += places
    for kind, places in seen.items():
        assert places == list(range(len(places))), f"{kind}: a place is left out or comes twice"
        assert places, f"{kind} never came, so that this test shows nothing"


def test_the_whole_batch_does_not_depend_on_who_makes_it():
    """12 sets a step: by one process at once, in parts, by two, by three in two parts each."""
    def places(ranks, accumulate):
        sizes = {kind: 6 * n // (ranks * accumulate) for kind, n in SIZES.items()}
        found = []
        for rank in range(ranks):
            plan = plan_of(10, accumulate=accumulate, rank=rank, ranks=ranks, sizes=sizes)
            found.append([plan.places(step, part) for step, part in plan.parts(0)])
        by_step = [[] for _ in range(10)]
        for of_rank in found:
            for k, part in enumerate(of_rank):
                by_step[k // accumulate] += part.tolist()
        return by_step

    whole = places(1, 1)
    for ranks, accumulate in ((1, 4), (2, 1), (3, 2)):
        assert places(ranks, accumulate) == whole, f"{ranks} processes, {accumulate} parts"


def test_a_run_goes_on_anywhere():
    plan = plan_of(20, accumulate=2)
    assert list(plan.parts(0)) == [(step, part) for step in range(20) for part in (0, 1)]
    assert list(plan.parts(17)) == list(plan.parts(0))[34:]
    assert list(plan.parts(20)) == []


def test_the_views_of_a_step_are_those_of_all_processes():
    plan = plan_of(5, accumulate=4, rank=1, ranks=3)
    assert plan.views == {"objects": 3 * 4 * 2 * 3, "images": 3 * 4 * 6}


# ---- a model and data that tell where each number comes from ---------------------------------

class Echo(torch.nn.Module):
    """In place of the autoencoder: the mean is the picture, the deviation is one number."""

    def __init__(self, deviation):
        super().__init__()
        self.encoder = torch.nn.Identity()
        self.deviation = deviation

    def encode(self, images):
        return images, torch.full_like(images, 2 * math.log(self.deviation))


def model_of(deviation=1e-20):
    config = SimpleNamespace(suffix=", 3d asset")
    return SimpleNamespace(
        device=torch.device("cpu"), text=small_tower(), config=config, vae=Echo(deviation))


# Five objects: how many views each has, and its sets as numbers of its own views.
VIEW_COUNTS = [4, 3, 6, 5, 8]
OWN_SETS = [
    [[0, 1, 2], [1, 2, 3], [3, 0, 1]],
    [[2, 0, 1]],
    [[0, 2, 4], [1, 3, 5]],
    [[4, 2, 0]],
    [[0, 3, 6], [1, 4, 7], [2, 5, 0], [3, 6, 1]],
]
OBJECT_CAPTIONS = [["red ball", "ball, red"], ["blue ball"], ["a ball"], ["3d ball"], ["red asset"]]
IMAGE_CAPTIONS = [
    ["red"], ["blue"], ["asset", "a asset", "3d asset"], ["ball"], ["3d ball"], ["red, blue"],
]


def picture(item, view):
    """uint8 [4, 2, 2]: the left half is opaque and says which it is, the right is transparent."""
    rgba = torch.zeros(4, 2, 2, dtype=torch.uint8)
    rgba[0], rgba[1] = item, view
    rgba[3, :, 0] = 255
    return rgba


def camera_of(item, view):
    return torch.full((16,), 100.0 * item + view)


def held():
    """What `read_everything` would return for the five objects and six images."""
    views, camera, sets, first_set = [], [], [], [0]
    for item, (count, own) in enumerate(zip(VIEW_COUNTS, OWN_SETS)):
        sets += [[len(views) + view for view in which] for which in own]
        first_set.append(len(sets))
        views += [picture(item, view) for view in range(count)]
        camera += [camera_of(item, view) for view in range(count)]
    names = [str(item) for item in range(6)]
    return Held(
        torch.stack(views), torch.stack(camera), torch.tensor(sets), torch.tensor(first_set),
        names[:5], OBJECT_CAPTIONS, torch.stack([picture(item, 0) for item in range(6)]), names,
        IMAGE_CAPTIONS, left_out=[])


EVERY = {"objects": torch.arange(5), "images": torch.arange(6)}


def from_memory(learned=EVERY, copies=2, deviation=1e-20, seed=0):
    feed = FromMemory(held(), model_of(deviation), seed, learned)
    feed.encode(copies)
    return feed


def dice_of(count, first=0, step=0):
    return data.Dice(0, torch.tensor(step), first + torch.arange(count))


def bytes_of(z):
    """(red, green) of latents [..., 3, 2, 2] of `picture`, where it is opaque: two int64 [...]."""
    values = ((z[..., :2, 0, 0] + 1) / 2 * 255).round().long()
    return values.unbind(-1)


def grey_of(z):
    """The grey behind the pictures, [...], the same in all channels and places."""
    behind = z[..., 1].flatten(-2)
    same = (behind - behind[..., :1]).abs().max() < 1e-6
    assert same, "what is behind a picture is not one grey"
    return behind[..., 0]


def assert_tokens(tokens, items, captions, suffix):
    """Each row is a wording of its item, and every wording comes."""
    tower, came = small_tower(), set()
    for row, item in zip(tokens, items.tolist(), strict=True):
        wordings = tower.tokenize([text + suffix for text in captions[item]])
        found = (wordings == row).all(1)
        assert found.any(), "the text is not the item's"
        came.add((item, found.int().argmax().item()))
    all_wordings = {(i, k) for i in items.tolist() for k in range(len(captions[i]))}
    assert came == all_wordings, "some wording never comes"


# ---- from memory -----------------------------------------------------------------------------

def test_views_cameras_texts_and_greys_belong_to_the_object():
    items = torch.arange(300) % 5
    z, tokens, camera = from_memory().latents("objects", dice_of(300), items)
    assert z.shape == (300, VIEWS, 3, 2, 2) and z.dtype == torch.float32
    which, view = bytes_of(z)
    assert torch.equal(which, items[:, None].expand(-1, VIEWS)), "a view of another object"
    torch.testing.assert_close(
        camera, (100.0 * which + view)[:, :, None].expand(-1, -1, 16), msg="another view's camera")
    assert_tokens(tokens, items, OBJECT_CAPTIONS, ", 3d asset")
    for item in range(5):
        came = {tuple(row) for row in view[items == item].tolist()}
        assert came == {tuple(own) for own in OWN_SETS[item]}, f"object {item} has other sets"


def test_each_object_has_another_grey_in_each_copy_behind_all_of_its_views():
    items = torch.arange(300) % 5
    z, _, _ = from_memory(copies=3).latents("objects", dice_of(300), items)
    grey = grey_of(z)
    assert torch.equal(grey, grey[:, :1].expand(-1, VIEWS)), "views of a set have different greys"
    greys = {item: set(grey[items == item, 0].tolist()) for item in range(5)}
    assert all(len(of_object) == 3 for of_object in greys.values()), "not one grey a copy"
    assert len(set().union(*greys.values())) == 15, "two objects or copies have the same grey"
    assert -1 <= grey.min() and grey.max() <= 1


def test_images_come_alone_with_their_texts():
    items = torch.arange(300) % 6
    z, tokens, camera = from_memory(copies=2).latents("images", dice_of(300), items)
    assert z.shape == (300, 1, 3, 2, 2)
    assert camera is None
    which, _ = bytes_of(z)
    assert torch.equal(which[:, 0], items), "another image"
    assert_tokens(tokens, items, IMAGE_CAPTIONS, "")
    greys = set(grey_of(z)[:, 0].tolist())
    assert len(greys) == 12, "not a grey for each image and copy"


@pytest.mark.parametrize("kind", ["objects", "images"])
def test_a_batch_in_halves_is_the_whole_one(kind):
    """Its latents with their noise, its texts, its cameras."""
    feed, items = from_memory(deviation=0.1), torch.tensor([3, 0, 4, 4, 2, 1])
    whole = feed.latents(kind, dice_of(6), items)
    first = feed.latents(kind, dice_of(3), items[:3])
    last = feed.latents(kind, dice_of(3, first=3), items[3:])
    for name, together, *halves in zip(("z", "tokens", "camera"), whole, first, last):
        if together is not None:
            assert torch.equal(torch.cat(halves), together), f"{name} of a half is another"
    again = feed.latents(kind, dice_of(6, step=1), items)
    assert not torch.equal(again[0], whole[0]), "the next step has the same latents"


def test_latents_are_samples_of_their_posteriors():
    items = torch.arange(2000) % 5
    exact, _, _ = from_memory().latents("objects", dice_of(2000), items)
    z, _, _ = from_memory(deviation=0.1).latents("objects", dice_of(2000), items)
    noise = (z - exact) / 0.1
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    between = torch.corrcoef(noise.flatten(2)[..., 0].T) - torch.eye(VIEWS)
    assert between.abs().max() < 0.1, "views share their noise"


def streamed(feed, plan, phase, start=0):
    """[(kind, items as a list)] of what a feed from memory yields."""
    kinds = [plan.kinds[step] for step, _ in plan.parts(start)]
    stream = feed.stream(plan, phase, start)
    return [(kind, items.tolist()) for kind, (items,) in zip(kinds, stream, strict=True)]


def test_every_epoch_has_what_is_learned_from_and_nothing_else():
    learned = {"objects": torch.tensor([0, 2, 3]), "images": torch.tensor([1, 2, 4, 5])}
    feed = FromMemory(held(), model_of(), 0, learned)
    for kind, items in learned.items():
        stream = streamed(feed, plan_of(60), "unet")
        came = torch.tensor([of_batch for of_kind, of_batch in stream if of_kind == kind]).flatten()
        epochs = came[: len(came) // len(items) * len(items)].view(-1, len(items))
        expected = items.expand_as(epochs)
        assert torch.equal(epochs.sort(1).values, expected), f"held-out {kind}, or one is missing"
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 3, "all epochs have one order"


def test_a_stream_goes_on_anywhere_and_belongs_to_the_seed():
    feed, plan = FromMemory(held(), model_of(), 0, EVERY), plan_of(30, accumulate=2)
    whole = streamed(feed, plan, "unet")
    rest = streamed(feed, plan, "unet", start=11)
    assert rest == whole[22:]
    other = streamed(FromMemory(held(), model_of(), 1, EVERY), plan, "unet")
    assert other != whole


def test_the_autoencoder_is_given_all_pictures():
    feed, count = FromMemory(held(), model_of(), 0, EVERY), sum(VIEW_COUNTS)
    came = {"objects": [], "images": []}
    for kind, items in streamed(feed, plan_of(60), "vae"):
        rgba = feed.pictures(kind, torch.tensor(items))
        assert rgba.dtype == torch.uint8 and rgba.shape == (SIZES[kind], 4, 2, 2)
        came[kind] += [tuple(pixels) for pixels in rgba[:, :2, 0, 0].tolist()]
    views = [(item, view) for item, n in enumerate(VIEW_COUNTS) for view in range(n)]
    assert sorted(came["objects"][:count]) == views, "not every view once"
    assert sorted(came["images"][:6]) == [(item, 0) for item in range(6)]


def test_the_deviation_is_that_of_the_means():
    """As pictures over the same greys in both copies: it is that of the colours in [-1, 1]."""
    feed = from_memory(copies=50, deviation=0.5)
    pixels = held().views.double() / 255
    opaque = pixels[:, :3, :, 0].flatten(1)
    # A grey from U[0, 1] has mean 1/2 and mean square 1/3, and fills half of each picture.
    mean = (opaque.mean() + 0.5) / 2
    square = ((opaque**2).mean() + 1 / 3) / 2
    expected = 2 * torch.sqrt(square - mean**2)
    assert feed.deviation() == pytest.approx(expected.item(), rel=0.05)


def test_some_pictures_are_rendered_and_single_ones():
    shown = FromMemory(held(), model_of(), 0, EVERY).some_pictures(8)
    assert shown.shape == (8, 4, 2, 2)
    assert shown[:6, 0, 0, 0].unique().tolist() == [0, 1, 2, 3, 4], "some objects are not shown"
    assert shown[6:, 0, 0, 0].tolist() == [0, 3], "images are not spread over all"


def test_without_images_all_is_of_objects():
    alone = held()
    alone.images, alone.image_names, alone.image_captions = alone.images[:0], [], []
    learned = {"objects": torch.arange(5), "images": torch.arange(0)}
    feed = FromMemory(alone, model_of(), 0, learned)
    assert len(feed.some_pictures(8)) == 6
    feed.encode(1)
    assert math.isfinite(feed.deviation())
    z, *_ = feed.latents("objects", dice_of(4), torch.arange(4))
    assert z.shape == (4, VIEWS, 3, 2, 2)


# ---- from files ------------------------------------------------------------------------------

class Examples:
    """In place of loader.Examples: item and place are what the picture's colours say."""
    views = VIEWS

    def __init__(self):
        self.chosen = EVERY

    def __getitem__(self, request):
        kind, positions = request
        items = [self.chosen[kind][p % len(self.chosen[kind])].item() for p in positions]
        V = VIEWS if kind == "objects" else 1
        rgba = [torch.stack([picture(item, p + v) for v in range(V)])
                for item, p in zip(items, positions)]
        camera = None
        if kind == "objects":
            cameras = [camera_of(item, p + v)
                       for item, p in zip(items, positions) for v in range(V)]
            camera = torch.stack(cameras).view(len(items), V, 16)
        captions = (OBJECT_CAPTIONS if kind == "objects" else IMAGE_CAPTIONS)
        texts = [captions[item][p % len(captions[item])] for item, p in zip(items, positions)]
        return Batch(kind, torch.stack(rgba), camera, texts, items, [], len(items) * V)


def from_files(deviation=1e-20, reported=None):
    report = (lambda batch: None) if reported is None else reported.append
    return FromFiles(Examples(), model_of(deviation), 0, report)


@pytest.mark.parametrize("accumulate, ranks", [(1, 1), (2, 2)])
def test_batches_from_files_are_those_of_the_plan(accumulate, ranks):
    """The texts and cameras belong to the pictures; every batch is reported."""
    for rank in range(ranks):
        plan, reported = plan_of(12, 0, accumulate, rank, ranks), []
        feed = from_files(reported=reported)
        stream = feed.stream(plan, "unet", 3)
        for (step, part), batch in zip(plan.parts(3), stream, strict=True):
            kind = plan.kinds[step]
            z, tokens, camera = feed.latents(kind, dice_of(SIZES[kind]), *batch)
            which, shown = bytes_of(z)
            places = plan.places(step, part)
            assert torch.equal(shown[:, 0], places), "not the places of this step and part"
            captions, suffix = IMAGE_CAPTIONS, ""
            if kind == "objects":
                captions, suffix = OBJECT_CAPTIONS, ", 3d asset"
                expected = (100.0 * which + shown)[:, :, None].expand(-1, -1, 16)
                assert torch.equal(camera, expected), "another view's camera"
            else:
                assert camera is None and z.shape[1] == 1
            texts = [captions[item][place % len(captions[item])] + suffix
                     for item, place in zip(which[:, 0].tolist(), places.tolist())]
            assert torch.equal(tokens, small_tower().tokenize(texts)), "another picture's text"
        kinds = [plan.kinds[step] for step, _ in plan.parts(3)]
        assert [batch.kind for batch in reported] == kinds


def test_one_new_grey_is_behind_all_views_of_an_object_from_files():
    feed = from_files()
    rgba, *rest = feed.tensors(Examples()[data.Request("objects", tuple(range(20)))], "unet")
    greys = []
    for step in (0, 1):
        z, _, _ = feed.latents("objects", dice_of(20, step=step), rgba, *rest)
        assert not z.requires_grad
        grey = grey_of(z)
        assert torch.equal(grey, grey[:, :1].expand(-1, VIEWS)), "views of a set have other greys"
        greys += grey[:, 0].tolist()
    assert len(set(greys)) == 40, "objects or steps share a grey"


def test_a_batch_from_files_in_halves_is_the_whole_one():
    feed = from_files(deviation=0.1)
    batch = Examples()[data.Request("objects", tuple(range(6)))]
    rgba, tokens, camera = feed.tensors(batch, "unet")
    whole, _, _ = feed.latents("objects", dice_of(6), rgba, tokens, camera)
    halves = [feed.latents("objects", dice_of(3, first=k), rgba[k : k + 3], tokens[k : k + 3])[0]
              for k in (0, 3)]
    assert torch.equal(torch.cat(halves), whole), "a half has other latents"
    exact, _, _ = from_files().latents("objects", dice_of(6), rgba, tokens, camera)
    noise = ((whole - exact) / 0.1).flatten()
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2
    assert len(noise.unique()) == noise.numel(), "some noise is used twice"


def test_the_autoencoder_is_given_whole_sets_from_files():
    """V pictures of each object, and of all objects in turn, over steps, parts and ranks."""
    sizes, came = {"objects": 2 * VIEWS, "images": 6}, {"objects": [], "images": []}
    plans = [plan_of(10, 0, 2, rank, 2, sizes) for rank in (0, 1)]
    streams = [(plan.parts(0), from_files().stream(plan, "vae", 0)) for plan in plans]
    for _ in range(10):
        for (parts, stream), _ in itertools.product(streams, range(2)):
            step, _ = next(parts)
            kind = plans[0].kinds[step]
            (rgba,) = next(stream)
            assert rgba.shape == (sizes[kind], 4, 2, 2)
            assert torch.equal(from_files().pictures(kind, rgba), rgba)
            came[kind] += rgba[:, 1, 0, 0].tolist()
    objects, images = came["objects"], came["images"]
    assert images == list(range(len(images))) and len(images) > 0
    first = objects[::VIEWS]
    assert first == list(range(len(first))), "an object is left out or comes twice"
    assert objects == [place + v for place in first for v in range(VIEWS)]


@pytest.mark.parametrize("make", [from_memory, from_files])
def test_a_batch_of_certain_objects(make):
    feed, items = make(), torch.tensor([4, 1, 2])
    batch = feed.batch_of(items)
    z, tokens, camera = feed.latents("objects", dice_of(3), *batch)
    which, _ = bytes_of(z)
    assert which[:, 0].sort().values.tolist() == [1, 2, 4], "other objects"
    assert camera.shape == (3, VIEWS, 16) and tokens.shape == (3, 10)
    if make is from_files:
        assert feed.examples.chosen is EVERY, "what is learned from has changed"


def test_some_pictures_from_files_and_their_deviation():
    feed = from_files(deviation=0.5)
    shown = feed.some_pictures(8)
    assert len(shown) >= 8 and shown.shape[1:] == (4, 2, 2)
    assert (shown[:6, 1, 0, 0] < 6).all() and shown[6:, 0, 0, 0].tolist() == [0, 1]
    pictures = data.on_grey(feed.some_pictures(256), torch.tensor(0.5))
    assert feed.deviation() == pytest.approx(pictures.std().item(), rel=1e-3)
