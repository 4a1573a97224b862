"""Candidates: what pictures could show, rendered; and how far pictures are from them.

The toy world can render any caption, so pictures can be compared with renders. To be fair,
- every candidate is seen from the pictures' own cameras and laid over their own background,
- it is tried in eight proportions and at six scales, and the best of these 48 counts,
- the eight proportions are the same for all captions, and neither training data nor the real
  renders of the ceiling have them.

Shapes: M sets of pictures, K candidates (proportions times scales), V views, s = SIZE pixels.
"""
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import toyworld
from ..cameras import VIEWS, orbit
from ..toyworld import Thing
from ..toyworld.tracer import paint, trace

# Pixels along a side, at which everything is compared. A wrong accessory has 3 times the error of
# the right one at 32 pixels as at 48, and drawing takes half the time.
SIZE = 32
# Each candidate is tried at these scales: a model may draw things smaller or larger than we do.
SCALES = (0.72, 0.80, 0.89, 1.0, 1.12, 1.25)
# Seeds of the candidates' proportions, and of those of real renders. Training uses others, from a
# million on.
CANDIDATE_SEEDS = range(8)
REAL_SEEDS = range(1000, 1_000_000)
# Where a picture differs from its background by more than this, it shows the thing.
VISIBLE = 0.08


class Cameras(NamedTuple):
    """The cameras of one set of views, all on one orbit."""
    # Degrees.
    elevation: float
    # Degrees, one per view.
    azimuth: tuple
    # Degrees. None if it is not known, as for samples: then any that training shows is possible.
    fov_deg: float | None = None


def even_azimuths(count):
    """`count` azimuths around the object, from the front on, a tuple of degrees."""
    return tuple(360.0 * view / count for view in range(count))


# The cameras of `MVDream.sample`.
SAMPLED = Cameras(elevation=15.0, azimuth=even_azimuths(VIEWS))


# ---- renders ---------------------------------------------------------------------------------

def camera_matrices(cameras, fov_deg, framing):
    """Camera to world for N objects and V views: [N, V, 4, 4].

    fov_deg [N]: degrees. framing (a number or [N]): at 1 the cube [-0.5, 0.5]^3 fills the picture,
    as on average in training; at 1.1 the camera is 1.1 times as far away.
    """
    distance = framing * 0.5 / torch.tan(torch.deg2rad(fov_deg) / 2)
    azimuth = torch.tensor(cameras.azimuth)
    return orbit(cameras.elevation, azimuth, distance[:, None])


def geometry(thing, seeds, cameras, device, *, fov_deg, framing, size):
    """A Thing without its colour, in one proportion per seed: Buffers of N objects, V views.

    `tracer.paint` turns them into pictures. fov_deg, framing: as in `camera_matrices`.
    """
    shapes = toyworld.build(thing.subject, thing.accessory, list(seeds), device)
    return trace(shapes, camera_matrices(cameras, fov_deg, framing), fov_deg, size)


def candidate_geometry(thing, cameras, device):
    """A Thing without its colour, in the proportions CANDIDATE_SEEDS: Buffers.

    If the field of view is not known, the proportions have different ones, from 15 to 60 degrees.
    """
    count = len(CANDIDATE_SEEDS)
    if cameras.fov_deg is None:
        fov_deg = 15 + 45 * (torch.arange(count) + 0.5) / count
    else:
        fov_deg = torch.full((count,), cameras.fov_deg)
    return geometry(
        thing, CANDIDATE_SEEDS, cameras, device, fov_deg=fov_deg, framing=1.0, size=SIZE)


def paint_candidates(buffers, colour):
    """The candidates of one subject and accessory in a colour: [K, V, 4, s, s], premultiplied."""
    count = len(buffers.slot)
    palette = toyworld.palette([colour] * count, buffers.slot.device)
    return at_scales(paint(buffers, palette))


def at_scales(rgba, scales=SCALES):
    """Renders [N, V, 4, s, s] with straight alpha, made smaller and larger to each of `scales`.

    Returns [len(scales) * N, V, 4, s, s], premultiplied: (colour times alpha, alpha); all N at the
    first scale come first.
    """
    alpha = rgba[:, :, 3:]
    premultiplied = torch.cat([rgba[:, :, :3] * alpha, alpha], 2).flatten(0, 1)
    scaled = []
    for scale in scales:
        zoom = torch.tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]], device=rgba.device)
        zoom = zoom.expand(len(premultiplied), -1, -1)
        grid = F.affine_grid(zoom, premultiplied.shape, align_corners=False)
        pictures = F.grid_sample(premultiplied, grid, align_corners=False)
        scaled.append(pictures.unflatten(0, rgba.shape[:2]))
    return torch.cat(scaled)


# ---- real renders, for the ceiling of each score ---------------------------------------------

