"""Names of tensors: every checkpoint layout <-> ours, and the sizes of a model from its tensors.

A model has three parts: "unet", "vae" and "text" (the text tower), as MVDream has attributes.
Inside its part, a tensor has the name that the part's `state_dict()` gives it. For example

    model.diffusion_model.input_blocks.1.0.in_layers.2.weight    in MVDream's file
    unet                 .encoder.1.res.conv1.weight             here

Three layouts are known. `checkpoint.read` returns a dict {name: tensor} for each of them:

- LDM: one file, as the authors of Stable Diffusion 2 and MVDream published it;
- diffusers: a folder with one file per part; the subfolder's name stands in front of each name;
- ours: one file. In older ones the text tower has LDM's names behind "text.tower.".

PREFIXES tells the part of a name. The part's rules (`rules_for`) then rewrite the rest, one after
the other. A rule is a pair (theirs, ours), where "#" stands for a number. A rule that starts with
a dot fits anywhere inside a name, any other only its beginning. The rules of all layouts may be
applied to any name, since a name that is ours already fits none. A layout's rules, read
backwards, write its names.

To add a layout: put its prefixes into PREFIXES, write a table of rules per part and add it to
`rules_for`, put what is not a weight into IGNORED, and a case into tests/test_weights.py.
"""
import functools
import math
import re
from dataclasses import replace

import torch

from . import diffusion
from .text import TextConfig
from .tools.errors import UserError
from .unet import UNetConfig
from .vae import VAEConfig

# The rows of CLIP's table of token vectors.
VOCABULARY = 49408
READABLE = "mvd reads MVDream and Stable Diffusion 2"

PREFIXES = {
    # LDM
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.model.": "text",
    # diffusers and ours
    "unet.": "unet",
    "vae.": "vae",
    # diffusers
    "text_encoder.": "text",
    # ours
    "text.": "text",
}

# ---- LDM: the file that the authors published ------------------------------------------------

LDM_UNET = [
    ("time_embed.", "time_mlp."),
    ("camera_embed.", "camera_mlp."),
    ("input_blocks.0.0.", "encoder.0.conv."),
    ("input_blocks.#.0.op.", "encoder.#.down."),
    ("input_blocks.#.0.", "encoder.#.res."),
    ("input_blocks.#.1.", "encoder.#.attention."),
    ("middle_block.0.", "middle.0.res."),
    ("middle_block.1.", "middle.1.attention."),
    ("middle_block.2.", "middle.2.res."),
    # LDM numbers the layers of a block: the upsampling is 2 behind a transformer, else 1.
    ("output_blocks.#.1.conv.", "decoder.#.up."),
    ("output_blocks.#.2.conv.", "decoder.#.up."),
    ("output_blocks.#.0.", "decoder.#.res."),
    ("output_blocks.#.1.", "decoder.#.attention."),
    ("out.0.", "norm_out."),
    ("out.2.", "conv_out."),
    (".res.in_layers.0.", ".res.norm1."),
    (".res.in_layers.2.", ".res.conv1."),
    (".res.emb_layers.1.", ".res.embed."),
    (".res.out_layers.0.", ".res.norm2."),
    (".res.out_layers.3.", ".res.conv2."),
    (".res.skip_connection.", ".res.skip."),
]

# Inside a transformer diffusers has LDM's names, too.
LDM_TRANSFORMER = [
    (".attention.transformer_blocks.0.norm#.", ".attention.norm#."),
    (".transformer_blocks.0.attn1.", ".self_attention."),
    (".transformer_blocks.0.attn2.", ".cross_attention."),
    (".to_out.0.", ".to_out."),
    (".transformer_blocks.0.ff.net.0.proj.", ".feed_in."),
    (".transformer_blocks.0.ff.net.2.", ".feed_out."),
]

