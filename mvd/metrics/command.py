"""python -m mvd.metrics: judge samples of a model, or 3D objects that distill.py made.

    python -m mvd.metrics --samples 8       # 8 captions of each split, sampled by the tiny model
    python -m mvd.metrics --samples 8 --consistency     # do eight views show one thing?
    python -m mvd.metrics runs/*            # 3D objects
    python -m mvd.metrics runs/* --shape    # their surfaces
    python -m mvd.metrics runs/* --clip     # of any prompts, judged by CLIP

Prints one line per split (toyworld/words.py). What is not of the toy world, or too fine for its
renders, is judged by CLIP (clip.py).
"""
import functools
import glob
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from .. import toyworld
from ..model import MVDream
from ..tools import cli
from ..tools.device import LARGEST_SEED, choose_device, choose_dtype
from ..tools.errors import UserError
from ..tools.files import read_safetensors
from ..tools.pictures import check_numbers
from . import clip, consistency
from .candidates import SAMPLED, Cameras, at_real_size, real_views
from .judge import judge_sets, name_colours, report_line, variety
from .meshes import read_obj, real_mesh
from .shape import Maps, judge_shapes, maps_of, shape_report, unseen_instances
from .things import draw_things, read_prompt

SPLITS = ("3d", "image", "never")
# Samples per caption whose variety is measured.
VARIETY_SETS = 8


# ---- samples ---------------------------------------------------------------------------------

def sample_all(model, prompts, seed, batch=16, cameras=SAMPLED):
    """One set of views per prompt, from the cameras: [N, V, 3, H, W] in [0, 1].

    The cameras stand evenly round the thing, the first in front. The batch that begins with
    prompt i has seed + i.
    """
    starts = range(0, len(prompts), batch)
    sets = []
    for i in tqdm(starts, desc="sampling", unit="batch", disable=None):
        sets.append(model.sample(
            prompts[i:i + batch], elevation=cameras.elevation, views=len(cameras.azimuth),
            seed=(seed + i) % (LARGEST_SEED + 1)))
    views = torch.cat(sets)
    check_numbers(views)
    return views


def judge_samples(flags, device):
    """The reports of --samples: one dict per split."""
    things = []
    for split in SPLITS:
        things.extend(draw_things(split, flags.samples, flags.seed))
    prompts = [toyworld.captions(thing)[0] for thing in things]
    # CLIP is loaded first: if it cannot be downloaded, we fail before we sample.
    network = clip.load_clip(device) if flags.clip else None
    model = MVDream.load(flags.model, device, choose_dtype("auto", device))
    views = sample_all(model, prompts, flags.seed)
    if network is not None:
        splits = [split for split in SPLITS for _ in range(flags.samples)]
        return clip.clip_reports(list(zip(splits, prompts, views)), network)

    verdicts, real = judge_with_ceiling(views, things, SAMPLED, flags.seed)
    reports = []
    for i, split in enumerate(SPLITS):
        part = slice(i * flags.samples, (i + 1) * flags.samples)
        report = report_line({"split": split, "mode": "3d"}, verdicts[part], real[part])
        if flags.variety > 0:
            report["variety"] = relative_variety(
                model, things[part][:flags.variety], flags.seed + 1, device)
        if flags.consistency:
            report.update(consistency_with_ceiling(model, things[part], flags.seed, device))
        reports.append(report)
    return reports


def relative_variety(model, things, seed, device):
    """Variety of samples as a share of the variety of real renders, the mean over Things."""
    shares = []
    for thing in things:
        prompts = [toyworld.captions(thing)[0]] * VARIETY_SETS
        sampled = sample_all(model, prompts, seed, batch=VARIETY_SETS)
        real = real_views([thing] * VARIETY_SETS, SAMPLED, device, seed)
        shares.append(variety(sampled) / variety(real))
    return sum(shares) / len(shares)


