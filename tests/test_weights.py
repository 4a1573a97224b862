"""Names: every released tensor finds its place once, and every layout gives the same model.

What is written is what was released. The oracle of diffusers' names is the walk in layouts.py.
"""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from layouts import (
    PREFIXES, RELEASED, SMALL, named_tensor, released_tensors, take, to_diffusers, unet_pairs,
    vae_pairs)
from mvd import MVDream, weights
from mvd.presets import ModelConfig
from mvd.tools.errors import UserError
from mvd.unet import MultiViewUNet, UNetConfig
from mvd.vae import VAE, VAEConfig
from test_unet import DATA

SCHEDULE = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
}
PARTS = ("unet", "vae", "text")


def meta(shapes):
    """{name: shape} -> {name: tensor without values}."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def flat(parts):
    """{part: {name: tensor}} -> {part.name: tensor}."""
    tensors = {}
    for part in parts:
        for name, tensor in parts[part].items():
            tensors[f"{part}.{name}"] = tensor
    return tensors


def without(tensors, *unwanted):
    """The tensors whose names do not start with any of these."""
    return {name: t for name, t in tensors.items() if not name.startswith(unwanted)}


def assert_same(parts, others):
    for part in PARTS:
        assert parts[part].keys() == others[part].keys()
        for name, tensor in parts[part].items():
            other = others[part][name]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


@pytest.fixture(scope="module")
def released():
    return released_tensors()


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return MVDream(ModelConfig())


# ---- the published names ---------------------------------------------------------------------


def test_each_of_the_1244_released_tensors_is_mapped_once_or_ignored_on_purpose(full):
    tensors = meta(RELEASED["mvdream"])
    assert len(tensors) == 1244
    parts = weights.convert(tensors)
    # The same objects: none is copied.
    found = [id(tensor) for part in PARTS for tensor in parts[part].values()]
    assert len(set(found)) == len(found) == 1232
    assert {name for name, tensor in tensors.items() if id(tensor) not in found} == SCHEDULE
    for part in PARTS:
        assert shapes_of(parts[part]) == shapes_of(getattr(full, part).state_dict())
    config = full.config
    assert weights.sizes(parts) == (config.unet, config.vae, config.text)


def test_each_diffusers_tensor_is_mapped_once(full):
    folder = {part: RELEASED[part] for part in PREFIXES}
    parts = weights.convert(meta(flat(folder)))
    unet = without(full.unet.state_dict(), "camera_mlp.")
    assert shapes_of(parts["unet"]) == shapes_of(unet)
    assert shapes_of(parts["vae"]) == shapes_of(full.vae.state_dict())
    text = without(full.text.state_dict(), "logit_scale", "text_projection", "blocks.23.")
    assert shapes_of(parts["text"]) == shapes_of(text)

    unet, vae, text = weights.sizes(parts)
    assert (unet, vae) == (full.config.unet, full.config.vae)
    assert (text.layers, text.unused_layers, text.output_dim) == (23, 0, None)


def test_the_walk_of_these_tests_gives_the_published_diffusers_names():
    """The oracle of the tests below: each name, with its shape, comes from the LDM tensor that the
    walk pairs it with."""
    folder = to_diffusers(meta(RELEASED["mvdream"]), ModelConfig())
    for part in PREFIXES:
        assert {name: list(t.shape) for name, t in folder[part].items()} == RELEASED[part]


def test_what_is_written_has_the_released_names_and_shapes(full):
    parts = {part: getattr(full, part).state_dict() for part in PARTS}
    written = weights.to_released(parts)
    assert {name: list(t.shape) for name, t in written.items()} == RELEASED["mvdream"]


def test_the_schedule_that_is_written():
    buffers = weights.schedule_buffers()
    reference = load_file(DATA / "schedule.safetensors")["alphas_cumprod"]
    torch.testing.assert_close(buffers["alphas_cumprod"], reference, rtol=1e-6, atol=0)
    first, last = math.sqrt(0.00085), math.sqrt(0.0120)
    abar = 1.0
    # DDPM eq. 4 and 7, one step at a time.
    for t in range(1000):
        beta = (first + t / 999 * (last - first)) ** 2
        before = abar
        abar = before * (1 - beta)
        variance = beta * (1 - before) / (1 - abar)
        expected = {
            "betas": beta,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": math.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": math.sqrt(1 - abar),
            "log_one_minus_alphas_cumprod": math.log(1 - abar),
            "sqrt_recip_alphas_cumprod": math.sqrt(1 / abar),
            "sqrt_recipm1_alphas_cumprod": math.sqrt(1 / abar - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": math.log(max(variance, 1e-20)),
            "posterior_mean_coef1": beta * math.sqrt(before) / (1 - abar),
            "posterior_mean_coef2": (1 - before) * math.sqrt(1 - beta) / (1 - abar),
        }
        for name, value in expected.items():
            found = buffers[name][t].item()
            assert found == pytest.approx(value, rel=1e-5, abs=1e-12), (name, t)


# ---- every layout ----------------------------------------------------------------------------


def older_file_of_ours(released):
    """Before the text tower was our own: its names were LDM's, behind "tower."."""
    parts = weights.convert(released)
    prefix = PREFIXES["text_encoder"]
    text = {}
    for name, tensor in released.items():
        if name.startswith(prefix):
            text["tower." + name.removeprefix(prefix)] = tensor
    text["logit_scale"] = text.pop("tower.logit_scale")
    return flat({**parts, "text": text})


