"""The judge of shapes: are surfaces as smooth as real ones, and are they the right ones?

It looks at normal maps, the directions of the surface that pixels show, and compares them with
those of real renders, which the toy world knows exactly (tracer.trace_normals).
- Roughness: the mean angle between a pixel's normal and the mean normal of its 5 x 5 pixels, and
  its ratio to that of real renders of the same caption. Edges are real, so a ratio far below 1 (a
  melted blob) is as wrong as one far above (noise).
- R-precision of normals: the share of sets whose normals are nearest to the true caption's among
  64. All of them differ in shape, since normals do not show colours.
- Angle: how far normals are from those of the nearest of eight real instances, on average.
The candidates are those of candidates.py, so this is fair in the same way. What a mesh is worth
is in meshes.py.

Shapes: M sets of V views; s = SIZE pixels.
"""
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import toyworld
from ..toyworld import Thing
from ..toyworld.tracer import trace_normals
from .candidates import (
    CANDIDATE_SEEDS,
    SIZE,
    Cutouts,
    at_scales,
    by_pair,
    camera_matrices,
    draw_framing,
    error_by_candidate,
    error_of_sets,
    real_seeds,
    resize,
    select,
)
from .judge import mean, where_wanted
from .meshes import mesh_facts, real_mesh
from .things import distractors

# Roughness is defined for pictures with so many pixels along a side ...
ROUGH_SIZE = 128
# ... and for neighbourhoods with so many.
NEIGHBOURHOOD = 5
# The nearest real instance is found at one of these scales, 3% apart, since angles between normals
# depend on how well two things lie on each other.
FINE_SCALES = tuple(0.7 * 1.03 ** k for k in range(21))
# Where opacity is above this, there is something.
SOLID = 0.5


class Maps(NamedTuple):
    """Normal maps of M sets of V views."""
    # [M, V, 3, H, W]: unit vectors in the world.
    normal: torch.Tensor
    # [M, V, 1, H, W] in [0, 1]: the normals count where there is something.
    opacity: torch.Tensor


# ---- roughness -------------------------------------------------------------------------------

def angle_between(a, b):
    """The angle between unit vectors [..., 3, H, W] in degrees: [..., 1, H, W].

    |a - b| = 2 sin(angle / 2): unlike the arc cosine it is exact for small angles, too.
    """
    half = torch.linalg.vector_norm(a - b, dim=-3, keepdim=True) / 2
    return torch.rad2deg(2 * torch.asin(half.clamp(max=1)))


def at_size(maps, size):
    """Maps at another size: [M, V, ..., size, size]. A pixel's normal is the mean of its area."""
    if maps.normal.shape[-1] == size:
        return maps
    # Nothing has no direction.
    weighted = torch.cat([maps.normal * maps.opacity, maps.opacity], 2)
    weighted = resize(weighted.flatten(0, 1), size).unflatten(0, maps.normal.shape[:2])
    return Maps(F.normalize(weighted[:, :, :3], dim=2), weighted[:, :, 3:])


def roughness(maps):
    """The roughness of each set in degrees, [M]; nan where a set shows nothing.

    The mean angle between a pixel's normal and the mean normal of its 5 x 5 neighbourhood, over the
    pixels of all views whose neighbourhood is inside the silhouette. It is defined for pictures of
    128 x 128: others are resized first, and so are the real renders that they are compared with.
    """
    normal, opacity = at_size(maps, ROUGH_SIZE)
    rim = NEIGHBOURHOOD // 2
    middle = normal[..., rim:-rim, rim:-rim]
    around = F.avg_pool2d(normal.flatten(0, 1), NEIGHBOURHOOD, stride=1)
    around = F.normalize(around.unflatten(0, normal.shape[:2]), dim=2)
    empty = (opacity <= SOLID).float().flatten(0, 1)
    inner = F.max_pool2d(empty, NEIGHBOURHOOD, stride=1).unflatten(0, normal.shape[:2]) == 0
    return mean_where(angle_between(middle, around), inner)


def mean_where(values, there):
    """The mean of values [M, ...] where `there` [M, ...], of each set: [M]; nan for nowhere."""
    total = torch.where(there, values, 0).flatten(1).sum(1)
    return total / there.flatten(1).sum(1)