LDM_VAE = [
    (".block.", ".blocks."),
    (".downsample.conv.", ".downsample."),
    (".upsample.conv.", ".upsample."),
    (".nin_shortcut.", ".shortcut."),
    (".mid.block_1.", ".middle.0."),
    (".mid.attn_1.", ".middle.1."),
    (".mid.block_2.", ".middle.2."),
    (".middle.1.q.", ".middle.1.query."),
    (".middle.1.k.", ".middle.1.key."),
    (".middle.1.v.", ".middle.1.value."),
    (".middle.1.proj_out.", ".middle.1.out."),
]

LDM_TEXT = [
    ("transformer.resblocks.#.", "blocks.#."),
    (".ln_#.", ".norm#."),
    (".attn.in_proj_", ".qkv."),
    (".attn.out_proj.", ".out."),
    (".mlp.c_fc.", ".feed_in."),
    (".mlp.c_proj.", ".feed_out."),
    ("ln_final.", "norm_out."),
]

# What stands in front of a part's names in the file, and the rules for the rest.
LDM = {
    "unet": ("model.diffusion_model.", LDM_UNET + LDM_TRANSFORMER),
    "vae": ("first_stage_model.", LDM_VAE),
    "text": ("cond_stage_model.model.", LDM_TEXT),
}

# ---- diffusers: a folder with one file per part ----------------------------------------------


def diffusers_unet(levels, blocks):
    """The rules of a UNet with `blocks` ResBlocks in each level of the encoder.

    diffusers starts to count anew in each level. LDM, and we, count through all levels, and the
    encoder's input convolution and its downsamplings have numbers of their own. A level of the
    decoder has one ResBlock more.
    """
    rules = [
        ("time_embedding.linear_1.", "time_mlp.0."),
        ("time_embedding.linear_2.", "time_mlp.2."),
        # diffusers has no camera: it warns that it leaves the tensor out.
        ("camera_embed.", "camera_mlp."),
        ("conv_in.", "encoder.0.conv."),
        ("mid_block.resnets.0.", "middle.0.res."),
        ("mid_block.attentions.0.", "middle.1.attention."),
        ("mid_block.resnets.1.", "middle.2.res."),
        ("conv_norm_out.", "norm_out."),
    ]
    for i in range(levels):
        for j in range(blocks + 1):
            n = i * (blocks + 1) + j
            rules += [
                (f"down_blocks.{i}.resnets.{j}.", f"encoder.{n + 1}.res."),
                (f"down_blocks.{i}.attentions.{j}.", f"encoder.{n + 1}.attention."),
                (f"up_blocks.{i}.resnets.{j}.", f"decoder.{n}.res."),
                (f"up_blocks.{i}.attentions.{j}.", f"decoder.{n}.attention."),
            ]
        # n is now the number of the level's last block.
        rules += [
            (f"down_blocks.{i}.downsamplers.0.conv.", f"encoder.{n + 1}.down."),
            (f"up_blocks.{i}.upsamplers.0.conv.", f"decoder.{n}.up."),
        ]
    rules += [
        (".res.time_emb_proj.", ".res.embed."),
        (".res.conv_shortcut.", ".res.skip."),
    ]
    return rules


