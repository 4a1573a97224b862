"""Is it this subject, or another of its class? The judge of dreambooth.py, on the toy world.

A subject is one of 64 instances of a class, each with its own proportions and with a colour of its own for every part, such as no
caption can express: a bulldog with a green body, a red bib and yellow paws. Five renders of it from the front half are the photos.
Pictures show the subject if they are nearer to it than to each of the 63 others, by mean squared error, view by view, from the same
cameras; as in metrics.py, at the best of a few scales and fields of view, on the pictures' own background.

    python -m mvd.metrics.identity bulldog 7 --photos photos/
    python dreambooth.py photos/ --prompt "a photo of [v] bulldog" --out runs/my-dog
    python -m mvd.metrics.identity bulldog 7 --model runs/my-dog
    python distill.py "[v] bulldog" --model runs/my-dog --out runs/my-dog-3d
    python -m mvd.metrics.identity bulldog 7 --run runs/my-dog-3d
"""
from pathlib import Path

import torch

from ..tools import cli
from . import judge as metrics
from ..toyworld import tracer as sdf, world as toyworld
from ..toyworld.animals import BLACK, PAINTS
from ..cameras import orbit
from ..tools.device import choose_device, choose_dtype
from ..tools.errors import UserError
from .judge import SIZE, Cameras
from ..model import MVDream
from ..tools.pictures import grid, save_png
from ..toyworld.world import ACCESSORIES, SUBJECTS

INSTANCES = 64
PHOTOS = (-60.0, -30.0, 0.0, 30.0, 60.0)         # azimuths, degrees: nobody photographs the back
UNSEEN = 60.0                                    # a side farther than this from every photo's is one that no photo shows
EIGHT = Cameras(15.0, tuple(45.0 * i for i in range(8)))
FIELDS_OF_VIEW = (22.0, 35.0, 50.0)              # of candidates, where the pictures' own is not known


def palette(seeds, device="cpu"):
    """What each slot of an instance looks like, then of accessories, which keep their colours: [N, 2 slots, 3] in [0, 1]."""
    rows = []
    for seed in seeds:
        odd = 0.05 + 0.9 * torch.rand(len(PAINTS), 3, generator=torch.Generator().manual_seed(1000 + seed))
        odd[BLACK] = torch.tensor(PAINTS["black"])                               # pupils and noses: a face stays one
        rows.append(torch.cat([odd, toyworld.palette(["white"])[0]]))
    return torch.stack(rows).to(device)


def draw(name, seeds, azimuth, elevation=15.0, fov_deg=40.0, framing=1.0, accessory=None, size=SIZE, device="cpu"):
    """Renders of instances, one a seed: rgba [N, V, 4, size, size], straight alpha. azimuth [V] degrees; elevation, fov_deg and
    framing (1.1: 1.1 times as far as in `metrics.geometry`) are numbers or tensors that broadcast to [N, V]."""
    views = torch.as_tensor(azimuth).expand(len(seeds), -1)                      # [N, V]
    elevation, fov_deg, framing = (torch.as_tensor(a, dtype=torch.float32).expand_as(views) for a in (elevation, fov_deg, framing))
    c2w = orbit(elevation, views, framing * 0.5 / torch.tan(torch.deg2rad(fov_deg) / 2))
    shapes = toyworld.build(name, accessory, list(seeds), device, accessory_slots=len(PAINTS))
    return sdf.paint(sdf.render(shapes, c2w, fov_deg, size), palette(seeds, device))


def photos(name, seed, size=256):
    """Five single renders, cameras as in training: rgba [5, 4, size, size]."""
    elevation, fov, far = torch.rand(3, len(PHOTOS), generator=torch.Generator().manual_seed(seed))
    return draw(name, [seed], torch.tensor(PHOTOS), 30 * elevation, 15 + 45 * fov, 0.9 + 0.2 * far, size=size)[0]


