"""Training data: rendered multi-view sets and captioned single images, mixed 70/30 (MVDream §3.2).

A data folder holds `index.jsonl`, one line a picture file, with as many captions as one likes (other fields are not read):
  {"file": "sets/000000.png", "kind": "set", "captions": [...], "elevation": deg, "azimuth": deg of the first view, "fov", "distance"}
  {"file": "images/000000.png", "kind": "image", "captions": [...], ...}
A set is one RGBA picture of N square views side by side, evenly round 360 degrees; an image is one square view.
"""
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import cameras
from .tools.errors import UserError


@dataclass
class Data:
    """The whole data set in memory. A picture keeps its alpha: the background is chosen when it is used."""
    sets: torch.Tensor                           # uint8 [N, 32, 4, H, W]
    set_captions: list                           # N lists of captions that mean the same
    set_cameras: torch.Tensor                    # [N, 32, 16]
    images: torch.Tensor                         # uint8 [M, 4, H, W]
    image_captions: list


NEEDED = {"set": {"file": str, "captions": list, "elevation": (int, float), "azimuth": (int, float)},
          "image": {"file": str, "captions": list}}                              # fields of a line, by kind


def read_line(text, place):
    """One line of the index as a dict. Raises UserError, naming the place, for what training cannot use."""
    try:
        item = json.loads(text)
        wrong = [name for name, kind in NEEDED[item["kind"]].items() if not isinstance(item.get(name), kind)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not a JSON object whose kind is set or image ({error!r})") from error
    if wrong or not item["captions"] or not all(isinstance(caption, str) and caption.strip() for caption in item["captions"]):
        raise UserError(f"{place}: the field {(wrong or ['captions'])[0]!r} is missing, empty or of a wrong type")
    return item


def load(folder):
    """Read a data folder. Raises UserError if there is none, a line of its index is wrong, or its pictures differ in size."""
    index = Path(folder) / "index.jsonl"
    if not index.is_file():
        raise UserError(f"{index} is not there: make one with `python -m mvd.toyworld --out {folder}`")
    items = [read_line(line, f"{index}, line {i}") for i, line in enumerate(index.read_text().splitlines(), 1)]

    def read(item):
        try:
            picture = torch.from_numpy(np.array(Image.open(Path(folder) / item["file"]).convert("RGBA")))     # [H, views·H, 4]
        except OSError as error:
            raise UserError(f"cannot read {Path(folder) / item['file']}: {error}; make the data again") from error
        if picture.shape[1] % picture.shape[0]:
            raise UserError(f"{Path(folder) / item['file']} is not a row of square views")
        return picture.unflatten(1, (-1, picture.shape[0])).permute(1, 3, 0, 2)                              # [views, 4, H, H]

    with ThreadPoolExecutor() as pool:
        pictures = list(tqdm(pool.map(read, items), total=len(items), desc="reading", unit="file"))
    of_kind = {kind: [i for i, item in enumerate(items) if item["kind"] == kind] for kind in ("set", "image")}
    for kind, indices in of_kind.items():
        if not indices or len({pictures[i].shape for i in indices}) != 1 or pictures[indices[0]].shape[-1] != pictures[0].shape[-1]:
            raise UserError(f"{folder}: training needs files of kind {kind!r}, all views of one size")
    views = pictures[of_kind["set"][0]].shape[0]
    if views % 4:
        raise UserError(f"{folder}: a set has {views} views, but four of them, 90 degrees apart, are to be a batch's")
    sets = [items[i] for i in of_kind["set"]]
    azimuth = torch.tensor([item["azimuth"] for item in sets])[:, None] + torch.arange(views) * 360 / views  # [N, views]
    orbit = cameras.orbit(torch.tensor([float(item["elevation"]) for item in sets])[:, None], azimuth)
    return Data(torch.stack([pictures[i] for i in of_kind["set"]]), [item["captions"] for item in sets],
                cameras.camera_numbers(orbit), torch.cat([pictures[i] for i in of_kind["image"]]),
                [items[i]["captions"] for i in of_kind["image"]])


def on_grey(rgba, grey):
    """uint8 pictures [..., 4, H, W] over a grey in [0, 1] that broadcasts to [...] -> [..., 3, H, W] in [-1, 1]."""
    rgba = rgba.float() / 255
    rgb, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    return 2 * (rgb * alpha + grey[..., None, None, None] * (1 - alpha)) - 1


def recolour(rgba, share=0.5):
    """uint8 pictures [N, 4, H, W] -> the same, a share of them in other colours: red, green and blue in a random order, each to a
    random power, e^U[-1.2, 1.2]. An autoencoder that has seen twelve colours takes a wine red for brown."""
    n, device = len(rgba), rgba.device
    order = torch.rand(n, 3, device=device).argsort(1)[:, :, None, None]                                     # [N, 3, 1, 1]
    power = torch.exp(2.4 * torch.rand(n, 3, 1, 1, device=device) - 1.2)
    rgb = (rgba[:, :3].float() / 255).gather(1, order.expand(-1, -1, *rgba.shape[2:])) ** power
    other = torch.cat([(255 * rgb).round().byte(), rgba[:, 3:]], 1)
    return torch.where((torch.rand(n, device=device) < share)[:, None, None, None], other, rgba)


def token_table(text, captions, suffix=""):
    """Every wording of every item as rows of the embedding table: int64 [N, wordings, L]; who has fewer wordings repeats them."""
    most = max(map(len, captions))
    return torch.stack([text.tokenize([wording + suffix for wording in islice(cycle(wordings), most)]) for wordings in captions])


@torch.no_grad()
def moments(vae, rgba, copies, pixels=2 ** 23):
    """Encode pictures once, before the UNet is trained: uint8 [N, views, 4, H, W] -> [copies, N, views, 2c, h, w] in half
    precision, the mean and standard deviation of the posterior; computed in bfloat16 on a GPU. Each copy of an object has a random
    grey behind it. pixels: how many are encoded at a time."""
    out, batch = [], max(1, pixels // rgba.shape[-1] ** 2)                       # 512 pictures of 128², 128 of 256²
    for _ in range(copies):
        grey = torch.rand(len(rgba), 1, device=rgba.device).expand(rgba.shape[:2]).flatten()                  # one grey an object
        flat = rgba.flatten(0, 1)
        parts = []
        for i in range(0, len(flat), batch):
            with torch.autocast("cuda", torch.bfloat16, enabled=rgba.is_cuda):
                mean, logvar = vae.encode(on_grey(flat[i:i + batch], grey[i:i + batch]))
            parts.append(torch.cat([mean, torch.exp(0.5 * logvar)], 1).half())
        out.append(torch.cat(parts).unflatten(0, rgba.shape[:2]))
    return torch.stack(out)


def sample_latents(moment):
    """A sample of the posterior whose mean and standard deviation are stacked in [..., 2c, h, w]."""
    mean, std = moment.float().chunk(2, dim=-3)
    return mean + std * torch.randn_like(mean)


def draw_sets(moment, camera, tokens, batch):
    """A multi-view batch: z [B, 4, c, h, w] unscaled, tokens [B, L], camera [B, 4, 16]; the 4 of N views are 90 degrees apart."""
    device, (copies, objects, views) = moment.device, moment.shape[:3]
    which, copy, first, wording = (torch.randint(high, (batch,), device=device)
                                   for high in (objects, copies, views, tokens.shape[1]))
    view = (first[:, None] + torch.arange(4, device=device) * (views // 4)) % views                           # [B, 4]
    which, copy = which[:, None], copy[:, None]
    return sample_latents(moment[copy, which, view]), tokens[which[:, 0], wording], camera[which, view]


def draw_images(moment, texts, batch):
    """A batch of single images. texts [M, W, ...]: of each item's W wordings, its tokens or its context. Returns z [B, 1, c, h, w]
    unscaled, texts [B, ...], and None for the camera: the 2D mode."""
    device, (copies, items) = moment.device, moment.shape[:2]
    which, copy, wording = (torch.randint(high, (batch,), device=device) for high in (items, copies, texts.shape[1]))
    return sample_latents(moment[copy, which]), texts[which, wording], None
