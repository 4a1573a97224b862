"""The data set in memory: layout, backgrounds, and what a batch is."""
import math

import pytest
import torch

import toy_data
from mvd import cameras, data
from mvd.tools.errors import UserError
from mvd.text import TextConfig, TextTower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    toy_data.write(path, size=16)
    return path


def test_load_reads_the_layout(folder):
    d = data.load(folder)
    assert d.sets.shape == (2, 32, 4, 16, 16) and d.images.shape == (2, 4, 16, 16) and d.sets.dtype == torch.uint8
    assert d.set_captions == [["a red ball", "ball, red"], ["a blue ball", "ball, blue"]] == d.image_captions
    assert d.sets[0, 0, :3, 4, 8].tolist() == [220, 40, 40]                      # view 0 is red, its spot in the middle white
    assert d.sets[0, 0, :3, 8, 8].tolist() == [255, 255, 255] and d.sets[0, 16, :3, 8, 8].tolist() == [220, 40, 40]
    expected = cameras.camera_numbers(cameras.orbit(10.0, 8 * 11.25))
    torch.testing.assert_close(d.set_cameras[1, 8], expected)


def test_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="python -m mvd.toyworld --out"):
        data.load(tmp_path)


@pytest.mark.parametrize("line, words", [
    ("{", "line 3: not a JSON object"), ("[]", "line 3: not a JSON object"), ('{"kind": "film"}', "line 3: not a JSON object"),
    ('{"kind": "set", "file": "a.png", "captions": ["a"], "elevation": 1}', "line 3: the field 'azimuth' is missing"),
    ('{"kind": "image", "file": "a.png", "captions": "a ball"}', "line 3: the field 'captions' is missing, empty or of a wrong type"),
    ('{"kind": "image", "file": "a.png", "captions": [" "]}', "'captions'"),
])
def test_a_wrong_line_of_the_index_is_named(folder, tmp_path, line, words):
    lines = (folder / "index.jsonl").read_text().splitlines()[:2]
    (tmp_path / "index.jsonl").write_text("\n".join([*lines, line]))
    with pytest.raises(UserError, match=words):
        data.load(tmp_path)


def test_all_views_have_one_size(tmp_path):
    toy_data.write(tmp_path, size=16)
    for file in (tmp_path / "images").iterdir():
        toy_data.view("red", 0, 32).save(file)
    with pytest.raises(UserError, match="one size"):
        data.load(tmp_path)


def test_fewer_wordings_are_repeated():
    text = TextTower(TextConfig(width=32, heads=2, layers=1, unused_layers=0, output_dim=None, context_length=8,
                                words=("red", "ball", "blue")))
    table = data.token_table(text, [["red ball", "ball, red", "red"], ["blue ball"]])
    assert table.shape == (2, 3, 8) and torch.equal(table[1], text.tokenize(["blue ball"]).expand(3, -1))


def test_on_grey_is_alpha_compositing():
    rgba = torch.zeros(2, 4, 1, 1, dtype=torch.uint8)
    rgba[:, 0], rgba[:, 3] = 255, 51                                             # red, one fifth opaque
    picture = (data.on_grey(rgba, torch.tensor([0.5, 1.0])) + 1) / 2
    torch.testing.assert_close(picture[:, :, 0, 0], torch.tensor([[0.6, 0.4, 0.4], [1.0, 0.8, 0.8]]), atol=1e-6, rtol=0)


class Echo:
    """In place of the autoencoder: the mean is the picture, the log-variance is 2 log 0.1 everywhere."""
    @staticmethod
    def encode(images):
        return images, torch.full_like(images, 2 * torch.log(torch.tensor(0.1)))


def test_moments_put_one_grey_behind_all_views_of_an_object():
    empty = torch.zeros(3, 4, 4, 2, 2, dtype=torch.uint8)
    torch.manual_seed(0)
    m = data.moments(Echo, empty, copies=2, pixels=5 * empty.shape[-1] ** 2)
    assert m.shape == (2, 3, 4, 6, 2, 2) and m.dtype == torch.float16
    assert (m[:, :, :, :3] == m[:, :, :1, :1, :1, :1]).all()                     # the same in all views, channels and pixels
    assert len(m[:, :, 0, 0, 0, 0].unique()) == 6                                # another one for every object and copy
    torch.testing.assert_close(m[:, :, :, 3:], torch.full_like(m[:, :, :, 3:], 0.1))


