"""Does it show what was asked, from every side? Pictures of things from the toy world, judged by rendering candidates.

The world can render any caption, so the judge needs no network: pictures belong to the caption whose renders they are
nearest to. To be fair, the judge looks at each candidate from the pictures' own cameras, before their own background, at
the best of a few scales, and in eight proportions that are the same for all candidates; and beside every score stands its
ceiling, what real renders score (other proportions, field of view and framing).

- R-precision: among 64 captions the pictures must be nearest to the true one. Half of the others differ from it in exactly
  one of subject, accessory and colour (cf. DreamFusion §4, where CLIP is the judge).
- View accuracy: each view of a thing with a front must be nearest to its own azimuth among the set's.
- Janus rate: of the recognised things with a front, how many have a back nearer to a front than to a back.
- Variety: how far samples of one caption are from each other, as a share of the same for real renders.

    python -m mvd.metrics --samples 8              # 8 captions of each split, sampled by the tiny model and judged
    python -m mvd.metrics runs/*                   # distilled objects
    python -m mvd.metrics runs/* --clip            # with any prompts, judged by CLIP

What is not of the world, or too fine for its renders, is judged by CLIP (`clip.py`).
"""
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..tools import cli
from . import clip
from ..toyworld import tracer as sdf, world as toyworld
from ..cameras import orbit
from ..tools.device import choose_device, choose_dtype
from ..tools.errors import UserError
from ..tools.files import read_safetensors
from ..model import MVDream
from ..toyworld.world import ACCESSORIES, COLOURS, ORIENTED, SUBJECTS, Thing

SIZE = 32                                        # pixels, at which everything is compared: a wrong accessory costs 3 times the
                                                 # right one's error there, as at 48, and drawing takes half the time
SCALES = (0.72, 0.80, 0.89, 1.0, 1.12, 1.25)     # of a candidate: things framed smaller or larger than the world frames them
INSTANCES = range(8)                             # seeds of the candidates' proportions; training has seeds from a million on
REAL = range(1000, 1_000_000)                    # and real renders draw theirs from here
CAPTIONS = 64
SPLITS = ("3d", "image", "never")


class Cameras(NamedTuple):
    """One set of views, degrees. fov_deg None: not known, as for samples; then it may be anything that training shows."""
    elevation: float
    azimuth: tuple
    fov_deg: Optional[float] = None


SAMPLED = Cameras(15.0, (0.0, 90.0, 180.0, 270.0))


# ---- captions --------------------------------------------------------------------------------------------------------------

