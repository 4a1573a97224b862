"""From pictures to what the UNet is trained on: backgrounds, colours, latents, tokens.

Pictures keep their alpha, uint8 [..., 4, H, W], until they are laid over a grey (MVDream §3.1).
"""
from itertools import cycle, islice

import torch

from ..tools.device import choose_dtype

# ---- pictures --------------------------------------------------------------------------------


def on_grey(rgba, grey):
    """Pictures over a grey background: uint8 [..., 4, H, W] -> [..., 3, H, W] in [-1, 1].

    grey: in [0, 1], broadcasts to [...].
    """
    rgba = rgba.float() / 255
    rgb, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    return 2 * (rgb * alpha + grey[..., None, None, None] * (1 - alpha)) - 1


def recolour(rgba, dice, share=0.5):
    """The same pictures, a share of them in other colours: uint8 [N, 4, H, W] -> the same.

    Red, green and blue come in a random order, each to a random power, e^U[-1.2, 1.2]. An
    autoencoder that has seen twelve colours takes a wine red for brown. dice: `order.Dice` of N.
    """
    order = dice.uniform("order of colours", (3,)).argsort(1)[:, :, None, None]  # [N, 3, 1, 1]
    power = torch.exp(2.4 * dice.uniform("power of colours", (3, 1, 1)) - 1.2)
    rgb = rgba[:, :3].float() / 255
    rgb = rgb.gather(1, order.expand(-1, -1, *rgba.shape[2:])) ** power
    other = torch.cat([(255 * rgb).round().byte(), rgba[:, 3:]], 1)
    chosen = dice.uniform("other colours") < share
    return torch.where(chosen[:, None, None, None], other, rgba)


# ---- texts -----------------------------------------------------------------------------------

def token_table(text, captions, suffix=""):
    """Every caption of every item as rows of the embedding table: int64 [N, W, L].

    W is the length of the longest list of captions; shorter lists are repeated.
    """
    longest = max(map(len, captions))
    rows = []
    for wordings in captions:
        repeated = islice(cycle(wordings), longest)
        rows.append(text.tokenize([wording + suffix for wording in repeated]))
    return torch.stack(rows)


# ---- latents ---------------------------------------------------------------------------------

def posteriors_of(vae, rgba, grey):
    """Encode pictures: uint8 [N, 4, H, W] over grey [N] -> [N, 2c, h, w], float32.

    It is the mean and the standard deviation of the posterior, computed in half precision on a
    GPU.
    """
    half = choose_dtype("auto", rgba.device)
    with torch.autocast("cuda", half, enabled=rgba.is_cuda):
        mean, logvar = vae.encode(on_grey(rgba, grey))
    mean, logvar = mean.float(), logvar.float()
    return torch.cat([mean, torch.exp(0.5 * logvar)], 1)


@torch.no_grad()
def encode_posteriors(vae, rgba, grey, pixels=2**23):
    """`posteriors_of` many pictures, in half precision. pixels: how many are encoded at a time."""
    batch = max(1, pixels // rgba.shape[-1] ** 2)
    parts = []
    for pictures, behind in zip(rgba.split(batch), grey.split(batch)):
        parts.append(posteriors_of(vae, pictures, behind).half())
    return torch.cat(parts)


def sample_posterior(posterior, noise=None):
    """A sample of the posterior whose mean and deviation are stacked in [..., 2c, h, w].

    noise [..., c, h, w] ~ N(0, 1); None: it is drawn here.
    """
    mean, std = posterior.float().chunk(2, dim=-3)
    noise = torch.randn_like(mean) if noise is None else noise
    return mean + std * noise


def draw_indices(counts, batch, device):
    """For each count n, `batch` random numbers of 0..n-1: a list of int64 [batch]."""
    return [torch.randint(n, (batch,), device=device) for n in counts]
