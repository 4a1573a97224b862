"""The data set in memory: how a folder is read, backgrounds and colours, and what a batch is."""
import math

import pytest
import torch

import toy_data
from mvd import cameras, data
from mvd.text import TextConfig, TextTower
from mvd.tools.errors import UserError

WORDS = ("3d", "a", "asset", "ball", "blue", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    toy_data.write(path, size=16)
    return path


def small_tower():
    """A text tower that knows six words."""
    config = TextConfig(
        width=8, heads=1, layers=1, unused_layers=0, output_dim=None, context_length=10,
        words=WORDS,
    )
    return TextTower(config)


# ---- reading a folder ------------------------------------------------------------------------

def test_read_folder_reads_the_layout(folder):
    d = data.read_folder(folder)
    assert d.sets.shape == (2, 32, 4, 16, 16)
    assert d.images.shape == (2, 4, 16, 16)
    assert d.sets.dtype == torch.uint8
    captions = [["a red ball", "ball, red"], ["a blue ball", "ball, blue"]]
    assert d.set_captions == captions
    assert d.image_captions == captions

    def colour(view, row):
        return d.sets[0, view, :3, row, 8].tolist()

    red, white = [220, 40, 40], [255, 255, 255]
    assert colour(0, 4) == red
    assert colour(0, 8) == white, "the spot in the middle of the front is gone"
    assert colour(16, 8) == red, "the back has a spot"
    expected = cameras.extrinsics(cameras.orbit(10.0, 8 * 11.25))
    torch.testing.assert_close(d.set_cameras[1, 8], expected)


def test_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="python -m mvd.toyworld --out"):
        data.read_folder(tmp_path)


WITHOUT_AZIMUTH = '{"kind": "set", "file": "a.png", "captions": ["a"], "elevation": 1}'
CAPTION_NOT_IN_A_LIST = '{"kind": "image", "file": "a.png", "captions": "a ball"}'
EMPTY_CAPTION = '{"kind": "image", "file": "a.png", "captions": [" "]}'


@pytest.mark.parametrize("line, words", [
    ("{", "line 3: not a JSON object"),
    ("[]", "line 3: not a JSON object"),
    ('{"kind": "film"}', "line 3: not a JSON object"),
    (WITHOUT_AZIMUTH, "line 3: the field 'azimuth' is missing"),
    (
        CAPTION_NOT_IN_A_LIST,
        "line 3: the field 'captions' is missing, empty or of a wrong type",
    ),
    (EMPTY_CAPTION, "'captions'"),
])
def test_a_wrong_line_of_the_index_is_named(folder, tmp_path, line, words):
    lines = (folder / "index.jsonl").read_text().splitlines()[:2]
    (tmp_path / "index.jsonl").write_text("\n".join([*lines, line]))
    with pytest.raises(UserError, match=words):
        data.read_folder(tmp_path)


def test_all_views_have_one_size(tmp_path):
    toy_data.write(tmp_path, size=16)
    for file in (tmp_path / "images").iterdir():
        toy_data.view("red", 0, 32).save(file)
    with pytest.raises(UserError, match="one size"):
        data.read_folder(tmp_path)


def test_the_views_of_a_set_must_be_divisible(tmp_path):
    """Of 30 views, 6 can stand evenly round the circle, and 4 cannot."""
    toy_data.write(tmp_path, size=16, views=30)
    d = data.read_folder(tmp_path, 6)
    assert d.sets.shape == (2, 30, 4, 16, 16)
    expected = cameras.extrinsics(cameras.orbit(10.0, 8 * 12.0))
    torch.testing.assert_close(d.set_cameras[1, 8], expected)
    with pytest.raises(UserError, match="a set has 30 views; .* divisible by 4"):
        data.read_folder(tmp_path)


# ---- captions --------------------------------------------------------------------------------

def test_fewer_captions_are_repeated():
    tower = small_tower()
    table = data.token_table(tower, [["red ball", "ball, red", "red"], ["blue ball"]])
    assert table.shape == (2, 3, 10)
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
    assert torch.equal(data.recolour(rgba, 0.0), rgba)
    other = data.recolour(rgba, 1.0)
    assert other.dtype == torch.uint8
    assert torch.equal(other[:, 3], rgba[:, 3]), "the alpha channel has changed"

    orders = set()
    rgb_before, rgb_after = rgba[:, :3].double() / 255, other[:, :3].double() / 255
    for before, after in zip(rgb_before, rgb_after):
        order = []
        for channel in after:
            index, power = source_and_power(channel, before)
            assert math.exp(-1.25) < power < math.exp(1.25)
            order.append(index)
        assert sorted(order) == [0, 1, 2], "a channel was used twice"
        orders.add(tuple(order))
    assert len(orders) == 6, "some order never came"

    changed = (data.recolour(rgba, 0.25) != rgba).flatten(1).any(1)
    assert 0.05 < changed.float().mean() < 0.5