def diffusers_vae(levels):
    """The rules of a VAE with so many levels.

    diffusers counts the decoder's levels as they run, coarsest first. LDM, and we, count from the
    finest.
    """
    rules = [("encoder.down_blocks.#.", "encoder.down.#.")]
    for i in range(levels):
        rules.append((f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}."))
    rules += [
        (".mid_block.resnets.0.", ".middle.0."),
        (".mid_block.attentions.0.", ".middle.1."),
        (".mid_block.resnets.1.", ".middle.2."),
        (".resnets.#.", ".blocks.#."),
        (".conv_shortcut.", ".shortcut."),
        (".downsamplers.0.conv.", ".downsample."),
        (".upsamplers.0.conv.", ".upsample."),
        (".conv_norm_out.", ".norm_out."),
        (".middle.1.group_norm.", ".middle.1.norm."),
        (".middle.1.to_q.", ".middle.1.query."),
        (".middle.1.to_k.", ".middle.1.key."),
        (".middle.1.to_v.", ".middle.1.value."),
        # Files of 2022 have this name, and query, key and value as we do.
        (".middle.1.proj_attn.", ".middle.1.out."),
        (".middle.1.to_out.0.", ".middle.1.out."),
    ]
    return rules


# Then q_proj, k_proj and v_proj are left to `join_qkv`.
DIFFUSERS_TEXT = [
    ("text_model.", ""),
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.#.", "blocks.#."),
    (".layer_norm#.", ".norm#."),
    (".self_attn.out_proj.", ".out."),
    (".self_attn.q_proj.", ".q_proj."),
    (".self_attn.k_proj.", ".k_proj."),
    (".self_attn.v_proj.", ".v_proj."),
    (".mlp.fc1.", ".feed_in."),
    (".mlp.fc2.", ".feed_out."),
    ("final_layer_norm.", "norm_out."),
]

# ---- ours ------------------------------------------------------------------------------------

# Until the text tower was our own, it was OpenCLIP's, with LDM's names behind "tower.".
OLDER_TEXT = [("tower.", "")]

# ---- what is not a weight of ours ------------------------------------------------------------

IGNORED = [
    # The moving average of a training that may go on; its authors load `model.*` instead.
    r"model_ema\.",
    # The loss.
    r"(logvar|lvlb_weights)$",
    # A mark of ComfyUI's, which `claims` reads.
    r"v_pred$",
    # Constants.
    r"cond_stage_model\.model\.attn_mask$",
    r"text_encoder\.(text_model\.)?embeddings\.position_ids$",
]

# Names that only another kind of file has, and what that is.
FOREIGN = {
    r"lora": "a LoRA, which only changes another model's weights",
    r"^conditioner\.": "Stable Diffusion XL",
    r"\.(label_emb\.weight$|class_embedding\.)": "an upscaler, or another model with classes",
    r"^model\.diffusion_model\.label_emb\.": "Stable Diffusion XL",
    r"^unet\.add_embedding\.": "Stable Diffusion XL",
    r"^cond_stage_model\.transformer\.": "Stable Diffusion 1",
    r"^control_model\.|\.image_embed\.|_ip\.": "a model that looks at pictures, too",
    r"^ztsnr$": "a model with another noise schedule",
    r"^(conv_in|encoder\.conv_in|time_embed|embeddings|text_model)\.":
        "one part of a model; name the folder that holds all",
}


def schedule_buffers():
    """The 12 tensors [1000] of the noise schedule that an LDM file carries: {name: float32}.

    All follow from the betas (DDPM §2, eq. 4 and 7), so reading ignores them. They are written
    because other tools want every name.
    """
    betas = diffusion.betas()
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - abar),
    }
    return {name: buffer.float() for name, buffer in buffers.items()}


# ---- names in a file -> ours -----------------------------------------------------------------