def consistency_with_ceiling(model, things, seed, device):
    """The mean consistency of samples of Things, and of real renders, in dB, as a dict."""
    cameras = consistency.CAMERAS
    prompts = [toyworld.captions(thing)[0] for thing in things]
    sampled = sample_all(model, prompts, seed, batch=8, cameras=cameras)
    # Of any field of view, as the samples are.
    real = real_views(things, cameras._replace(fov_deg=None), device, seed)
    found = {}
    for name, views in (("consistency", sampled), ("consistency_ceiling", real)):
        progress = functools.partial(tqdm, desc="fitting fields", unit="set", disable=None)
        found[name] = consistency.psnr_of_predictions(views, progress).mean().item()
    return found


def judge_with_ceiling(views, things, cameras, seed):
    """Verdicts on the pictures, and on real renders of the same Things.

    They are judged together, so that candidates are drawn once.
    """
    things = name_colours(views, things, cameras)
    real = real_views(things, cameras, views.device, seed)
    both = torch.cat([at_real_size(views), real])
    progress = functools.partial(tqdm, desc="judging", unit="pair", disable=None)
    verdicts = judge_sets(both, things * 2, cameras, seed, progress)
    return verdicts[:len(things)], verdicts[len(things):]


# ---- runs of distill.py ----------------------------------------------------------------------

class Run(NamedTuple):
    """What distill.py left in a folder."""
    # Its path, as the user named it.
    folder: str
    # What the object should show.
    prompt: str
    # "3d" or "2d".
    mode: str
    cameras: Cameras
    # [V, 3, H, W] in [0, 1].
    views: torch.Tensor
    # Only for --shape (`with_surface`): Maps of one set, and how much of the world a picture shows
    # at the distance of the origin.
    maps: Maps | None = None
    edge: float | None = None


def read_views(folder):
    """The pictures in a run's folder: Cameras, views [V, 3, H, W].

    Raises UserError, KeyError or ValueError if they are not as distill.py writes them.
    """
    tensors, _ = read_safetensors(Path(folder) / "views.safetensors")
    views, azimuth = tensors["rgb"], tensors["azimuth"]
    if views.ndim != 4 or views.shape[:2] != (azimuth.numel(), 3) or not views.numel():
        raise ValueError(f"its pictures have the shape {list(views.shape)}")
    if not views.is_floating_point() or not views.isfinite().all():
        raise ValueError("its pictures are not numbers from 0 to 1")
    if tensors["elevation"].numel() != 1 or tensors["fov"].numel() != 1:
        raise ValueError("its cameras have several elevations or fields of view")
    cameras = Cameras(
        elevation=tensors["elevation"].item(),
        azimuth=tuple(azimuth.tolist()),
        fov_deg=tensors["fov"].item())
    return cameras, views


def read_run(folder):
    """A folder of distill.py as a Run. Raises UserError if it is not one, or is not finished."""
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
        prompt, mode = config["prompt"], config.get("mode", "3d")
        if not isinstance(prompt, str) or not isinstance(mode, str):
            raise ValueError("its prompt or mode is not text")
        cameras, views = read_views(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a finished run of distill.py ({error}): "
            "name only folders that hold views.safetensors")
    return Run(folder, prompt, mode, cameras, views)


def folders_of(patterns):
    """The folders that paths and patterns name, each once; not every shell expands a `*`."""
    folders = []
    for pattern in patterns:
        matches = [] if Path(pattern).exists() else sorted(glob.glob(pattern))
        folders += matches or [pattern]
    return list(dict.fromkeys(folders))


