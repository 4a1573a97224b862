"""A model's tensors in the layouts of other tools, written without mvd's tables: by walking through the networks as they are built."""
import copy
import gzip
import json
import math
import zlib
from pathlib import Path

import torch

from mvd import MVDream, weights
from mvd.model import ModelConfig
from mvd.text import TextConfig
from mvd.unet import UNetConfig
from mvd.vae import VAEConfig

RELEASED = json.loads(gzip.decompress((Path(__file__).parent / "data" / "released_names.json.gz").read_bytes()))
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.model."}

# Small, but of Stable Diffusion 2's kind: what `weights.sizes` cannot see in the tensors is as there.
SMALL = ModelConfig(
    unet=UNetConfig(model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(1, 2), context_dim=64),
    vae=VAEConfig(channels=32, channel_mult=(1, 2, 2, 4), num_res_blocks=2),
    text=TextConfig(width=64, heads=1, layers=3, output_dim=32, context_length=77))


def named_tensor(name, shape):
    """The reference's weights: drawn from the tensor's name in the released file."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return w / math.sqrt(w[0].numel())
    return 1 + 0.1 * w if name.endswith("weight") else 0.1 * w


def released_tensors(config=SMALL):
    """{name: tensor} as in MVDream's file, schedule included, for a model of any size."""
    with torch.device("meta"):
        model = MVDream(copy.deepcopy(config))
    parts = {part: getattr(model, part).state_dict() for part in ("unet", "vae", "text")}
    return {name: named_tensor(name, tensor.shape) if tensor.is_meta else tensor
            for name, tensor in weights.to_released(parts).items()}


# ---- the walk: (LDM module, diffusers module) ------------------------------------------------------------------------------

def res_pairs(ldm, theirs):
    return [(f"{ldm}.{a}", f"{theirs}.{b}") for a, b in (
        ("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"), ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"))]


def transformer_pairs(ldm, theirs):
    same = ["norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{leaf}" for leaf in (
        "norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2",
        *(f"attn{k}.{leaf}" for k in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0"))))]
    return [(f"{ldm}.{leaf}", f"{theirs}.{leaf}") for leaf in same]


def unet_pairs(config):
    """In the order of the forward pass."""
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    attend = [2 ** level in config.attention_resolutions for level in range(levels)]
    pairs = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"), ("input_blocks.0.0", "conv_in")]
    n = 0
    for level in range(levels):
        for j in range(blocks):
            n += 1
            pairs += res_pairs(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{j}")
            if attend[level]:
                pairs += transformer_pairs(f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{j}")
        if level < levels - 1:
            n += 1
            pairs.append((f"input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
    pairs += res_pairs("middle_block.0", "mid_block.resnets.0") + transformer_pairs("middle_block.1", "mid_block.attentions.0")
    pairs += res_pairs("middle_block.2", "mid_block.resnets.1")
    n = 0
    for i, level in enumerate(reversed(range(levels))):
        for j in range(blocks + 1):
            pairs += res_pairs(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}")
            if attend[level]:
                pairs += transformer_pairs(f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}")
            if j == blocks and level > 0:
                pairs.append((f"output_blocks.{n}.{2 if attend[level] else 1}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
            n += 1
    return pairs + [("out.0", "conv_norm_out"), ("out.2", "conv_out")]


def vae_pairs(config, attention=("to_q", "to_k", "to_v", "to_out.0")):
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]

    def res(ldm, theirs):
        return [(f"{ldm}.{leaf}", f"{theirs}.{leaf}") for leaf in ("norm1", "conv1", "norm2", "conv2")] + [
            (f"{ldm}.nin_shortcut", f"{theirs}.conv_shortcut")]

    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.conv_in", f"{half}.conv_in"), (f"{half}.norm_out", f"{half}.conv_norm_out"),
                  (f"{half}.conv_out", f"{half}.conv_out"), (f"{half}.mid.attn_1.norm", f"{half}.mid_block.attentions.0.group_norm")]
        pairs += [(f"{half}.mid.attn_1.{a}", f"{half}.mid_block.attentions.0.{b}") for a, b in zip(("q", "k", "v", "proj_out"), attention)]
        pairs += res(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0") + res(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
    for i in range(levels):
        for j in range(blocks):
            pairs += res(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(blocks + 1):
            pairs += res(f"decoder.up.{i}.block.{j}", f"decoder.up_blocks.{levels - 1 - i}.resnets.{j}")
        pairs.append((f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"))
        pairs.append((f"decoder.up.{i}.upsample.conv", f"decoder.up_blocks.{levels - 1 - i}.upsamplers.0.conv"))
    return pairs


def text_pairs(layers):
    pairs = [("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm")]
    for i in range(layers):
        pairs += [(f"transformer.resblocks.{i}.{a}", f"encoder.layers.{i}.{b}") for a, b in (
            ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ("attn.out_proj", "self_attn.out_proj"))]
    return pairs


def to_diffusers(released, config=SMALL, of_2022=False, text_prefix="text_model."):
    """{"unet": {name: tensor}, "vae": ..., "text_encoder": ...}: what a diffusers folder holds, without the camera MLP."""
    attention = ("query", "key", "value", "proj_attn") if of_2022 else ("to_q", "to_k", "to_v", "to_out.0")
    layers = config.text.layers - config.text.unused_layers
    folder = {part: {} for part in PREFIXES}
    for part, pairs in (("unet", unet_pairs(config.unet)), ("vae", vae_pairs(config.vae, attention)), ("text_encoder", text_pairs(layers))):
        for ldm, theirs in pairs:
            for kind in ("weight", "bias"):
                tensor = released.get(f"{PREFIXES[part]}{ldm}.{kind}")
                if tensor is not None:                                           # not every layer has a bias, or a shortcut
                    linear = ".attn_1." in ldm and tensor.dim() == 4
                    folder[part][f"{theirs}.{kind}"] = tensor[:, :, 0, 0] if linear else tensor
    text = folder["text_encoder"]
    text["embeddings.position_embedding.weight"] = released["cond_stage_model.model.positional_embedding"]
    for i in range(layers):
        for kind in ("weight", "bias"):
            joined = released[f"cond_stage_model.model.transformer.resblocks.{i}.attn.in_proj_{kind}"]
            for letter, third in zip("qkv", joined.chunk(3)):
                text[f"encoder.layers.{i}.self_attn.{letter}_proj.{kind}"] = third
    folder["text_encoder"] = {text_prefix + name: tensor for name, tensor in text.items()}
    return folder
