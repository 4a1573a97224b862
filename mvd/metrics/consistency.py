"""Do the views of a set show one and the same thing?

Eight views are drawn. A small radiance field is fitted to every other one, 90 degrees apart as in
training, and has to predict those between, which it has not seen; then the other way round. The
figure is the PSNR of these predictions where there is something to see, in dB. Means of 16 captions
of the toy world, over which the figure of a set scatters by 2 dB:

    real renders (the ceiling)                           19.6
    of these, two neighbours exchanged                   17.0
    of these, all views but the first in reverse order   15.2
    every other view of another instance                 15.9
    every other view in another colour                   15.0
    samples of the tiny model                            18.9
    its samples with every view drawn for itself         16.2

Each of the 16 sets of renders falls when it is mixed or its views are exchanged. How well a field
fits the views that it has seen says nothing: it has room for four views of four different things.
With two views exchanged it still fits them at 36 dB.
"""
import copy
import math

import torch
import torch.nn.functional as F

from .. import render
from ..cameras import orbit, rays
from ..hashgrid import HashGridConfig
from ..nerf import NeRF, NeRFConfig
from ..tools.device import GraphedStep, side_stream
from ..tools.optimizer import adamw, learning_rate, set_rates
from .candidates import SAMPLED, SIZE, Cameras, cut_out, even_azimuths, select, squared_error

# What is asked for. The field of view of a sample is not known; this is about the mean in training.
CAMERAS = Cameras(SAMPLED.elevation, even_azimuths(8), fov_deg=40.0)
# The object's cube, [-0.5, 0.5]^3, is this much larger in the box of the field, [-1, 1]^3.
SCALE = 1.8
# The budget, the same for all sets and models.
STEPS = 300
RAYS = 512
SAMPLES = 4096
# Distance between samples along a ray, and steps between visits to the occupancy grid.
SPACING = 0.06
VISIT_EVERY = 8


def new_field():
    """The field that every fit starts from: (NeRF, OccupancyGrid)."""
    torch.manual_seed(0)
    grid = HashGridConfig(levels=4, log2_entries=15, coarsest=8, finest=32, lr_grid=0.02)
    nerf = NeRF(NeRFConfig(grid=grid, hidden=32, lr=0.005))
    return nerf, render.OccupancyGrid(size=16)


class Fitter:
    """Fits the field to pictures, again and again from the same start.

    It is made once for all sets, so that on a GPU a step is one CUDA graph for all of them.
    """

    def __init__(self, device):
        nerf, occupancy = new_field()
        self.nerf, self.occupancy = nerf.to(device), occupancy.to(device)
        self.start = copy.deepcopy((nerf.state_dict(), occupancy.state_dict()))
        groups = [(group["params"], group["lr"], 0.0) for group in nerf.parameter_groups()]
        self.peaks = [rate for _, rate, _ in groups]
        self.optimizer = adamw(groups, betas=(0.9, 0.99))
        self.graphed_step = GraphedStep(self.step, device)
        self.graphed_visit = GraphedStep(self.visit, device)

    def begin(self):
        """Forget all that was fitted. In place, since graphs read the tensors where they lie."""
        for module, state in zip((self.nerf, self.occupancy), self.start):
            module.load_state_dict(state)
        for state in self.optimizer.state.values():
            for number in state.values():
                number.zero_()
        torch.manual_seed(0)

    def visit(self):
        self.occupancy.update(self.nerf.density, SPACING, everywhere=True)

    def step(self, origins, directions, rgb, background):
        """One step on RAYS of the pixels, drawn at random. All arguments are [pixels, 3]."""
        pixel = torch.randint(len(rgb), (RAYS,), device=rgb.device)
        jitter, phase = render.draw_jitter(RAYS, rgb.device)
        seen = render.render_rays(
            self.nerf, self.occupancy, origins[pixel], directions[pixel], background[pixel],
            budget=SAMPLES, step=SPACING, jitter=jitter, phase=phase)
        self.optimizer.zero_grad(set_to_none=True)
        F.mse_loss(seen.rgb, rgb[pixel]).backward()
        self.optimizer.step()

    def fit(self, c2w, cutouts):
        """Fit the field to V pictures: c2w [V, 4, 4], Cutouts of [V]."""
        origins, directions = rays(c2w, CAMERAS.fov_deg, SIZE)
        background = cutouts.background.expand_as(cutouts.rgb)
        colours = [pictures.movedim(1, -1) for pictures in (cutouts.rgb, background)]
        pixels = [x.reshape(-1, 3) for x in (origins, directions, *colours)]
        self.begin()
        for step in range(STEPS):
            if step % VISIT_EVERY == 0:
                self.graphed_visit()
            set_rates(self.optimizer, *(learning_rate(step, STEPS, p) for p in self.peaks))
            self.graphed_step(*pixels)

    def predict(self, c2w):
        """What the field shows, premultiplied: c2w [V, 4, 4] -> [V, 4, SIZE, SIZE]."""
        seen = render.render_views(
            self.nerf, self.occupancy, c2w, CAMERAS.fov_deg, SIZE, background=0.0, step=SPACING)
        return torch.cat([seen.rgb, seen.opacity], 1)


def psnr_of_predictions(views, progress=iter):
    """The figure of each of M sets, [M] in dB: views [M, 8, 3, H, W] in [0, 1], at CAMERAS.

    Where all pictures are blank it is 0. progress wraps the numbers of the sets (tqdm). The
    caller's random numbers are left as they are.
    """
    device = views.device
    cutouts = cut_out(views)
    distance = SCALE * 0.5 / math.tan(math.radians(CAMERAS.fov_deg) / 2)
    c2w = orbit(CAMERAS.elevation, torch.tensor(CAMERAS.azimuth), distance).to(device)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    figures = []
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), side_stream(device):
        fitter = Fitter(device)
        for m in progress(range(len(views))):
            total = 0
            for seen, unseen in ((even, odd), (odd, even)):
                fitter.fit(c2w[seen], select(cutouts, (m, seen)))
                predicted = fitter.predict(c2w[unseen])
                hidden = select(cutouts, (slice(m, m + 1), unseen))
                error, weight = squared_error(hidden, predicted[None])
                total = total + torch.stack([error.sum(), weight.sum()])
            psnr = -10 * torch.log10(total[0] / total[1])
            something = cutouts.foreground[m].any()
            figures.append(torch.where(something, psnr, torch.zeros_like(psnr)))
    return torch.stack(figures)