def read_runs(folders, read):
    """What read(folder) returns of each folder that can be judged, a list.

    What cannot, since `read` raises UserError (a training, say), is named on stderr and left out.
    Raises UserError if nothing is left.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read(folder))
        except UserError as error:
            problems.append(error)
    last = None if runs else problems.pop()
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if last:
        raise last
    return runs


def with_thing(folder, shape):
    """A Run, with its surface if its shape is judged, and the Thing that its prompt asks for."""
    run = read_run(folder)
    try:
        thing = read_prompt(run.prompt)
    except UserError as error:
        raise UserError(f"{folder}: {error}; --clip judges any prompt") from error
    return (with_surface(run) if shape else run), thing


def judge_runs(flags, device):
    """The reports of runs: one dict per mode and split. Prints the verdict on each run, too.

    Runs whose pictures have the same cameras and size are judged together.
    """
    folders = folders_of(flags.runs)
    if flags.clip:
        runs = read_runs(folders, read_run)
        sets = [(run.mode, run.prompt, run.views) for run in runs]
        return clip.clip_reports(sets, clip.load_clip(device))

    judge, words, line = judge_pictures, in_words, report_line
    if flags.shape:
        judge, words, line = judge_surfaces, shape_in_words, shape_report
    groups = {}
    for run, thing in read_runs(folders, functools.partial(with_thing, shape=flags.shape)):
        group = groups.setdefault((run.cameras, run.views.shape), [])
        group.append((run, thing))
    # (mode, split) -> verdicts, verdicts on real renders
    found = {}
    for (cameras, _), group in groups.items():
        things = [thing for run, thing in group]
        group = [run for run, thing in group]
        verdicts, real_verdicts = judge(group, things, cameras, device, flags.seed)
        for run, verdict, real in zip(group, verdicts, real_verdicts):
            thing = verdict["thing"]
            key = (run.mode, toyworld.split(thing.subject, thing.accessory))
            ours, ceiling = found.setdefault(key, ([], []))
            ours.append(verdict)
            ceiling.append(real)
            if not flags.json:
                print(f"{run.folder}: {words(verdict)}")

    if flags.shape and len(found) > 1:
        found.update(of_all_splits(found))
    reports = []
    for mode, split in sorted(found):
        ours, ceiling = found[mode, split]
        reports.append(line({"split": split, "mode": mode}, ours, ceiling))
    return reports


def of_all_splits(found):
    """{(mode, "all"): the verdicts of all its splits}, from {(mode, split): (ours, on real ones)}.

    A median over all splits cannot be told from those of each.
    """
    joined = {}
    for (mode, _), (ours, ceiling) in found.items():
        all_ours, all_ceiling = joined.setdefault((mode, "all"), ([], []))
        all_ours.extend(ours)
        all_ceiling.extend(ceiling)
    return joined


def judge_pictures(runs, things, cameras, device, seed):
    """Verdicts on the pictures of runs of M Things, and on real renders."""
    views = torch.stack([run.views for run in runs]).to(device)
    return judge_with_ceiling(views, things, cameras, seed)


def in_words(verdict):
    """A verdict for people: "recognised", "looks like a blue bus, Janus", ..."""
    text = recognised_in_words(verdict)
    if verdict["janus"]:
        text += ", Janus"
    return text


def recognised_in_words(verdict):
    """What pictures are nearest to: "recognised", or "looks like a blue bus"."""
    if verdict["recognised"]:
        return "recognised"
    return "looks like " + toyworld.captions(verdict["nearest"])[0]


# ---- the shapes of runs ----------------------------------------------------------------------

def with_surface(run):
    """The Run with its maps and edge. Raises UserError if its folder holds no normals."""
    tensors, _ = read_safetensors(Path(run.folder) / "views.safetensors")
    if not {"normal", "opacity", "distance"} <= tensors.keys():
        raise UserError(
            f"{run.folder} was made by an older distill.py, which wrote no normals: "
            "make the object again, or leave out --shape")
    half = torch.tan(torch.deg2rad(tensors["fov"]) / 2)
    return run._replace(
        maps=Maps(tensors["normal"][None], tensors["opacity"][None]),
        edge=2 * (tensors["distance"] * half).item())


def judge_surfaces(runs, things, cameras, device, seed):
    """Verdicts of shape.py on runs of M Things, and on real instances that no candidate is."""
    unseen = unseen_instances(len(things), cameras, seed)
    real = maps_of(things, unseen, cameras, device, runs[0].views.shape[-1])
    normal = torch.cat([run.maps.normal for run in runs])
    opacity = torch.cat([run.maps.opacity for run in runs])
    both = Maps(
        torch.cat([normal.to(device), real.normal]), torch.cat([opacity.to(device), real.opacity]))
    edges = [run.edge for run in runs]

    def meshes():
        for run in runs:
            yield read_obj(Path(run.folder) / "mesh.obj")
        for thing, instance, framing, edge in zip(things, unseen.seeds, unseen.framing, edges):
            yield real_mesh(thing, instance, edge / framing.item(), device)

    progress = functools.partial(tqdm, desc="judging", disable=None)
    verdicts = judge_shapes(
        both, meshes(), edges * 2, things * 2, cameras=cameras, seed=seed, progress=progress)
    return verdicts[:len(runs)], verdicts[len(runs):]


def shape_in_words(verdict):
    """A verdict on a shape for people: "recognised, normals 12 degrees off, roughness ..."."""
    numbers = {name: cell(value) for name, value in verdict.items()}
    words = [
        recognised_in_words(verdict),
        "normals {angle} degrees off".format(**numbers),
        "roughness {roughness} degrees, {ratio} times the real".format(**numbers),
    ]
    if verdict["watertight"] is None:
        words.append("no mesh")
    else:
        words.append("watertight" if verdict["watertight"] else "not watertight")
        words.append(
            "volume {volume} times the real, in {components} parts, {floaters} of it floating, "
            "{outside} outside the hull".format(**numbers))
    return "; ".join(words)


def print_shape_tables(reports):
    """Print a table per report of `shape_report`: its figures, and beside each the real one."""
    for report in reports:
        print("split {split}, mode {mode}, n = {n}".format(**report))
        rows = []
        for name, value in report.items():
            if f"{name}_real" in report:
                rows.append({"figure": name, "runs": value, "real": report[f"{name}_real"]})
        print_table(rows)


# ---- the command -----------------------------------------------------------------------------

def print_table(reports):
    """Print reports, dicts with the same keys, as a table: a column per key."""
    widths = [max(15, len(name) + 2) for name in reports[0]]
    print("".join(name.rjust(width) for name, width in zip(reports[0], widths)))
    for report in reports:
        cells = [cell(value) for value in report.values()]
        print("".join(text.rjust(width) for text, width in zip(cells, widths)))


def cell(value):
    """The text of a table's cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def main(argv=None):
    """The command: judge samples of a model, or runs, and print the reports. Raises UserError."""
    parser = cli.Parser(
        prog="python -m mvd.metrics",
        description="Does it show what was asked, from every side? Pictures of things from the "
        "toy world, judged by rendering candidates.")
    add = parser.add_argument
    add("runs", nargs="*", help="folders that distill.py wrote")
    add("--samples", type=int, help="sample and judge so many captions of each split")
    add("--variety", type=int, default=0,
        help="with --samples: measure the variety of so many captions per split")
    add("--consistency", action="store_true",
        help="with --samples: fit fields to half of eight views, and measure in dB how well they "
        "predict the other half")
    add("--model", default="tiny",
        help="with --samples: tiny, mvdream-sd21, sd21, or the path of a checkpoint")
    add("--clip", action="store_true",
        help="let CLIP judge, by any prompts, instead of the world's renders")
    add("--shape", action="store_true",
        help="with runs: judge their surfaces instead of their colours, by normals and mesh")
    add("--device", default="auto", help="cuda, cpu, or mps (untested); auto: cuda, else cpu")
    add("--seed", type=cli.converter(int, {"min": 0}), default=0,
        help="of captions, noise and real renders")
    add("--json", action="store_true", help="one JSON object per line instead of a table")
    flags = parser.parse_args(argv)
    if bool(flags.runs) == (flags.samples is not None):
        raise UserError(
            "name the folders of runs, or say how many captions to sample: --samples 8")
    if flags.shape and (flags.clip or not flags.runs):
        raise UserError("--shape judges the folders of runs, by the world's renders, not by CLIP")
    if flags.runs and (flags.variety or flags.consistency):
        raise UserError("--variety and --consistency go with --samples")
    device = choose_device(flags.device)
    if flags.runs:
        reports = judge_runs(flags, device)
    else:
        reports = judge_samples(flags, device)
    if flags.json:
        for report in reports:
            print(json.dumps(report))
    elif flags.runs and flags.shape:
        print_shape_tables(reports)
    else:
        print_table(reports)
