"""Multi-view score distillation (MVDream §3.2): the diffusion model teaches a radiance field.

One step: render V views of the field, encode them to latents x_0, noise them to one time step t,
let the guided model predict the clean latents x̂_0 of all views together, and take the loss
½‖x_0 - sg(x̂_0)‖². Its gradient runs back through the encoder and the renderer into the field; the
UNet is not differentiated. Since x_0 - x̂_0 = sqrt((1 - ᾱ_t) / ᾱ_t) (ε̂ - ε), this is SDS
(DreamFusion eq. 3) with that weight, as long as the guidance rescale is off.

From top to bottom: the settings, the random draws, the loss, and `Distillation`, whose `step`, with
`encode` and `ask` above it, is the whole method on one screen.
"""
import contextlib
import math
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import cameras, diffusion, render
from .model import compile_network
from .nerf import ENCODINGS, NeRF, NeRFConfig
from .tools.cli import setting
from .tools.device import side_by_side

NEGATIVE = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and "
    "unclear, cropped, lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn "
    "face, deformed, dehydrated, bad proportions"
)
# Weight of the orientation loss: at first, and from `shading_from` on, with a line between them.
ORIENTATION = (10.0, 1000.0)
# Of the smoothness loss: the standard deviation of the offset δ, along each axis.
NEARBY = 0.04
# Of random cameras (MVDream, appendix): degrees, degrees, and multiples of 1 / tan(fov/2).
ELEVATION = (0.0, 30.0)
FOV = (15.0, 60.0)
DISTANCE = (0.8, 1.0)


