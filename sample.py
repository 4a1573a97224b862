"""A sentence -> pictures of one thing from several sides (MVDream §3.1).

    python sample.py "a red car wearing a party hat"
    python sample.py "an astronaut riding a horse" --model mvdream-sd21
    python sample.py "a red car" --views 16 --transforms views/car

The last one also writes the views one by one, views/car/000.png and so on, and their cameras,
transforms.json, in the format of NeRF's synthetic scenes, which other 3D tools read. The network
knows from where it looks but not how far: 40 degrees of field of view are taken for granted, and
the distance at which the cube [-0.5, 0.5]^3 fills the picture.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import mvd  # before torch: tools/threads.py
import torch
from tqdm import tqdm

from mvd.cameras import VIEWS, orbit
from mvd.data.transforms import write_transforms
from mvd.diffusion import SAMPLERS
from mvd.model import MVDream, read_config
from mvd.tools import cli, run
from mvd.tools.cli import setting
from mvd.tools.device import choose_device, choose_dtype
from mvd.tools.errors import UserError
from mvd.tools.pictures import check_numbers, grid, save_png, save_views, to_pil
from mvd.tools.vocabulary import known_part

# Of the cameras in transforms.json, degrees.
FOV = 40.0
# What to try where memory does not suffice.
SMALLER = "fewer --views, or a smaller --batch or --size"


@dataclass
class SampleSettings:
    """The flags. Size, guidance and negative prompt are the model's unless they are given."""
    prompt: str = setting(help="what to draw, in quotes", positional=True)
    model: str = setting("tiny", "tiny, mvdream-sd21, sd21, or the path of a checkpoint")
    out: str | None = setting(
        None, "PNG file, or a folder for <prompt>.png, <prompt>-2.png, ... (default: samples)"
    )
    transforms: str | None = setting(None, "folder for the single views and transforms.json")
    mode: str = setting(
        "3d", "3d: views of one thing; 2d: independent pictures", choices=("3d", "2d")
    )
    views: int = setting(VIEWS, "pictures", min=1, max=64)
    batch: int = setting(1, "samples of the prompt, one below the other", min=1, max=64)
    size: int = setting(256, "pixels of a picture", min=8, max=2048)
    elevation: float = setting(15.0, "of the cameras, degrees", min=-89, max=89)
    azimuth: float = setting(0.0, "of the first camera, degrees; 0 sees the front")
    span: float = setting(360.0, "degrees that the views share out")
    negative: str = setting("", "negative prompt")
    guidance: float = setting(10.0, "guidance scale", min=0)
    rescale: float = setting(0.0, "guidance rescale", min=0, max=1)
    steps: int = setting(25, "denoising steps", min=1, max=1000)
    sampler: str = setting(
        "dpm++", "dpm++ needs the fewest steps; ddim twice as many; ddpm the most", choices=SAMPLERS
    )
    eta: float = setting(0.0, "noise that --sampler ddim adds back", min=0, max=1)
    seed: int = setting(0, "of the noise", min=0)
    device: str = setting("auto", "cuda, cpu, or mps (untested); auto: cuda, else cpu")
    dtype: str = setting(
        "auto",
        "auto: bfloat16 on cuda (float16 before Ampere), else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


def settings_of(name, config):
    """What a model changes of the defaults: (where it stands, {setting: value})."""
    changes = dict(size=config.size, negative=config.negative, guidance=config.guidance)
    return f'the model "{name}"', changes


def model_settings(flags):
    """The settings of the model that the flags name."""
    return settings_of(flags.model, read_config(flags.model))


# ---- where the pictures go -------------------------------------------------------------------

def picture_file(s):
    """The file that --out asks for; in a folder it has a name that may be taken. A Path.

    Raises UserError if it is there already, or no name of a PNG file.
    """
    out = Path(s.out or "samples")
    if out.is_dir() or not out.suffix:
        return out / f"{run.slug(s.prompt)}.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"{out} is no PNG file: choose a name that ends in .png, or a folder")
    if out.exists():
        raise UserError(f"{out} exists already: choose another name for --out")
    return out


def view_folders(s):
    """The folders that --transforms asks for: one per sample, below it if they are several.

    Raises UserError if there are no cameras to write, or others or pictures are there already.
    """
    if s.transforms is None:
        return []
    if s.mode == "2d":
        raise UserError("--transforms needs --mode 3d: independent pictures have no cameras")
    folders = [Path(s.transforms)]
    if s.batch > 1:
        folders = [folders[0] / f"{i:03d}" for i in range(s.batch)]
    for folder in [Path(s.transforms), *folders]:
        for name in ("transforms.json", "000.png"):
            if (folder / name).exists():
                raise UserError(
                    f"{folder} holds a {name} already: choose another folder for --transforms"
                )
    return folders


def write_views(folder, images, s):
    """Write images [V, 3, H, W] and their cameras into a folder."""
    azimuths = s.azimuth + torch.arange(s.views) * s.span / s.views
    distance = 0.5 / math.tan(math.radians(FOV / 2))
    names = save_views(folder, [to_pil(image) for image in images])
    c2w = orbit(s.elevation, azimuths, distance)
    write_transforms(folder, names, c2w, FOV, size=s.size)


# ---- the command -----------------------------------------------------------------------------

def main(argv=None):
    """The command: a prompt -> a PNG file of views. Raises UserError."""
    s = cli.parse(SampleSettings, argv, __doc__, model_settings)
    if not s.prompt.strip():
        raise UserError(
            'the prompt is empty: say what to draw, for example "a bulldog wearing a crown"'
        )
    if s.eta and s.sampler != "ddim":
        raise UserError(f"--eta is a setting of --sampler ddim, and the sampler is {s.sampler}")
    folders = view_folders(s)
    out = picture_file(s)
    device = choose_device(s.device)
    model = MVDream.load(s.model, device, choose_dtype(s.dtype, device))
    # Before anything is made: raises if the model knows no word of one, whatever the suffix is.
    prompt = known_part(s.prompt, model.config.text)
    negative = known_part(s.negative, model.config.text)
    model.check_size(s.size)
    for file in [*(folder / "transforms.json" for folder in folders), out]:
        run.make_folder(file)
    cli.print_changes(s, *settings_of(s.model, model.config))
    start = time.time()
    images = model.sample(
        [prompt] * s.batch,
        negative,
        views=s.views,
        steps=s.steps,
        guidance=s.guidance,
        rescale=s.rescale,
        elevation=s.elevation,
        azimuth=s.azimuth,
        span=s.span,
        seed=s.seed,
        sampler=s.sampler,
        eta=s.eta,
        mode=s.mode,
        size=s.size,
        progress=tqdm,
    )  # [B, V, 3, H, W]
    check_numbers(images, "try --dtype float32 or a lower --guidance; else its weights are damaged")
    columns = min(s.views, 8)
    # White pictures fill the last row of a sample, so that the next one starts a row of its own.
    missing = -s.views % columns
    blank = images.new_ones(s.batch, missing, *images.shape[2:])
    rows = torch.cat([images, blank], 1).flatten(0, 1)
    for folder, views in zip(folders, images):
        write_views(folder, views, s)
    # Not before: what draws the same prompt at the same time may have taken the name.
    out = run.free_file(out)
    save_png(out, grid(rows.cpu(), columns))
    if folders:
        print(f"{s.transforms}: the same, one by one, and their cameras")
    print(f"{out}: {s.batch * s.views} views in {time.time() - start:.1f} s")


if __name__ == "__main__":
    cli.main(main, SMALLER)