# ---- real renders ----------------------------------------------------------------------------

def draw_maps(thing, seeds, cameras, device, *, framing, size):
    """The Maps of a Thing in one proportion per seed, N in all.

    framing (a number or [N]): as in `candidates.camera_matrices`.
    """
    fov_deg = torch.full((len(seeds),), cameras.fov_deg)
    shapes = toyworld.build(thing.subject, thing.accessory, list(seeds), device)
    c2w = camera_matrices(cameras, fov_deg, framing)
    return Maps(*trace_normals(shapes, c2w, fov_deg, size))


class Instances(NamedTuple):
    """Real instances, one per set: how they are proportioned, and how far the camera is away."""
    # M seeds.
    seeds: list
    # [M]: see `candidates.camera_matrices`.
    framing: torch.Tensor


def unseen_instances(count, cameras, seed):
    """Instances that no candidate is, framed as in training: their scores are the ceilings."""
    _, framing, _ = draw_framing(count, cameras, seed)
    return Instances(real_seeds(count, seed), framing)


def maps_of(things, instances, cameras, device, size):
    """The Maps of M Things as one instance each."""
    views = len(cameras.azimuth)
    normal = torch.zeros(len(things), views, 3, size, size, device=device)
    opacity = torch.zeros(len(things), views, 1, size, size, device=device)
    for pair, ms in by_pair(things).items():
        seeds = [instances.seeds[m] for m in ms]
        drawn = draw_maps(
            Thing(*pair), seeds, cameras, device, framing=instances.framing[ms], size=size)
        normal[ms] = drawn.normal
        opacity[ms] = drawn.opacity
    return Maps(normal, opacity)


def real_roughness(things, cameras, device, size):
    """The mean roughness of the eight instances CANDIDATE_SEEDS of each of M Things: [M]."""
    found = torch.zeros(len(things), device=device)
    for pair, ms in by_pair(things).items():
        drawn = draw_maps(Thing(*pair), CANDIDATE_SEEDS, cameras, device, framing=1.0, size=size)
        found[ms] = roughness(drawn).mean()
    return found


# ---- the nearest of 64 -----------------------------------------------------------------------

def vector_pictures(maps):
    """Maps at SIZE, as pictures with straight alpha: [M, V, 4, s, s]."""
    return torch.cat(at_size(maps, SIZE), 2)


def vector_cutouts(maps):
    """Maps as Cutouts: pictures of vectors, with nothing, the vector 0, in their background.

    So `squared_error` is |n - n'|^2 / 3 where there are two normals, and 1 / 3, as much as for 60
    degrees, where only one of two silhouettes is.
    """
    pictures = vector_pictures(maps)
    opacity = pictures[:, :, 3:]
    vectors = pictures[:, :, :3] * opacity
    return Cutouts(vectors, vectors.new_zeros(vectors.shape[:3] + (1, 1)), opacity)


def nearest_shapes(maps, things, cameras, seed=0, progress=iter):
    """Which of 64 captions the normals of each set are nearest to, and which real instance.

    maps: of M sets. things: M Things without a colour. seed: of the distractors. progress: wraps
    the loop (tqdm). Returns M Things and the Instances, of the true captions, that are nearest.
    As in `judge_sets` the loop is over captions, and each is drawn once.
    """
    device = maps.normal.device
    cutouts = vector_cutouts(maps)
    # The true caption first. Colours do not show.
    captions = [[thing, *distractors(thing, seed, colours=(None,))] for thing in things]
    errors = torch.zeros(len(things), len(captions[0]), device=device)
    seeds = [None] * len(things)
    framing = torch.ones(len(things))
    for pair, by_colour in progress(list(where_wanted(captions).items())):
        drawn = draw_maps(Thing(*pair), CANDIDATE_SEEDS, cameras, device, framing=1.0, size=SIZE)
        pictures = vector_pictures(drawn)
        ms = [m for m, k in by_colour[None]]
        ks = [k for m, k in by_colour[None]]
        errors[ms, ks] = error_of_sets(select(cutouts, ms), at_scales(pictures))
        own = [m for m, k in by_colour[None] if k == 0]
        if own:
            candidates = at_scales(pictures, FINE_SCALES)
            best = error_by_candidate(select(cutouts, own), candidates).argmin(1)
            for m, candidate in zip(own, best.tolist()):
                scale, proportion = divmod(candidate, len(CANDIDATE_SEEDS))
                seeds[m] = CANDIDATE_SEEDS[proportion]
                framing[m] = 1 / FINE_SCALES[scale]

    nearest = [choice[k] for choice, k in zip(captions, errors.argmin(1).tolist())]
    return nearest, Instances(seeds, framing)