def test_sample_latents_has_the_posteriors_mean_and_deviation():
    moment = torch.cat([torch.full((20000, 1, 1, 1), 3.0), torch.full((20000, 1, 1, 1), 0.5)], 1).half()
    z = data.sample_latents(moment)
    assert abs(z.mean() - 3) < 0.02 and abs(z.std() - 0.5) < 0.02


def test_a_set_is_four_views_a_quarter_turn_apart_with_their_cameras():
    moment = torch.zeros(2, 3, 32, 2, 1, 1).half()                               # std 0: the latent says which view it is
    moment[:, :, :, 0, 0, 0] = torch.arange(32) + 100 * torch.arange(3)[:, None]
    camera = moment[0, :, :, :1, 0, 0].float().expand(3, 32, 16)
    tokens = torch.arange(3)[:, None, None].expand(3, 5, 7)
    torch.manual_seed(0)
    z, rows, cams = data.draw_sets(moment, camera, tokens, 500)
    which, view = (z[:, :, 0, 0, 0] // 100).long(), (z[:, :, 0, 0, 0] % 100).long()
    assert (view.diff(dim=1) % 32 == 8).all() and (which == which[:, :1]).all()
    assert (rows == which[:, :1]).all() and rows.shape == (500, 7)
    assert torch.equal(cams[..., 0], z[:, :, 0, 0, 0]) and len(view[:, 0].unique()) == 32 and len(which.unique()) == 3


def test_images_come_alone_and_without_camera():
    moment = torch.zeros(2, 3, 1, 2, 1, 1).half()
    moment[:, :, 0, 0, 0, 0] = torch.arange(3.0)
    tokens = torch.arange(3)[:, None, None].expand(3, 5, 7)
    z, rows, camera = data.draw_images(moment, tokens, 100)
    assert z.shape == (100, 1, 1, 1, 1) and camera is None
    assert torch.equal(z[:, 0, 0, 0, 0].long(), rows[:, 0]) and len(rows.unique()) == 3


def test_token_table_adds_the_suffix():
    tower = TextTower(TextConfig(width=8, heads=1, layers=1, unused_layers=0, output_dim=None, context_length=10,
                                 words=("3d", "a", "asset", "ball", "red")))
    table = data.token_table(tower, [["a red ball", "ball, red"]], ", 3d asset")
    assert torch.equal(table[0], tower.tokenize(["a red ball, 3d asset", "ball, red, 3d asset"]))


def test_recolour_mixes_the_colours_and_nothing_else():
    """Each picture: one order of its three colours and one power each, from the values themselves; alpha stays."""
    torch.manual_seed(0)
    rgba = torch.randint(256, (64, 4, 5, 5), dtype=torch.uint8)
    assert torch.equal(data.recolour(rgba, 0.0), rgba)
    other, orders = data.recolour(rgba, 1.0), set()
    assert other.dtype == torch.uint8 and torch.equal(other[:, 3], rgba[:, 3])
    for before, after in zip(rgba[:, :3].double() / 255, other[:, :3].double() / 255):
        found = []
        for channel in after:
            fits = []
            for source in before:
                middling = (source > 0.2) & (source < 0.8)
                powers = channel[middling].clamp(min=1e-9).log() / source[middling].log()
                fits.append((powers.std() / powers.mean(), powers.mean()))
            spread, power = min(fits)
            assert spread < 0.05 and math.exp(-1.25) < power < math.exp(1.25)
            found.append(fits.index((spread, power)))
        assert sorted(found) == [0, 1, 2]
        orders.add(tuple(found))
    assert len(orders) == 6
    share = (data.recolour(rgba, 0.25) != rgba).flatten(1).any(1).float().mean()
    assert 0.05 < share < 0.5
