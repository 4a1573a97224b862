"""python -m mvd.tools.convert MODEL OUT: a trained model with the names of other tools.

    python -m mvd.tools.convert runs/tiny tiny.safetensors --layout mvdream
    python -m mvd.tools.convert runs/tiny tiny-diffusers --layout diffusers

MVDream's file can be read by the released code, if it is told the sizes; the folder by diffusers,
in which the model draws single pictures. mvd reads both as the model that they were.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from ..model import LAYOUTS, MVDream, find_file, read_model
from . import cli
from .errors import UserError
from .run import make_folder

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass
class Settings:
    """The flags of this command."""
    model: str = cli.setting(
        positional=True, help="tiny, a file, a diffusers folder or the folder of a run")
    out: str = cli.setting(
        positional=True, help="the file (.safetensors, .pt or .ckpt) or folder to write")
    layout: str = cli.setting("mvdream", choices=tuple(LAYOUTS), help="whose names")
    dtype: str = cli.setting("auto", choices=DTYPES, help="of the numbers; auto: the UNet's own")


def main(argv=None):
    """The command: a model -> OUT with the names of --layout. Raises UserError."""
    s = cli.parse(Settings, argv, __doc__)
    if Path(s.out).exists():
        raise UserError(f"{s.out} is there already; choose another name")
    if s.dtype == "auto":
        _, parts = read_model(find_file(s.model))
        dtype = parts["unet"]["conv_out.weight"].dtype
    else:
        dtype = getattr(torch, s.dtype)
    model = MVDream.load(s.model)
    make_folder(s.out)
    model.save(s.out, dtype, s.layout)
    print(f"{s.out}: {s.model} with the names of {s.layout}")


if __name__ == "__main__":
    cli.main(main)
