"""The diffusion process: noise schedule, noising, the loss, guidance, and three samplers.

Forward (DDPM, Ho et al. 2020, eq. 4):  x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε,  ε ~ N(0, I).
The network predicts the noise, ε_θ(x_t, t), or v, which implies it; all else is arithmetic.

x is a batch of sets of views [B, V, c, h, w], and t is [B] int64: the views of a set share their
time step, and each has noise of its own. The arithmetic is float32 whatever the network's number
format is: 1 - ᾱ_0 is 0.00085, and bfloat16 keeps 8 bits. A function that you rewrite must keep
that, also under autocast and for bfloat16 inputs.
"""
import math

import torch

from .tools.errors import UserError

NUM_TIMESTEPS = 1000
# What `sampling_steps` knows.
SAMPLERS = ("dpm++", "ddim", "ddpm")


# ---- the noise schedule ----------------------------------------------------------------------

def betas():
    """Stable Diffusion's schedule, linear in sqrt(β): [1000] float64."""
    ends = math.sqrt(0.00085), math.sqrt(0.0120)
    return torch.linspace(*ends, NUM_TIMESTEPS, dtype=torch.float64) ** 2


# The schedule on each device that has asked for it: a compiled step and a CUDA graph read it where
# it lies, and copy nothing. (`torch.compiler.assume_constant_result` would do, too, but it imports
# the compiler, which takes as long as all else after torch.)
SCHEDULES = {}


def alphas_cumprod(device=torch.device("cpu")):
    """ᾱ_t = Π_{s ≤ t} (1 - β_s), the signal's share of the variance at t, from 0.9991 to 0.0047.

    [1000] float32. There is one tensor per device, shared by all callers: do not write to it.
    """
    if device not in SCHEDULES:
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False):
            SCHEDULES[device] = torch.cumprod(1 - betas(), 0).float().to(device)
    return SCHEDULES[device]


def alpha_bar(t, x):
    """ᾱ at t [B], as [B, 1, 1, ...], to multiply x [B, ...]."""
    trailing = [1] * (x.dim() - 1)
    return alphas_cumprod(x.device)[t].view(-1, *trailing)


# ---- noising, prediction, loss ---------------------------------------------------------------

def q_sample(x0, t, noise):
    """Noise x0 [B, V, c, h, w] to the time steps t [B]: x_t, float32 (DDPM eq. 4)."""
    abar = alpha_bar(t, x0)
    return abar.sqrt() * x0.float() + (1 - abar).sqrt() * noise.float()


def solve_x0(x_t, eps, abar):
    """DDPM eq. 4 solved for x_0: (x_t - sqrt(1 - ᾱ) ε) / sqrt(ᾱ), float32.

    abar: ᾱ_t, a number, or a tensor that broadcasts to x_t.
    """
    return (x_t.float() - (1 - abar) ** 0.5 * eps.float()) / abar**0.5


def predict_x0(x_t, t, eps):
    """x̂_0: the clean latents that x_t [B, V, c, h, w] at t [B] and its predicted noise imply."""
    return solve_x0(x_t, eps, alpha_bar(t, x_t))


def predict_noise(unet, x_t, t, context, camera=None):
    """ε_θ(x_t; y, c, t), float32: the only place that calls the network.

    So this is the place that knows what the network predicts: the noise, or (`predicts_v`)
    v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0 (Salimans & Ho 2022), which implies the noise. Samplers
    and distillation know only the noise; of training only `squared_errors` asks.

    x_t [B, V, c, h, w], t [B], context [B, L, D], camera [B, V, 16] or None for the 2D mode.
    """
    prediction = unet(x_t, t, context, camera).float()
    if not predicts_v(unet):
        return prediction
    abar = alpha_bar(t, x_t)
    return abar.sqrt() * prediction + (1 - abar).sqrt() * x_t.float()


def predicts_v(unet):
    """Is this a network with v-prediction? A plain function is taken to predict the noise."""
    return getattr(unet, "prediction", "eps") == "v"


