"""The autoencoder of Stable Diffusion: images <-> latents (Rombach et al. 2022, §3.1).

The encoder halves the picture between two levels and returns a Gaussian per latent pixel; the
decoder mirrors it. Both are stacks of residual blocks, with one single-head attention over all
pixels at the coarsest level. A diffusion model works on `scale_factor * z`, so that its inputs
have a standard deviation near 1; this file does not scale (`MVDream.encode` does).

A small model has a second, light encoder, which has learned to give nearly the same latents. Only
distillation uses it (`sds.py`), where it saves most of the encoder's time in every step.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .groupnorm import GroupNorm
from .unet import Conv2d


@dataclass
class VAEConfig:
    """The defaults are Stable Diffusion's. Each width must be a multiple of `groups`."""
    channels: int = 128
    # The width of each level as a multiple of channels, finest level first.
    channel_mult: tuple = (1, 2, 4, 4)
    # Per level of the encoder; the decoder has one more.
    num_res_blocks: int = 2
    z_channels: int = 4
    # A diffusion model sees scale_factor * z.
    scale_factor: float = 0.18215
    # Groups of every group norm: more than one channel each, or it removes the brightness.
    groups: int = 32
    # The widths of the levels of the light encoder, finest first; (): there is none.
    light: tuple = ()


def level_widths(config):
    """The widths of the levels of encoder and decoder, finest first."""
    return [config.channels * multiple for multiple in config.channel_mult]


def group_norm(groups, channels):
    """The norm of this file: its epsilon is 1e-6, the UNet's ResBlocks have 1e-5."""
    return GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised 3×3 convolutions and a skip connection."""

    def __init__(self, channels_in, channels_out, groups):
        super().__init__()
        self.norm1 = group_norm(groups, channels_in)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(groups, channels_out)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else Conv2d(channels_in, channels_out, 1)

    def forward(self, x):
        """[N, channels_in, h, w] -> [N, channels_out, h, w]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden


