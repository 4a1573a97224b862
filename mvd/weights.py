"""The names of every checkpoint layout <-> ours, and the size of a model from its tensors. Reading the files: `checkpoint.py`.

Stable Diffusion 2 and MVDream come in two layouts. LDM's is one file, as their authors' code writes it. diffusers' is a folder
with one file a part; some of those kept LDM's names inside the parts. Our own is one file of `unet.*`, `vae.*`, `text.*`.

A rule is a pair (theirs, ours). `#` stands for a number; `ours` may be a function of those numbers. A name is rewritten by every
rule of its part in turn. A rule with a dot in front fits anywhere inside a name, the others fit its beginning. The rules of all
layouts can be applied to any name, since a name in ours fits none. LDM's rules, read backwards, write its names.
"""
import itertools
import re
import statistics

import torch

from . import diffusion
from .tools.errors import UserError
from .text import TextConfig
from .unet import UNetConfig
from .vae import VAEConfig

# ---- LDM: the released file ------------------------------------------------------------------------------------------------

LDM_UNET = [
    ("time_embed.", "time_mlp."), ("camera_embed.", "camera_mlp."),
    ("input_blocks.0.0.", "encoder.0.conv."), ("input_blocks.#.0.op.", "encoder.#.down."),
    ("input_blocks.#.0.", "encoder.#.res."), ("input_blocks.#.1.", "encoder.#.attention."),
    ("middle_block.0.", "middle.0.res."), ("middle_block.1.", "middle.1.attention."), ("middle_block.2.", "middle.2.res."),
    ("output_blocks.#.1.conv.", "decoder.#.up."), ("output_blocks.#.2.conv.", "decoder.#.up."),     # after a transformer: 2
    ("output_blocks.#.0.", "decoder.#.res."), ("output_blocks.#.1.", "decoder.#.attention."),
    ("out.0.", "norm_out."), ("out.2.", "conv_out."),
    (".res.in_layers.0.", ".res.norm1."), (".res.in_layers.2.", ".res.conv1."), (".res.emb_layers.1.", ".res.embed."),
    (".res.out_layers.0.", ".res.norm2."), (".res.out_layers.3.", ".res.conv2."), (".res.skip_connection.", ".res.skip."),
    (".attention.transformer_blocks.0.norm#.", ".attention.norm#."),
    (".transformer_blocks.0.attn1.", ".self_attention."), (".transformer_blocks.0.attn2.", ".cross_attention."),
    (".to_out.0.", ".to_out."), (".transformer_blocks.0.ff.net.0.proj.", ".feed_in."),
    (".transformer_blocks.0.ff.net.2.", ".feed_out."),
]
LDM_VAE = [
    (".block.", ".blocks."), (".downsample.conv.", ".downsample."), (".upsample.conv.", ".upsample."),
    (".nin_shortcut.", ".shortcut."), (".mid.block_1.", ".middle.0."), (".mid.attn_1.", ".middle.1."),
    (".mid.block_2.", ".middle.2."), (".middle.1.q.", ".middle.1.query."), (".middle.1.k.", ".middle.1.key."),
    (".middle.1.v.", ".middle.1.value."), (".middle.1.proj_out.", ".middle.1.out."),
]
LDM_TEXT = [
    ("transformer.resblocks.#.", "blocks.#."), ("ln_final.", "norm_out."), (".ln_#.", ".norm#."), (".attn.in_proj_", ".qkv."),
    (".attn.out_proj.", ".out."), (".mlp.c_fc.", ".feed_in."), (".mlp.c_proj.", ".feed_out."),
]
OLDER_TEXT = [("tower.", "")]                     # files of ours from when the tower was open_clip's; then LDM's names
LDM = {"unet": ("model.diffusion_model.", LDM_UNET), "vae": ("first_stage_model.", LDM_VAE),
       "text": ("cond_stage_model.model.", LDM_TEXT)}                           # the file's prefix of a part, and its rules


# ---- diffusers -------------------------------------------------------------------------------------------------------------

