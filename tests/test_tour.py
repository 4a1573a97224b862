"""The tour on a tiny random model: what its pictures show is what the functions compute."""
import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mvd import diffusion, tour
from scripts import status
from test_model import random_model, small_config


@pytest.fixture(scope="module")
def scene():
    """A bulldog for a model of random weights, whose pictures have 32 pixels."""
    config = small_config()
    config.size = 32
    return tour.set_scene("bulldog", None, "red", model=random_model(config))


@pytest.fixture
def short(monkeypatch):
    """Steps that take a second instead of a minute."""
    monkeypatch.setattr(tour.sample, "__defaults__", (3, 4.0))
    monkeypatch.setattr(tour.sample_without_cameras, "__defaults__", (3, 4.0))
    monkeypatch.setattr(tour.distil_image, "__defaults__", (2, 5.0, 0.1))
    monkeypatch.setattr(tour.distil_field, "__defaults__", (1, 0.05, 0.01))


def test_the_page_holds_every_step_and_needs_nothing_else(scene, short, monkeypatch, tmp_path):
    monkeypatch.setattr(tour, "set_scene", lambda device: scene)
    assert status(lambda: tour.main(["--out", str(tmp_path)])) == 0
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "http-equiv" not in page, "the page still waits for more"
    outside = re.findall(r'(?:src|href)="(?!data:)', page)
    assert not outside, "the page needs something outside of it"
    headings = re.findall(r"<h2>(\d)\. ", page)
    assert headings == list("123456789")
    assert page.count("def ") >= 9, "the code of a step is missing"

    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    files = sorted((tmp_path / "progress").iterdir())
    assert len(pictures) == len(files) == 9
    for text, file in zip(pictures, files):
        content = base64.b64decode(text)
        assert content == file.read_bytes(), f"{file.name} is not the picture of the page"
        pixels = np.array(Image.open(io.BytesIO(content)))
        assert pixels.std() > 10, f"{file.name} shows nothing"

    assert status(lambda: tour.main(["--out", str(tmp_path)])) == 2, "a tour was overwritten"
    assert (tmp_path / "index.html").read_text("utf-8") == page


def test_one_step_alone_repeats(scene, monkeypatch, tmp_path):
    monkeypatch.setattr(tour, "set_scene", lambda device: scene)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert status(lambda: tour.main(["--step", "2", "--seed", "5"])) == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    name = "progress/2-prediction.png"
    assert [file.name for file in (first / "progress").iterdir()] == ["2-prediction.png"]
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_queries_and_keys_are_those_of_the_attention(scene):
    """With the values of the same tokens they give what the layer itself gives."""
    torch.manual_seed(0)
    layer = scene.model.unet.middle[1].attention.self_attention
    x = torch.randn(1, 12, layer.to_q.in_features)
    given = []
    q, k = tour.queries_and_keys(layer, lambda: given.append(layer(x)))
    weights = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)
    values = layer.split_heads(layer.to_v(x)).double()
    expected = layer.to_out((weights @ values).transpose(1, 2).flatten(2).float())
    torch.testing.assert_close(given[0], expected, msg="these are not the weights of the layer")
    layer(x)
    assert not layer.to_q._forward_hooks, "the hook is still there"


def test_attention_shows_the_tokens_that_the_network_looks_at(scene, monkeypatch):
    """If all weight goes to one token of view 2, it alone is orange."""
    V, h, w = scene.x0.shape[1], *scene.x0.shape[-2:]
    target = 2 * h * w + 1 * w + 3
    q = torch.zeros(1, 1, V * h * w, 4)
    k = torch.zeros(1, 1, V * h * w, 4)
    q[...] = 100.0
    k[:, :, target] = 1.0
    monkeypatch.setattr(tour, "queries_and_keys", lambda layer, call: (q, k))
    picture, words = tour.attention(scene, places=((0, 0),))
    assert "100%" in words
    size = scene.views.shape[-1]
    shown = picture[:, 18 : 18 + size].unfold(2, size, size + 2)  # [3, size, 5, size]
    orange = (shown - torch.tensor(tour.ORANGE).view(3, 1, 1, 1)).abs().amax(0) < 0.01
    rows, images, columns = torch.nonzero(orange, as_tuple=True)
    cell = size // h
    assert set(images.tolist()) == {3}, "another view is orange (the first image is the token)"
    assert (rows.min(), rows.max()) == (cell, 2 * cell - 1)
    assert (columns.min(), columns.max()) == (3 * cell, 4 * cell - 1)


@pytest.mark.parametrize("step", [
    tour.prediction, tour.sample, tour.sample_without_cameras, tour.belief,
])
def test_a_network_that_knows_the_answer_predicts_it(scene, short, monkeypatch, step):
    """Whatever the noise, the predicted x0 of each step is the answer, and a sample ends there."""
    asked = []

    def network(x_t, t, context, camera):
        asked.append(camera)
        abar = diffusion.alpha_bar(t, x_t)
        return (x_t - abar.sqrt() * scene.x0) / (1 - abar).sqrt()

    monkeypatch.setattr(scene.model.unet, "forward", network)
    monkeypatch.setattr(tour, "look", lambda scene, latents: latents.flatten(0, -4))
    monkeypatch.setattr(tour, "sheet", lambda rows: rows)
    rows, _ = step(scene)
    found = {names[0]: images for images, names in rows}
    answer = scene.x0[0] if step is tour.belief else scene.x0[0, :1]
    predicted = found["predicted x0"]
    torch.testing.assert_close(
        predicted, answer.expand_as(predicted), rtol=0, atol=2e-4, msg="that is not the x0")
    assert all((camera is None) == (step is tour.sample_without_cameras) for camera in asked)
    if step in (tour.sample, tour.sample_without_cameras):
        result, _ = rows[2]
        assert (result - scene.x0[0]).abs().mean() < 0.05, "the sample ends elsewhere"


def test_noise_leaves_the_share_that_is_said(scene, monkeypatch):
    """The signal that is left in x_t, measured by its correlation with x0."""
    torch.manual_seed(0)
    monkeypatch.setattr(tour, "look", lambda scene, latents: latents)
    monkeypatch.setattr(tour, "sheet", lambda rows: rows)
    large = scene._replace(x0=torch.randn(1, 1, 8, 64, 64))
    rows, words = tour.noise(large, times=(20, 500, 980))
    x_t, _ = rows[0]
    signal = (x_t * large.x0[:, 0]).mean((1, 2, 3))
    expected = diffusion.alphas_cumprod()[[20, 500, 980]].sqrt()
    torch.testing.assert_close(signal, expected, rtol=0, atol=0.02)
    assert "0.6%" in words


def test_a_single_image_is_pulled_to_what_the_model_predicts(scene, monkeypatch):
    """A network that always believes in the same latents: they become the image."""
    torch.manual_seed(0)
    belief = torch.randn_like(scene.x0[:, :1])

    def network(x_t, t, context, camera):
        assert camera is None, "a single image has no camera"
        abar = diffusion.alpha_bar(t, x_t)
        return (x_t - abar.sqrt() * belief) / (1 - abar).sqrt()

    seen = []
    monkeypatch.setattr(scene.model.unet, "forward", network)
    monkeypatch.setattr(tour, "look", lambda scene, x: seen.append(x.detach().clone()) or x[0])
    monkeypatch.setattr(tour, "sheet", lambda rows: rows)
    tour.distil_image(scene, steps=40, lr=0.2)
    before, after = [(x - belief).abs().mean().item() for x in (seen[0], seen[-1])]
    assert after < 0.1 * before, f"from {before:.2f} it came only to {after:.2f}"