def convert(state_dict):
    """Give the tensors of a file, in any known layout, our names.

    state_dict: {name: tensor}, of a model of any width and depth; it may lie one level down, under
    "state_dict". Returns {"unet": {name: tensor}, "vae": ..., "text": ...}. No tensor is copied,
    except q, k and v of a text tower in diffusers' layout. Whether a model lacks tensors is for
    the caller to check. Raises UserError, naming the tensor, if one belongs to no layout or to
    another kind of model, or is there twice.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    if not isinstance(state_dict, dict):
        raise UserError(f"its state_dict is a {type(state_dict).__name__}, not tensors by name")
    refuse_other_models(state_dict)
    rules = rules_for(state_dict)
    schedule = schedule_buffers()
    check_schedule(state_dict.get("alphas_cumprod"), schedule["alphas_cumprod"])
    parts = {"unet": {}, "vae": {}, "text": {}}
    for name, tensor in state_dict.items():
        if name in schedule or any(re.match(ignored, name) for ignored in IGNORED):
            continue
        part, inner = split_prefix(name)
        if part is None or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{name!r} is not a tensor of an MVDream or Stable Diffusion 2 model"
            )
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise UserError(f"{name!r} holds {tensor.dtype}, {tensor.layout}, so it is quantised "
                            f"or packed; {READABLE}")
        ours = rename(inner, rules[part])
        if ours in parts[part]:
            raise UserError(f"{name!r} is there twice, under two names")
        if part == "unet" and ours.endswith(".attention.proj_in.weight") and tensor.dim() == 4:
            # Stable Diffusion 2 has a linear layer there.
            raise UserError(
                f"{name!r} is a convolution, so this is Stable Diffusion 1; {READABLE}"
            )
        if part == "vae" and re.search(r"\.middle\.1\.\w+\.weight", ours) and tensor.dim() == 2:
            # The attention has linear layers in diffusers and 1x1 convolutions here.
            tensor = tensor[:, :, None, None]
        parts[part][ours] = tensor
    join_qkv(parts["text"])
    return parts


def refuse_other_models(names):
    """Raise UserError if a name shows that this is another kind of model, or not a whole one."""
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{name!r:.60} is not the name of a tensor; {READABLE}")
        for sign, kind in FOREIGN.items():
            if re.search(sign, name):
                raise UserError(f"{name!r} is a tensor of {kind}; {READABLE}")


def check_schedule(theirs, ours):
    """Raise UserError if a file has another ᾱ [1000] than ours, rounded to bfloat16 perhaps.

    None, or a tensor without values or of zeros, says nothing.
    """
    if not isinstance(theirs, torch.Tensor) or theirs.is_meta or not theirs.any():
        return
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=0, atol=5e-3):
        raise UserError(f"'alphas_cumprod' is of another noise schedule; {READABLE}")


def rules_for(names):
    """{part: the rules of all layouts}, with as many levels and blocks as diffusers' names show."""
    unet_levels = count(names, r"unet\.(?:down|up)_blocks\.(\d+)")
    unet_blocks = count(names, r"unet\.down_blocks\.\d+\.resnets\.(\d+)")
    vae_levels = count(names, r"vae\.decoder\.up_blocks\.(\d+)")
    return {
        "unet": diffusers_unet(unet_levels, unet_blocks) + LDM_UNET + LDM_TRANSFORMER,
        "vae": diffusers_vae(vae_levels) + LDM_VAE,
        "text": OLDER_TEXT + DIFFUSERS_TEXT + LDM_TEXT,
    }


def count(names, pattern):
    """1 + the greatest number that the pattern's group takes; 0 if no name fits."""
    number = 0
    for name in names:
        match = re.match(pattern, name)
        if match:
            number = max(number, int(match[1]) + 1)
    return number


def split_prefix(name):
    """A name in a file -> (part, name inside the part), or (None, name) if no prefix fits."""
    for prefix, part in PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return None, name


def rename(name, rules):
    """Rewrite a name by each rule (theirs, ours) in turn."""
    for theirs, ours in rules:
        name = pattern_of(theirs).sub(ours.replace("#", r"\1"), name)
    return name


@functools.cache
def pattern_of(theirs):
    """The pattern of a rule: # is a number, and without a dot in front it fits a beginning."""
    pattern = re.escape(theirs).replace(r"\#", r"(\d+)")
    return re.compile(pattern if theirs.startswith(".") else "^" + pattern)


def join_qkv(text):
    """Join the projections that diffusers keeps apart: q, k, v [D, D] -> qkv [3D, D], in place."""
    for name in list(text):
        joined = re.sub(r"\.[qkv]_proj\.", ".qkv.", name)
        if joined == name or joined in text:
            continue
        thirds = [joined.replace(".qkv.", f".{letter}_proj.") for letter in "qkv"]
        for third in thirds:
            if third not in text:
                raise UserError(f"the tensor text.{third} is missing")
        if len({text[third].shape for third in thirds}) > 1:
            found = [f"text.{third} has shape {list(text[third].shape)}" for third in thirds]
            raise UserError(f"these three need the same shape: {', '.join(found)}")
        text[joined] = torch.cat([text.pop(third) for third in thirds])


# ---- our names -> theirs ---------------------------------------------------------------------


def to_released(parts):
    """The inverse of `convert`: {part: {our name: tensor}} -> {name: tensor} as in MVDream's file.

    The noise schedule's tensors are added.
    """
    released = schedule_buffers()
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            released[released_name(part, name, parts)] = tensor
    return released


