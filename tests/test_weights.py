"""Names: every released tensor finds its place once, every layout gives the same model, and what is written is what was released."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from layouts import PREFIXES, RELEASED, SMALL, named_tensor, released_tensors, to_diffusers, unet_pairs, vae_pairs
from mvd import MVDream, weights
from mvd.tools.errors import UserError
from mvd.model import PRESETS
from mvd.unet import MultiViewUNet, UNetConfig
from mvd.vae import VAE, VAEConfig
from test_unet import DATA

SCHEDULE = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
            "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def flat(folder):
    return {f"{part}.{name}": tensor for part, tensors in folder.items() for name, tensor in tensors.items()}


def assert_same(parts, others):
    for part in ("unet", "vae", "text"):
        assert parts[part].keys() == others[part].keys()
        for name, tensor in parts[part].items():
            assert tensor.dtype == others[part][name].dtype and torch.equal(tensor, others[part][name]), name


@pytest.fixture(scope="module")
def released():
    return released_tensors()


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return MVDream(PRESETS["sd21"])


def test_each_of_the_1244_released_tensors_is_mapped_once_or_ignored_on_purpose(full):
    tensors = meta(RELEASED["mvdream"])
    assert len(tensors) == 1244
    parts = weights.convert(tensors)
    found = [id(tensor) for part in parts.values() for tensor in part.values()]                  # none is copied
    assert len(set(found)) == len(found) == 1232
    assert {name for name, tensor in tensors.items() if id(tensor) not in found} == SCHEDULE
    for part, theirs in parts.items():
        ours = getattr(full, part).state_dict()
        assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}
    assert weights.sizes(parts) == (full.config.unet, full.config.vae, full.config.text)


def test_each_diffusers_tensor_is_mapped_once(full):
    names = flat({part: RELEASED[part] for part in PREFIXES})
    parts = weights.convert(meta(names))
    for part, lacking in (("unet", "camera_mlp."), ("vae", "none"), ("text", ("logit_scale", "text_projection",
                                                                             "blocks.23."))):
        ours = {name: t.shape for name, t in getattr(full, part).state_dict().items() if not name.startswith(lacking)}
        assert {name: t.shape for name, t in parts[part].items()} == ours
    unet, vae, text = weights.sizes(parts)
    assert (unet, vae) == (full.config.unet, full.config.vae)
    assert (text.layers, text.unused_layers, text.output_dim) == (23, 0, None)


def test_the_walk_of_these_tests_gives_the_published_diffusers_names():
    """The oracle of the tests below: each name, with its shape, comes from the LDM tensor that the walk pairs it with."""
    folder = to_diffusers(meta(RELEASED["mvdream"]), PRESETS["sd21"])
    for part in PREFIXES:
        assert {name: list(t.shape) for name, t in folder[part].items()} == RELEASED[part]


def test_what_is_written_has_the_released_names_and_shapes(full):
    parts = {part: getattr(full, part).state_dict() for part in ("unet", "vae", "text")}
    assert {name: list(t.shape) for name, t in weights.to_released(parts).items()} == RELEASED["mvdream"]


def test_the_schedule_that_is_written():
    buffers = weights.schedule_buffers()
    torch.testing.assert_close(buffers["alphas_cumprod"], load_file(DATA / "schedule.safetensors")["alphas_cumprod"], rtol=1e-6, atol=0)
    beta = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.0120) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
    abar = 1.0
    for t in range(1000):                                                        # DDPM eq. 4 and 7, one step at a time
        before, abar = abar, abar * (1 - beta[t])
        variance = beta[t] * (1 - before) / (1 - abar)
        expected = {"betas": beta[t], "alphas_cumprod": abar, "alphas_cumprod_prev": before, "sqrt_alphas_cumprod": math.sqrt(abar),
                    "sqrt_one_minus_alphas_cumprod": math.sqrt(1 - abar), "log_one_minus_alphas_cumprod": math.log(1 - abar),
                    "sqrt_recip_alphas_cumprod": math.sqrt(1 / abar), "sqrt_recipm1_alphas_cumprod": math.sqrt(1 / abar - 1),
                    "posterior_variance": variance, "posterior_log_variance_clipped": math.log(max(variance, 1e-20)),
                    "posterior_mean_coef1": beta[t] * math.sqrt(before) / (1 - abar),
                    "posterior_mean_coef2": (1 - before) * math.sqrt(1 - beta[t]) / (1 - abar)}
        for name, value in expected.items():
            assert buffers[name][t].item() == pytest.approx(value, rel=1e-5, abs=1e-12), (name, t)


def variants(released):
    """The same model as other tools write it: {how: tensors}. A diffusers folder cannot hold all of it."""
    ldm = {name: tensor for name, tensor in released.items() if name not in SCHEDULE}
    ours = weights.convert(released)
    folder, old = to_diffusers(released), to_diffusers(released, of_2022=True, text_prefix="")
    old["text_encoder"]["embeddings.position_ids"] = torch.arange(77)[None]
    folder["text_encoder"]["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    convolutions = {name: tensor[:, :, None, None] if "attentions" in name and tensor.dim() == 2 else tensor
                    for name, tensor in old["vae"].items()}
    repackaged = {name.removeprefix(PREFIXES["unet"]): t for name, t in ldm.items() if name.startswith(PREFIXES["unet"])}
    whole = {
        "without schedule": ldm,
        "state_dict level": {"state_dict": released, "global_step": 7},
        "training state": {**released, "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3), "logvar": torch.zeros(
            1000), "model_ema.diffusion_modelout2weight": torch.zeros(3), "cond_stage_model.model.attn_mask": torch.zeros(77, 77)},
        "ours": flat(ours)}
    cut = {"diffusers": flat(folder), "of 2022": flat(old), "of 2022, convolutions": flat({**old, "vae": convolutions})}
    return ours, whole, cut, flat({**folder, "unet": repackaged})


def test_every_layout_gives_the_same_model(released):
    ours, whole, cut, repackaged = variants(released)
    for tensors in whole.values():
        assert_same(weights.convert(tensors), ours)
    text = {name: t for name, t in ours["text"].items() if name not in ("logit_scale", "text_projection") and ".2." not in name}
    assert_same(weights.convert(repackaged), {**ours, "text": text})
    unet = {name: t for name, t in ours["unet"].items() if not name.startswith("camera_mlp.")}
    for tensors in cut.values():
        assert_same(weights.convert(tensors), {**ours, "unet": unet, "text": text})


@pytest.mark.parametrize("mult, blocks, attention", [
    ((1,), 1, (1,)), ((1, 2), 1, (1, 2)), ((1, 2, 4), 3, (2,)), ((1, 1, 2, 2, 3), 2, (1, 4)), ((1, 2), 2, ())])
def test_any_depth(mult, blocks, attention):
    unet_config = UNetConfig(model_channels=64, channel_mult=mult, num_res_blocks=blocks, attention_resolutions=attention, context_dim=96)
    vae_config = VAEConfig(channels=32, channel_mult=mult, num_res_blocks=blocks, z_channels=4)
    with torch.device("meta"):
        ours = {"unet": MultiViewUNet(unet_config).state_dict(), "vae": VAE(vae_config).state_dict()}
    written = weights.to_released(ours)
    for part, pairs in (("unet", unet_pairs(unet_config)), ("vae", vae_pairs(vae_config))):
        ldm = {name: t for name, t in written.items() if name.startswith(PREFIXES[part])}
        back = weights.convert(ldm)[part]
        assert all(back[name] is t for name, t in ours[part].items())
        theirs = {f"{part}.{b}.{kind}": ldm[f"{PREFIXES[part]}{a}.{kind}"] for a, b in pairs for kind in ("weight", "bias")
                  if f"{PREFIXES[part]}{a}.{kind}" in ldm}
        expected = {name: t for name, t in ours[part].items() if not name.startswith("camera_mlp.")}
        converted = weights.convert(theirs)[part]
        assert converted.keys() == expected.keys() and all(converted[name] is t for name, t in expected.items())
    with torch.device("meta"):
        text = MVDream(SMALL).text.state_dict()
    assert weights.sizes({**ours, "text": text}) == (unet_config, vae_config, SMALL.text)


@torch.no_grad()
def test_the_released_numbers_through_diffusers_names():
    """The small reference case, its weights drawn from LDM names, written as diffusers writes them."""
    shapes = json.loads((DATA / "keys_unet_small.json").read_text())
    config = UNetConfig(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), head_dim=32, context_dim=48)
    tensors = {}
    for ldm, theirs in unet_pairs(config):
        for kind in ("weight", "bias"):
            if (name := f"{PREFIXES['unet']}{ldm}.{kind}") in shapes:
                tensors[f"unet.{theirs}.{kind}"] = named_tensor(name, shapes[name])
    unet = MultiViewUNet(config).eval()
    lacking = unet.load_state_dict(weights.convert(tensors)["unet"], strict=False).missing_keys
    assert {name.split(".")[0] for name in lacking} == {"camera_mlp"}
    case = load_file(DATA / "unet_small.safetensors")
    out = unet(case["x"], case["t"], case["context"])
    assert (out - case["out_2d"]).norm() / case["out_2d"].norm() < 1e-4


def test_a_tensor_that_is_there_twice_is_named(released):
    with pytest.raises(UserError, match="'unet.time_embedding.linear_1.bias' is there twice"):
        weights.convert({**released, "unet.time_embedding.linear_1.bias": torch.zeros(256)})


@pytest.mark.parametrize("name, shape, words", [
    ("model.diffusion_model.label_emb.0.0.weight", [4, 4], "Stable Diffusion XL"),
    ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", [4], "Stable Diffusion XL"),
    ("unet.add_embedding.linear_1.weight", [4, 4], "Stable Diffusion XL"),
    ("cond_stage_model.transformer.text_model.final_layer_norm.bias", [4], "Stable Diffusion 1"),
    ("model.diffusion_model.input_blocks.1.1.proj_in.weight", [4, 4, 1, 1], "Stable Diffusion 1"),
    ("unet.down_blocks.0.attentions.0.proj_in.weight", [4, 4, 1, 1], "Stable Diffusion 1"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", [4, 4], "LoRA"),
    ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", [4, 4], "LoRA"),
    ("base_model.model.lora_A.weight", [4, 4], "LoRA"),
    ("conv_in.weight", [4, 4, 3, 3], "one part of a model"),
    ("text_model.final_layer_norm.weight", [4], "one part of a model"),
    ("double_blocks.0.img_attn.qkv.weight", [4, 4], "no tensor of an MVDream or Stable Diffusion 2 model")])
def test_other_models_are_recognised_by_a_tensor_that_is_named(name, shape, words):
    with pytest.raises(UserError, match=words) as error:
        weights.convert({name: torch.empty(shape, device="meta")})
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("letter", "qkv")
def test_a_lost_or_misshapen_third_of_a_projection_is_named(released, letter):
    tensors = flat(to_diffusers(released))
    name = f"text_encoder.text_model.encoder.layers.1.self_attn.{letter}_proj.weight"
    ours = rf"text.blocks.1.attn.{letter}_proj.weight"
    with pytest.raises(UserError, match=rf"{ours} has shape \[7, 5\]"):
        weights.convert({**tensors, name: torch.zeros(7, 5)})
    del tensors[name]
    with pytest.raises(UserError, match=f"{ours} is missing"):
        weights.convert(tensors)