@dataclass
class DistillSettings:
    """The flags of distill.py. The defaults are the released ones, for the full-size model.

    But the smoothness, the budgets of samples and the finer occupancy grid are ours. The flags
    stand here since `Distillation` and bench.py read them. A model's preset may change them
    (`presets.py`).
    """
    prompt: str = setting(help="what to make, in quotes", positional=True)
    model: str = setting("tiny", "tiny, mvdream-sd21, sd21, or the path of a checkpoint")
    mode: str = setting(
        "3d", "3d: multi-view distillation; 2d: every view alone", choices=("3d", "2d")
    )
    out: str | None = setting(None, "folder of the run (default: runs/<prompt>)")
    resume: bool = setting(False, "go on from the run's checkpoint")
    device: str = setting("auto", "cuda, cpu, or mps (untested); auto: cuda, else cpu")
    dtype: str = setting(
        "auto",
        "of the model; auto: bfloat16 on cuda (float16 before Ampere), else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = setting(0, "of everything random", min=0)
    steps: int = setting(10000, "optimisation steps; every schedule is a share of them", min=1)
    compile: bool = setting(
        True,
        "on a GPU, fuse the operations of a step (torch.compile): slow at first, then several "
        "times as fast",
    )
    save_every: int = setting(1000, "steps between checkpoints", min=1)
    show_every: int = setting(
        0, "steps between pictures; 0: a tenth of the run, and at least 20", min=0
    )

    # what the model is asked
    negative: str = setting(NEGATIVE, "negative prompt")
    # The released distillation adds none, unlike sampling (ModelConfig.suffix).
    suffix: str = setting("", "what is added to the prompt in 3d mode")
    guidance: float = setting(50.0, "guidance scale", min=0)
    rescale: float = setting(0.5, "guidance rescale of the x0 loss", min=0, max=1)
    loss: str = setting(
        "x0",
        "x0: reconstruction of the predicted latents; sds: the classic gradient",
        choices=("x0", "sds"),
    )
    t_start: float = setting(0.98, "noise at the start, share of 1000 time steps", min=0, max=1)
    t_min: float = setting(0.02, "least noise at the end", min=0, max=1)
    t_max: float = setting(0.50, "greatest noise at the end", min=0, max=1)
    anneal: float = setting(0.8, "share of the run over which the noise falls", min=0.001, max=1)

    # pictures
    views: int = setting(cameras.VIEWS, "views of a set, evenly round the object", min=1, max=64)
    coarse_size: int = setting(64, "pixels of a rendering at first", min=8)
    coarse_sets: int = setting(2, "sets of views in a batch at first", min=1)
    fine_size: int = setting(256, "pixels of a rendering later", min=8)
    fine_sets: int = setting(1, "sets of views in a batch later", min=1)
    fine_from: float = setting(
        0.5, "share of the run after which the later size is used", min=0, max=1
    )
    light_encoder: bool = setting(
        True, "the model's light encoder makes latents of them, if it has one"
    )
    coarse_budget: int = setting(1 << 18, "samples of the field in a step at first", min=1024)
    fine_budget: int = setting(1 << 20, "samples of the field in a step later", min=1024)
    step_size: float = setting(
        render.DIAGONAL / 512, "distance between samples", min=0.001, max=0.2
    )
    random_background: float = setting(
        0.5,
        "share of steps with one random colour behind instead of the learned environment",
        min=0,
        max=1,
    )
    grey_background: bool = setting(False, "the random colours are greys")
    shading: bool = setting(False, "point light, textureless steps and orientation loss")
    shading_from: float = setting(
        0.5, "share of the run before the light goes on", min=0, max=1
    )
    smoothness: float = setting(10.0, "weight of the loss that keeps surfaces smooth", min=0)
    smooth_points: int = setting(4096, "points at which a step takes that loss", min=1)

    # the field
    encoding: str = setting("hash", "how it encodes points", choices=tuple(ENCODINGS))
    levels: int = setting(16, "levels of the hash grid", min=1)
    log2_entries: int = setting(19, "entries of a level, as a power of two", min=8, max=24)
    coarsest: int = setting(16, "cells along the coarsest level", min=2)
    finest: int = setting(4096, "cells along the finest level", min=2)
    hidden: int = setting(64, "width of the field's networks", min=1)
    blob_strength: float = setting(10.0, "density that the centre starts with")
    lr_grid: float = setting(0.01, "learning rate of the encoding", min=0)
    lr: float = setting(0.001, "learning rate of the networks", min=0)
    occupancy_cells: int = setting(
        64, "cells along each side of the occupancy grid", min=4, max=256
    )
    occupancy_every: int = setting(16, "steps between visits to the occupancy grid", min=1)
    occupancy_warm_up: float = setting(
        0.0256, "share of the run in which a visit takes in every cell", min=0, max=1
    )
    density_threshold: float = setting(25.0, "density at the mesh's surface", min=0)
    mesh_size: int = setting(
        128, "cells along each side of the grid that the mesh is found on", min=8, max=512
    )


# ---- random draws ----------------------------------------------------------------------------

def time_range(progress, t_min=(0.98, 0.02), t_max=(0.98, 0.50), anneal=0.8):
    """The annealed range of t: (low, high), as fractions of 1000.

    Each end goes in a straight line from its first to its last value while `progress` (the share
    of the run that is done, 0..1) goes from 0 to `anneal`; then it stays.
    """
    share = min(progress / anneal, 1.0)
    low = t_min[0] + share * (t_min[1] - t_min[0])
    high = t_max[0] + share * (t_max[1] - t_max[0])
    return low, high


def draw_time(low, high, sets, device):
    """One integer t ~ U[low, high] · 1000, shared by all sets of the batch: [sets] int64."""
    u = torch.rand((), device=device)
    t = ((low + (high - low) * u) * diffusion.NUM_TIMESTEPS).long()
    return t.clamp(0, diffusion.NUM_TIMESTEPS - 1).expand(sets)


def draw_cameras(sets, views, device):
    """Random sets of cameras round the object, the views of a set 360/views degrees apart.

    MVDream, appendix. The elevation is half of the time uniform in degrees, else uniform on the
    sphere, asin(U[0, 1/3]), as released: up to 19.5 degrees. The distance is U[DISTANCE] /
    tan(fov/2). A set shares its elevation, field of view and distance. Returns c2w
    [sets, views, 4, 4] and fov [sets], in degrees.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(sets, device=device)

    on_sphere = torch.rad2deg(torch.asin(torch.rand(sets, device=device) / 3))
    in_degrees = torch.rand(sets, device=device) < 0.5
    elevations = torch.where(in_degrees, uniform(*ELEVATION), on_sphere)[:, None]  # [sets, 1]
    turn = torch.rand(sets, 1, device=device) + torch.arange(views, device=device)
    azimuths = turn * (360 / views)  # [sets, views]
    fov = uniform(*FOV)
    distances = uniform(*DISTANCE) / torch.tan(torch.deg2rad(fov) / 2)
    return cameras.orbit(elevations, azimuths, distances[:, None]), fov


# ---- the loss --------------------------------------------------------------------------------

def predict_sets(unet, x_t, t, context, camera, *, guidance, rescale):
    """The model's guided prediction for B sets: (x̂_0, ε̂), [B, V, c, h, w] each, float32.

    x_t [B, V, c, h, w], t [B]; context [2B, L, D]: B prompts, then B negative prompts;
    camera [B, V, 16], or None for the 2D mode. `rescale` mixes in x̂_0 with the standard
    deviation that the unguided one has over (V, c, h, w) of a set (Lin et al. 2023, §3.4).
    """
    eps, conditional = diffusion.guided_noise(unet, x_t, t, context, camera, guidance)
    x0 = diffusion.predict_x0(x_t, t, eps)
    x0_unguided = diffusion.predict_x0(x_t, t, conditional)
    return diffusion.rescale(x0, x0_unguided, rescale), eps


def distillation_loss(
    unet, x0, t, context, camera, *, guidance, rescale=0.5, kind="x0", noise=None
):
    """The distillation loss of rendered latents, and what the model predicts: (loss [], x̂_0).

    kind "x0":  ½ ‖x_0 - sg(x̂_0)‖² / (B·V), x̂_0 with guidance rescale       (MVDream eq. 4)
    kind "sds": a loss whose gradient by x_0 is w(t) (ε̂ - ε) / (B·V), w = 1 - ᾱ_t; x̂_0 without
                                                                      (DreamFusion eq. 3)
    x0 [B, V, c, h, w]: scaled, with gradient; t [B]; context, camera as in `predict_sets`. noise:
    standard normal like x0; drawn if not given, as for a contiguous x0. Both results are float32.
    """
    x0 = x0.float().contiguous()
    noise = torch.randn_like(x0) if noise is None else noise
    with torch.no_grad():
        x_t = diffusion.q_sample(x0, t, noise)
        phi = rescale if kind == "x0" else 0.0
        x0_hat, eps = predict_sets(unet, x_t, t, context, camera, guidance=guidance, rescale=phi)
        aim = x0_hat
        if kind == "sds":
            # The gradient of ½‖x_0 - aim‖² is x_0 - aim: with this aim, w(t) (ε̂ - ε). Only the
            # gradient has a meaning then, the value of the loss has none.
            weight = 1 - diffusion.alpha_bar(t, x0)
            aim = x0 - weight * (eps - noise)
    views = math.prod(x0.shape[:2])
    return 0.5 * ((x0 - aim) ** 2).sum() / views, x0_hat


# ---- one run ---------------------------------------------------------------------------------

class Stage(NamedTuple):
    """What a step renders: `sets` sets of views of size × size pixels, with `budget` samples."""
    size: int
    sets: int
    budget: int


def stages(s):
    """What the settings s render at first, and from s.fine_from on: [Stage, Stage]."""
    coarse = Stage(s.coarse_size, s.coarse_sets, s.coarse_budget)
    fine = Stage(s.fine_size, s.fine_sets, s.fine_budget)
    return [coarse, fine]


class Draws(NamedTuple):
    """All random numbers of the pictures of a step."""
    c2w: torch.Tensor         # [B, V, 4, 4]
    fov: torch.Tensor         # [B], degrees
    colour: torch.Tensor      # [3], the plain background
    plain: torch.Tensor       # [] bool: that, or the learned environment
    light: torch.Tensor       # [B, V, 3], the lamp's position; None without shading
    lit_kind: torch.Tensor    # [] in [0, 1): albedo, diffuse or textureless; None likewise
    softness: torch.Tensor    # [] in [0, 1); None likewise
    jitter: torch.Tensor      # [R], see `render.draw_jitter`
    phase: torch.Tensor       # []
    nearby: torch.Tensor      # [P, 3], from points to their neighbours; None without smoothness


class Step(NamedTuple):
    """What a step says of itself."""
    loss: torch.Tensor        # [], the distillation loss
    gradient: torch.Tensor    # [], the norm of the field's gradient
    opacity: torch.Tensor     # [], the mean over all rays
    images: torch.Tensor      # [B, V, 3, H, W] in [-1, 1], what was rendered
    x_t: torch.Tensor         # [B, V, c, h, w], its latents with noise
    x0_hat: torch.Tensor      # [B, V, c, h, w], the predicted clean latents


def pick(config_class, s):
    """A config whose fields have the values of the settings s of the same name, else its own.

    So a field of an encoding's config becomes a flag by adding it to DistillSettings. It must not
    have the name of another flag, such as `steps` or `size`.
    """
    names = [field.name for field in fields(config_class)]
    return config_class(**{name: getattr(s, name) for name in names if hasattr(s, name)})


class Distillation:
    """The field of a run, and the step that improves it.

    `step` is `draw`, `find_samples`, `render_images`, `encode`, `ask`, and the way back. No shape
    in it depends on data, and nothing in it waits for the device, so that a CUDA graph can hold it:
    no `.item()`, no boolean indexing, no branch on a tensor, no tensor made of Python numbers. What
    changes in the course of a run is read from tensors, which `anneal` sets between two steps.
    """

    def __init__(self, s, model, context):
        """s: DistillSettings; model: MVDream; context [2, L, D]: prompt and negative prompt."""
        self.s = s
        self.model = model
        self.context = context
        # What makes latents of renders.
        vae = model.vae
        self.encoder = vae.light if s.light_encoder and vae.light else vae.encoder
        self.device = device = context.device
        _, encoding_config = ENCODINGS[s.encoding]
        config = NeRFConfig(
            encoding=s.encoding,
            grid=pick(encoding_config, s),
            hidden=s.hidden,
            blob_strength=s.blob_strength,
            lr=s.lr,
        )
        self.nerf = NeRF(config).to(device)
        self.occupancy = render.OccupancyGrid(s.occupancy_cells).to(device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.nerf.parameter_groups(), betas=(0.9, 0.99), eps=1e-15, fused=cuda, capturable=cuda
        )
        self.t_low = torch.zeros((), device=device)
        self.t_high = torch.zeros((), device=device)
        # 0 before the light goes on, then 1.
        self.lit = torch.zeros((), device=device)
        self.orientation = torch.zeros((), device=device)
        self.begin(stages(s)[0])

    def begin(self, stage, compiled=False):
        """From here on, steps render this Stage. compiled: with torch.compile, for good.

        Then it fuses the rendering, the encoder and the UNet.
        """
        self.stage = stage
        self.batch_context = self.context.repeat_interleave(stage.sets, 0)  # [2B, L, D]
        self.sampling, self.rendering = self.find_samples, self.render_images
        if compiled:
            # Two programs, which two processes compile at a time (ahead.py).
            self.sampling = torch.compile(self.find_samples, dynamic=False)
            self.rendering = torch.compile(self.render_images, dynamic=False)
            compile_network(self.encoder)
            compile_network(self.model.unet)

    def anneal(self, progress):
        """Set what changes in the course of a run. progress: the share that is done, 0..1."""
        s = self.s
        low, high = time_range(progress, (s.t_start, s.t_min), (s.t_start, s.t_max), s.anneal)
        share = min(1.0, progress / max(s.shading_from, 1e-9))
        self.t_low.fill_(low)
        self.t_high.fill_(high)
        self.lit.fill_(progress >= s.shading_from)
        self.orientation.fill_(ORIENTATION[0] + share * (ORIENTATION[1] - ORIENTATION[0]))

    def draw(self):
        """All random numbers of a picture, so that what is compiled draws none itself: Draws."""
        s, device, stage = self.s, self.device, self.stage
        c2w, fov = draw_cameras(stage.sets, s.views, device)
        colour = torch.rand(1 if s.grey_background else 3, device=device).expand(3)
        plain = torch.rand((), device=device) < s.random_background
        light = lit_kind = softness = None
        if s.shading:
            lit_kind, softness = torch.rand(2, device=device).unbind()
            light = render.draw_light(c2w[..., :3, 3])
        ray_count = stage.sets * s.views * stage.size**2
        jitter, phase = render.draw_jitter(ray_count, device)
        nearby = None
        if s.smoothness:
            nearby = NEARBY * torch.randn(s.smooth_points, 3, device=device)
        return Draws(c2w, fov, colour, plain, light, lit_kind, softness, jitter, phase, nearby)

    def rays(self, draws):
        """The rays of all pixels of a step: origins, directions [R, 3]."""
        size, sets, _ = self.stage
        fov = draws.fov[:, None].expand(sets, self.s.views)
        origins, directions = cameras.rays(draws.c2w, fov, size)
        return origins.reshape(-1, 3), directions.reshape(-1, 3)

    @torch.no_grad()
    def find_samples(self, draws):
        """Where the rays of a step meet matter: `render.Samples`, as many as its budget."""
        origins, directions = self.rays(draws)  # [R, 3]
        return render.sample_rays(
            self.occupancy,
            origins,
            directions,
            step=self.s.step_size,
            budget=self.stage.budget,
            jitter=draws.jitter,
            phase=draws.phase,
        )

    def render_images(self, draws, samples):
        """The field's images [B, V, 3, H, W] in [-1, 1], mean opacity [], `penalty` []."""
        s, (size, sets, _) = self.s, self.stage
        origins, directions = self.rays(draws)  # [R, 3]
        background = torch.where(draws.plain, draws.colour, self.nerf.background(directions))
        # In a step of a bfloat16 model the field's two networks compute in bfloat16, too, and so
        # do the normals that shade it. Occupancy, smoothness and results stay in float32.
        rough = contextlib.nullcontext()
        if self.context.dtype == torch.bfloat16:
            rough = torch.autocast(self.device.type, torch.bfloat16)
        with rough:
            seen = render.shade_samples(
                self.nerf,
                samples,
                origins,
                directions,
                background,
                shading=self.shading(draws) if s.shading else None,
            )
        images = seen.rgb.view(sets * s.views, size, size, 3).movedim(-1, 1)  # [B·V, 3, H, W]
        pixels = self.model.config.size
        images = F.interpolate(
            images, (pixels, pixels), mode="bilinear", antialias=size > pixels
        )
        images = (2 * images - 1).unflatten(0, (sets, s.views))
        return images, seen.opacity.detach().mean(), self.penalty(seen, directions, draws)

    def penalty(self, seen, directions, draws):
        """The weighted losses on the shape itself, []: orientation (with shading) and smoothness.

        The smoothness is ours: what the model judges are latents, for which a rough surface in the
        right colours will do.
        """
        s = self.s
        total = torch.zeros((), device=self.device)
        if s.shading:
            towards = directions[seen.samples.ray]
            away = render.orientation_loss(seen.weights, seen.normals, towards, seen.opacity)
            total = total + self.orientation * away
        if s.smoothness:
            points = render.draw_seen_points(
                seen.samples, seen.weights, s.smooth_points, draws.phase
            )
            turn = render.smoothness_loss(self.nerf, points, draws.nearby)
            total = total + s.smoothness * turn
        return total

    def shading(self, draws):
        """The light of a step: albedo alone 25%, diffuse 37.5%, textureless 37.5% of the time."""
        pixels = self.stage.size**2
        # lit_kind: 0..0.25 albedo alone | 0.25..0.625 diffuse | 0.625..1 diffuse, and white.
        # Before the light goes on, self.lit is 0, and so are softness and textureless.
        diffuse = draws.lit_kind > 0.25
        textureless = draws.lit_kind > 0.625
        light = draws.light[..., None, :].expand(-1, -1, pixels, -1).reshape(-1, 3)  # [R, 3]
        softness = draws.softness * diffuse * self.lit
        return render.Shading(light, softness, textureless * self.lit)

    def encode(self, images):
        """Images [B, V, 3, H, W] -> latents [B, V, c, h, w], float32.

        Set by set, so that a compiler sees one shape however many sets there are.
        """
        encode = partial(self.model.encode, sample=True, encoder=self.encoder)
        latents = side_by_side(encode, images.split(1))
        return torch.cat(latents).float().contiguous()

    def ask(self, latents, draws):
        """Noise the latents to a random t and ask the model: (distillation loss [], x_t, x̂_0)."""
        s = self.s
        t = draw_time(self.t_low, self.t_high, len(latents), self.device)
        noise = torch.randn_like(latents)
        camera = cameras.extrinsics(draws.c2w) if s.mode == "3d" else None
        loss, x0_hat = distillation_loss(
            self.model.unet,
            latents,
            t,
            self.batch_context,
            camera,
            guidance=s.guidance,
            rescale=s.rescale,
            kind=s.loss,
            noise=noise,
        )
        return loss, diffusion.q_sample(latents.detach(), t, noise), x0_hat

    def step(self):
        """One optimisation step: Step. It does not wait for the device."""
        draws = self.draw()
        images, opacity, penalty = self.rendering(draws, self.sampling(draws))
        latents = self.encode(images)
        loss, x_t, x0_hat = self.ask(latents, draws)
        total = loss + penalty
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        gradients = [p.grad for p in self.nerf.parameters() if p.grad is not None]
        gradient = torch.nn.utils.get_total_norm(gradients)
        self.optimizer.step()
        return Step(loss.detach(), gradient, opacity, images.detach(), x_t, x0_hat)

    def state_dict(self):
        """What a checkpoint holds of the field."""
        return {
            "nerf": self.nerf.state_dict(),
            "occupancy": self.occupancy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