def draw_framing(count, cameras, seed):
    """What training varies per set (MVDream, appendix): (fov_deg, framing, grey), [count] each.

    The field of view is 15 to 60 degrees, or the cameras' own; framing (see `geometry`) is 0.9 to
    1.1; grey, the background, is 0 to 1. The random draw is torch.rand(3, count) on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    fov, framing, grey = torch.rand(3, count, generator=generator)
    fov_deg = 15 + 45 * fov
    if cameras.fov_deg is not None:
        fov_deg = torch.full_like(fov, cameras.fov_deg)
    return fov_deg, 0.9 + 0.2 * framing, grey


def over_grey(rgba, grey):
    """Renders [M, V, 4, H, W], straight alpha, over one grey per set [M]: [M, V, 3, H, W]."""
    rgb = rgba[:, :, :3]
    alpha = rgba[:, :, 3:]
    grey = grey[:, None, None, None, None].to(rgba.device)
    return rgb * alpha + grey * (1 - alpha)


def real_seeds(count, seed):
    """`count` different seeds of proportions, which no candidate has."""
    return random.Random(seed).sample(REAL_SEEDS, count)


def by_pair(things):
    """Where each shape stands among the Things: {(subject, accessory): [m, ...]}."""
    found = {}
    for m, thing in enumerate(things):
        found.setdefault((thing.subject, thing.accessory), []).append(m)
    return found


def real_views(things, cameras, device="cpu", seed=0, size=2 * SIZE):
    """What a perfect model would draw for M Things: [M, V, 3, size, size] in [0, 1].

    Proportions are from REAL_SEEDS, so no candidate has them; the rest is as in training
    (`draw_framing`). Their score is the ceiling of what a model can score.
    """
    fov_deg, framing, grey = draw_framing(len(things), cameras, seed)
    seeds = real_seeds(len(things), seed)
    shape = (len(things), len(cameras.azimuth), 3, size, size)
    views = torch.zeros(shape, device=device)
    for pair, ms in by_pair(things).items():
        buffers = geometry(
            Thing(*pair), [seeds[m] for m in ms], cameras, device,
            fov_deg=fov_deg[ms], framing=framing[ms], size=size)
        palette = toyworld.palette([things[m].colour for m in ms], device)
        views[ms] = over_grey(paint(buffers, palette), grey[ms])
    return views


# ---- pictures, and their distance from candidates --------------------------------------------

class Cutouts(NamedTuple):
    """Pictures at SIZE, cut out of their backgrounds."""
    # [..., 3, s, s] in [0, 1]: the whole pictures.
    rgb: torch.Tensor
    # [..., 3, 1, 1]: one colour per picture.
    background: torch.Tensor
    # [..., 1, s, s]: 1.0 where a picture differs visibly from its background, else 0.0.
    foreground: torch.Tensor


def resize(pictures, size):
    """Pictures [N, 3, H, W] at another size, antialiased: [N, 3, size, size]."""
    return F.interpolate(
        pictures, (size, size), mode="bilinear", antialias=True, align_corners=False)


def at_real_size(views):
    """Views [M, V, 3, H, W] at the size of `real_views`, so that both can be judged together."""
    return resize(views.flatten(0, 1), 2 * SIZE).unflatten(0, views.shape[:2])


def cut_out(views):
    """Pictures [..., 3, H, W] in [0, 1] as Cutouts.

    A picture's background is the median of its border, channel by channel.
    """
    small = resize(views.flatten(0, -4).float(), SIZE)
    top, bottom = small[..., 0, :], small[..., -1, :]
    left, right = small[..., 0], small[..., -1]
    # [N, 3, 4 s]
    border = torch.cat([top, bottom, left, right], -1)
    background = border.median(-1).values[..., None, None]
    difference = (small - background).abs().amax(1, keepdim=True)
    foreground = (difference > VISIBLE).float()
    shape = views.shape[:-3]
    return Cutouts(
        small.unflatten(0, shape), background.unflatten(0, shape), foreground.unflatten(0, shape))


def select(cutouts, which):
    """The sets `which` of M: a list of indices, or a slice."""
    return Cutouts(
        cutouts.rgb[which], cutouts.background[which], cutouts.foreground[which])


def squared_error(cutouts, candidates):
    """Squared error, summed over each view's pixels, and its weight: both [M, K, V].

    cutouts of [M, V]; candidates [K, V, 4, s, s], premultiplied, are laid over each background.
    A pixel's error is the mean over its channels. Its weight is 1 in the picture's foreground and
    the candidate's alpha elsewhere. Divide sum by weight, after adding views if they belong
    together, to get a mean squared error.
    """
    rgb = candidates[:, :, :3]
    alpha = candidates[:, :, 3:]
    # [M, K, V, 3, s, s]
    drawn = rgb + (1 - alpha) * cutouts.background[:, None]
    weight = torch.maximum(cutouts.foreground[:, None], alpha)
    # In place where it can be: these are the largest tensors of all.
    error = (cutouts.rgb[:, None] - drawn).square_()
    error = error.mean(3, keepdim=True).mul_(weight)
    return error.sum((3, 4, 5)), weight.sum((3, 4, 5))


def in_chunks(cutouts, candidates):
    """The sets of cutouts, as many at a time as fit into memory beside the candidates."""
    most = 2 ** 28 if candidates.is_cuda else 2 ** 22
    count = max(1, most // candidates.numel())
    for i in range(0, len(cutouts.rgb), count):
        yield select(cutouts, slice(i, i + count))


def error_by_candidate(cutouts, candidates):
    """Mean squared error of each set to each candidate, over all its views: [M, K]."""
    errors = []
    for chunk in in_chunks(cutouts, candidates):
        error, weight = squared_error(chunk, candidates)
        errors.append(error.sum(2) / weight.sum(2))
    return torch.cat(errors)


def error_of_sets(cutouts, candidates):
    """Mean squared error of each set to its nearest candidate, one for all its views: [M]."""
    return error_by_candidate(cutouts, candidates).amin(1)


def error_of_views(cutouts, candidates):
    """Mean squared error of each view to its nearest candidate, which may differ: [M, V]."""
    errors = []
    for chunk in in_chunks(cutouts, candidates):
        error, weight = squared_error(chunk, candidates)
        errors.append((error / weight).amin(1))
    return torch.cat(errors)


def error_by_azimuth(cutouts, candidates):
    """Error of each view to the candidates as each of the cameras sees them: [M, V, V azimuths].

    The smallest error of a row tells which side of the thing a view shows.
    """
    columns = []
    for azimuth in range(candidates.shape[1]):
        alone = candidates[:, azimuth:azimuth + 1].expand_as(candidates)
        columns.append(error_of_views(cutouts, alone))
    return torch.stack(columns, 2)