def diffusers_unet(blocks):
    """blocks: ResBlocks a level of the encoder. diffusers counts them anew in each level; LDM, and we, count all through, and give
    the input convolution and each downsampling a number of its own. A level of the decoder has one ResBlock more."""
    level = blocks + 1
    return [
        ("time_embedding.linear_1.", "time_mlp.0."), ("time_embedding.linear_2.", "time_mlp.2."), ("conv_in.", "encoder.0.conv."),
        ("down_blocks.#.resnets.#.", lambda i, j: f"encoder.{1 + level * i + j}.res."),
        ("down_blocks.#.attentions.#.", lambda i, j: f"encoder.{1 + level * i + j}.attention."),
        ("down_blocks.#.downsamplers.0.conv.", lambda i: f"encoder.{level * (i + 1)}.down."),
        ("mid_block.resnets.0.", "middle.0.res."), ("mid_block.attentions.0.", "middle.1.attention."),
        ("mid_block.resnets.1.", "middle.2.res."),
        ("up_blocks.#.resnets.#.", lambda i, j: f"decoder.{level * i + j}.res."),
        ("up_blocks.#.attentions.#.", lambda i, j: f"decoder.{level * i + j}.attention."),
        ("up_blocks.#.upsamplers.0.conv.", lambda i: f"decoder.{level * i + blocks}.up."),
        ("conv_norm_out.", "norm_out."), (".res.time_emb_proj.", ".res.embed."), (".res.conv_shortcut.", ".res.skip."),
    ]                                                                           # the transformers have LDM's names


def diffusers_vae(levels):
    """diffusers counts the decoder's levels in the order they run, coarsest first; LDM, and we, from the finest."""
    return [
        ("encoder.down_blocks.#.", "encoder.down.#."), ("decoder.up_blocks.#.", lambda i: f"decoder.up.{levels - 1 - i}."),
        (".mid_block.resnets.0.", ".middle.0."), (".mid_block.attentions.0.", ".middle.1."), (".mid_block.resnets.1.", ".middle.2."),
        (".resnets.#.", ".blocks.#."), (".conv_shortcut.", ".shortcut."), (".downsamplers.0.conv.", ".downsample."),
        (".upsamplers.0.conv.", ".upsample."), (".conv_norm_out.", ".norm_out."), (".middle.1.group_norm.", ".middle.1.norm."),
        (".middle.1.to_q.", ".middle.1.query."), (".middle.1.to_k.", ".middle.1.key."), (".middle.1.to_v.", ".middle.1.value."),
        (".middle.1.to_out.0.", ".middle.1.out."), (".middle.1.proj_attn.", ".middle.1.out."),       # of 2022; query, key, value too
    ]


DIFFUSERS_TEXT = [
    ("text_model.", ""), ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"), ("encoder.layers.#.", "transformer.resblocks.#."),
    ("final_layer_norm.", "ln_final."), (".self_attn.", ".attn."), (".layer_norm#.", ".ln_#."), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),                                              # q_proj, k_proj, v_proj: joined in `convert`
]

# ---- what is not a weight of ours ------------------------------------------------------------------------------------------

IGNORED = (r"model_ema\.",                       # the average of a training that may go on; `model.*` is what its authors load
           r"(logvar|lvlb_weights)$",            # of the loss
           r"cond_stage_model\.model\.attn_mask$", r"text_encoder\.(text_model\.)?embeddings\.position_ids$")   # constants
FOREIGN = {r"lora": "a LoRA, which only changes another model's weights",
           r"^(conditioner|model\.diffusion_model\.label_emb|unet\.add_embedding)\.": "Stable Diffusion XL",
           r"^cond_stage_model\.transformer\.": "Stable Diffusion 1",
           r"^(conv_in|encoder\.conv_in|time_embed|embeddings|text_model)\.": "one part of a model; name the folder that holds all"}
PREFIXES = {"model.diffusion_model.": "unet", "unet.": "unet", "first_stage_model.": "vae", "vae.": "vae",
            "cond_stage_model.model.": "text", "text_encoder.": "text", "text.": "text"}


def schedule_buffers():
    """The 12 tensors [1000] of the noise schedule that an LDM file carries. All follow from the betas (DDPM §2, eq. 4 and 7), so
    reading ignores them; they are written because other tools want every name."""
    betas = diffusion.betas()
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    buffers = {
        "betas": betas, "alphas_cumprod": abar, "alphas_cumprod_prev": before, "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(), "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(), "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance, "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - abar)}
    return {name: buffer.float() for name, buffer in buffers.items()}


