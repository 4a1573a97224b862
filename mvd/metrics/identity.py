"""Is it this subject, or another of its class? The judge of dreambooth.py, on the toy world.

A subject is one of 64 instances of a class, with its own proportions and its own colour for every
part, which no caption can describe: a bulldog with a green body, a red bib and yellow paws. Five
renders from the front half are its photos. A view shows the subject if it is nearer to it than to
each of the 63 other instances, compared as in candidates.py.

    python -m mvd.metrics.identity bulldog 7 --photos photos/
    python dreambooth.py photos/ --prompt "a photo of [v] bulldog" --out runs/my-dog
    python -m mvd.metrics.identity bulldog 7 --model runs/my-dog
    python distill.py "[v] bulldog" --model runs/my-dog --out runs/my-dog-3d
    python -m mvd.metrics.identity bulldog 7 --run runs/my-dog-3d
"""
from pathlib import Path
from typing import NamedTuple

import torch

from .. import toyworld
from ..cameras import VIEWS, orbit
from ..model import MVDream
from ..tools import cli, run
from ..tools.device import choose_device, choose_dtype
from ..tools.errors import UserError
from ..tools.pictures import grid, save_png
from ..toyworld import ACCESSORIES, PAINTS, SLOT, SUBJECTS
from ..toyworld.tracer import paint, trace
from .candidates import (
    SAMPLED,
    SIZE,
    Cameras,
    Cutouts,
    at_real_size,
    at_scales,
    cut_out,
    draw_framing,
    error_by_azimuth,
    error_of_sets,
    error_of_views,
    even_azimuths,
    over_grey,
)
from .command import read_views
from .judge import sides_and_janus

# Instances per class: seeds 0 to 63.
INSTANCES = 64
# Azimuths of the photos, degrees. Nobody photographs the back.
PHOTOS = (-60.0, -30.0, 0.0, 30.0, 60.0)
# A side that is farther than this from the azimuth of each photo is shown by none. Degrees.
UNSEEN = 60.0
# Two sets of views, those of the second in the middle between those of the first.
TWO_SETS = Cameras(SAMPLED.elevation, even_azimuths(2 * VIEWS))
# Of candidates, where the pictures' own is not known. Degrees.
FIELDS_OF_VIEW = (22.0, 35.0, 50.0)


class Subject(NamedTuple):
    """One instance of a class."""
    # Its class, a key of SUBJECTS.
    name: str
    # Decides its proportions and colours, 0 to INSTANCES - 1.
    seed: int
    # What it wears, a key of ACCESSORIES, or None.
    accessory: str | None = None


# ---- renders ---------------------------------------------------------------------------------

def instance_palette(seeds, device="cpu"):
    """What each slot of N instances looks like, [N, 2 * slots, 3] in [0, 1].

    The first half of the slots is for the subject, in random colours; pupils and noses stay black,
    so that a face can be seen. The second half is for the accessory, in its ordinary colours.
    """
    ordinary = toyworld.palette(["white"])[0]
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 + seed)
        odd = 0.05 + 0.9 * torch.rand(len(PAINTS), 3, generator=generator)
        odd[SLOT["black"]] = torch.tensor(PAINTS["black"])
        rows.append(torch.cat([odd, ordinary]))
    return torch.stack(rows).to(device)


def render_subjects(
        subjects, azimuth, *, elevation=15.0, fov_deg=40.0, framing=1.0, size=SIZE, device="cpu"):
    """Renders of N Subjects of one class and accessory: [N, V, 4, size, size], straight alpha.

    azimuth [V]: degrees. elevation and fov_deg (degrees) and framing (`candidates.geometry`) are
    numbers or tensors that broadcast to [N, V].
    """
    name, _, accessory = subjects[0]
    seeds = [subject.seed for subject in subjects]
    # [N, V]
    azimuth = torch.as_tensor(azimuth).expand(len(subjects), -1)
    elevation = torch.as_tensor(elevation, dtype=torch.float32).expand_as(azimuth)
    fov_deg = torch.as_tensor(fov_deg, dtype=torch.float32).expand_as(azimuth)
    framing = torch.as_tensor(framing, dtype=torch.float32).expand_as(azimuth)
    distance = framing * 0.5 / torch.tan(torch.deg2rad(fov_deg) / 2)
    c2w = orbit(elevation, azimuth, distance)
    shapes = toyworld.build(name, accessory, seeds, device, accessory_slots=len(PAINTS))
    return paint(trace(shapes, c2w, fov_deg, size), instance_palette(seeds, device))