def squared_errors(unet, x0, context, camera, t, noise):
    """The squared error of what the network predicts, number by number: [B, V, c, h, w].

    (ε - ε_θ(x_t; y, c, t))², or (v - v_θ)², which is that divided by ᾱ_t.

    x0 [B, V, c, h, w]: scaled latents; t [B]; noise like x0. context and camera as in
    `predict_noise`.
    """
    eps = predict_noise(unet, q_sample(x0, t, noise), t, context, camera)
    errors = (eps - noise) ** 2
    return errors / alpha_bar(t, x0) if predicts_v(unet) else errors


def denoising_loss(unet, x0, context, camera=None):
    """‖ε - ε_θ(x_t; y, c, t)‖² at a random t per set, the mean over all numbers (MVDream eq. 2).

    With v-prediction ‖v - v_θ‖². Arguments as in `squared_errors`. The time steps are drawn first,
    then the noise.
    """
    t = torch.randint(NUM_TIMESTEPS, (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    return torch.mean(squared_errors(unet, x0, context, camera, t, noise))


# ---- guidance --------------------------------------------------------------------------------

def guide(eps_cond, eps_uncond, scale):
    """Classifier-free guidance (Ho & Salimans 2022): away from the prediction without the text.

    scale 1 is no guidance, 0 no text. The result has the predictions' number format.
    """
    return eps_uncond + scale * (eps_cond - eps_uncond)


def guided_noise(unet, x_t, t, context, camera, scale):
    """Ask with the prompts and with the negative prompts: (guided ε̂, ε̂ with the text), float32.

    x_t [B, V, c, h, w], t [B]; context [2B, L, D]: B prompts, then B negative prompts. camera
    [B, V, 16] or None: both halves keep it (MVDream, appendix).
    """
    if camera is not None:
        camera = torch.cat([camera, camera])
    both = predict_noise(unet, torch.cat([x_t, x_t]), torch.cat([t, t]), context, camera)
    conditional, unconditional = both.chunk(2)
    return guide(conditional, unconditional, scale), conditional


def rescale(guided, conditional, phi):
    """Give guided predictions the contrast of unguided ones, float32 (Lin et al. 2023, eq. 15-16).

    guided, conditional [B, V, c, h, w]: ε, or x_0 in distillation. The standard deviation is
    taken over all views of a set. phi 0 changes nothing, phi 1 matches the deviation exactly.
    """
    guided, conditional = guided.float(), conditional.float()
    of_a_set = tuple(range(1, guided.dim()))
    ratio = conditional.std(of_a_set, keepdim=True) / guided.std(of_a_set, keepdim=True)
    matched = guided * ratio
    return phi * matched + (1 - phi) * guided


# ---- samplers --------------------------------------------------------------------------------

def timesteps(steps, sampler="ddim"):
    """The time steps that a sampler visits, in its order: [steps] int64, descending, in 0..999.

    t_i = 1 + floor(1000 i / steps), which is the released rule where `steps` divides 1000: 981,
    961, ..., 21, 1 for 50. For 1000 steps the offset 1 is left out, since t would reach 1000.
    "dpm++" starts where there is only noise: 999, 949, ..., 99, 49 for 20 (what Lin et al. 2023
    call trailing). Raises UserError unless 1 <= steps <= 1000.
    """
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise UserError(f"steps is {steps}, but a sampler takes 1 to {NUM_TIMESTEPS} steps")
    offset = 0 if steps == NUM_TIMESTEPS else 1
    spaced = torch.arange(steps).mul(NUM_TIMESTEPS).div(steps, rounding_mode="floor")
    if sampler == "dpm++":
        return NUM_TIMESTEPS - 1 - spaced
    return (spaced + offset).flip(0)


def ddim_step(x_t, eps, abar_t, abar_prev, eta=0.0, noise=0.0):
    """x_t -> x_prev, float32 (DDIM, Song et al. 2021, eq. 12, with sigma as in eq. 16).

    abar_t <= abar_prev: numbers, or tensors that broadcast. noise ~ N(0, I), or the number 0 with
    eta 0, which is deterministic; eta 1 is DDPM.
    """
    eps = eps.float()
    sigma = eta * ((1 - abar_prev) / (1 - abar_t)) ** 0.5 * (1 - abar_t / abar_prev) ** 0.5
    x0 = solve_x0(x_t, eps, abar_t)
    direction = (1 - abar_prev - sigma**2) ** 0.5 * eps
    return abar_prev**0.5 * x0 + direction + sigma * noise


def ddpm_step(x_t, eps, abar_t, abar_prev, noise):
    """x_t -> x_prev, a sample of q(x_prev | x_t, x̂_0), float32 (DDPM eq. 7), noise ~ N(0, I).

    The two time steps need not be neighbours: alpha = ᾱ_t / ᾱ_prev is the signal kept between.
    """
    x_t = x_t.float()
    alpha = abar_t / abar_prev
    x0 = solve_x0(x_t, eps, abar_t)
    from_x0 = abar_prev**0.5 * (1 - alpha) * x0
    from_x_t = alpha**0.5 * (1 - abar_prev) * x_t
    mean = (from_x0 + from_x_t) / (1 - abar_t)
    variance = (1 - abar_prev) / (1 - abar_t) * (1 - alpha)
    return mean + variance**0.5 * noise.float()


def half_log_snr(abar):
    """λ = log(sqrt(ᾱ) / sqrt(1 - ᾱ)), a number; infinite for ᾱ = 1, where no noise is left."""
    return 0.5 * math.log(abar / (1 - abar)) if abar < 1 else math.inf


def dpm_solver_step(x_t, x0, abar_t, abar_prev, before=None):
    """x_t -> x_prev, float32 (DPM-Solver++(2M), Lu et al. 2022, algorithm 2).

    DDIM takes x̂_0 for constant during a step of the flow, this solver for a straight line in λ,
    through what the network believes now and what it believed one step before. abar_t <=
    abar_prev: numbers. x0: x̂_0 at t. before: (x̂_0, ᾱ) of the step before; None: there was none,
    and the step is DDIM's. So is one that leaves no noise (abar_prev 1, where λ is infinite).
    """
    lambda_t, lambda_prev = half_log_snr(abar_t), half_log_snr(abar_prev)
    h = lambda_prev - lambda_t
    D = x0.float()
    if before is not None and h < math.inf:
        x0_before, abar_before = before
        h_before = lambda_t - half_log_snr(abar_before)
        r = h_before / h if h else math.inf
        D = (1 + 1 / (2 * r)) * D - 1 / (2 * r) * x0_before.float()
    sigma_t, sigma_prev = (1 - abar_t) ** 0.5, (1 - abar_prev) ** 0.5
    return sigma_prev / sigma_t * x_t.float() - abar_prev**0.5 * math.expm1(-h) * D


@torch.no_grad()
def sampling_steps(
    eps_fn, shape, steps, sampler, eta=0.0, *, generator=None, device=None
):
    """Sample step by step, from noise of the given shape (B, V, c, h, w): yields (x, x̂_0).

    x is what the step made of x_t, and x̂_0 what the network believed to be behind x_t; both
    float32. The last x is the result. Exactly `steps` steps are taken; the last one lands on
    ᾱ_0 = 0.9991, as Stable Diffusion's does.

    eps_fn(x_t, t) -> the predicted noise, guided already, with t [B] int64. sampler: "ddim" (with
    its eta), "ddpm" or "dpm++". Noise is drawn where the generator lives, then moved to the device
    (by default the same). Raises UserError for steps outside 1..1000, an unknown sampler, and an
    eta that it has no use for.
    """
    if sampler not in SAMPLERS:
        raise UserError(f'unknown sampler "{sampler}": choose one of {", ".join(SAMPLERS)}')
    if eta and sampler != "ddim":
        raise UserError(f'eta is a setting of ddim, and the sampler is "{sampler}"')
    generator = generator or torch.default_generator
    device = device or generator.device

    def draw_noise():
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(device)

    abar = alphas_cumprod()
    times = timesteps(steps, sampler).tolist()
    x, before = draw_noise(), None
    for t, t_prev in zip(times, times[1:] + [0]):
        eps = eps_fn(x, torch.full((shape[0],), t, device=device))
        abar_t, abar_prev = abar[t].item(), abar[t_prev].item()
        x0 = solve_x0(x, eps, abar_t)
        if sampler == "ddpm":
            x = ddpm_step(x, eps, abar_t, abar_prev, draw_noise())
        elif sampler == "dpm++":
            x = dpm_solver_step(x, x0, abar_t, abar_prev, before)
            before = x0, abar_t
        else:
            x = ddim_step(x, eps, abar_t, abar_prev, eta, draw_noise() if eta else 0.0)
        yield x, x0