# ---- applying the rules ----------------------------------------------------------------------------------------------------

def rename(name, rules):
    """Rewrite a name by each rule (from, to) in turn."""
    for old, new in rules:
        pattern = ("" if old.startswith(".") else "^") + re.escape(old).replace(r"\#", r"(\d+)")
        if callable(new):
            name = re.sub(pattern, lambda match: new(*map(int, match.groups())), name)
        else:
            name = re.sub(pattern, new.replace("#", r"\1"), name)
    return name


def released_name(part, name, parts):
    """The name that a tensor of ours has in MVDream's file. parts: all tensors, since LDM counts the layers of a block."""
    prefix, rules = LDM[part]
    theirs = rename(name, [(ours, old) for old, ours in reversed(rules)])
    if part == "unet" and ".up." in name and not any(other.startswith(name.split("up")[0] + "attention.") for other in parts["unet"]):
        theirs = theirs.replace(".2.conv.", ".1.conv.")                         # this level has no transformer
    return prefix + theirs


def to_released(parts):
    """The inverse of `convert`: tensors in our names -> {name: tensor} as in MVDream's file, its schedule included."""
    renamed = {released_name(part, name, parts): tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return {**schedule_buffers(), **renamed}


def most(names, pattern):
    """The greatest number that the pattern's group takes among the names, plus one: how many there are; 0 if none fits."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def convert(state_dict):
    """{name: tensor} of any known layout, width and depth -> {"unet": {...}, "vae": {...}, "text": {...}} in our names.

    The tensors of a diffusers folder have the subfolder's name in front: `unet.`, `vae.`, `text_encoder.`. A level `state_dict` on
    top may be there. No tensor is copied, but for the text tower's q, k and v where they are apart. Whether all tensors of a
    model are there is for the caller to check. Raises UserError, naming the tensor, for one that belongs to no layout, to another
    kind of model, or that is there twice.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    for name, (sign, kind) in itertools.product(state_dict, FOREIGN.items()):
        if re.search(sign, name):
            raise UserError(f"{name!r} is a tensor of {kind}; mvd reads MVDream and Stable Diffusion 2")
    blocks = most(state_dict, r"unet\.down_blocks\.\d+\.resnets\.(\d+)")
    levels = most(state_dict, r"vae\.decoder\.up_blocks\.(\d+)")
    rules = {"unet": diffusers_unet(blocks) + LDM_UNET, "vae": diffusers_vae(levels) + LDM_VAE, "text": OLDER_TEXT + DIFFUSERS_TEXT + LDM_TEXT}
    ignored = re.compile("|".join([*IGNORED, *(f"{name}$" for name in schedule_buffers())]))
    parts = {part: {} for part in LDM}
    for name, tensor in state_dict.items():
        if ignored.match(name):
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if not prefix or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{name!r} is no tensor of an MVDream or Stable Diffusion 2 model")
        part = PREFIXES[prefix]
        ours = rename(name.removeprefix(prefix), rules[part])
        if ours in parts[part]:
            raise UserError(f"{name!r} is there twice, under two names")
        if part == "unet" and ours.endswith(".attention.proj_in.weight") and tensor.dim() == 4:     # linear in SD 2
            raise UserError(f"{name!r} is a convolution, so this is Stable Diffusion 1; mvd reads MVDream and Stable Diffusion 2")
        if part == "vae" and re.search(r"\.middle\.1\.\w+\.weight", ours) and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]                                   # linear in diffusers, a 1x1 convolution here
        parts[part][ours] = tensor
    text = parts["text"]
    for joined in {re.sub(r"\.attn\.[qkv]_proj\.", ".qkv.", name): None for name in text if re.search(r"\.[qkv]_proj\.", name)}:
        apart = [joined.replace(".qkv.", f".attn.{letter}_proj.") for letter in "qkv"]
        if missing := [name for name in apart if name not in text]:
            raise UserError(f"the tensor text.{missing[0]} is missing")
        common = statistics.mode(text[name].shape for name in apart)
        if odd := [name for name in apart if text[name].shape != common]:
            raise UserError(f"the tensor text.{odd[0]} has shape {list(text[odd[0]].shape)}, wanted {list(common)}")
        text[joined] = torch.cat([text.pop(name) for name in apart])
    return parts