def distractors(thing, seed=0):
    """63 other Things: 32 differ from it in exactly one of subject, accessory and colour, 31 in more. Always the same ones."""
    rng = random.Random(f"{seed} {thing}")
    one = ([thing._replace(subject=s) for s in SUBJECTS if s != thing.subject]
           + [thing._replace(accessory=a) for a in ACCESSORIES if a != thing.accessory]
           + [thing._replace(colour=c) for c in COLOURS if c != thing.colour])
    every = [Thing(*names) for names in itertools.product(SUBJECTS, ACCESSORIES, COLOURS)]
    more = [other for other in every if sum(a != b for a, b in zip(other, thing)) > 1]
    return rng.sample(one, CAPTIONS // 2) + rng.sample(more, CAPTIONS // 2 - 1)


def draw_things(split, count, seed=0):
    """`count` different Things of a split that have an accessory and a colour; all subjects in turn, as far as they are there."""
    rng, by_subject = random.Random(f"{seed} {split}"), {}
    for (subject, accessory), colour in itertools.product(toyworld.pairs(split), COLOURS):
        if accessory:
            by_subject.setdefault(subject, []).append(Thing(subject, accessory, colour))
    rows = [rng.sample(things, len(things)) for things in rng.sample(list(by_subject.values()), len(by_subject))]
    turns = [thing for turn in itertools.zip_longest(*rows) for thing in turn if thing]
    if not 1 <= count <= len(turns):
        raise UserError(f"the split {split!r} has 1 to {len(turns)} captions, not {count}")
    return turns[:count]


def read_prompt(prompt):
    """The Thing that a prompt describes; its colour is None if the prompt names none. Raises UserError if the world has none."""
    for thing in itertools.starmap(Thing, itertools.product(SUBJECTS, (None, *ACCESSORIES), (None, *COLOURS))):
        if prompt.strip().lower() in toyworld.captions(thing):
            return thing
    raise UserError(f'"{prompt}" is no caption of the toy world, so there is nothing to judge it by')


# ---- pictures --------------------------------------------------------------------------------------------------------------

def geometry(thing, seeds, cameras, device, fov_deg, framing, size):
    """Renders of a Thing in one proportion a seed, for `sdf.paint` to colour: Buffers of N things, V views. fov_deg [N].

    framing (a number or [N]) 1: the cube [-0.5, 0.5]^3 fills the picture, as on average in training; 1.1: 1.1 times as far.
    """
    distance = framing * 0.5 / torch.tan(torch.deg2rad(fov_deg) / 2)                                    # [N]
    c2w = orbit(cameras.elevation, torch.tensor(cameras.azimuth), distance[:, None])                    # [N, V, 4, 4]
    shapes = toyworld.build(thing.subject, thing.accessory, list(seeds), device)
    return sdf.render(shapes, c2w.to(device), fov_deg.to(device), size)


def real_views(things, cameras, device="cpu", seed=0, size=2 * SIZE):
    """What a perfect model would draw: [M, V, 3, size, size] in [0, 1], proportions that the judge does not use, and framing,
    grey background and (if not known) field of view as in training (MVDream §3.3)."""
    fov, far, grey = torch.rand(3, len(things), generator=torch.Generator().manual_seed(seed))
    fov_deg = 15 + 45 * fov if cameras.fov_deg is None else torch.full_like(fov, cameras.fov_deg)
    seeds = random.Random(seed).sample(REAL, len(things))
    views = torch.zeros(len(things), len(cameras.azimuth), 3, size, size, device=device)
    for pair in {thing[:2] for thing in things}:
        of_pair = [m for m, thing in enumerate(things) if thing[:2] == pair]
        buffers = geometry(Thing(*pair), [seeds[m] for m in of_pair], cameras, device, fov_deg[of_pair],
                           0.9 + 0.2 * far[of_pair], size)
        rgba = sdf.paint(buffers, toyworld.palette([things[m].colour for m in of_pair], device))        # [m, V, 4, size, size]
        rgb, alpha, behind = rgba[:, :, :3], rgba[:, :, 3:], grey[of_pair].to(device)[:, None, None, None, None]
        views[of_pair] = rgb * alpha + behind * (1 - alpha)
    return views


def as_real(views):
    """Pictures [M, V, 3, H, W] at the size of `real_views`, so that both can be judged together."""
    small = F.interpolate(views.flatten(0, 1), (2 * SIZE, 2 * SIZE), mode="bilinear", antialias=True, align_corners=False)
    return small.unflatten(0, views.shape[:2])


def cut_out(views):
    """Pictures [..., 3, H, W] in [0, 1] -> at SIZE: [..., 3, s, s], their backgrounds [..., 3, 1, 1], foregrounds [..., 1, s, s].

    The background is one colour a view, the median of the border; the foreground is what differs from it visibly.
    """
    small = F.interpolate(views.flatten(0, -4).float(), (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    border = torch.cat([small[..., 0, :], small[..., -1, :], small[..., 0], small[..., -1]], -1)         # [N, 3, 4 s]
    background = border.median(-1).values[..., None, None]
    foreground = ((small - background).abs().amax(1, keepdim=True) > 0.08).float()
    return tuple(a.unflatten(0, views.shape[:-3]) for a in (small, background, foreground))


def at_scales(rgba):
    """Renders [N, V, 4, s, s], straight alpha -> colour times alpha, and alpha, at each of SCALES: [SCALES * N, V, 4, s, s]."""
    premultiplied = torch.cat([rgba[:, :, :3] * rgba[:, :, 3:], rgba[:, :, 3:]], 2).flatten(0, 1)
    out = []
    for scale in SCALES:
        theta = torch.tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]], device=rgba.device).expand(len(premultiplied), -1, -1)
        grid = F.affine_grid(theta, premultiplied.shape, align_corners=False)
        out.append(F.grid_sample(premultiplied, grid, align_corners=False).unflatten(0, rgba.shape[:2]))
    return torch.cat(out)


