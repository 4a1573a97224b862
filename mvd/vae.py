"""The autoencoder of Stable Diffusion: images <-> latents (Rombach et al. 2022, §3.1; KL-regularised variant).

The encoder halves the picture once between two levels and returns a Gaussian a latent pixel; the decoder mirrors it. Both are
stacks of residual blocks with one single-head attention over all pixels at the coarsest level. Diffusion works on
`scale_factor * z`, so that its inputs have a standard deviation near 1; this file does not scale.
"""
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import nn

from .groupnorm import GroupNorm


@dataclass
class VAEConfig:
    """The defaults are Stable Diffusion's. Every width (channels * multiple) must be a multiple of `groups`."""
    channels: int = 128
    channel_mult: tuple = (1, 2, 4, 4)      # width of each level, finest first; each level after the first halves the picture
    num_res_blocks: int = 2                 # a level of the encoder; the decoder has one more
    z_channels: int = 4
    scale_factor: float = 0.18215           # diffusion sees scale_factor * z
    groups: int = 32                        # of a group norm; a group of one channel would forget how bright the picture is


norm = partial(GroupNorm, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection: [N, in, h, w] -> [N, out, h, w]."""

    def __init__(self, channels_in, channels_out, groups):
        super().__init__()
        self.norm1 = norm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = norm(groups, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x):
        hidden = self.conv1(self.norm1(x))
        hidden = self.conv2(self.norm2(hidden))
        return self.shortcut(x) + hidden


class Attention(nn.Module):
    """Every pixel looks at every pixel of its own picture, with a single head: [N, C, h, w] -> the same."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = norm(groups, channels, silu=False)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        """softmax(q kᵀ / √C) v, and a skip connection (Vaswani et al. 2017, eq. 1)."""
        hidden = self.norm(x)
        query, key, value = (layer(hidden).flatten(2).mT for layer in (self.query, self.key, self.value))      # [N, h*w, C]
        attend = (query * x.shape[1] ** -0.5 @ key.mT).softmax(-1)               # fused kernels are slow with so wide a head
        return x + self.out((attend @ value).mT.unflatten(2, x.shape[2:]))


def middle(channels, groups):
    return nn.Sequential(ResBlock(channels, channels, groups), Attention(channels, groups), ResBlock(channels, channels, groups))


class DownLevel(nn.Module):
    """Residual blocks, then (but for the coarsest level) a convolution of stride 2."""

    def __init__(self, channels_in, channels_out, num_blocks, groups, halve):
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.blocks = nn.Sequential(*map(partial(ResBlock, groups=groups), widths[:-1], widths[1:]))
        self.downsample = nn.Conv2d(channels_out, channels_out, 3, stride=2) if halve else None

    def forward(self, x):
        x = self.blocks(x)
        if self.downsample is None:
            return x
        return self.downsample(F.pad(x, (0, 1, 0, 1)))      # right and bottom only: what the released weights were trained with


class UpLevel(nn.Module):
    """Residual blocks, then (but for the finest level) nearest-neighbour doubling and a convolution."""

    def __init__(self, channels_in, channels_out, num_blocks, groups, double):
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.blocks = nn.Sequential(*map(partial(ResBlock, groups=groups), widths[:-1], widths[1:]))
        self.upsample = nn.Conv2d(channels_out, channels_out, 3, padding=1) if double else None

    def forward(self, x):
        x = self.blocks(x)
        if self.upsample is None:
            return x
        return self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    """Images [N, 3, H, W] -> [N, 2 * z_channels, h, w]."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * multiple for multiple in config.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.Sequential(*(                        # down[0] is the finest level
            DownLevel(widths[i - 1] if i else config.channels, widths[i], config.num_res_blocks, config.groups, halve=i < last)
            for i in range(len(widths))))
        self.middle = middle(widths[-1], config.groups)
        self.norm_out = norm(config.groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.middle(self.down(self.conv_in(x)))
        return self.conv_out(self.norm_out(x))


class Decoder(nn.Module):
    """Latents [N, z_channels, h, w] -> images [N, 3, H, W]."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * multiple for multiple in config.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], config.groups)
        self.up = nn.ModuleList(                            # up[0] is the finest level, as down[0] is, and runs last
            UpLevel(widths[min(i + 1, last)], widths[i], config.num_res_blocks + 1, config.groups, double=i > 0)
            for i in range(len(widths)))
        self.norm_out = norm(config.groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.middle(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class VAE(nn.Module):
    """The two together. A picture of H x W pixels has latents of h = H / 2**(levels - 1) by w likewise."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or VAEConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, images):
        """Images [N, 3, H, W] in [-1, 1] -> mean and log-variance of q(z | image), each [N, z_channels, h, w], unscaled.

        H and W must be multiples of 2**(levels - 1). A sample is mean + exp(logvar / 2) * noise.
        """
        mean, logvar = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype))).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Unscaled latents [N, z_channels, h, w] -> images [N, 3, H, W], about [-1, 1]; not clamped."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))