def real_views(name, seed, cameras, accessory=None, sets=4):
    """What a perfect model would draw, framed as in training: [sets, V, 3, 2 SIZE, 2 SIZE] in [0, 1]. Its score is the ceiling."""
    fov, far, grey = torch.rand(3, sets, generator=torch.Generator().manual_seed(seed))
    fov = 15 + 45 * fov if cameras.fov_deg is None else torch.full_like(fov, cameras.fov_deg)
    rgba = draw(name, [seed] * sets, torch.tensor(cameras.azimuth), cameras.elevation, fov[:, None], 0.9 + 0.2 * far[:, None], accessory,
                2 * SIZE)
    return rgba[:, :, :3] * rgba[:, :, 3:] + grey[:, None, None, None, None] * (1 - rgba[:, :, 3:])


def candidates_of(name, seeds, cameras, accessory, device):
    """What each instance looks like from the cameras, at the fields of view and scales that come into question, for
    `metrics.distance`: a list of [K, V, 4, s, s]."""
    fields = FIELDS_OF_VIEW if cameras.fov_deg is None else (cameras.fov_deg,)
    rgba = torch.stack([draw(name, seeds, torch.tensor(cameras.azimuth), cameras.elevation, fov, 1.0, accessory, SIZE, device)
                        for fov in fields], 1)                                   # [seeds, fields, V, 4, s, s]
    return [metrics.at_scales(of_seed) for of_seed in rgba]


def errors(views, name, instances, cameras):
    """How far M sets of pictures [M, V, 3, H, W] in [0, 1] are from instances, (seed, accessory or None) each: [M, instances, V]."""
    cut, columns = metrics.cut_out(views), {}
    for accessory in {accessory for _, accessory in instances}:
        seeds = [seed for seed, worn in instances if worn == accessory]
        for seed, candidates in zip(seeds, candidates_of(name, seeds, cameras, accessory, views.device)):
            pairs = [metrics.distance(*part, candidates) for part in metrics.chunks(cut, range(len(views)), candidates)]
            columns[seed, accessory] = torch.cat([(error / weight).amin(1) for error, weight in pairs])
    return torch.stack([columns[instance] for instance in instances], 1)


def identity(views, name, seed, cameras, accessory=None):
    """Which views show the subject rather than any other instance of its class: bool [M, V]."""
    others = [(other, accessory) for other in range(INSTANCES) if other != seed]
    return errors(views, name, [(seed, accessory), *others], cameras).argmin(1) == 0


def wears(views, name, seed, accessory, cameras):
    """Which sets show the subject with this accessory rather than with one of the nine others or none: bool [M]."""
    others = [(seed, other) for other in (None, *ACCESSORIES) if other != accessory]
    return errors(views, name, [(seed, accessory), *others], cameras).mean(2).argmin(1) == 0


def has_outline(views, name, seed, cameras, accessory=None):
    """Which sets have the outline of the subject rather than of a thing of another class: bool [M]. `identity` compares within the class,
    where a bulldog in the colours of the car would be the car."""
    _, _, foreground = metrics.cut_out(views)
    white_on_black = foreground.expand(-1, -1, 3, -1, -1), torch.zeros_like(foreground[..., :1, :1]), foreground
    outlines = (candidates_of(other, [seed], cameras, accessory, views.device)[0][:, :, 3:] for other in SUBJECTS)
    errors = [metrics.nearest(white_on_black, range(len(views)), outline.expand(-1, -1, 4, -1, -1)) for outline in outlines]
    return torch.stack(errors, 1).argmin(1) == list(SUBJECTS).index(name)


def sides(views, name, seed, cameras, accessory=None):
    """`metrics.sides` of pictures [M, V, 3, H, W] of the subject: bool [M, V] and bool [M]."""
    candidates, = candidates_of(name, [seed], cameras, accessory, views.device)
    confusion = metrics.nearest_by_view(metrics.cut_out(views), range(len(views)), candidates)          # [M, view, azimuth]
    return metrics.sides(confusion, cameras)


