"""A model's tensors in the layouts of other tools, written without the rules of weights.py.

The names come from a walk through the networks in the order in which they are built. They are the
oracle of test_weights.py, which also compares them with the published names.
"""
import copy
import gzip
import json
import math
import zlib
from pathlib import Path

import torch

from mvd import MVDream, weights
from mvd.presets import ModelConfig
from mvd.text import TextConfig
from mvd.unet import UNetConfig
from mvd.vae import VAEConfig

NAMES = Path(__file__).parent / "data" / "released_names.json.gz"
# {layout or part: {name: shape}} of the published files.
RELEASED = json.loads(gzip.decompress(NAMES.read_bytes()))
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.model.",
}

# Small, but of Stable Diffusion 2's kind: what `weights.sizes` cannot see in tensors is as there.
SMALL = ModelConfig(
    unet=UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(1, 2),
        context_dim=64,
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 2, 2, 4), num_res_blocks=2),
    text=TextConfig(width=64, heads=1, layers=3, output_dim=32, context_length=77),
)


def named_tensor(name, shape):
    """The reference's weights: drawn from the tensor's name in the released file."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    w = torch.randn(shape, generator=g)
    if len(shape) > 1:
        return w / math.sqrt(w[0].numel())
    return 1 + 0.1 * w if name.endswith("weight") else 0.1 * w


def released_tensors(config=SMALL):
    """{name: tensor} as in MVDream's file, schedule included, for a model of any size."""
    with torch.device("meta"):
        model = MVDream(copy.deepcopy(config))
    parts = {part: getattr(model, part).state_dict() for part in ("unet", "vae", "text")}
    tensors = weights.to_released(parts)
    for name, tensor in tensors.items():
        # Only the schedule has values already.
        if tensor.is_meta:
            tensors[name] = named_tensor(name, tensor.shape)
    return tensors


# ---- the walk: pairs (LDM's module, diffusers' module) ---------------------------------------


def res_pairs(ldm, theirs):
    leaves = [
        ("in_layers.0", "norm1"),
        ("in_layers.2", "conv1"),
        ("emb_layers.1", "time_emb_proj"),
        ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"),
        ("skip_connection", "conv_shortcut"),
    ]
    return [(f"{ldm}.{a}", f"{theirs}.{b}") for a, b in leaves]