def distance(pictures, background, foreground, candidates):
    """Mean squared error over the foreground of either, summed before it is divided: (sum, weight), each [M, K, V].

    pictures [M, V, 3, s, s] and theirs (`cut_out`); candidates [K, V, 4, s, s], premultiplied, laid over each background.
    """
    rgb, alpha = candidates[:, :, :3], candidates[:, :, 3:]
    drawn = rgb + (1 - alpha) * background[:, None]                                                     # [M, K, V, 3, s, s]
    either = torch.maximum(foreground[:, None], alpha)
    error = (pictures[:, None] - drawn).square_().mean(3, keepdim=True).mul_(either)
    return error.sum((3, 4, 5)), either.sum((3, 4, 5))


# ---- the judge -------------------------------------------------------------------------------------------------------------

def candidate_geometry(thing, cameras, device):
    """The eight proportions of a Thing, uncoloured. Where the field of view is not known, each has its own between 15 and 60."""
    count = len(INSTANCES)
    fov_deg = 15 + 45 * (torch.arange(count) + 0.5) / count if cameras.fov_deg is None else torch.full((count,), cameras.fov_deg)
    return geometry(thing, INSTANCES, cameras, device, fov_deg, 1.0, SIZE)


def paint(buffers, colour):
    """The candidates of one (subject, accessory) pair in a colour: [K, V, 4, s, s], K = proportions times scales."""
    return at_scales(sdf.paint(buffers, toyworld.palette([colour] * len(INSTANCES), buffers.slot.device)))


def name_colours(views, things, cameras):
    """The same Things, where those that leave the colour open get the one that suits their pictures best; as `judge_sets`."""
    cut, named = cut_out(views), list(things)
    for m, thing in enumerate(things):
        if thing.colour is None:
            buffers = candidate_geometry(thing, cameras, views.device)
            errors = {colour: nearest(cut, [m], paint(buffers, colour)).item() for colour in COLOURS}
            named[m] = thing._replace(colour=min(errors, key=errors.get))
    return named


def judge_sets(views, things, cameras, seed=0, progress=iter):
    """Judge M sets of pictures, views [M, V, 3, H, W] in [0, 1], of M Things with a colour, all from `cameras`. -> M dicts:

    thing; nearest (the Thing it looks most like); recognised (are they the same); and for things with a front, else None:
    right_views (share of views nearest to their own azimuth) and janus (bool). seed: of the distractors. progress wraps the loop
    over (subject, accessory) pairs, each of which is drawn once (tqdm).
    """
    device, cut = views.device, cut_out(views)
    captions = [[thing] + distractors(thing, seed) for thing in things]
    wanted = {}                                                                # pair -> colour -> [(m, k)]: drawn once for all
    for m, k in itertools.product(range(len(things)), range(CAPTIONS)):
        subject, accessory, colour = captions[m][k]
        wanted.setdefault((subject, accessory), {}).setdefault(colour, []).append((m, k))

    errors = torch.zeros(len(things), CAPTIONS, device=device)
    confusion = torch.zeros(len(things), len(cameras.azimuth), len(cameras.azimuth), device=device)      # [M, view, azimuth]
    for pair, colours in progress(list(wanted.items())):
        buffers = candidate_geometry(Thing(*pair), cameras, device)
        for colour, places in colours.items():
            candidates, (ms, ks) = paint(buffers, colour), map(list, zip(*places))
            errors[ms, ks] = nearest(cut, ms, candidates)
            own = [m for m, k in places if k == 0]
            if own and pair[0] in ORIENTED:
                confusion[own] = nearest_by_view(cut, own, candidates)
    return [row(captions[m], errors[m], confusion[m], cameras) for m in range(len(things))]


