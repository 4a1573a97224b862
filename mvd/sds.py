"""Multi-view score distillation (MVDream §3.3): the model's opinion of four rendered views becomes a gradient for the field.

The rendered latents x0 are noised to one time step t for all views, the guided model predicts the clean latents x̂0, and x0 is
drawn towards them. Without rescale the gradient of that loss is the classic one (DreamFusion eq. 3) with the weight σ_t/α_t.
"""
import math

import torch

from . import cameras, diffusion


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
    both = None if camera is None else torch.cat([camera, camera])
    conditional, unconditional = unet(torch.cat([x_t, x_t]), torch.cat([t, t]), context, both).float().chunk(2)
    eps = diffusion.guide(conditional, unconditional, guidance)
    x0 = diffusion.predict_x0(x_t, t, eps)
    return diffusion.rescale(x0, diffusion.predict_x0(x_t, t, conditional), rescale), eps


def loss(unet, x0, t, context, camera, guidance, rescale=0.5, kind="x0", noise=None):
    """The distillation loss of rendered latents x0 [B, V, c, h, w] (scaled, with gradient); a number to minimise.

    kind "x0":  ½ ‖x0 − sg(x̂0)‖² / (B·V)                                    (MVDream eq. 4, with guidance rescale)
    kind "sds": a loss whose gradient is w(t)(ε̂ − ε) / (B·V), w = 1 − ᾱ_t   (DreamFusion eq. 3); no rescale
    t [B]; context, camera, guidance as in `target`. noise: standard normal like x0, drawn if not given.
    """
    x0 = x0.float()
    noise = torch.randn_like(x0) if noise is None else noise
    with torch.no_grad():
        x_t = diffusion.q_sample(x0, t, noise)
        x0_hat, eps = target(unet, x_t, t, context, camera, guidance, rescale if kind == "x0" else 0.0)
        if kind == "sds":
            weight = 1 - diffusion.alphas_cumprod(x0.device)[t][:, None, None, None, None]
            x0_hat = x0 - weight * (eps - noise)
    return 0.5 * ((x0 - x0_hat) ** 2).sum() / math.prod(x0.shape[:2])
