"""A network that predicts v is sampled, distilled and trained as one that predicts the noise.

The oracle is a network that knows the noise or, by Salimans & Ho (2022, appendix D), the v of it.
"""
import copy
import json
import math

import pytest
import torch

import dreambooth
from mvd import MVDream, diffusion, sds
from mvd.model import read_config
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from test_model import random_model, small_config

TIMES = [0, 21, 500, 981, 999]


def abar_of(t):
    """ᾱ_t, one step at a time, float64 [n, 1, 1, 1, 1]."""
    first, last = math.sqrt(0.00085), math.sqrt(0.0120)
    product, products = 1.0, []
    for i in range(1000):
        product *= 1 - (first + i / 999 * (last - first)) ** 2
        products.append(product)
    return torch.tensor(products, dtype=torch.float64)[t].view(-1, 1, 1, 1, 1)


class Says:
    """A network that answers `answer`, whatever it is asked; its kind is `prediction`."""

    def __init__(self, answer, prediction):
        self.answer = answer
        self.prediction = prediction

    def __call__(self, x_t, t, context, camera=None):
        return self.answer


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    x0, noise, other = torch.randn(3, len(TIMES), 2, 4, 8, 8, generator=g)
    t = torch.tensor(TIMES)
    abar = abar_of(t)
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    return {"x0": x0, "noise": noise, "other": other, "t": t, "abar": abar, "v": v}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_follows_from_v_at_every_time(case, dtype):
    x_t = diffusion.q_sample(case["x0"], case["t"], case["noise"])
    network = Says(case["v"].to(dtype), "v")
    eps = diffusion.predict_noise(network, x_t.to(dtype), case["t"], None)
    assert eps.dtype == torch.float32
    torch.testing.assert_close(eps, case["noise"], rtol=1e-4, atol=1e-5)
    x0 = diffusion.predict_x0(x_t, case["t"], eps)
    torch.testing.assert_close(x0, case["x0"], rtol=1e-3, atol=1e-4)


def test_training_has_the_plain_error_of_what_is_predicted(case):
    x0, t, noise, other = (case[name] for name in ("x0", "t", "noise", "other"))
    for prediction, truth in (("eps", noise), ("v", case["v"])):
        network = Says(other, prediction)
        errors = diffusion.squared_errors(network, x0, None, None, t, noise)
        expected = (truth - other.double()) ** 2
        torch.testing.assert_close(errors, expected.float(), rtol=1e-3, atol=1e-4)


def test_the_gradient_of_v_does_not_fade_with_the_noise(case):
    """d/dv of (v - v_θ)² is 2 (v_θ - v) at every time; of ε it would be ᾱ_t times that."""
    answer = case["other"].clone().requires_grad_()
    network = Says(answer, "v")
    errors = diffusion.squared_errors(network, case["x0"], None, None, case["t"], case["noise"])
    errors.sum().backward()
    expected = 2 * (case["other"] - case["v"])
    torch.testing.assert_close(answer.grad, expected.float(), rtol=1e-3, atol=1e-3)


class KnowsX0:
    """The v that leads from any x_t to x0."""
    prediction = "v"

    def __init__(self, x0):
        self.x0 = x0

    def __call__(self, x_t, t, context, camera=None):
        abar = abar_of(t)
        eps = (x_t - abar.sqrt() * self.x0) / (1 - abar).sqrt()
        return (abar.sqrt() * eps - (1 - abar).sqrt() * self.x0).to(x_t)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_a_sampler_arrives_where_v_leads(sampler):
    x0 = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    network = KnowsX0(x0)

    def eps_fn(x, t):
        context = torch.zeros(2, 1, 1)
        return diffusion.guided_noise(network, x, t, context, None, 5.0)[0]

    # Both halves of guidance ask for the same.
    network.x0 = torch.cat([x0, x0])
    steps = list(diffusion.sampling_steps(eps_fn, x0.shape, 20, sampler))
    for _, believed in steps:
        torch.testing.assert_close(believed, x0, rtol=1e-3, atol=1e-3)
    kept = abar_of(torch.tensor([0])).sqrt()
    assert (steps[-1][0] - kept * x0).abs().max() < 0.2