def render_photos(subject, size=256):
    """Five single pictures from the front half, cameras as in training: [5, 4, size, size].

    The random draw is torch.rand(3, 5): elevation, field of view, framing.
    """
    generator = torch.Generator().manual_seed(subject.seed)
    elevation, fov, framing = torch.rand(3, len(PHOTOS), generator=generator)
    rgba = render_subjects(
        [subject], torch.tensor(PHOTOS), elevation=30 * elevation, fov_deg=15 + 45 * fov,
        framing=0.9 + 0.2 * framing, size=size)
    return rgba[0]


def real_subject_views(subject, cameras, sets=4):
    """What a perfect model would draw: [sets, V, 3, 2 SIZE, 2 SIZE] in [0, 1].

    Framed as in training (`draw_framing`). Its score is the ceiling of what a model can score.
    """
    fov_deg, framing, grey = draw_framing(sets, cameras, subject.seed)
    rgba = render_subjects(
        [subject] * sets, torch.tensor(cameras.azimuth), elevation=cameras.elevation,
        fov_deg=fov_deg[:, None], framing=framing[:, None], size=2 * SIZE)
    return over_grey(rgba, grey)


def subject_candidates(subjects, cameras, device):
    """Candidates of Subjects of one class and accessory: a list of [K, V, 4, s, s], premultiplied.

    K are the scales, times FIELDS_OF_VIEW if the cameras' field of view is not known.
    """
    azimuth = torch.tensor(cameras.azimuth)
    fields = FIELDS_OF_VIEW if cameras.fov_deg is None else (cameras.fov_deg,)
    renders = []
    for fov_deg in fields:
        renders.append(render_subjects(
            subjects, azimuth, elevation=cameras.elevation, fov_deg=fov_deg, device=device))
    # [N, fields, V, 4, s, s]
    rgba = torch.stack(renders, 1)
    return [at_scales(of_subject) for of_subject in rgba]


# ---- the judge: views are [M, V, 3, H, W] in [0, 1] ------------------------------------------

def subject_errors(views, subjects, cameras):
    """How far M sets of views are from each of N Subjects, view by view: [M, N, V]."""
    cutouts = cut_out(views)
    groups = {}
    for subject in subjects:
        groups.setdefault((subject.name, subject.accessory), []).append(subject)
    errors = {}
    for group in groups.values():
        candidates = subject_candidates(group, cameras, views.device)
        for subject, of_subject in zip(group, candidates):
            errors[subject] = error_of_views(cutouts, of_subject)
    return torch.stack([errors[subject] for subject in subjects], 1)


def shows_subject(views, subject, cameras):
    """Which views show the subject rather than another instance of its class: bool [M, V]."""
    choice = [subject]
    for seed in range(INSTANCES):
        if seed != subject.seed:
            choice.append(subject._replace(seed=seed))
    return subject_errors(views, choice, cameras).argmin(1) == 0


def wears_accessory(views, subject, cameras):
    """Which sets show the subject with its accessory rather than another or none: bool [M]."""
    choice = [subject]
    for accessory in (None, *ACCESSORIES):
        if accessory != subject.accessory:
            choice.append(subject._replace(accessory=accessory))
    errors = subject_errors(views, choice, cameras)
    return errors.mean(2).argmin(1) == 0


def has_outline(views, subject, cameras):
    """Which sets have the outline of the subject rather than of another class: bool [M].

    `shows_subject` only compares within the class: for it, a bulldog in the colours of a car could
    be the car. Here pictures and candidates are all white on black, so colours do not count.
    """
    foreground = cut_out(views).foreground
    white_on_black = Cutouts(
        rgb=foreground.expand(-1, -1, 3, -1, -1),
        background=torch.zeros_like(foreground[..., :1, :1]),
        foreground=foreground)
    errors = []
    for name in SUBJECTS:
        other = subject._replace(name=name)
        candidates = subject_candidates([other], cameras, views.device)[0]
        alpha = candidates[:, :, 3:]
        errors.append(error_of_sets(white_on_black, alpha.expand(-1, -1, 4, -1, -1)))
    nearest = torch.stack(errors, 1).argmin(1)
    return nearest == list(SUBJECTS).index(subject.name)


def subject_sides_and_janus(views, subject, cameras):
    """`judge.sides_and_janus` of views of the subject: bool [M, V] and bool [M]."""
    candidates = subject_candidates([subject], cameras, views.device)[0]
    return sides_and_janus(error_by_azimuth(cut_out(views), candidates), cameras)


def unseen(cameras):
    """Which of the cameras see a side that no photo shows: bool [V]."""
    azimuth = torch.tensor(cameras.azimuth)[:, None]
    apart = (azimuth - torch.tensor(PHOTOS) + 180) % 360 - 180
    return apart.abs().amin(1) > UNSEEN


