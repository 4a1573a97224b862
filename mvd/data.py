"""Training data: rendered multi-view sets and captioned single images (MVDream §3.1).

A data folder holds `index.jsonl`, one JSON object per line and picture file:

    {"file": "sets/000000.png", "kind": "set", "captions": [...], "elevation": 12.5, "azimuth": 3.0}
    {"file": "images/000000.png", "kind": "image", "captions": [...]}

A set is one RGBA picture of N square views side by side, evenly round 360 degrees; `azimuth` is
the first view's, in degrees. An image is one square view. The captions of an item all mean the
same, and one is drawn whenever the item is. Other fields are not read.
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
    """The whole data set in memory. Pictures keep their alpha; the background comes later."""
    sets: torch.Tensor         # uint8 [N, views, 4, H, W]
    set_captions: list         # N lists of captions that mean the same
    set_cameras: torch.Tensor  # [N, views, 16]
    images: torch.Tensor       # uint8 [M, 4, H, W]
    image_captions: list       # M lists of captions


# ---- reading a folder ------------------------------------------------------------------------

NUMBER = (int, float)
# The fields that a line of the index needs, with their types, by kind.
NEEDED = {
    "set": {"file": str, "captions": list, "elevation": NUMBER, "azimuth": NUMBER},
    "image": {"file": str, "captions": list},
}


def read_line(text, place):
    """One line of the index as a dict. Raises UserError, naming the place, if it is unusable."""
    try:
        item = json.loads(text)
        needed = NEEDED[item["kind"]]
        wrong = [name for name, kind in needed.items() if not isinstance(item.get(name), kind)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: not a JSON object whose kind is set or image ({error!r})"
        ) from error
    if not wrong:
        captions = item["captions"]
        texts = [c for c in captions if isinstance(c, str) and c.strip()]
        if not captions or len(texts) < len(captions):
            wrong = ["captions"]
    if wrong:
        raise UserError(
            f"{place}: the field {wrong[0]!r} is missing, empty or of a wrong type"
        )
    return item


def read_picture(path):
    """A row of square views as uint8 [views, 4, H, H]. Raises UserError."""
    try:
        pixels = np.array(Image.open(path).convert("RGBA"))  # [H, views·H, 4]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; make the data again") from error
    height, width = pixels.shape[:2]
    if width % height:
        raise UserError(f"{path} is not a row of square views")
    views = torch.from_numpy(pixels).unflatten(1, (-1, height))
    return views.permute(1, 3, 0, 2)


def read_folder(folder, views=cameras.VIEWS):
    """Read a data folder: Data. `views`: how many views of a set a batch will take.

    Raises UserError if there is no folder, a line of its index is wrong, its pictures differ in
    size, or the views of its sets cannot be divided by `views`.
    """
    folder = Path(folder)
    index = folder / "index.jsonl"
    if not index.is_file():
        raise UserError(
            f"{index} is not there: make one with `python -m mvd.toyworld --out {folder}`"
        )
    lines = index.read_text().splitlines()
    items = [read_line(line, f"{index}, line {i}") for i, line in enumerate(lines, 1)]
    paths = [folder / item["file"] for item in items]
    with ThreadPoolExecutor() as pool:
        reading = pool.map(read_picture, paths)
        pictures = list(tqdm(reading, total=len(items), desc="reading", unit="file"))

    found = {"set": [], "image": []}  # (item, picture) pairs
    for item, picture in zip(items, pictures):
        found[item["kind"]].append((item, picture))
    for kind, pairs in found.items():
        shapes = {picture.shape for _, picture in pairs}
        sizes = {picture.shape[-1] for picture in pictures}
        if len(shapes) != 1 or len(sizes) != 1:
            raise UserError(
                f"{folder}: training needs files of kind {kind!r}, all views of one size"
            )
    if found["image"][0][1].shape[0] != 1:
        raise UserError(f"{folder}: an image must be one square view, not a row of views")
    sets = torch.stack([picture for _, picture in found["set"]])
    if sets.shape[1] % views:
        raise UserError(
            f"{folder}: a set has {sets.shape[1]} views; the number must be divisible by {views}"
        )
    return Data(
        sets=sets,
        set_captions=[item["captions"] for item, _ in found["set"]],
        set_cameras=set_cameras([item for item, _ in found["set"]], sets.shape[1]),
        images=torch.cat([picture for _, picture in found["image"]]),
        image_captions=[item["captions"] for item, _ in found["image"]],
    )


def set_cameras(items, views):
    """What the UNet is given of each view's camera: [N, views, 16]."""
    elevation = torch.tensor([float(item["elevation"]) for item in items])[:, None]
    first = torch.tensor([item["azimuth"] for item in items])[:, None]
    azimuth = first + torch.arange(views) * 360 / views  # [N, views]
    return cameras.extrinsics(cameras.orbit(elevation, azimuth))


# ---- pictures --------------------------------------------------------------------------------