def angle_between_maps(maps, others):
    """The mean angle in degrees between the normals of each set and of another's: [M].

    Over the pixels of all views where both have something; nan if there are none.
    """
    both = (maps.opacity > SOLID) & (others.opacity > SOLID)
    return mean_where(angle_between(maps.normal, others.normal), both)


# ---- the verdict -----------------------------------------------------------------------------

def judge_shapes(maps, surfaces, edges, things, *, cameras, seed=0, progress=iter):
    """Judge M objects, each by its Maps from `cameras` and by its mesh. Returns M verdicts.

    maps: of M sets. surfaces: an iterable of M meshes (vertices, faces), each None if there is
    none; edges: M numbers, how much of the world a picture shows at the distance of the origin.
    things: M Things, whose colours do not count. seed: of the distractors. progress: wraps the loop
    over captions, and that over meshes. A verdict is a dict:
        thing, nearest, recognised      as in `judge.verdict`, but from normals, without colours
        roughness                       in degrees
        ratio                           roughness over the mean of the caption's real renders
        angle                           degrees between its normals and those of the nearest of
                                        the caption's eight real instances
        components, watertight, floaters, volume, outside       see meshes.py
    A number is None where there is nothing to measure.
    """
    things = [thing._replace(colour=None) for thing in things]
    device = maps.normal.device
    size = maps.normal.shape[-1]
    nearest, instances = nearest_shapes(maps, things, cameras, seed, progress)
    drawn = maps_of(things, instances, cameras, device, size)
    silhouettes = (drawn.opacity[:, :, 0] > SOLID).cpu()
    angles = angle_between_maps(maps, drawn)
    rough = roughness(maps)
    ratios = rough / real_roughness(things, cameras, device, size)
    verdicts = []
    for m, surface in enumerate(progress(surfaces)):
        edge = edges[m] / instances.framing[m].item()
        real = real_mesh(things[m], instances.seeds[m], edge, device)
        verdicts.append({
            "thing": things[m],
            "nearest": nearest[m],
            "recognised": nearest[m] == things[m],
            "roughness": known(rough[m]),
            "ratio": known(ratios[m]),
            "angle": known(angles[m]),
            **mesh_facts(surface, real, silhouettes[m], cameras, edges[m]),
        })
    return verdicts


def known(number):
    """A tensor's number, or None for nan."""
    return None if number.isnan() else number.item()


def shape_summary(verdicts):
    """Figures over verdicts of `judge_shapes`, a dict: means, but for the ratios' three.

    None where nothing counts. An object without a mesh is not watertight.
    """
    def numbers(name):
        return [v[name] for v in verdicts if v[name] is not None]

    ratios = numbers("ratio") or [None]
    return {
        "r_precision": mean(numbers("recognised")),
        "angle": mean(numbers("angle")),
        "roughness": mean(numbers("roughness")),
        "smallest_ratio": min(ratios),
        "median_ratio": statistics.median(ratios),
        "largest_ratio": max(ratios),
        "watertight": mean([bool(v["watertight"]) for v in verdicts]),
        "components": mean(numbers("components")),
        "floaters": mean(numbers("floaters")),
        "volume": mean(numbers("volume")),
        "outside": mean(numbers("outside")),
    }


def shape_report(label, verdicts, real_verdicts):
    """A line of the result, a dict: the label's items, n, and each figure beside its real one."""
    report = {**label, "n": len(verdicts)}
    real = shape_summary(real_verdicts)
    for name, value in shape_summary(verdicts).items():
        report[name] = value
        report[f"{name}_real"] = real[name]
    return report
