"""What a checkpoint says of itself is heard: another kind of model is refused, v is sampled as v.

The values are those of files that were published, or that the tools of their layout write.
"""
import copy
import json
from dataclasses import replace

import pytest
import torch

import layouts
from mvd import MVDream, weights
from mvd.model import read_config, told_config
from mvd.presets import PRESETS, ModelConfig
from mvd.tools import checkpoint, claims
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from test_model import random_model

SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"

# stabilityai/stable-diffusion-2-1-base, and what its 768-pixel sister says otherwise.
BASE = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.10.0.dev0",
        "unet": ["diffusers", "UNet2DConditionModel"],
    },
    SCHEDULER: {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    UNET: {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "class_embed_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "sample_size": 64,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "norm_num_groups": 32,
        "sample_size": 768,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "num_attention_heads": 16,
    },
}
NO_PARTS = {"unet": {}, "vae": {}, "text": {}}


def config_of(said):
    claims.check("m", said)
    return told_config(said, NO_PARTS)


def changed(*changes):
    """BASE with other values: (place, key, value)."""
    said = copy.deepcopy(BASE)
    for place, key, value in changes:
        said[place][key] = value
    return said


def refused(path):
    """The one line with which a checkpoint is refused, before its weights are looked for."""
    with pytest.raises(UserError) as error:
        checkpoint.read(checkpoint.find(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def write_configs(path, said):
    for place, content in said.items():
        (path / place).parent.mkdir(parents=True, exist_ok=True)
        (path / place).write_text(json.dumps(content))
    return path


# ---- a diffusers folder ----------------------------------------------------------------------


def test_the_published_folders_are_what_they_are():
    config = config_of(BASE)
    assert config.size == 512 and config.unet.prediction == "eps" and config.unet.head_dim == 64
    large = config_of(changed((SCHEDULER, "prediction_type", "v_prediction"),
                              (UNET, "sample_size", 96)))
    assert large.size == 768 and large.unet.prediction == "v"
    assert large.text == config.text and large.vae == config.vae


OTHERS = [
    ("model_index.json", "_class_name", "StableDiffusionXLPipeline"),
    ("model_index.json", "_class_name", "StableDiffusionInpaintPipeline"),
    ("model_index.json", "_class_name", "StableDiffusionDepth2ImgPipeline"),
    ("model_index.json", "_class_name", "StableDiffusionUpscalePipeline"),
    ("model_index.json", "_class_name", "FluxPipeline"),
    ("model_index.json", "_class_name", ["a", "list"]),
    (SCHEDULER, "prediction_type", "sample"),
    (SCHEDULER, "prediction_type", "flow_prediction"),
    (SCHEDULER, "prediction_type", None),
    (SCHEDULER, "beta_schedule", "squaredcos_cap_v2"),
    (SCHEDULER, "beta_end", 0.02),
    (SCHEDULER, "num_train_timesteps", 4000),
    (SCHEDULER, "trained_betas", [0.1, 0.2]),
    (SCHEDULER, "rescale_betas_zero_snr", True),
    (UNET, "_class_name", "UNetSpatioTemporalConditionModel"),
    (UNET, "class_embed_type", "projection"),
    (UNET, "num_class_embeds", 1000),
    (UNET, "addition_embed_type", "text_time"),
    (UNET, "time_cond_proj_dim", 256),
    (UNET, "resnet_time_scale_shift", "scale_shift"),
    ("vae/config.json", "_class_name", "VQModel"),
    ("vae/config.json", "shift_factor", 0.1159),
    ("text_encoder/config.json", "hidden_act", "quick_gelu"),
]


@pytest.mark.parametrize("place, key, value", OTHERS)
def test_a_folder_of_another_kind_is_refused_by_what_it_says(place, key, value, tmp_path):
    said = changed((place, key, value))
    line = refused(write_configs(tmp_path, said))
    assert str(tmp_path) in line and place in line and key in line, line


def test_what_the_tensors_do_not_tell_is_taken_from_the_folder():
    config = config_of(changed(
        (UNET, "attention_head_dim", [10, 20, 40, 40]), (UNET, "norm_num_groups", 16),
        ("vae/config.json", "scaling_factor", 0.5), ("vae/config.json", "norm_num_groups", 8),
        ("text_encoder/config.json", "num_attention_heads", 8)))
    assert (config.unet.head_dim, config.unet.groups) == (32, 16)
    assert (config.vae.scale_factor, config.vae.groups, config.text.heads) == (0.5, 8, 8)


@pytest.mark.parametrize("place, key, value", [
    # Stable Diffusion 1: 8 heads at every width.
    (UNET, "attention_head_dim", 8),
    (UNET, "attention_head_dim", [5, 10]),
    (UNET, "attention_head_dim", [0, 10, 20, 20]),
    (UNET, "attention_head_dim", "five"),
    (UNET, "block_out_channels", 3),
    (UNET, "norm_num_groups", 0),
    (UNET, "norm_num_groups", "32"),
    (UNET, "sample_size", -64),
    ("vae/config.json", "scaling_factor", float("inf")),
    ("vae/config.json", "scaling_factor", 0),
    ("vae/config.json", "block_out_channels", None),
    ("text_encoder/config.json", "num_attention_heads", [16]),
])
def test_numbers_that_do_not_fit_are_one_line(place, key, value):
    with pytest.raises(UserError) as error:
        config_of(changed((place, key, value)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff\xfe", '"x"', "1" * 5000])
def test_a_damaged_config_file_is_named(text, tmp_path):
    write_configs(tmp_path, BASE)
    (tmp_path / UNET).write_text(text)
    assert f"{UNET} is damaged" in refused(tmp_path)


# ---- one file --------------------------------------------------------------------------------


def said_of(tmp_path, name="m.safetensors", metadata=None, tensors=(), yaml=None):
    if yaml is not None:
        (tmp_path / name).with_suffix(".yaml").write_text(yaml)
    return checkpoint.said_by_file(tmp_path / name, dict.fromkeys(tensors), metadata or {})


V_YAML = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"   # not eps
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    image_size: 64
    scale_factor: 0.18215
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
"""
EPS_YAML = V_YAML.replace('parameterization: "v"   # not eps', "# parameterization: v")
PREDICT_KEY, TYPE = "modelspec.predict_key", "modelspec.prediction_type"
ARCHITECTURE = "modelspec.architecture"


@pytest.mark.parametrize("how, prediction, size", [
    ({}, "eps", 512),
    ({"yaml": V_YAML}, "v", 768),
    ({"yaml": EPS_YAML}, "eps", 512),
    ({"yaml": "model: {params: {parameterization: 'v'}}"}, "v", 768),
    ({"yaml": "model: {target: another.Trainer, scale_factor: 3}"}, "eps", 512),
    ({"name": "v2-1_768-ema-pruned.ckpt"}, "v", 768),
    ({"name": "v2-1_512-ema-pruned.ckpt"}, "eps", 512),
    ({"name": "768-v-ema.ckpt"}, "v", 768),
    # What is written inside counts more than a name.
    ({"name": "768-v-ema.ckpt", "metadata": {TYPE: "epsilon"}}, "eps", 512),
    ({"metadata": {TYPE: "v"}}, "v", 768),
    ({"metadata": {TYPE: "epsilon"}}, "eps", 512),
    ({"metadata": {PREDICT_KEY: "v", "modelspec.resolution": "640x640"}}, "v", 640),
    ({"metadata": {ARCHITECTURE: "stable-diffusion-v2-768-v"}}, "v", 768),
    ({"metadata": {ARCHITECTURE: "stable-diffusion-v2-512", "format": "pt"}}, "eps", 512),
    ({"tensors": ["v_pred"]}, "v", 768),
])
def test_a_file_says_what_it_predicts(how, prediction, size, tmp_path):
    config = config_of(said_of(tmp_path, **how))
    assert (config.unet.prediction, config.size) == (prediction, size)


@pytest.mark.parametrize("how, word", [
    ({"yaml": V_YAML.replace('"v"', "x0")}, "parameterization"),
    ({"yaml": V_YAML.replace(".LatentDiffusion", ".LatentInpaintDiffusion")}, "target"),
    ({"yaml": V_YAML.replace(".LatentDiffusion", ".LatentDepth2ImageDiffusion")}, "target"),
    ({"yaml": V_YAML.replace("0.0120", "0.02")}, "linear_end"),
    ({"metadata": {TYPE: "sample"}}, TYPE),
    ({"metadata": {ARCHITECTURE: "stable-diffusion-xl-v1-base"}}, ARCHITECTURE),
    ({"metadata": {ARCHITECTURE: "stable-diffusion-v1"}}, ARCHITECTURE),
    ({"metadata": {ARCHITECTURE: "stable-diffusion-v2-inpainting"}}, ARCHITECTURE),
    ({"metadata": {ARCHITECTURE: "stable-diffusion-v2-512/lora"}}, ARCHITECTURE),
])
def test_a_file_of_another_kind_is_refused_by_what_it_says(how, word, tmp_path):
    with pytest.raises(UserError, match=word):
        config_of(said_of(tmp_path, **how))


@pytest.mark.parametrize("name, words", [
    ("ztsnr", "noise schedule"),
    ("model.diffusion_model.label_emb.weight", "classes"),
    ("unet.class_embedding.weight", "classes"),
    ("model.diffusion_model.image_embed.proj.weight", "pictures"),
    ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip.weight",
     "pictures"),
    ("control_model.time_embed.0.weight", "pictures"),
])
def test_a_tensor_gives_another_kind_away(name, words):
    with pytest.raises(UserError, match=words):
        weights.convert({name: torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_with_another_noise_schedule_is_refused(dtype):
    ours = weights.schedule_buffers()["alphas_cumprod"]
    weights.convert({"alphas_cumprod": ours.to(dtype)})
    root = ours.sqrt()
    # Lin et al. 2023, algorithm 1: no signal at the last step.
    no_signal = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    cosine = torch.cos(torch.linspace(0, 1, 1000) * torch.pi / 2) ** 2
    for theirs in (no_signal, cosine, ours[:500]):
        with pytest.raises(UserError, match="noise schedule"):
            weights.convert({"alphas_cumprod": theirs.to(dtype)})


# ---- whole models ----------------------------------------------------------------------------


def test_a_folder_without_our_header_is_the_same_model(tmp_path):
    """All that our header says of a plain model stands in the config files, too."""
    config = copy.deepcopy(PRESETS["nano"].model)
    config.unet.prediction = "v"
    config.vae.scale_factor = 0.3
    config = replace(config, preset="sd21", guidance=ModelConfig().guidance)
    model = random_model(config)
    model.save(tmp_path / "m", layout="diffusers")
    assert read_config(tmp_path / "m") == config
    file = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, metadata = read_safetensors(file)
    assert metadata.pop("mvd")
    write_safetensors(file, tensors, metadata)
    again = MVDream.load(tmp_path / "m")
    assert again.config == config
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in model.state_dict().items())


def test_parts_of_two_models_are_refused(tmp_path):
    released = layouts.released_tensors()
    config = replace(layouts.SMALL, unet=replace(layouts.SMALL.unet, context_dim=128))
    other = layouts.released_tensors(config)
    prefix = layouts.PREFIXES["unet"]
    mixed = {name: other[name] if name.startswith(prefix) else t for name, t in released.items()}
    torch.save(mixed, tmp_path / "m.pt")
    with pytest.raises(UserError, match="reads 128 numbers per token and the text tower gives 64"):
        MVDream.load(tmp_path / "m.pt")