def on_grey(rgba, grey):
    """Pictures over a grey background: uint8 [..., 4, H, W] -> [..., 3, H, W] in [-1, 1].

    grey: in [0, 1], broadcasts to [...].
    """
    rgba = rgba.float() / 255
    rgb, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    return 2 * (rgb * alpha + grey[..., None, None, None] * (1 - alpha)) - 1


def recolour(rgba, share=0.5):
    """The same pictures, a share of them in other colours: uint8 [N, 4, H, W] -> the same.

    Red, green and blue come in a random order, each to a random power, e^U[-1.2, 1.2]. An
    autoencoder that has seen twelve colours takes a wine red for brown.
    """
    n, device = len(rgba), rgba.device
    order = torch.rand(n, 3, device=device).argsort(1)[:, :, None, None]  # [N, 3, 1, 1]
    power = torch.exp(2.4 * torch.rand(n, 3, 1, 1, device=device) - 1.2)
    rgb = rgba[:, :3].float() / 255
    rgb = rgb.gather(1, order.expand(-1, -1, *rgba.shape[2:])) ** power
    other = torch.cat([(255 * rgb).round().byte(), rgba[:, 3:]], 1)
    chosen = torch.rand(n, device=device) < share
    return torch.where(chosen[:, None, None, None], other, rgba)


# ---- what is computed once -------------------------------------------------------------------

def token_table(text, captions, suffix=""):
    """Every caption of every item as rows of the embedding table: int64 [N, W, L].

    W is the length of the longest list of captions; shorter lists are repeated.
    """
    longest = max(map(len, captions))
    rows = []
    for wordings in captions:
        repeated = islice(cycle(wordings), longest)
        rows.append(text.tokenize([wording + suffix for wording in repeated]))
    return torch.stack(rows)


@torch.no_grad()
def encode_posteriors(vae, rgba, copies, pixels=2**23):
    """Encode pictures once, before the UNet is trained.

    uint8 [N, views, 4, H, W] -> [copies, N, views, 2c, h, w] in half precision: mean and standard
    deviation of the posterior, computed in bfloat16 on a GPU. In each copy, each object has
    another random grey behind all of its views. pixels: how many are encoded at a time.
    """
    batch = max(1, pixels // rgba.shape[-1] ** 2)
    flat = rgba.flatten(0, 1)
    posteriors = []
    for _ in range(copies):
        grey = torch.rand(len(rgba), 1, device=rgba.device)
        grey = grey.expand(rgba.shape[:2]).flatten()
        parts = []
        for i in range(0, len(flat), batch):
            pictures = on_grey(flat[i : i + batch], grey[i : i + batch])
            with torch.autocast("cuda", torch.bfloat16, enabled=rgba.is_cuda):
                mean, logvar = vae.encode(pictures)
            parts.append(torch.cat([mean, torch.exp(0.5 * logvar)], 1).half())
        posteriors.append(torch.cat(parts).unflatten(0, rgba.shape[:2]))
    return torch.stack(posteriors)


# ---- batches ---------------------------------------------------------------------------------

def sample_posterior(posterior):
    """A sample of the posterior whose mean and deviation are stacked in [..., 2c, h, w]."""
    mean, std = posterior.float().chunk(2, dim=-3)
    return mean + std * torch.randn_like(mean)


def draw_indices(counts, batch, device):
    """For each count n, `batch` random numbers of 0..n-1: a list of int64 [batch]."""
    return [torch.randint(n, (batch,), device=device) for n in counts]


def multiview_batch(posteriors, camera, tokens, batch, views=cameras.VIEWS):
    """A batch of sets: z [B, V, c, h, w] unscaled, tokens [B, L], camera [B, V, 16].

    posteriors [copies, N, n, 2c, h, w], camera [N, n, 16], tokens [N, W, L]. The V views are
    360/V degrees apart; where the first one stands is random.
    """
    device = posteriors.device
    copies, objects, n = posteriors.shape[:3]
    counts = objects, copies, n, tokens.shape[1]
    which, copy, first, wording = draw_indices(counts, batch, device)
    apart = torch.arange(views, device=device) * (n // views)
    view = (first[:, None] + apart) % n  # [B, V]
    texts = tokens[which, wording]
    which, copy = which[:, None], copy[:, None]
    return sample_posterior(posteriors[copy, which, view]), texts, camera[which, view]


def image_batch(posteriors, texts, batch):
    """A batch of single images, for the 2D mode: z [B, 1, c, h, w] unscaled, texts [B, ...].

    posteriors [copies, M, 1, 2c, h, w]; texts [M, W, ...]: of each item's W captions, its tokens
    or its context.
    """
    copies, items = posteriors.shape[:2]
    counts = items, copies, texts.shape[1]
    which, copy, wording = draw_indices(counts, batch, posteriors.device)
    return sample_posterior(posteriors[copy, which]), texts[which, wording]
