"""The diffusion process: noise schedule, noising, guidance and its rescale, DDIM and DDPM steps, and the sampling loop.

Forward (Ho et al. 2020, eq. 4):  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise,  noise ~ N(0, I).
The network predicts the noise, eps(x_t, t); all else here is arithmetic. x is a batch of sets of views [B, V, c, h, w] and t
is [B] int64: the views of a set share t and each has noise of its own.
The arithmetic is float32 whatever the network's precision: 1 - abar_0 is 0.00085, and bfloat16 keeps 8 bits.
"""
import functools
import math

import torch

from .tools.errors import UserError

NUM_TIMESTEPS = 1000


def betas():
    """Stable Diffusion's schedule, linear in sqrt(beta): [1000] float64 (rounded once, in alphas_cumprod)."""
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.0120), NUM_TIMESTEPS, dtype=torch.float64) ** 2


@functools.cache
def schedule(device):
    """What alphas_cumprod returns, made once a device."""
    with torch.inference_mode(False):           # or it could not be used in training later
        return torch.cumprod(1 - betas(), 0).float().to(device)


@torch.compiler.assume_constant_result          # torch.compile and CUDA graphs see a constant, not a copy to the device
def alphas_cumprod(device=torch.device("cpu")):
    """abar_t = prod_{s <= t} (1 - beta_s), the signal's share of the variance at t: [1000] float32, from 0.9991 to 0.0047.

    One tensor a device, shared by all: do not write to it.
    """
    return schedule(device)


def alpha_bar(t, x):
    """abar at t [B], as [B, 1, 1, ...], to multiply x [B, ...]."""
    return alphas_cumprod(x.device)[t].view(-1, *[1] * (x.dim() - 1))


def q_sample(x0, t, noise):
    """Noise x0 [B, V, c, h, w] to the time steps t [B]: x_t, float32 (DDPM eq. 4)."""
    abar = alpha_bar(t, x0)
    return abar.sqrt() * x0.float() + (1 - abar).sqrt() * noise.float()


def predict_x0(x_t, t, eps):
    """The clean latents that x_t [B, V, c, h, w] and its predicted noise imply, float32 (DDPM eq. 4 solved for x_0)."""
    abar = alpha_bar(t, x_t)
    return (x_t.float() - (1 - abar).sqrt() * eps.float()) / abar.sqrt()


def loss(unet, x0, context, camera=None):
    """‖ε − ε_θ(x_t; y, c, t)‖², the mean over all numbers, at a random t for each set (MVDream eq. 2).

    x0 [B, V, c, h, w] scaled latents, context [B, L, D], camera [B, V, 16] or None for the 2D mode.
    """
    t = torch.randint(NUM_TIMESTEPS, (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    eps = unet(q_sample(x0, t, noise), t, context, camera)
    return torch.mean((eps.float() - noise) ** 2)


# ---- guidance --------------------------------------------------------------------------------------------------------------

def guide(eps_cond, eps_uncond, scale):
    """Classifier-free guidance: away from the prediction without the text (Ho & Salimans 2022); 1 is no guidance."""
    return eps_uncond + scale * (eps_cond - eps_uncond)


def rescale(guided, conditional, phi):
    """Give guided predictions the contrast of unguided ones (Lin et al. 2023, eq. 15-16).

    guided, conditional [B, V, c, h, w]: eps, or x0 in distillation. The standard deviation is taken over all the views of a
    set. phi = 0 changes nothing, phi = 1 matches the deviation exactly. Returns float32.
    """
    guided, conditional = guided.float(), conditional.float()
    over = tuple(range(1, guided.dim()))
    matched = guided * (conditional.std(over, keepdim=True) / guided.std(over, keepdim=True))
    return phi * matched + (1 - phi) * guided


# ---- samplers --------------------------------------------------------------------------------------------------------------

def timesteps(steps):
    """The time steps of a sampler in the order it visits them: [steps] int64, descending, all different, in 0..999.

    t_i = 1 + floor(1000 i / steps), as released for divisors of 1000: 981, 961, ..., 21, 1 for 50. All 1000 steps leave no
    room for the 1. Raises UserError unless 1 <= steps <= 1000.
    """
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise UserError(f"steps is {steps}, but a sampler takes 1 to {NUM_TIMESTEPS} steps")
    offset = 0 if steps == NUM_TIMESTEPS else 1
    return torch.arange(steps).mul(NUM_TIMESTEPS).div(steps, rounding_mode="floor").add(offset).flip(0)


def ddim_step(x_t, eps, abar_t, abar_prev, eta=0.0, noise=0.0):
    """x_t -> x_prev (DDIM eq. 12, sigma as in eq. 16). abar_t <= abar_prev: numbers or tensors that broadcast.

    eta = 0 is deterministic; eta = 1, with noise ~ N(0, I), is DDPM.
    """
    x_t, eps = x_t.float(), eps.float()
    sigma = eta * ((1 - abar_prev) / (1 - abar_t)) ** 0.5 * (1 - abar_t / abar_prev) ** 0.5
    x0 = (x_t - (1 - abar_t) ** 0.5 * eps) / abar_t ** 0.5
    return abar_prev ** 0.5 * x0 + (1 - abar_prev - sigma ** 2) ** 0.5 * eps + sigma * noise


def ddpm_step(x_t, eps, abar_t, abar_prev, noise):
    """x_t -> x_prev, a sample of q(x_prev | x_t, x_0) (DDPM eq. 7), with noise ~ N(0, I): the ancestral sampler.

    The two time steps need not be neighbours: alpha = abar_t / abar_prev is the signal kept between them.
    """
    x_t, eps = x_t.float(), eps.float()
    alpha = abar_t / abar_prev
    x0 = (x_t - (1 - abar_t) ** 0.5 * eps) / abar_t ** 0.5
    mean = (abar_prev ** 0.5 * (1 - alpha) * x0 + alpha ** 0.5 * (1 - abar_prev) * x_t) / (1 - abar_t)
    variance = (1 - abar_prev) / (1 - abar_t) * (1 - alpha)
    return mean + variance ** 0.5 * noise


@torch.no_grad()
def sample(eps_fn, shape, steps=50, sampler="ddim", eta=0.0, generator=None, device=None, progress=iter):
    """From noise to latents of the given shape (B, V, c, h, w), float32.

    eps_fn(x_t, t) -> eps, guided already, with t [B] int64. sampler is "ddim" (with its eta) or "ddpm". Takes exactly
    `steps` steps; the last lands on abar_0 = 0.9991, as Stable Diffusion's does. Noise is drawn where the generator lives and
    moved to device, by default the same. progress wraps the loop's steps, as tqdm does.
    Raises UserError for steps outside 1..1000 and for an unknown sampler.
    """
    if sampler not in ("ddim", "ddpm"):
        raise UserError(f'unknown sampler "{sampler}": choose ddim or ddpm')
    generator = generator or torch.default_generator
    device = device or generator.device
    def noise(): return torch.randn(shape, generator=generator, device=generator.device).to(device)
    abar, times = alphas_cumprod(), timesteps(steps).tolist()
    x = noise()
    for t, t_prev in progress(list(zip(times, times[1:] + [0]))):
        eps = eps_fn(x, torch.full((shape[0],), t, device=device))
        abar_t, abar_prev = abar[t].item(), abar[t_prev].item()
        if sampler == "ddpm":
            x = ddpm_step(x, eps, abar_t, abar_prev, noise())
        else:
            x = ddim_step(x, eps, abar_t, abar_prev, eta, noise() if eta else 0.0)
    return x