def transformer_pairs(ldm, theirs):
    """Both call the layers inside a transformer the same."""
    leaves = ["norm", "proj_in", "proj_out"]
    inner = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
    for attention in ("attn1", "attn2"):
        inner += [f"{attention}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    leaves += [f"transformer_blocks.0.{leaf}" for leaf in inner]
    return [(f"{ldm}.{leaf}", f"{theirs}.{leaf}") for leaf in leaves]


def unet_pairs(config):
    """In the order of the forward pass."""
    pairs = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
    ]
    pairs += unet_encoder_pairs(config)
    pairs += res_pairs("middle_block.0", "mid_block.resnets.0")
    pairs += transformer_pairs("middle_block.1", "mid_block.attentions.0")
    pairs += res_pairs("middle_block.2", "mid_block.resnets.1")
    pairs += unet_decoder_pairs(config)
    pairs += [("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    return pairs


def unet_encoder_pairs(config):
    levels = len(config.channel_mult)
    pairs = []
    n = 0
    for level in range(levels):
        theirs = f"down_blocks.{level}"
        for j in range(config.num_res_blocks):
            n += 1
            pairs += res_pairs(f"input_blocks.{n}.0", f"{theirs}.resnets.{j}")
            if 2**level in config.attention_resolutions:
                pairs += transformer_pairs(f"input_blocks.{n}.1", f"{theirs}.attentions.{j}")
        if level < levels - 1:
            n += 1
            pairs.append((f"input_blocks.{n}.0.op", f"{theirs}.downsamplers.0.conv"))
    return pairs


def unet_decoder_pairs(config):
    levels = len(config.channel_mult)
    pairs = []
    n = 0
    for i in range(levels):
        level = levels - 1 - i
        theirs = f"up_blocks.{i}"
        attend = 2**level in config.attention_resolutions
        for j in range(config.num_res_blocks + 1):
            pairs += res_pairs(f"output_blocks.{n}.0", f"{theirs}.resnets.{j}")
            if attend:
                pairs += transformer_pairs(f"output_blocks.{n}.1", f"{theirs}.attentions.{j}")
            if j == config.num_res_blocks and level > 0:
                layer = 2 if attend else 1
                up = f"output_blocks.{n}.{layer}.conv"
                pairs.append((up, f"{theirs}.upsamplers.0.conv"))
            n += 1
    return pairs


VAE_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
VAE_ATTENTION_2022 = ("query", "key", "value", "proj_attn")


def vae_res_pairs(ldm, theirs):
    pairs = [(f"{ldm}.{leaf}", f"{theirs}.{leaf}") for leaf in ("norm1", "conv1", "norm2", "conv2")]
    return pairs + [(f"{ldm}.nin_shortcut", f"{theirs}.conv_shortcut")]


def vae_pairs(config, attention=VAE_ATTENTION):
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        ldm, theirs = f"{half}.mid", f"{half}.mid_block"
        pairs += [
            (f"{half}.conv_in", f"{half}.conv_in"),
            (f"{half}.norm_out", f"{half}.conv_norm_out"),
            (f"{half}.conv_out", f"{half}.conv_out"),
            (f"{ldm}.attn_1.norm", f"{theirs}.attentions.0.group_norm"),
        ]
        for a, b in zip(("q", "k", "v", "proj_out"), attention):
            pairs.append((f"{ldm}.attn_1.{a}", f"{theirs}.attentions.0.{b}"))
        pairs += vae_res_pairs(f"{ldm}.block_1", f"{theirs}.resnets.0")
        pairs += vae_res_pairs(f"{ldm}.block_2", f"{theirs}.resnets.1")
    for i in range(levels):
        ldm, theirs = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        for j in range(blocks):
            pairs += vae_res_pairs(f"{ldm}.block.{j}", f"{theirs}.resnets.{j}")
        pairs.append((f"{ldm}.downsample.conv", f"{theirs}.downsamplers.0.conv"))
        ldm, theirs = f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        for j in range(blocks + 1):
            pairs += vae_res_pairs(f"{ldm}.block.{j}", f"{theirs}.resnets.{j}")
        pairs.append((f"{ldm}.upsample.conv", f"{theirs}.upsamplers.0.conv"))
    return pairs


def text_pairs(layers):
    """Without q, k and v, which diffusers keeps apart."""
    pairs = [
        ("token_embedding", "embeddings.token_embedding"),
        ("ln_final", "final_layer_norm"),
    ]
    leaves = [
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
        ("attn.out_proj", "self_attn.out_proj"),
    ]
    for i in range(layers):
        for a, b in leaves:
            pairs.append((f"transformer.resblocks.{i}.{a}", f"encoder.layers.{i}.{b}"))
    return pairs


# ---- the tensors of a diffusers folder -------------------------------------------------------


def take(released, prefix, pairs):
    """{diffusers' name: tensor} for the pairs of modules of one part."""
    tensors = {}
    for ldm, theirs in pairs:
        for kind in ("weight", "bias"):
            name = f"{prefix}{ldm}.{kind}"
            # Not every layer has a bias, not every block a shortcut.
            if name in released:
                tensors[f"{theirs}.{kind}"] = released[name]
    return tensors


def to_diffusers(released, config=SMALL, of_2022=False, text_prefix="text_model."):
    """What a diffusers folder holds: {"unet": {name: tensor}, "vae": ..., "text_encoder": ...}.

    It has no camera MLP. of_2022: with the names that the VAE's attention had then.
    """
    unet = take(released, PREFIXES["unet"], unet_pairs(config.unet))

    attention = VAE_ATTENTION_2022 if of_2022 else VAE_ATTENTION
    vae = take(released, PREFIXES["vae"], vae_pairs(config.vae, attention))
    for name, tensor in vae.items():
        # diffusers has linear layers where LDM has 1x1 convolutions.
        if ".attentions." in name and tensor.dim() == 4:
            vae[name] = tensor[:, :, 0, 0]

    prefix = PREFIXES["text_encoder"]
    layers = config.text.layers - config.text.unused_layers
    text = take(released, prefix, text_pairs(layers))
    positions = released[prefix + "positional_embedding"]
    text["embeddings.position_embedding.weight"] = positions
    for i in range(layers):
        for kind in ("weight", "bias"):
            joined = released[f"{prefix}transformer.resblocks.{i}.attn.in_proj_{kind}"]
            for letter, third in zip("qkv", joined.chunk(3)):
                text[f"encoder.layers.{i}.self_attn.{letter}_proj.{kind}"] = third
    text = {text_prefix + name: tensor for name, tensor in text.items()}
    return {"unet": unet, "vae": vae, "text_encoder": text}