def chunks(cut, which, candidates):
    """The pictures of some sets, as many at a time as fit into memory beside the candidates."""
    count = max(1, (2 ** 28 if candidates.is_cuda else 2 ** 22) // candidates.numel())
    for i in range(0, len(which), count):
        yield [part[which[i:i + count]] for part in cut]


def nearest(cut, which, candidates):
    """Error of the sets `which` to the nearest candidate, one proportion and scale for all views: [len(which)]."""
    pairs = (distance(*part, candidates) for part in chunks(cut, which, candidates))
    return torch.cat([(error.sum(2) / weight.sum(2)).amin(1) for error, weight in pairs])


def nearest_by_view(cut, which, candidates):
    """Error of every view to the nearest candidate seen from each of the set's azimuths: [len(which), V views, V azimuths]."""
    columns = []
    for azimuth in range(candidates.shape[1]):
        alone = candidates[:, azimuth:azimuth + 1].expand_as(candidates)
        pairs = (distance(*part, alone) for part in chunks(cut, which, candidates))
        columns.append(torch.cat([(error / weight).amin(1) for error, weight in pairs]))
    return torch.stack(columns, 2)


def sides(confusion, cameras):
    """From `nearest_by_view` [M, V, V]: which views are nearest to their own azimuth, bool [M, V]; and which sets have a back that is
    nearer to the front than to the back (Janus), bool [M]."""
    def nearest_to(angle):
        return min(range(len(cameras.azimuth)), key=lambda v: abs((cameras.azimuth[v] - angle + 180) % 360 - 180))
    front, back = nearest_to(0), nearest_to(180)
    own = torch.arange(confusion.shape[1], device=confusion.device)
    return confusion.argmin(2) == own, confusion[:, back, front] < confusion[:, back, back]


def row(captions, errors, confusion, cameras):
    """The verdict on one set: what `judge_sets` describes, from its errors [CAPTIONS] and [V, V]. captions[0] is the true one."""
    result = {"thing": captions[0], "nearest": captions[errors.argmin()], "right_views": None, "janus": None}
    result["recognised"] = result["nearest"] == captions[0]
    if captions[0].subject in ORIENTED:
        right, janus = sides(confusion[None], cameras)
        result["right_views"], result["janus"] = right.float().mean().item(), janus.item()
    return result


def summary(rows):
    """Means over rows of `judge_sets`: n, r_precision, view_accuracy, janus_rate (None where nothing counts)."""
    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else None
    oriented = [r for r in rows if r["right_views"] is not None]
    return {"n": len(rows), "r_precision": mean(r["recognised"] for r in rows),
            "view_accuracy": mean(r["right_views"] for r in oriented),
            "janus_rate": mean(r["janus"] for r in oriented if r["recognised"])}


def variety(views):
    """Mean distance between any two of N sets [N, V, 3, H, W], root of the mean square, backgrounds replaced by one grey."""
    pictures, _, foreground = cut_out(views)
    pictures = torch.where(foreground > 0, pictures, 0.5).flatten(1)
    return torch.pdist(pictures).mean().item() / math.sqrt(pictures.shape[1])


# ---- command line ----------------------------------------------------------------------------------------------------------

def sample_all(model, prompts, seed, batch=16):
    """Samples for many prompts: [N, V, 3, H, W] in [0, 1], from the cameras SAMPLED."""
    starts = tqdm(range(0, len(prompts), batch), desc="sampling", unit="batch", disable=None)
    return torch.cat([model.sample(prompts[i:i + batch], elevation=SAMPLED.elevation, seed=seed + i) for i in starts])


def read_views(folder):
    """What distill.py drew in a run's folder: Cameras, views [V, 3, H, W]."""
    tensors, _ = read_safetensors(Path(folder) / "views.safetensors")
    return Cameras(tensors["elevation"].item(), tuple(tensors["azimuth"].tolist()), tensors["fov"].item()), tensors["rgb"]


def read_run(folder):
    """A folder of distill.py -> (prompt, mode, Cameras, views [V, 3, H, W]). Raises UserError if it is none, or not finished."""
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
        return config["prompt"], config.get("mode", "3d"), *read_views(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no finished run of distill.py ({error}): name only folders that hold views.safetensors")


def judge_with_ceiling(views, things, cameras, seed):
    """Rows of the pictures and rows of real renders of the same Things, judged together, so that candidates are drawn once."""
    things = name_colours(views, things, cameras)
    both = torch.cat([as_real(views), real_views(things, cameras, views.device, seed)])
    rows = judge_sets(both, things * 2, cameras, seed, lambda pairs: tqdm(pairs, desc="judging", unit="pair", disable=None))
    return rows[:len(things)], rows[len(things):]


def report(label, rows, real, **more):
    """One line of the result: scores of the pictures, and ceilings of the same."""
    ours, best = summary(rows), summary(real)
    return {**label, "n": ours["n"], "r_precision": ours["r_precision"], "ceiling": best["r_precision"],
            "view_accuracy": ours["view_accuracy"], "view_ceiling": best["view_accuracy"],
            "janus_rate": ours["janus_rate"], "janus_ceiling": best["janus_rate"], **more}


def judge_samples(flags, device):
    """--samples: one report a split."""
    things = [thing for split in SPLITS for thing in draw_things(split, flags.samples, flags.seed)]
    prompts = [toyworld.captions(thing)[0] for thing in things]
    network = clip.load(device) if flags.clip else None
    model = MVDream.load(flags.model, device, choose_dtype("auto", device))
    views = sample_all(model, prompts, flags.seed)
    if network:
        return clip.judge([(SPLITS[i // flags.samples], prompt, views[i]) for i, prompt in enumerate(prompts)], network)
    rows, real = judge_with_ceiling(views, things, SAMPLED, flags.seed)
    reports = []
    for i, split in enumerate(SPLITS):
        part, more = slice(i * flags.samples, (i + 1) * flags.samples), {}
        if flags.variety > 0:
            shares = []
            for thing in things[part][:flags.variety]:
                drawn = sample_all(model, [toyworld.captions(thing)[0]] * 8, flags.seed + 1, batch=8)
                shares.append(variety(drawn) / variety(real_views([thing] * 8, SAMPLED, device, flags.seed + 1)))
            more["variety"] = sum(shares) / len(shares)
        reports.append(report({"split": split, "mode": "3d"}, rows[part], real[part], **more))
    return reports


def judge_runs(flags, device):
    """Folders: one report a mode and split. Runs from the same cameras are judged together; what is no run of distill.py (a training,
    say) is named and left out."""
    others = [folder for folder in flags.runs if not (Path(folder) / "views.safetensors").exists()]
    if len(others) == len(flags.runs):
        raise UserError(f"{others[0]} is no finished run of distill.py: name folders that hold views.safetensors")
    for folder in others:
        print(f"left out, no finished run of distill.py: {folder}", file=sys.stderr)
    found = {folder: read_run(folder) for folder in flags.runs if folder not in others}
    if flags.clip:
        return clip.judge([(mode, prompt, views) for prompt, mode, _, views in found.values()], clip.load(device))
    groups, reports = {}, {}
    for folder, (prompt, mode, cameras, views) in found.items():
        groups.setdefault((cameras, views.shape), []).append((folder, mode, read_prompt(prompt), views))
    for (cameras, _), runs in groups.items():
        folders, modes, things, views = zip(*runs)
        both = judge_with_ceiling(torch.stack(views).to(device), things, cameras, flags.seed)
        for folder, mode, row, real in zip(folders, modes, *both):
            key = mode, toyworld.split(row["thing"].subject, row["thing"].accessory)
            reports.setdefault(key, []).append((row, real))
            if not flags.json:
                verdict = "recognised" if row["recognised"] else "looks like " + toyworld.captions(row["nearest"])[0]
                print(f"{folder}: {verdict}{', Janus' if row['janus'] else ''}")
    return [report({"split": split, "mode": mode}, *zip(*rows)) for (mode, split), rows in sorted(reports.items())]


def main():
    """The command: judge samples of a model, or objects of runs, and print a table. Raises UserError."""
    parser = cli.Parser(prog="python -m mvd.metrics", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders that distill.py wrote")
    parser.add_argument("--samples", type=int, help="sample and judge so many captions of each split")
    parser.add_argument("--variety", type=int, default=0, help="with --samples: measure the variety of so many captions a split")
    parser.add_argument("--model", default="tiny", help="with --samples: tiny, mvdream-sd21, sd21, or the path of a checkpoint")
    parser.add_argument("--clip", action="store_true", help="let CLIP judge, by any prompts, instead of the world's renders")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto takes the best")
    parser.add_argument("--seed", type=int, default=0, help="of captions, noise and real renders")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    flags = parser.parse_args()
    if bool(flags.runs) == (flags.samples is not None):
        raise UserError("name the folders of runs, or say how many captions to sample: --samples 8")
    device = choose_device(flags.device)
    reports = judge_runs(flags, device) if flags.runs else judge_samples(flags, device)
    if flags.json:
        for line in reports:
            print(json.dumps(line))
        return
    print("".join(f"{name:>15}" for name in reports[0]))
    for line in reports:
        print("".join(f"{'-' if v is None else f'{v:.3f}' if isinstance(v, float) else v:>15}" for v in line.values()))