def released_name(part, name, parts):
    """The name that a tensor of ours has in MVDream's file.

    parts: all tensors, since it depends on the other layers of a block.
    """
    prefix, rules = LDM[part]
    released = rename(name, backwards(rules))
    if part == "unet" and ".up." in name:
        transformer = name.split(".up.")[0] + ".attention."
        if not any_starts(parts["unet"], transformer):
            released = released.replace(".2.conv.", ".1.conv.")
    return prefix + released


def backwards(rules):
    """The rules that undo these."""
    return [(ours, theirs) for theirs, ours in reversed(rules)]


def flat(parts):
    """{part: {name: tensor}} -> {part.name: tensor}: our own layout."""
    tensors = {}
    for part, state in parts.items():
        tensors.update({f"{part}.{name}": tensor for name, tensor in state.items()})
    return tensors


def to_diffusers(parts, config):
    """{part: {our name: tensor}} -> {folder: {name: tensor}} as in a diffusers folder.

    config: the ModelConfig. What diffusers does not run is left out: CLIP's projection, its logit
    scale and last blocks. The camera MLP is kept, under LDM's name.
    """
    unet, vae, text = config.unet, config.vae, config.text
    levels = len(unet.channel_mult)
    unet_rules = diffusers_unet(levels, unet.num_res_blocks) + LDM_TRANSFORMER
    vae_rules = diffusers_vae(len(vae.channel_mult))
    return {
        "unet": renamed(parts["unet"], backwards(unet_rules)),
        "vae": renamed(linear_attention(parts["vae"]), backwards(vae_rules)),
        "text_encoder": renamed(split_qkv(parts["text"], text), backwards(DIFFUSERS_TEXT)),
    }


def renamed(tensors, rules):
    return {rename(name, rules): tensor for name, tensor in tensors.items()}


def linear_attention(vae):
    """The VAE's tensors with linear layers in its attention, in place of 1x1 convolutions."""
    tensors = {}
    for name, tensor in vae.items():
        linear = ".middle.1." in name and tensor.dim() == 4
        tensors[name] = tensor[:, :, 0, 0] if linear else tensor
    return tensors


def split_qkv(text, config):
    """The text tower's tensors that are run, with q, k and v apart. Undoes `join_qkv`."""
    unused = [f"blocks.{config.layers - 1 - i}." for i in range(config.unused_layers)]
    tensors = {}
    for name, tensor in text.items():
        if name.startswith(("text_projection", "logit_scale", *unused)):
            continue
        if ".qkv." not in name:
            tensors[name] = tensor
            continue
        for letter, third in zip("qkv", tensor.chunk(3)):
            tensors[name.replace(".qkv.", f".{letter}_proj.")] = third
    return tensors


def any_starts(names, prefix):
    return any(name.startswith(prefix) for name in names)


# ---- the sizes of a model --------------------------------------------------------------------


def sizes(parts, unet=None, vae=None, text=None):
    """The configurations that tensors in our names are of: (UNetConfig, VAEConfig, TextConfig).

    What the tensors do not tell is as in the configurations that are given, by default MVDream's:
    attention, camera and prediction, channels per head, groups, the scale of the latents, the
    words, how many text blocks are not run. Raises UserError, naming the tensor, if one that tells
    a size is missing or cannot tell it, or if UNet and VAE do not fit together.
    """
    unet = unet_config(parts, unet or UNetConfig())
    vae = vae_config(parts, vae or VAEConfig())
    text = text_config(parts, text or TextConfig())
    if unet.in_channels != vae.z_channels:
        raise UserError(
            f"the UNet takes {unet.in_channels} channels (unet.encoder.0.conv.weight) and the VAE "
            f"gives {vae.z_channels} (vae.post_quant_conv.weight): a model for inpainting or "
            f"upscaling, perhaps; {READABLE}"
        )
    return unet, vae, text