def whole_files(released):
    """{how: tensors}: the same model in one file, as other tools write it."""
    training = {
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3),
        "logvar": torch.zeros(1000),
        "model_ema.diffusion_modelout2weight": torch.zeros(3),
        "cond_stage_model.model.attn_mask": torch.zeros(77, 77),
    }
    return {
        "without schedule": {n: t for n, t in released.items() if n not in SCHEDULE},
        "state_dict level": {"state_dict": released, "global_step": 7},
        "training state": {**released, **training},
        "ours": flat(weights.convert(released)),
        "ours, older": older_file_of_ours(released),
    }


def folders(released):
    """{how: tensors} of diffusers folders, which cannot hold all of the model."""
    today = to_diffusers(released)
    today["text_encoder"]["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    old = to_diffusers(released, of_2022=True, text_prefix="")
    old["text_encoder"]["embeddings.position_ids"] = torch.arange(77)[None]
    convolutions = dict(old["vae"])
    for name, tensor in old["vae"].items():
        if "attentions" in name and tensor.dim() == 2:
            convolutions[name] = tensor[:, :, None, None]
    return {
        "diffusers": flat(today),
        "of 2022": flat(old),
        "of 2022, convolutions": flat({**old, "vae": convolutions}),
    }


def test_every_layout_gives_the_same_model(released):
    ours = weights.convert(released)
    for tensors in whole_files(released).values():
        assert_same(weights.convert(tensors), ours)
    unet = without(ours["unet"], "camera_mlp.")
    text = without(ours["text"], "logit_scale", "text_projection", "blocks.2.")
    for tensors in folders(released).values():
        assert_same(weights.convert(tensors), {**ours, "unet": unet, "text": text})


def test_a_folder_may_keep_ldm_names_inside_a_part(released):
    """So MVDream was repackaged, with its camera MLP."""
    ours = weights.convert(released)
    prefix = PREFIXES["unet"]
    folder = to_diffusers(released)
    folder["unet"] = {}
    for name, tensor in released.items():
        if name.startswith(prefix):
            folder["unet"][name.removeprefix(prefix)] = tensor
    text = without(ours["text"], "logit_scale", "text_projection", "blocks.2.")
    assert_same(weights.convert(flat(folder)), {**ours, "text": text})


@pytest.mark.parametrize("mult, blocks, attention", [
    ((1,), 1, (1,)),
    ((1, 2), 1, (1, 2)),
    ((1, 2, 4), 3, (2,)),
    ((1, 1, 2, 2, 3), 2, (1, 4)),
    ((1, 2), 2, ()),
])
def test_any_depth(mult, blocks, attention):
    unet = UNetConfig(
        model_channels=64,
        channel_mult=mult,
        num_res_blocks=blocks,
        attention_resolutions=attention,
        context_dim=96,
    )
    vae = VAEConfig(channels=32, channel_mult=mult, num_res_blocks=blocks, z_channels=4)
    with torch.device("meta"):
        ours = {"unet": MultiViewUNet(unet).state_dict(), "vae": VAE(vae).state_dict()}
        text = MVDream(SMALL).text.state_dict()
    assert weights.sizes({**ours, "text": text}) == (unet, vae, SMALL.text)

    released = weights.to_released(ours)
    assert_converts_to(released, ours)
    # The same tensors, called as the walk says that diffusers calls them.
    folder = {
        "unet": take(released, PREFIXES["unet"], unet_pairs(unet)),
        "vae": take(released, PREFIXES["vae"], vae_pairs(vae)),
    }
    ours["unet"] = without(ours["unet"], "camera_mlp.")
    assert_converts_to(flat(folder), ours)


def assert_converts_to(tensors, ours):
    converted = weights.convert(tensors)
    for part in ours:
        assert converted[part].keys() == ours[part].keys()
        for name, tensor in ours[part].items():
            assert converted[part][name] is tensor, f"{part}.{name} is another tensor, or a copy"


@torch.no_grad()
def test_the_released_numbers_through_diffusers_names():
    """The small reference case: its weights, drawn from LDM names, in diffusers' names."""
    config = UNetConfig(
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        head_dim=32,
        context_dim=48,
    )
    shapes = json.loads((DATA / "keys_unet_small.json").read_text())
    drawn = {name: named_tensor(name, shape) for name, shape in shapes.items()}
    tensors = take(drawn, PREFIXES["unet"], unet_pairs(config))
    unet = MultiViewUNet(config).eval()
    converted = weights.convert(flat({"unet": tensors}))["unet"]
    lacking = unet.load_state_dict(converted, strict=False).missing_keys
    assert {name.split(".")[0] for name in lacking} == {"camera_mlp"}
    case = load_file(DATA / "unet_small.safetensors")
    out = unet(case["x"], case["t"], case["context"])
    assert (out - case["out_2d"]).norm() / case["out_2d"].norm() < 1e-4


# ---- what is refused -------------------------------------------------------------------------


def test_a_tensor_that_is_there_twice_is_named(released):
    twice = {**released, "unet.time_embedding.linear_1.bias": torch.zeros(256)}
    with pytest.raises(UserError, match="'unet.time_embedding.linear_1.bias' is there twice"):
        weights.convert(twice)


XL, SD1, PART = "Stable Diffusion XL", "Stable Diffusion 1", "one part of a model"
TEXT_MODEL = "transformer.text_model.final_layer_norm.bias"


@pytest.mark.parametrize("name, shape, words", [
    ("model.diffusion_model.label_emb.0.0.weight", [4, 4], XL),
    (f"conditioner.embedders.0.{TEXT_MODEL}", [4], XL),
    ("unet.add_embedding.linear_1.weight", [4, 4], XL),
    (f"cond_stage_model.{TEXT_MODEL}", [4], SD1),
    ("model.diffusion_model.input_blocks.1.1.proj_in.weight", [4, 4, 1, 1], SD1),
    ("unet.down_blocks.0.attentions.0.proj_in.weight", [4, 4, 1, 1], SD1),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", [4, 4], "LoRA"),
    ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", [4, 4], "LoRA"),
    ("base_model.model.lora_A.weight", [4, 4], "LoRA"),
    ("conv_in.weight", [4, 4, 3, 3], PART),
    ("text_model.final_layer_norm.weight", [4], PART),
    (
        "double_blocks.0.img_attn.qkv.weight",
        [4, 4],
        "not a tensor of an MVDream or Stable Diffusion 2 model",
    ),
])
def test_other_models_are_recognised_by_a_tensor_that_is_named(name, shape, words):
    with pytest.raises(UserError, match=words) as error:
        weights.convert({name: torch.empty(shape, device="meta")})
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("letter", "qkv")
def test_a_lost_or_misshapen_third_of_a_projection_is_named(released, letter):
    tensors = flat(to_diffusers(released))
    name = f"text_encoder.text_model.encoder.layers.1.self_attn.{letter}_proj.weight"
    ours = f"text.blocks.1.{letter}_proj.weight"
    with pytest.raises(UserError, match=rf"{ours} has shape \[7, 5\]"):
        weights.convert({**tensors, name: torch.zeros(7, 5)})
    del tensors[name]
    with pytest.raises(UserError, match=f"{ours} is missing"):
        weights.convert(tensors)


def test_a_size_that_no_model_has_is_named(released):
    """Such as a width that the groups of a group norm do not divide."""
    name = "model.diffusion_model.input_blocks.0.0.weight"
    parts = weights.convert({**released, name: torch.zeros(70, 4, 3, 3)})
    with pytest.raises(UserError, match="unet.encoder.0.conv.weight has shape .70") as error:
        weights.sizes(parts)
    assert name in str(error.value)
