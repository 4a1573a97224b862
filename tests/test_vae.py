"""The autoencoder against the published definition's numbers, and properties of its layers."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agree import agree, near
from layouts import named_tensor
from mvd.vae import VAE, VAEConfig

DATA = Path(__file__).parent / "data"
SMALL = VAEConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1)


def ours(ldm_name):
    """The published names and ours differ in these words."""
    name = ldm_name.removeprefix("first_stage_model.")
    name = (
        name.replace(".block.", ".blocks.")
        .replace("nin_shortcut", "shortcut")
        .replace("sample.conv.", "sample.")
    )
    name = (
        name.replace("mid.block_1", "middle.0")
        .replace("mid.attn_1", "middle.1")
        .replace("mid.block_2", "middle.2")
    )
    for short, long in {"q": "query", "k": "key", "v": "value", "proj_out": "out"}.items():
        name = re.sub(rf"middle\.1\.{short}\.", f"middle.1.{long}.", name)
    return name


@pytest.fixture(scope="module")
def vae():
    shapes = json.loads((DATA / "keys_vae_small.json").read_text())
    model = VAE(SMALL).eval()
    model.load_state_dict(
        {ours(name): named_tensor(name, shape) for name, shape in shapes.items()}
    )  # strict
    return model


@pytest.fixture(scope="module")
def case():
    return load_file(DATA / "vae_small.safetensors")


@torch.no_grad()
def test_encode_agrees_with_the_published_definition(vae, case):
    mean, logvar = vae.encode(case["image"])
    found = torch.cat([mean, logvar], 1)
    near(found, case["moments"], "mean and log-variance of the published encoder")


@torch.no_grad()
def test_what_a_compiler_sees_agrees_with_the_published_definition(vae, case, monkeypatch):
    """Norms, convolutions and the encoder's layout have another form there."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = torch.cat(vae.encode(case["image"]), 1)
    near(found, case["moments"], "mean and log-variance, of the form for a compiler")
    found = vae.decode(case["moments"][:, :4])
    near(found, case["decoded_mean"], "the picture, of the form for a compiler")


@torch.no_grad()
def test_decode_agrees_with_the_published_definition(vae, case):
    found = vae.decode(case["moments"][:, :4])
    near(found, case["decoded_mean"], "the picture of the published decoder")


@torch.no_grad()
def test_channels_last_changes_nothing(vae, case):
    mean, _ = vae.encode(case["image"])
    again = VAE(SMALL).eval()
    again.load_state_dict(vae.state_dict())
    again = again.to(memory_format=torch.channels_last)
    image = case["image"].contiguous(memory_format=torch.channels_last)
    near(again.encode(image)[0], mean, "the mean if tensors lie channels last")


@torch.no_grad()
def test_attention_is_the_textbook_formula(vae, case):
    block, x = vae.encoder.middle[1].double(), torch.randn(1, 64, 3, 5, dtype=torch.float64)
    groups = x.view(1, 32, 2, 15)
    hidden = (groups - groups.mean((2, 3), keepdim=True)) / (
        groups.var((2, 3), unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    hidden = hidden.view(64, 15) * block.norm.weight[:, None] + block.norm.bias[:, None]

    def linear(layer, h):
        return layer.weight[:, :, 0, 0] @ h + layer.bias[:, None]

    query, key, value = (
        linear(layer, hidden) for layer in (block.query, block.key, block.value)
    )  # [C, pixels]
    attended = value @ torch.softmax(query.T @ key / 64**0.5, 1).T
    expected = x + linear(block.out, attended).view(1, 64, 3, 5)
    hint = "Is it divided by sqrt(channels), and softmax taken over the keys?"
    agree(block(x), expected, "x + attention(norm(x))", hint, atol=1e-12)
    block.float()


@torch.no_grad()
def test_log_variance_is_clamped(vae):
    model = VAE(SMALL)
    model.quant_conv.weight.zero_()
    for bias, clamped in ((-99.0, -30.0), (99.0, 20.0)):
        model.quant_conv.bias.fill_(bias)
        mean, logvar = model.encode(torch.zeros(1, 3, 8, 8))
        agree(logvar, clamped, f"a log-variance of {bias}, clamped", atol=0)
        agree(mean, bias, f"a mean of {bias}, which is not clamped", atol=0)


def test_any_width_and_size():
    model = VAE(
        VAEConfig(channels=32, channel_mult=(2, 1, 1, 3), num_res_blocks=2, z_channels=7)
    )
    image = torch.randn(2, 3, 16, 24, requires_grad=True)
    mean, logvar = model.encode(image)
    assert mean.shape == logvar.shape == (2, 7, 2, 3), "latents are not an eighth of the size"
    decoded = model.decode(mean)
    assert decoded.shape == image.shape, "the decoded picture has another size"
    decoded.square().sum().backward()
    assert image.grad.abs().sum() > 0, "no gradient reaches the image"


@pytest.mark.parametrize("light", [(32, 64), (64,), (32, 64, 32)])
def test_a_light_encoder_gives_latents_of_the_same_shape(light):
    model = VAE(VAEConfig(channels=32, channel_mult=(1, 2, 2), z_channels=3, groups=8, light=light))
    image = torch.randn(2, 3, 16, 24, requires_grad=True)
    mean, logvar = model.encode(image, model.light)
    assert mean.shape == logvar.shape == model.encode(image)[0].shape == (2, 3, 4, 6)
    mean.square().sum().backward()
    assert image.grad.abs().sum() > 0, "no gradient reaches the image"


@torch.no_grad()
def test_a_light_encoder_begins_with_a_wider_convolution():
    """Of every second pixel, or every fourth: its kernel is that of the patches, unrolled."""
    for light, patch in (((32, 64), 2), ((64,), 4)):
        model = VAE(VAEConfig(channels=32, channel_mult=(1, 2, 2), groups=8, light=light))
        first = model.light.conv_in
        out = first.out_channels
        kernel = first.weight.view(out, 3, patch, patch, 3, 3)  # out, colour, y and x in a patch
        kernel = kernel.permute(0, 1, 4, 2, 5, 3).reshape(out, 3, 3 * patch, 3 * patch)
        image = torch.randn(1, 3, 16, 24)
        wanted = torch.nn.functional.conv2d(
            image, kernel, first.bias, stride=patch, padding=patch
        )
        seen = []
        first.register_forward_hook(lambda layer, inputs, output: seen.append(output))
        model.encode(image, model.light)
        agree(seen[0], wanted, f"the first layer, over patches of {patch} x {patch}", atol=1e-5)


def test_full_size_has_the_parameters_of_stable_diffusion():
    with torch.device("meta"):
        model = VAE()
    count = sum(p.numel() for p in model.parameters())
    agree(count, 83_653_863, "the number of parameters", atol=0)
