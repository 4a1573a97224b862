"""What the tests of mvd/metrics/ share: Things, cameras, runs of distill.py, the command, and a
judge that is quick enough for tests."""
import functools
import json
import sys

import torch
from safetensors.torch import save_file

from mvd import toyworld
from mvd.metrics import candidates, command, judge, things
from mvd.metrics.candidates import Cameras, even_azimuths, real_views
from mvd.toyworld import Thing

# The last has no front.
THINGS = [
    Thing("bulldog", "crown", "red"),
    Thing("car", "party hat", "blue"),
    Thing("duck", "skateboard", "yellow"),
    Thing("lamp", "crown", "green"),
]
# Front, left, back, right.
FOUR = Cameras(15.0, even_azimuths(4))


def make_small(patch):
    """The judge has fewer captions and proportions, and keeps what it has drawn."""
    patch.setattr(things, "CAPTIONS", 12)
    patch.setattr(candidates, "CANDIDATE_SEEDS", range(3))
    cached = functools.cache(judge.candidate_geometry)
    patch.setattr(judge, "candidate_geometry", cached)


def run_main(monkeypatch, capsys, *flags):
    """What `python -m mvd.metrics` prints."""
    monkeypatch.setattr(sys, "argv", ["metrics", *flags, "--device", "cpu"])
    command.main()
    return capsys.readouterr().out


def save_run(folder, thing, mode="3d", size=40, shown=None):
    """What distill.py leaves of a run that was asked for `thing`.

    The pictures are real renders of the thing, or of another one that is `shown`.
    """
    folder.mkdir()
    config = {"prompt": toyworld.captions(thing)[0], "mode": mode}
    (folder / "config.json").write_text(json.dumps(config))
    shown = shown or thing._replace(colour=thing.colour or "teal")
    cameras = FOUR._replace(fov_deg=40.0)
    tensors = {
        "rgb": real_views([shown], cameras, size=size)[0],
        "elevation": torch.tensor(15.0),
        "azimuth": torch.tensor(cameras.azimuth),
        "fov": torch.tensor(40.0),
        "distance": torch.tensor(2.5),
    }
    save_file(tensors, folder / "views.safetensors")