def test_distillation_aims_at_the_same_x0():
    x0 = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    network = KnowsX0(torch.cat([x0, x0]))
    camera, context = torch.zeros(1, 4, 16), torch.zeros(2, 1, 1)
    t = torch.tensor([700])
    found, _ = sds.predict_sets(
        network, torch.randn(x0.shape), t, context, camera, guidance=20.0, rescale=0.0)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


# ---- the real network ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    config = small_config()
    config.unet.prediction = "v"
    return random_model(config)


def test_a_sample_is_ddim_with_v(model):
    """x_prev = cos-like rotation of (x_t, v) (Salimans & Ho, appendix D): two steps by hand."""
    text, none = model.embed(["a red bulldog"]), model.embed([""])
    x = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    for t, previous in ((501, 1), (1, 0)):
        now, then = abar_of(torch.tensor([t])), abar_of(torch.tensor([previous]))
        when = torch.tensor([t])
        v = model.unet(x.float(), when, none).double()
        v = v + 3.0 * (model.unet(x.float(), when, text).double() - v)
        x0 = now.sqrt() * x - (1 - now).sqrt() * v
        eps = (1 - now).sqrt() * x + now.sqrt() * v
        x = then.sqrt() * x0 + (1 - then).sqrt() * eps
    expected = (model.decode(x.float()) / 2 + 0.5).clamp(0, 1)
    flags = dict(mode="2d", views=2, steps=2, guidance=3.0, seed=3, sampler="ddim")
    drawn = model.sample("a red bulldog", **flags)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-4)
    plain = copy.deepcopy(model)
    plain.unet.prediction = "eps"
    other = plain.sample("a red bulldog", **flags)
    assert not torch.allclose(drawn, other, atol=1e-2), "v makes no difference"


def test_dreambooth_preserves_what_v_implies(model):
    """‖ε_θ - ε_θ0‖² = ᾱ_t ‖v_θ - v_θ0‖²: the frozen network predicts v, too."""
    unet, context = model.unet, model.embed(["a bulldog"])
    theta0 = {name: 0.9 * w for name, w in unet.named_parameters()}
    x0 = torch.randn(1, 1, 8, 8, 8)
    torch.manual_seed(5)
    found = dreambooth.class_loss(unet, theta0, x0, context)
    torch.manual_seed(5)
    t = torch.randint(1000, (1,))
    abar = abar_of(t)
    x_t = (abar.sqrt() * x0 + (1 - abar).sqrt() * torch.randn_like(x0)).float()
    before = torch.func.functional_call(unet, theta0, (x_t, t, context))
    expected = abar * (unet(x_t, t, context) - before).double() ** 2
    torch.testing.assert_close(found, expected.mean().float(), rtol=1e-3, atol=1e-8)


@pytest.mark.filterwarnings("ignore:(?s).*text_projection")
def test_every_layout_keeps_the_kind_of_prediction(model, tmp_path):
    for layout in ("mvd", "mvdream", "diffusers"):
        path = tmp_path / layout
        model.save(path, layout=layout)
        assert read_config(path) == MVDream.load(path).config == model.config, layout
    scheduler = json.loads((tmp_path / "diffusers/scheduler/scheduler_config.json").read_bytes())
    assert scheduler["prediction_type"] == "v_prediction"
    with pytest.raises(UserError, match="no room for"):
        model.save(tmp_path / "m.pt", layout="mvdream")


def test_files_from_before_there_was_v_predict_noise(model, tmp_path):
    path = tmp_path / "m.safetensors"
    model.save(path)
    tensors, metadata = read_safetensors(path)
    header = json.loads(metadata["mvd"])
    assert header["unet"].pop("prediction") == "v"
    write_safetensors(path, tensors, {"mvd": json.dumps(header)})
    assert MVDream.load(path).unet.prediction == "eps"
    header["unet"]["prediction"] = "score"
    write_safetensors(path, tensors, {"mvd": json.dumps(header)})
    with pytest.raises(UserError, match="no prediction 'score': choose eps, v"):
        MVDream.load(path)
