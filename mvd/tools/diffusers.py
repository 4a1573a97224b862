"""A diffusers folder: the config files, CLIP's tokenizer, and the tensors of each part.

    model_index.json  scheduler/  tokenizer/  text_encoder/  unet/  vae/

`diffusers.StableDiffusionPipeline.from_pretrained(folder)` draws what our 2D mode draws.
"""
import json
import os
import shutil
from pathlib import Path

from ..text import tokenizer
from .errors import UserError
from .files import write_atomic, write_safetensors
from .run import make_folder

# The file of each part, as diffusers and transformers call it.
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def write_folder(path, tensors, config, header):
    """Write a folder that is complete or not there at all.

    tensors: {part: {name: tensor}} (`weights.to_diffusers`). config: the ModelConfig. header: ours,
    {str: str}, which goes into the UNet's file. Raises UserError if the folder is there already or
    cannot be made.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"cannot write {path}: it is there already; choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    texts = {**config_files(config), **tokenizer_files(config.text.context_length)}
    try:
        for name, text in texts.items():
            make_folder(temporary / name)
            write_atomic(temporary / name, text.encode())
        for part, name in FILES.items():
            make_folder(temporary / name)
            write_safetensors(temporary / name, tensors[part], header if part == "unet" else None)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- the config files ------------------------------------------------------------------------


def config_files(config):
    """{path: JSON} of the files that say what the tensors do not."""
    factor = 2 ** (len(config.vae.channel_mult) - 1)
    files = {
        "model_index.json": PIPELINE,
        "scheduler/scheduler_config.json": scheduler_config(config.unet),
        "unet/config.json": unet_config(config.unet, config.size // factor),
        "vae/config.json": vae_config(config.vae, config.size),
        "text_encoder/config.json": text_config(config.text),
    }
    return {name: json.dumps(settings, indent=2) for name, settings in files.items()}


PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    # What their pipeline can have and this model has not.
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def scheduler_config(unet):
    """`diffusion.betas`, `diffusion.timesteps` and DDIM."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[unet.prediction],
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def unet_config(unet, sample_size):
    """sample_size: height and width of the latents."""
    widths = [multiple * unet.model_channels for multiple in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in range(len(widths))]
    down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    up = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": down,
        "up_block_types": up,
        # Despite its name, the number of heads.
        "attention_head_dim": [width // unet.head_dim for width in widths],
        "cross_attention_dim": unet.context_dim,
        "norm_num_groups": unet.groups,
        "use_linear_projection": True,
    }


def vae_config(vae, sample_size):
    """sample_size: height and width of a picture."""
    levels = len(vae.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "latent_channels": vae.z_channels,
        "block_out_channels": [multiple * vae.channels for multiple in vae.channel_mult],
        "layers_per_block": vae.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": vae.groups,
        "scaling_factor": vae.scale_factor,
    }


def text_config(text):
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tokenizer().vocab_size,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers - text.unused_layers,
        "max_position_embeddings": text.context_length,
        "hidden_act": "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 0,
    }


# ---- the tokenizer ---------------------------------------------------------------------------


def tokenizer_files(context_length):
    """{path: text} of CLIP's tokenizer. Token 0 pads, as Stable Diffusion 2 was trained."""
    clip = tokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    named = dict(zip(clip.all_special_ids, (start, end)))
    vocabulary = {named.get(token, text): token for text, token in clip.encoder.items()}
    merges = [" ".join(pair) for pair in clip.bpe_ranks]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!"}
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": context_length,
        "do_lower_case": True, **special,
    }
    return {
        "tokenizer/vocab.json": json.dumps(vocabulary),
        "tokenizer/merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer/special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer/tokenizer_config.json": json.dumps(settings, indent=2),
    }