def unseen(cameras):
    """Which of the cameras see a side that no photo shows: bool [V]."""
    apart = (torch.tensor(cameras.azimuth)[:, None] - torch.tensor(PHOTOS) + 180) % 360 - 180
    return apart.abs().amin(1) > UNSEEN


def sample_eight(model, prompt, sets, seed=0):
    """Samples at the cameras EIGHT, each as two sets of four views: [sets, 8, 3, H, W] in [0, 1]."""
    halves = [model.sample([prompt] * sets, azimuth=azimuth, elevation=EIGHT.elevation, seed=seed) for azimuth in (0.0, 45.0)]
    return torch.stack(halves, 2).flatten(1, 2)


def report(label, views, name, seed, cameras, accessory=None):
    """One line: the share of views that show the subject, the same among sides that no photo shows, with real renders' in brackets,
    the share of sets with the outline of the subject, of views that show their own side, of Janus faces, and of sets with the accessory."""
    both = torch.cat([metrics.as_real(views), real_views(name, seed, cameras, accessory).to(views.device)])   # candidates drawn once
    shown, best = identity(both, name, seed, cameras, accessory).float().cpu().split([len(views), len(both) - len(views)])
    back = unseen(cameras)
    outline = has_outline(views, name, seed, cameras, accessory).float().mean()
    right, janus = (verdict.float().mean() for verdict in sides(views, name, seed, cameras, accessory))
    line = (f"{label}: identity {shown.mean():.2f} ({best.mean():.2f}), unseen sides {shown[:, back].mean():.2f} "
            f"({best[:, back].mean():.2f}), outline {outline:.2f}, view accuracy {right:.2f}, Janus {janus:.2f}")
    if accessory:
        line += f", {accessory} {wears(views, name, seed, accessory, cameras).float().mean():.2f}"
    print(line)


def main():
    """The command: write photos of a subject, or judge samples or an object. Raises UserError."""
    parser = cli.Parser(prog="python -m mvd.metrics.identity", description=__doc__.split("\n")[0])
    parser.add_argument("subject", choices=tuple(SUBJECTS), metavar="class", help="what the subject is, such as bulldog")
    parser.add_argument("instance", type=int, choices=range(INSTANCES), metavar="N", help=f"which of its {INSTANCES} instances")
    parser.add_argument("--photos", help="folder to write the five photos to")
    parser.add_argument("--model", help="folder of dreambooth.py: sample the subject and judge the pictures")
    parser.add_argument("--run", help="folder of distill.py: judge the object")
    parser.add_argument("--samples", type=int, default=4, help="with --model: samples of each prompt")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto takes the best")
    flags = parser.parse_args()
    name, seed, device = flags.subject, flags.instance, choose_device(flags.device)
    if not (flags.photos or flags.model or flags.run):
        raise UserError("say what to do: --photos FOLDER, --model FOLDER or --run FOLDER")
    if flags.photos:
        Path(flags.photos).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(photos(name, seed)):
            toyworld.save(Path(flags.photos) / f"{i}.png", (picture * 255).round().byte().permute(1, 2, 0))
    if flags.model:
        model = MVDream.load(flags.model, device, choose_dtype("auto", device))
        for prompt, accessory in ((f"[v] {name}", None), (f"[v] {name} wearing a top hat", "top hat"), (f"a {name}", None)):
            views = sample_eight(model, prompt, flags.samples)
            save_png(Path(flags.model) / f"{prompt.replace(' ', '-')}.png", grid(views.flatten(0, 1).cpu(), 8))
            report(f'"{prompt}"', views, name, seed, EIGHT, accessory)
    if flags.run:
        cameras, views = metrics.read_views(flags.run)
        report(flags.run, views[None].to(device), name, seed, cameras)


if __name__ == "__main__":
    cli.main(main)