class Attention(nn.Module):
    """Every pixel looks at every pixel of its own picture, with a single head."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.query = Conv2d(channels, channels, 1)
        self.key = Conv2d(channels, channels, 1)
        self.value = Conv2d(channels, channels, 1)
        self.out = Conv2d(channels, channels, 1)

    def forward(self, x):
        """softmax(q kᵀ / sqrt(C)) v, and a skip connection: [N, C, h, w] -> the same.

        Written out, since the fused kernels are slow with one head as wide as all channels.
        """
        C, h, w = x.shape[1:]
        hidden = self.norm(x)
        q = self.query(hidden).flatten(2).mT  # [N, h·w, C]
        k = self.key(hidden).flatten(2).mT
        v = self.value(hidden).flatten(2).mT
        attention = (q * C**-0.5 @ k.mT).softmax(-1)  # [N, h·w, h·w]
        return x + self.out((attention @ v).mT.unflatten(2, (h, w)))


def res_blocks(channels_in, channels_out, count, groups):
    """`count` ResBlocks in a row; the first one changes the width."""
    widths = [channels_in] + [channels_out] * count
    blocks = [ResBlock(*pair, groups) for pair in zip(widths, widths[1:])]
    return nn.Sequential(*blocks)


def middle(channels, groups):
    """What stands at the coarsest level, between the levels and the latents."""
    return nn.Sequential(
        ResBlock(channels, channels, groups),
        Attention(channels, groups),
        ResBlock(channels, channels, groups),
    )


class DownLevel(nn.Module):
    """A level of the encoder: residual blocks, then (if `halve`) a convolution of stride 2."""

    def __init__(self, channels_in, channels_out, num_blocks, groups, halve):
        super().__init__()
        self.blocks = res_blocks(channels_in, channels_out, num_blocks, groups)
        self.downsample = Conv2d(channels_out, channels_out, 3, stride=2) if halve else None

    def forward(self, x):
        x = self.blocks(x)
        if self.downsample is None:
            return x
        # Padded on the right and below only, as the released weights were trained.
        return self.downsample(F.pad(x, (0, 1, 0, 1)))


class UpLevel(nn.Module):
    """A level of the decoder: residual blocks, then (if `double`) upsampling and a convolution."""

    def __init__(self, channels_in, channels_out, num_blocks, groups, double):
        super().__init__()
        self.blocks = res_blocks(channels_in, channels_out, num_blocks, groups)
        self.upsample = Conv2d(channels_out, channels_out, 3, padding=1) if double else None

    def forward(self, x):
        x = self.blocks(x)
        if self.upsample is None:
            return x
        return self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    """Images [N, 3, H, W] -> [N, 2 z_channels, h, w].

    widths: those of a light encoder's levels, finest first; else None. Where they are fewer than
    the decoder's, the first level takes 2 × 2 pixels as one, or 4 × 4, ...
    """
    # What a compiler takes one by one (`model.compile_network`).
    PIECES = ("descend", "leave")

    def __init__(self, config, widths=None):
        super().__init__()
        groups = config.groups
        if widths is None:
            width, widths = config.channels, level_widths(config)
        else:
            width = widths[0]
        self.patch = 2 ** (len(config.channel_mult) - len(widths))
        self.conv_in = Conv2d(3 * self.patch**2, width, 3, padding=1)
        levels = []  # finest first
        for i, wider in enumerate(widths):
            halve = i < len(widths) - 1
            levels.append(DownLevel(width, wider, config.num_res_blocks, groups, halve))
            width = wider
        self.down = nn.Sequential(*levels)
        self.middle = middle(width, groups)
        self.norm_out = group_norm(groups, width)
        self.conv_out = Conv2d(width, 2 * config.z_channels, 3, padding=1)

    def descend(self, number, x):
        """A level, 0 the finest, which takes the picture: x [N, C, h, w] -> [N, C', h/2, w/2].

        The last one does not halve it.
        """
        if number == 0:
            if torch.compiler.is_compiling():
                # Else a GPU copies the wide gradient of conv_in twice, to this layout and back.
                x = x.contiguous(memory_format=torch.channels_last)
            if self.patch > 1:
                x = F.pixel_unshuffle(x, self.patch)  # [N, 3 patch², H / patch, W / patch]
            x = self.conv_in(x)
        return self.down[number](x)

    def leave(self, x):
        """The output of the coarsest level -> [N, 2 z_channels, h, w]."""
        x = self.middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def forward(self, x):
        for number in range(len(self.down)):
            x = self.descend(number, x)
        return self.leave(x)


class Decoder(nn.Module):
    """Latents [N, z_channels, h, w] -> images [N, 3, H, W]."""
    PIECES = ("forward",)

    def __init__(self, config):
        super().__init__()
        groups = config.groups
        widths = level_widths(config)
        coarsest = len(widths) - 1
        self.conv_in = Conv2d(config.z_channels, widths[coarsest], 3, padding=1)
        self.middle = middle(widths[coarsest], groups)
        # up[0] is the finest level, as the encoder's down[0] is, and runs last.
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            width_in = widths[min(i + 1, coarsest)]
            self.up.append(UpLevel(width_in, width, config.num_res_blocks + 1, groups, i > 0))
        self.norm_out = group_norm(groups, widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.middle(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The two together. H × W pixels have h × w latents, h = H / 2^(levels - 1), w likewise."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or VAEConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.light = Encoder(config, config.light) if config.light else None
        self.quant_conv = Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, images, encoder=None):
        """Images in [-1, 1] -> mean and log-variance of the posterior q(z | image), unscaled.

        images [N, 3, H, W], H and W divisible by 2^(levels - 1). encoder: `self.light`, or None
        for `self.encoder`. Each result is [N, z_channels, h, w]; a sample is
        mean + exp(logvar / 2) * noise.
        """
        encoder = encoder or self.encoder
        mean, logvar = self.quant_conv(encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Unscaled latents [N, z_channels, h, w] -> images [N, 3, H, W], about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))