def report_line(label, views, subject, cameras):
    """The scores of M sets of views, as a line of text.

    identity       the share of views that show the subject; in brackets that of real renders
    unseen sides   the same among sides that no photo shows
    outline        the share of sets with the outline of the subject
    view accuracy  the share of views that show their own side
    Janus          the share of sets whose back looks more like the front than like the back
    and the share of sets with the accessory, if the subject has one.
    """
    real = real_subject_views(subject, cameras)
    # Judged together, so that candidates are drawn once.
    both = torch.cat([at_real_size(views), real.to(views.device)])
    shown = shows_subject(both, subject, cameras).float().cpu()
    shown, best = shown[:len(views)], shown[len(views):]
    back = unseen(cameras)
    outline = has_outline(views, subject, cameras).float().mean()
    right, janus = subject_sides_and_janus(views, subject, cameras)
    parts = [
        f"identity {shown.mean():.2f} ({best.mean():.2f})",
        f"unseen sides {shown[:, back].mean():.2f} ({best[:, back].mean():.2f})",
        f"outline {outline:.2f}",
        f"view accuracy {right.float().mean():.2f}",
        f"Janus {janus.float().mean():.2f}",
    ]
    if subject.accessory:
        worn = wears_accessory(views, subject, cameras).float().mean()
        parts.append(f"{subject.accessory} {worn:.2f}")
    return f"{label}: {', '.join(parts)}"


# ---- the command -----------------------------------------------------------------------------

def write_photos(folder, subject):
    """Write the photos of a subject as 0.png, 1.png, ..., with alpha."""
    if any(Path(folder).glob("*.png")):
        raise UserError(f"{folder} holds pictures already: choose another folder for --photos")
    run.make_folder(Path(folder) / "0.png")
    for i, rgba in enumerate(render_photos(subject)):
        pixels = (rgba * 255).round().byte().permute(1, 2, 0)
        toyworld.save(Path(folder) / f"{i}.png", pixels)


def sample_two_sets(model, prompt, samples):
    """Samples at the cameras TWO_SETS: [samples, 2 VIEWS, 3, H, W] in [0, 1]."""
    sets = []
    for azimuth in TWO_SETS.azimuth[:2]:
        sets.append(model.sample(
            [prompt] * samples, azimuth=azimuth, elevation=TWO_SETS.elevation, seed=0,
            views=VIEWS))
    # The views of both sets in turn, [samples, VIEWS, 2, ...].
    return torch.stack(sets, 2).flatten(1, 2)


def judge_model(folder, subject, samples, device):
    """Sample a model of dreambooth.py, save the pictures into its folder and print their scores."""
    model = MVDream.load(folder, device, choose_dtype("auto", device))
    name = subject.name
    prompts = [
        (f"[v] {name}", None),
        (f"[v] {name} wearing a top hat", "top hat"),
        (f"a {name}", None),
    ]
    for prompt, accessory in prompts:
        views = sample_two_sets(model, prompt, samples)
        sheet = grid(views.flatten(0, 1).cpu(), len(TWO_SETS.azimuth))
        save_png(run.free_file(Path(folder) / f"{prompt.replace(' ', '-')}.png"), sheet)
        asked = subject._replace(accessory=accessory)
        print(report_line(f'"{prompt}"', views, asked, TWO_SETS))


def main(argv=None):
    """The command: write photos of a subject, judge samples or an object. Raises UserError."""
    parser = cli.Parser(
        prog="python -m mvd.metrics.identity", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("subject", choices=tuple(SUBJECTS), metavar="class",
        help="what the subject is, such as bulldog")
    add("instance", type=int, choices=range(INSTANCES), metavar="N",
        help=f"which of its {INSTANCES} instances")
    add("--photos", help="folder to write the five photos to")
    add("--model", help="folder of dreambooth.py: sample the subject and judge the pictures")
    add("--run", help="folder of distill.py: judge the object")
    add("--samples", type=cli.converter(int, {"min": 1}), default=4,
        help="with --model: samples of each prompt")
    add("--device", default="auto", help="cuda, cpu, or mps (untested); auto: cuda, else cpu")
    flags = parser.parse_args(argv)
    subject = Subject(flags.subject, flags.instance)
    device = choose_device(flags.device)
    if not (flags.photos or flags.model or flags.run):
        raise UserError("say what to do: --photos FOLDER, --model FOLDER or --run FOLDER")
    if flags.photos:
        write_photos(flags.photos, subject)
    if flags.model:
        judge_model(flags.model, subject, flags.samples, device)
    if flags.run:
        cameras, views = read_views(flags.run)
        print(report_line(flags.run, views[None].to(device), subject, cameras))


if __name__ == "__main__":
    cli.main(main)
