"""Checkpoints on disk <-> tensors in our names, safely: nothing is ever unpickled.

Our own file is one safetensors file: tensors `unet.*`, `vae.*`, `text.*`, and in its header, under "mvd", a JSON object with the
configuration, the vocabulary and the defaults for sampling and distillation.
"""
import json
import re

from .errors import UserError
from .files import read_safetensors, write_safetensors

# The names of Stable Diffusion's own ("LDM") files -> ours. A name is rewritten by every rule of its part, in order.
LDM_UNET = [
    (r"^time_embed\.", "time_mlp."), (r"^camera_embed\.", "camera_mlp."),
    (r"^input_blocks\.", "encoder."), (r"^output_blocks\.", "decoder."), (r"^encoder\.0\.0\.", "encoder.0.conv."),
    (r"^encoder\.(\d+)\.0\.op\.", r"encoder.\1.down."), (r"^decoder\.(\d+)\.\d\.conv\.", r"decoder.\1.up."),
    (r"^(encoder|decoder)\.(\d+)\.0\.", r"\1.\2.res."), (r"^(encoder|decoder)\.(\d+)\.1\.", r"\1.\2.attention."),
    (r"^middle_block\.([02])\.", r"middle.\1.res."), (r"^middle_block\.1\.", "middle.1.attention."),
    (r"\.res\.in_layers\.0\.", ".res.norm1."), (r"\.res\.in_layers\.2\.", ".res.conv1."), (r"\.res\.emb_layers\.1\.", ".res.embed."),
    (r"\.res\.out_layers\.0\.", ".res.norm2."), (r"\.res\.out_layers\.3\.", ".res.conv2."), (r"\.skip_connection\.", ".skip."),
    (r"\.transformer_blocks\.0\.", "."), (r"\.attn1\.", ".self_attention."), (r"\.attn2\.", ".cross_attention."),
    (r"\.to_out\.0\.", ".to_out."), (r"\.ff\.net\.0\.proj\.", ".feed_in."), (r"\.ff\.net\.2\.", ".feed_out."),
    (r"^out\.0\.", "norm_out."), (r"^out\.2\.", "conv_out."),
]
LDM_VAE = [
    (r"\.block\.", ".blocks."), (r"\.(downsample|upsample)\.conv\.", r".\1."), (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.mid\.block_1\.", ".middle.0."), (r"\.mid\.attn_1\.", ".middle.1."), (r"\.mid\.block_2\.", ".middle.2."),
    (r"\.middle\.1\.q\.", ".middle.1.query."), (r"\.middle\.1\.k\.", ".middle.1.key."),
    (r"\.middle\.1\.v\.", ".middle.1.value."), (r"\.middle\.1\.proj_out\.", ".middle.1.out."),
]
LDM_TEXT = [(r"^", "tower.")]
LDM_PARTS = {"unet": ("model.diffusion_model.", LDM_UNET), "vae": ("first_stage_model.", LDM_VAE),
             "text": ("cond_stage_model.model.", LDM_TEXT)}


def convert(state_dict):
    """{name: tensor} in our layout or in LDM's, at any width -> {"unet": {...}, "vae": {...}, "text": {...}} in our names.

    Raises UserError, naming the tensor, for a name that belongs to neither layout.
    """
    parts = {part: {} for part in LDM_PARTS}
    for name, tensor in state_dict.items():
        part = next((part for part, (prefix, _) in LDM_PARTS.items() if name.startswith((prefix, part + "."))), None)
        if part is None:
            raise UserError(f"{name!r} is no tensor of an MVDream or Stable Diffusion model")
        prefix, rules = LDM_PARTS[part]
        if name.startswith(prefix):
            ours = name.removeprefix(prefix)
            for pattern, replacement in rules:
                ours = re.sub(pattern, replacement, ours)
        else:
            ours = name.removeprefix(part + ".")
        parts[part][ours] = tensor
    return parts


def write_model(path, parts, header):
    """Write {"unet": state dict, ...} and the JSON-able header to one file of ours."""
    write_safetensors(path, {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()},
                      {"mvd": json.dumps(header)})


def read_model(path):
    """Read what `write_model` wrote: (parts, header). Raises UserError for a file that is not ours."""
    tensors, metadata = read_safetensors(path)
    if "mvd" not in metadata:
        raise UserError(f"{path} is a safetensors file, but not one of an mvd model")
    return convert(tensors), json.loads(metadata["mvd"])