# ---- posteriors ------------------------------------------------------------------------------

class Echo:
    """In place of the autoencoder: the mean is the picture, the deviation is 0.1 everywhere."""

    @staticmethod
    def encode(images):
        return images, torch.full_like(images, 2 * math.log(0.1))


def test_one_grey_is_behind_all_views_of_an_object():
    empty = torch.zeros(3, 4, 4, 2, 2, dtype=torch.uint8)
    torch.manual_seed(0)
    pixels = 5 * empty.shape[-1] ** 2
    posteriors = data.encode_posteriors(Echo, empty, copies=2, pixels=pixels)
    assert posteriors.shape == (2, 3, 4, 6, 2, 2)
    assert posteriors.dtype == torch.float16
    mean, std = posteriors.chunk(2, dim=3)
    same = mean == mean[:, :, :1, :1, :1, :1]
    assert same.all(), "the background of an object differs between views, channels or pixels"
    greys = mean[:, :, 0, 0, 0, 0].unique()
    assert len(greys) == 6, "two objects or copies have the same grey"
    torch.testing.assert_close(std, torch.full_like(std, 0.1))


def test_a_sample_has_the_posteriors_mean_and_deviation():
    mean = torch.full((20000, 1, 1, 1), 3.0)
    std = torch.full((20000, 1, 1, 1), 0.5)
    z = data.sample_posterior(torch.cat([mean, std], 1).half())
    assert abs(z.mean() - 3) < 0.02
    assert abs(z.std() - 0.5) < 0.02


# ---- batches ---------------------------------------------------------------------------------

def numbered(rendered):
    """Posteriors, cameras and tokens of three objects that say which object and view they are.

    The deviation is 0, so every latent is 100·object + view, which is also the camera's first
    number; the tokens of an object are its number.
    """
    posteriors = torch.zeros(2, 3, rendered, 2, 1, 1).half()
    numbers = torch.arange(rendered) + 100 * torch.arange(3)[:, None]
    posteriors[:, :, :, 0, 0, 0] = numbers
    camera = numbers.float()[:, :, None].expand(3, rendered, 16)
    tokens = torch.arange(3)[:, None, None].expand(3, 5, 7)
    return posteriors, camera, tokens


@pytest.mark.parametrize("views, rendered", [(4, 32), (3, 30), (6, 30)])
def test_a_set_is_views_evenly_round_with_their_cameras(views, rendered):
    posteriors, camera, tokens = numbered(rendered)
    torch.manual_seed(0)
    batch = data.multiview_batch(posteriors, camera, tokens, 500, views)
    z, texts, cameras_of_batch = batch
    assert z.shape == (500, views, 1, 1, 1)
    number = z[:, :, 0, 0, 0].long()
    which, view = number // 100, number % 100
    apart = view.diff(dim=1) % rendered
    assert (apart == rendered // views).all(), "the views are not evenly round the circle"
    assert (which == which[:, :1]).all(), "a set has views of two objects"
    assert texts.shape == (500, 7)
    assert (texts == which[:, :1]).all(), "a set has the text of another object"
    assert cameras_of_batch.shape == (500, views, 16)
    found = cameras_of_batch[..., 0].long()
    assert torch.equal(found, number), "a view has the camera of another one"
    assert len(view[:, 0].unique()) == rendered, "some view never comes first"
    assert len(which.unique()) == 3, "some object never comes"


def test_a_set_has_four_views_unless_told_otherwise():
    z, _, camera = data.multiview_batch(*numbered(32), 2)
    assert z.shape[1] == camera.shape[1] == cameras.VIEWS == 4


def test_images_come_alone():
    posteriors, _, tokens = numbered(1)
    torch.manual_seed(0)
    z, texts = data.image_batch(posteriors, tokens, 100)
    assert z.shape == (100, 1, 1, 1, 1)
    which = z[:, 0, 0, 0, 0].long() // 100
    assert torch.equal(which, texts[:, 0]), "an image has the text of another one"
    assert len(texts.unique()) == 3, "some image never comes"
