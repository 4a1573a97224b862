"""A sentence -> pictures of one thing from several sides (MVDream §3.1).

    python sample.py "a red car wearing a party hat"
    python sample.py "an astronaut riding a horse" --model mvdream-sd21
"""
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from mvd.tools import cli, run
from mvd.tools.device import choose_device, choose_dtype
from mvd.tools.errors import UserError
from mvd.tools.vocabulary import known_part
from mvd.model import MVDream
from mvd.tools.pictures import grid, save_png


@dataclass
class Settings:
    """The flags."""
    prompt: str = field(metadata={"help": "what to draw, in quotes", "positional": True})
    model: str = field(default="tiny", metadata={"help": "tiny, mvdream-sd21, sd21, or the path of a checkpoint"})
    out: str | None = field(default=None, metadata={"help": "PNG file to write (default: samples/<prompt>.png)"})
    mode: str = field(default="3d", metadata={"help": "3d: views of one thing; 2d: independent pictures", "choices": ("3d", "2d")})
    views: int = field(default=4, metadata={"help": "pictures", "min": 1, "max": 64})
    batch: int = field(default=1, metadata={"help": "samples of the prompt, one below the other", "min": 1, "max": 64})
    size: int | None = field(default=None, metadata={"help": "pixels of a picture (default: the model's)", "min": 8, "max": 2048})
    elevation: float = field(default=15.0, metadata={"help": "of the cameras, degrees", "min": -89, "max": 89})
    azimuth: float = field(default=0.0, metadata={"help": "of the first camera, degrees; 0 sees the front"})
    span: float = field(default=360.0, metadata={"help": "degrees that the views share out"})
    negative: str | None = field(default=None, metadata={"help": "negative prompt (default: the model's)"})
    guidance: float | None = field(default=None, metadata={"help": "guidance scale (default: the model's)", "min": 0})
    rescale: float = field(default=0.0, metadata={"help": "guidance rescale", "min": 0, "max": 1})
    steps: int = field(default=50, metadata={"help": "denoising steps", "min": 1, "max": 1000})
    sampler: str = field(default="ddim", metadata={"help": "sampler", "choices": ("ddim", "ddpm")})
    eta: float = field(default=0.0, metadata={"help": "noise that DDIM adds back", "min": 0, "max": 1})
    seed: int = field(default=0, metadata={"help": "of the noise", "min": 0, "max": 2 ** 63 - 1})
    device: str = field(default="auto", metadata={"help": "cuda, mps or cpu; auto takes the best"})
    dtype: str = field(default="auto", metadata={"help": "auto: bfloat16 on cuda, else float32",
                                                 "choices": ("auto", "float32", "bfloat16", "float16")})


def main():
    """The command: a prompt -> a PNG file of views. Raises UserError."""
    s = cli.parse(Settings, description=__doc__)
    if not s.prompt.strip():
        raise UserError('the prompt is empty: say what to draw, for example "a bulldog wearing a crown"')
    device = choose_device(s.device)
    model = MVDream.load(s.model, device, choose_dtype(s.dtype, device))
    prompt = known_part(s.prompt, model.config.text)                                              # all unknown: the end, whatever the suffix
    out = s.out or f"samples/{run.slug(s.prompt)}.png"
    run.make_folder(out)
    start = time.time()
    images = model.sample([prompt] * s.batch, s.negative, s.views, s.steps, s.guidance, s.rescale, s.elevation, s.azimuth, s.span,
                          s.seed, s.sampler, s.eta, s.mode, s.size, progress=tqdm)        # [B, V, 3, H, W]
    columns = min(s.views, 8)
    blank = -s.views % columns                                                            # a sample starts a row of its own
    rows = torch.cat([images, images.new_ones(s.batch, blank, *images.shape[2:])], 1).flatten(0, 1)
    save_png(out, grid(rows.cpu(), columns))
    print(f"{out}: {s.batch * s.views} views in {time.time() - start:.1f} s")


if __name__ == "__main__":
    cli.main(main)