def unet_config(parts, known):
    """A level of the encoder has as many ResBlocks as stand before the first downsampling."""
    names = parts["unet"]
    divisor = math.lcm(known.head_dim, known.groups)
    width = size(parts, "unet", "encoder.0.conv.weight", multiple_of=divisor)
    length = count(names, r"encoder\.(\d+)\.")
    downs = [i for i in range(length) if any_starts(names, f"encoder.{i}.down.")]
    blocks = (downs[0] if downs else length) - 1
    mult, attention = [], []
    for level in range(len(downs) + 1):
        first = f"encoder.{1 + level * (blocks + 1)}"
        channels = size(parts, "unet", f"{first}.res.conv1.bias", multiple_of=width)
        mult.append(channels // width)
        if any_starts(names, f"{first}.attention."):
            attention.append(2**level)
    channels = size(parts, "unet", "encoder.0.conv.weight", axis=1)
    to_k = "middle.1.attention.cross_attention.to_k.weight"
    return replace(
        known,
        in_channels=channels,
        out_channels=channels,
        model_channels=width,
        channel_mult=tuple(mult),
        num_res_blocks=blocks,
        attention_resolutions=tuple(attention),
        context_dim=size(parts, "unet", to_k, axis=1),
    )


def vae_config(parts, known):
    names = parts["vae"]
    width = size(parts, "vae", "encoder.conv_in.weight", multiple_of=known.groups)
    # At least one, so that its tensors are missed if there is none.
    levels = max(1, count(names, r"encoder\.down\.(\d+)\."))
    widths = level_widths(parts, "encoder", levels, multiple_of=width)
    light = level_widths(
        parts, "light", count(names, r"light\.down\.(\d+)\."), multiple_of=known.groups
    )
    if len(light) > levels:
        raise UserError(
            f"the VAE has {levels} levels and its light encoder {len(light)}: it can have no more"
        )
    return replace(
        known,
        channels=width,
        channel_mult=tuple(wider // width for wider in widths),
        light=light,
        num_res_blocks=count(names, r"encoder\.down\.0\.blocks\.(\d+)\."),
        z_channels=size(parts, "vae", "post_quant_conv.weight"),
    )


def level_widths(parts, encoder, levels, *, multiple_of):
    """The widths of the levels of one of the VAE's encoders, finest first."""
    biases = [f"{encoder}.down.{level}.blocks.0.conv1.bias" for level in range(levels)]
    return tuple(size(parts, "vae", bias, multiple_of=multiple_of) for bias in biases)


def text_config(parts, known):
    """diffusers cuts CLIP's projection, its logit scale, and the last block, which is not run."""
    names = parts["text"]
    rows = size(parts, "text", "token_embedding.weight")
    if rows != VOCABULARY and not known.words:
        raise UserError(
            f"the tensor text.token_embedding.weight has {rows} rows, but CLIP's vocabulary has "
            f"{VOCABULARY}; a model that knows fewer words needs the header that mvd writes"
        )
    # A tower of another width has more or fewer heads.
    head_dim = max(1, known.width // known.heads)
    width = size(parts, "text", "norm_out.weight", multiple_of=head_dim)
    layers = max(1, count(names, r"blocks\.(\d+)\."))
    whole = "text_projection" in names or "logit_scale" in names
    return replace(
        known,
        width=width,
        heads=width // head_dim,
        layers=layers,
        unused_layers=known.unused_layers if whole or layers == known.layers else 0,
        output_dim=size(parts, "text", "text_projection", axis=1) if whole else None,
        context_length=size(parts, "text", "positional_embedding"),
    )


def size(parts, part, name, *, axis=0, multiple_of=1):
    """The size of one tensor along one axis.

    Raises UserError if the tensor is missing, lacks the axis, or the size is 0 or not a multiple.
    """
    theirs = f"(in MVDream's file: {released_name(part, name, parts)})"
    if name not in parts[part]:
        raise UserError(f"the tensor {part}.{name} is missing {theirs}")
    shape = parts[part][name].shape
    if len(shape) <= axis or shape[axis] == 0 or shape[axis] % multiple_of:
        found = f"has shape {list(shape)}, which fits no model that mvd reads"
        raise UserError(f"the tensor {part}.{name} {found} {theirs}")
    return shape[axis]