# ---- how large the model is ------------------------------------------------------------------------------------------------

def sizes(parts):
    """The configurations that tensors in our names are of: (UNetConfig, VAEConfig, TextConfig).

    What shapes do not tell is taken from Stable Diffusion 2: 64 channels a head, 32 groups, the latents' scale, and that the last
    layer of a whole text tower is not run; a tower cut for it has no `text_projection`. Raises UserError, naming the tensor, if
    one that tells a size is missing or cannot tell it, or the vocabulary is not CLIP's.
    """
    unet, vae, text = (parts[part] for part in ("unet", "vae", "text"))

    def size(part, name, axis=0):
        theirs = f"(in MVDream's file: {released_name(part, name, parts)})"
        if name not in parts[part]:
            raise UserError(f"the tensor {part}.{name} is missing {theirs}")
        if parts[part][name].dim() <= axis:
            raise UserError(f"the tensor {part}.{name} has shape {list(parts[part][name].shape)} {theirs}")
        return parts[part][name].shape[axis]

    def width(part, stem, *layers):                                             # one tensor of a wrong shape is outvoted, then named
        return statistics.mode(size(part, f"{stem}.{layer}") for layer in layers)

    channels, rungs = width("unet", "encoder", "0.conv.weight", "0.conv.bias", "1.res.norm1.bias"), most(unet, r"encoder\.(\d+)")
    held = {tuple(name.split(".")[:3]) for name in unet}                        # ("encoder", "3", "down"), ...
    blocks = next((i for i in range(1, rungs) if ("encoder", f"{i}", "down") in held), rungs) - 1
    firsts = range(1, rungs, blocks + 1)                                        # the first ResBlock of each level
    unet_config = UNetConfig(
        in_channels=size("unet", "encoder.0.conv.weight", 1), out_channels=width("unet", "conv_out", "weight", "bias"),
        model_channels=channels, num_res_blocks=blocks,
        channel_mult=tuple(width("unet", f"encoder.{i}.res", "conv1.bias", "norm2.weight", "norm2.bias") // channels for i in firsts),
        attention_resolutions=tuple(2 ** level for level, i in enumerate(firsts) if ("encoder", f"{i}", "attention") in held),
        context_dim=size("unet", "middle.1.attention.cross_attention.to_k.weight", 1))
    channels = width("vae", "encoder", "conv_in.weight", "conv_in.bias", "down.0.blocks.0.norm1.bias")
    vae_config = VAEConfig(
        channels=channels, z_channels=size("vae", "post_quant_conv.weight"),
        channel_mult=tuple(width("vae", f"encoder.down.{i}.blocks.0", "conv1.bias", "norm2.weight", "norm2.bias") // channels
                           for i in range(most(vae, r"encoder\.down\.(\d+)"))),
        num_res_blocks=most(vae, r"encoder\.down\.0\.blocks\.(\d+)"))
    if (rows := size("text", "token_embedding.weight")) != 49408:
        raise UserError(f"the tensor text.token_embedding.weight has {rows} rows, but CLIP's vocabulary has 49408; a model that "
                        "knows fewer words needs the header that mvd writes")
    columns, layers = width("text", "norm_out", "weight", "bias"), most(text, r"blocks\.(\d+)")
    whole = bool({"text_projection", "logit_scale"} & text.keys())
    text_config = TextConfig(
        width=columns, heads=columns // 64, layers=layers, unused_layers=int(whole or layers == TextConfig.layers),
        output_dim=size("text", "text_projection", 1) if whole else None,
        context_length=size("text", "positional_embedding"))
    if unet_config.in_channels != vae_config.z_channels:
        raise UserError(f"the UNet takes {unet_config.in_channels} channels and the VAE gives {vae_config.z_channels}: a model for "
                        "inpainting or upscaling, perhaps; mvd reads MVDream and Stable Diffusion 2")
    return unet_config, vae_config, text_config
