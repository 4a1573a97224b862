"""Multi-view score distillation (MVDream §3.3): the model's opinion of four rendered views becomes a gradient for the field.

The rendered latents x0 are noised to one time step t for all views, the guided model predicts the clean latents x̂0, and x0 is
drawn towards them. Without rescale the gradient of that loss is the classic one (DreamFusion eq. 3) with the weight σ_t/α_t.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import cameras, diffusion, render
from .nerf import NeRF, NeRFConfig

NEGATIVE = ("ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, lowres, "
            "low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, bad proportions")
VIEWS = 4                                        # of a set
ORIENTATION = (10.0, 1000.0)                     # weight of the orientation loss, first and from `shading_from` on


@dataclass
class Settings:
    """The flags of distill.py, here because `make_step` and bench.py read them. The defaults are the released ones, for the full-size
    model; a model's header may hold others (`ModelConfig.distill`)."""
    prompt: str = field(metadata={"help": "what to make, in quotes", "positional": True})
    model: str = field(default="tiny", metadata={"help": "tiny, mvdream-sd21, sd21, or the path of a checkpoint"})
    mode: str = field(default="3d", metadata={"help": "3d: multi-view distillation; 2d: every view alone", "choices": ("3d", "2d")})
    out: str | None = field(default=None, metadata={"help": "folder of the run (default: runs/<prompt>)"})
    resume: bool = field(default=False, metadata={"help": "go on from the run's checkpoint"})
    device: str = field(default="auto", metadata={"help": "cuda, mps or cpu; auto takes the best"})
    dtype: str = field(default="auto", metadata={"help": "of the model; auto: bfloat16 on cuda, else float32",
                                                 "choices": ("auto", "float32", "bfloat16", "float16")})
    seed: int = field(default=0, metadata={"help": "of everything random", "min": 0, "max": 2 ** 63 - 1})
    steps: int = field(default=10000, metadata={"help": "optimisation steps; every schedule is a share of them", "min": 1})
    compile: bool = field(default=True, metadata={"help": "on a GPU, fuse the operations of a step (torch.compile): slow at first, "
                                                          "then several times as fast"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints", "min": 1})
    # what the model is asked
    negative: str = field(default=NEGATIVE, metadata={"help": "negative prompt"})
    suffix: str = field(default="", metadata={"help": "what is added to the prompt in 3d mode"})
    guidance: float = field(default=50.0, metadata={"help": "guidance scale", "min": 0})
    rescale: float = field(default=0.5, metadata={"help": "guidance rescale of the x0 loss", "min": 0, "max": 1})
    loss: str = field(default="x0", metadata={"help": "x0: reconstruction of the predicted latents; sds: the classic gradient",
                                              "choices": ("x0", "sds")})
    t_start: float = field(default=0.98, metadata={"help": "time at the start, of 1", "min": 0, "max": 1})
    t_min: float = field(default=0.02, metadata={"help": "least time at the end", "min": 0, "max": 1})
    t_max: float = field(default=0.50, metadata={"help": "greatest time at the end", "min": 0, "max": 1})
    anneal: float = field(default=0.8, metadata={"help": "share of the run over which the times fall", "min": 0.001, "max": 1})
    # pictures
    coarse_size: int = field(default=64, metadata={"help": "pixels of a rendering at first", "min": 8})
    coarse_sets: int = field(default=2, metadata={"help": "sets of four views in a batch at first", "min": 1})
    fine_size: int = field(default=256, metadata={"help": "pixels of a rendering later", "min": 8})
    fine_sets: int = field(default=1, metadata={"help": "sets of four views in a batch later", "min": 1})
    fine_from: float = field(default=0.5, metadata={"help": "share of the run after which the later size is used", "min": 0, "max": 1})
    coarse_budget: int = field(default=1 << 18, metadata={"help": "samples of the field in a step at first", "min": 1024})
    fine_budget: int = field(default=1 << 20, metadata={"help": "samples of the field in a step later", "min": 1024})
    step_size: float = field(default=render.DIAGONAL / 512, metadata={"help": "distance between samples", "min": 0.001, "max": 0.2})
    random_background: float = field(default=0.5, metadata={"help": "share of steps with one random colour behind instead of the "
                                                                    "learned environment", "min": 0, "max": 1})
    grey_background: bool = field(default=False, metadata={"help": "the random colours are greys"})
    shading: bool = field(default=False, metadata={"help": "point light, textureless steps and orientation loss"})
    shading_from: float = field(default=0.5, metadata={"help": "share of the run before the light goes on", "min": 0, "max": 1})
    # the field
    levels: int = field(default=16, metadata={"help": "levels of the hash grid", "min": 1})
    log2_entries: int = field(default=19, metadata={"help": "entries of a level, as a power of two", "min": 8, "max": 24})
    coarsest: int = field(default=16, metadata={"help": "cells along the coarsest level", "min": 2})
    finest: int = field(default=4096, metadata={"help": "cells along the finest level", "min": 2})
    hidden: int = field(default=64, metadata={"help": "width of the field's networks", "min": 1})
    blob_strength: float = field(default=10.0, metadata={"help": "density that the centre starts with"})
    lr_grid: float = field(default=0.01, metadata={"help": "learning rate of the hash grid", "min": 0})
    lr: float = field(default=0.001, metadata={"help": "learning rate of the networks", "min": 0})
    occupancy_cells: int = field(default=64, metadata={"help": "cells along each side of the occupancy grid", "min": 4, "max": 256})
    occupancy_every: int = field(default=16, metadata={"help": "steps between visits to the occupancy grid", "min": 1})
    occupancy_warm_up: float = field(default=0.0256, metadata={"help": "share of the run in which a visit takes in every cell",
                                                               "min": 0, "max": 1})
    density_threshold: float = field(default=25.0, metadata={"help": "density at the mesh's surface", "min": 0})


# ---------------------------------------------------------------- random draws and the loss

def time_range(progress, t_min=(0.98, 0.02), t_max=(0.98, 0.50), anneal=0.8):
    """The annealed range of t as fractions of 1000: each end goes in a straight line from its first to its last value while
    `progress` (the share of the run that is done, 0..1) goes from 0 to `anneal`, then stays. Returns (low, high)."""
    share = min(progress / anneal, 1.0)
    return tuple(first + share * (last - first) for first, last in (t_min, t_max))


def draw_time(low, high, sets, device):
    """One integer t ~ U[low, high]·1000, shared by all sets of the batch: [sets] int64."""
    u = torch.rand((), device=device)
    return ((low + (high - low) * u) * diffusion.NUM_TIMESTEPS).long().clamp(0, diffusion.NUM_TIMESTEPS - 1).expand(sets)


def draw_cameras(sets, views, device, elevation=(0.0, 30.0), fov_deg=(15.0, 60.0), distance=(0.8, 1.0)):
    """Random sets of cameras round the object, their azimuths 360/views degrees apart (MVDream, appendix).

    Elevation: half of the time uniform in degrees, else uniform on the sphere, asin(U[0, 1/3]). Distance: U[distance]/tan(fov/2).
    One draw of everything a set. Returns c2w [sets, views, 4, 4] and fov [sets] in degrees.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(sets, device=device)

    on_sphere = torch.rad2deg(torch.asin(torch.rand(sets, device=device) / 3))
    elevation = torch.where(torch.rand(sets, device=device) < 0.5, uniform(*elevation), on_sphere)[:, None]  # [sets, 1]
    azimuth = (torch.rand(sets, 1, device=device) + torch.arange(views, device=device)) * (360 / views)        # [sets, views]
    fov = uniform(*fov_deg)
    away = uniform(*distance) / torch.tan(torch.deg2rad(fov) / 2)
    return cameras.orbit(elevation, azimuth, away[:, None]), fov


def target(unet, x_t, t, context, camera, guidance, rescale):
    """The model's guided prediction: (x̂0 [B, V, c, h, w], ε̂ [B, V, c, h, w]), both float32.

    context [2B, L, D]: the prompt's, then the negative prompt's; camera [B, V, 16], or None for the 2D mode. `rescale` mixes in x̂0
    with the standard deviation that the unguided one has over (V, c, h, w) (Lin et al. 2023, §3.4).
    """
    def ask(i):                                                                  # one set, both halves: one shape for the compiler
        x, time, seen_from = (None if given is None else torch.cat(2 * [given[i:i + 1]]) for given in (x_t, t, camera))
        return unet(x, time, context[i::len(x_t)].contiguous(), seen_from).float()       # [2, V, c, h, w]

    conditional, unconditional = torch.stack([ask(i) for i in range(len(x_t))], 1)
    eps = diffusion.guide(conditional, unconditional, guidance)
    x0 = diffusion.predict_x0(x_t, t, eps)
    return diffusion.rescale(x0, diffusion.predict_x0(x_t, t, conditional), rescale), eps


def loss(unet, x0, t, context, camera, guidance, rescale=0.5, kind="x0", noise=None):
    """The distillation loss of rendered latents x0 [B, V, c, h, w] (scaled, with gradient); a number to minimise.

    kind "x0":  ½ ‖x0 − sg(x̂0)‖² / (B·V)                                    (MVDream eq. 4, with guidance rescale)
    kind "sds": a loss whose gradient is w(t)(ε̂ − ε) / (B·V), w = 1 − ᾱ_t   (DreamFusion eq. 3); no rescale
    t [B]; context, camera, guidance as in `target`. noise: standard normal like x0, drawn if not given.
    """
    x0 = x0.float().contiguous()                                                 # noise is drawn in the order of memory
    noise = torch.randn_like(x0) if noise is None else noise
    with torch.no_grad():
        x_t = diffusion.q_sample(x0, t, noise)
        x0_hat, eps = target(unet, x_t, t, context, camera, guidance, rescale if kind == "x0" else 0.0)
        if kind == "sds":
            weight = 1 - diffusion.alphas_cumprod(x0.device)[t][:, None, None, None, None]
            x0_hat = x0 - weight * (eps - noise)
    return 0.5 * ((x0 - x0_hat) ** 2).sum() / math.prod(x0.shape[:2])


# ---------------------------------------------------------------- one step of the loop

class Stage(NamedTuple):
    """What a step renders: sets of four views of size x size pixels, with so many samples of the field."""
    size: int
    sets: int
    budget: int


def stages(s):
    """What the Settings s render at first, and from s.fine_from on: [Stage, Stage]."""
    return [Stage(s.coarse_size, s.coarse_sets, s.coarse_budget), Stage(s.fine_size, s.fine_sets, s.fine_budget)]


class Schedule:
    """What changes in the course of a run, as tensors [], so that a step which was captured once reads what is new."""

    def __init__(self, device):
        self.low, self.high, self.light, self.orientation = (torch.zeros((), device=device) for _ in range(4))

    def set(self, s, progress):
        """s: Settings; progress: the share of the run that is done, 0..1."""
        for value, tensor in zip(time_range(progress, (s.t_start, s.t_min), (s.t_start, s.t_max), s.anneal), (self.low, self.high)):
            tensor.fill_(value)
        self.light.fill_(progress >= s.shading_from)
        self.orientation.fill_(ORIENTATION[0] + (ORIENTATION[1] - ORIENTATION[0]) * min(1.0, progress / max(s.shading_from, 1e-9)))


def make_field(s, device):
    """A new field with its occupancy grid and its optimizer, as the Settings s ask: (NeRF, OccupancyGrid, AdamW) on a device."""
    nerf = NeRF(NeRFConfig(levels=s.levels, log2_entries=s.log2_entries, coarsest=s.coarsest, finest=s.finest, hidden=s.hidden,
                           blob_strength=s.blob_strength)).to(device)
    networks = [p for name, p in nerf.named_parameters() if not name.startswith("grid.")]
    cuda = torch.device(device).type == "cuda"
    optimizer = torch.optim.AdamW([{"params": list(nerf.grid.parameters()), "lr": s.lr_grid}, {"params": networks, "lr": s.lr}],
                                  betas=(0.9, 0.99), eps=1e-15, fused=cuda, capturable=cuda)
    return nerf, render.OccupancyGrid(s.occupancy_cells).to(device), optimizer


def make_step(s, model, nerf, occupancy, optimizer, context, schedule, stage):
    """One optimisation step with shapes that never change: a function that returns the loss [], float32, without waiting for the device.

    s: Settings; nerf, occupancy, optimizer from `make_field`; context [2, L, D]: prompt and negative prompt; schedule: a Schedule, read
    at every call; stage: a Stage. With s.compile, torch.compile fuses the rendering, and `MVDream.compile_networks` should have done
    the same for the model.
    """
    device, (size, sets, budget) = context.device, stage
    context = context.repeat_interleave(sets, 0)                                 # [2·sets, L, D]

    def draw():
        """All random numbers of a picture: what is compiled draws none, so it shows what the eager step shows."""
        c2w, fov = draw_cameras(sets, VIEWS, device)                             # [sets, V, 4, 4] [sets]
        colour = torch.rand(1 if s.grey_background else 3, device=device).expand(3)
        plain = torch.rand((), device=device) < s.random_background
        lamp = (torch.rand(2, device=device), render.draw_light(c2w[..., :3, 3])) if s.shading else None
        return c2w, fov, colour, plain, lamp, *render.draw_offsets(sets * VIEWS * size * size, device)

    def picture(c2w, fov, colour, plain, lamp, jitter, phase):
        """-> images [sets, V, 3, H, W] in [-1, 1], orientation loss."""
        origins, directions = cameras.rays(c2w, fov[:, None].expand(sets, VIEWS), size)
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)  # [R, 3]
        background = torch.where(plain, colour, nerf.background(directions))     # [R, 3]
        shading = None
        if s.shading:
            draws, position = lamp                                               # [2] [sets, V, 3]
            kind, softness = draws.unbind()
            lit, white = kind > 0.25, kind > 0.625                               # albedo 25%, diffuse 37.5%, textureless 37.5%
            light = position[..., None, :].expand(-1, -1, size * size, -1).reshape(-1, 3)        # one a ray, [R, 3]
            shading = render.Shading(light, softness * lit * schedule.light, white * schedule.light)
        seen = render.render(nerf, occupancy, origins, directions, background, budget, s.step_size, jitter, phase, shading)
        images = seen.rgb.view(sets * VIEWS, size, size, 3).movedim(-1, 1)       # [sets·V, 3, H, W]
        images = F.interpolate(images, (model.config.size,) * 2, mode="bilinear", antialias=size > model.config.size)
        penalty = 0.0
        if s.shading:
            penalty = render.orientation_loss(seen.weights, seen.normals, directions[seen.samples.ray], seen.opacity)
        return (2 * images - 1).unflatten(0, (sets, VIEWS)), penalty

    if s.compile:
        picture = torch.compile(picture, dynamic=False)

    def step():
        c2w, *numbers = draw()
        images, penalty = picture(c2w, *numbers)
        latents = torch.cat([model.encode(of_set, sample=True) for of_set in images.split(1)])   # [sets, V, c, h, w]
        t = draw_time(schedule.low, schedule.high, sets, device)
        camera = cameras.camera_numbers(c2w) if s.mode == "3d" else None
        distilled = loss(model.unet, latents, t, context, camera, s.guidance, s.rescale, s.loss)
        total = distilled + schedule.orientation * penalty if s.shading else distilled
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return distilled.detach()

    return step
