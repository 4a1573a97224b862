"""The UNet of Stable Diffusion 2 with MVDream's two changes (MVDream §3.1, figure 3):

1. every self-attention runs over the tokens of all views at once ("3D attention"): the weights are those of the 2D model, only
   the tokens are gathered differently, [B·V, L, C] -> [B, V·L, C];
2. the camera of each view (16 numbers) goes through a two-layer MLP and is added to the time embedding.

Without a camera both are off: each view attends to itself alone and the same weights are a text-to-image model (the 2D mode).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .groupnorm import GroupNorm


@dataclass
class UNetConfig:
    """The defaults are Stable Diffusion 2.1's, 866 M parameters, with a camera MLP of 16 numbers."""
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple = (1, 2, 4)     # downsampling rates that have a transformer
    head_dim: int = 64
    context_dim: int = 1024
    camera_dim: int = 16
    groups: int = 32                             # of every group norm


def time_embedding(t, width):
    """Sinusoids of the time step (DDPM, appendix B; Attention is all you need §3.5): t [N] -> [N, width], cosines first."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = t.float()[:, None] * frequency                                       # [N, half]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def embedding_mlp(width_in, width):
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))


def zeroed(layer):
    """A layer that starts at zero, so that the residual branch it ends is the identity at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def camera_mlp(config):
    """The network of the camera's numbers. It starts silent, so that Stable Diffusion is at first what it was (MVDream §3.1)."""
    mlp = embedding_mlp(config.camera_dim, 4 * config.model_channels)
    zeroed(mlp[-1])
    return mlp


class StreamConv(nn.Conv2d):
    """A convolution of the residual stream. What flows from block to block is float32, also in a network of bfloat16 weights: else
    every sum would be rounded to 8 bits."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(torch.promote_types(x.dtype, torch.float32))


class ResBlock(nn.Module):
    """Two convolutions with the time (and camera) embedding added between them."""

    def __init__(self, width_in, width, embedding_width, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.embed = nn.Linear(embedding_width, width)
        self.norm2 = GroupNorm(groups, width)
        self.conv2 = zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.skip = StreamConv(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x, embedding):
        """x [N, C, h, w], of the residual stream; embedding [N, E] -> [N, width, h, w]."""
        h = self.conv1(self.norm1(x))
        h = h + self.embed(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head attention of x [N, L, C] to context [N, M, D]."""

    def __init__(self, width, context_width, head_dim):
        super().__init__()
        self.heads = width // head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x, context):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)             # [N, heads, L, head_dim]
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class MultiViewTransformer(nn.Module):
    """Self-attention over all views, cross-attention to the text, a gated feed-forward layer; each with a residual."""

    def __init__(self, width, context_width, head_dim, groups):
        super().__init__()
        self.norm = GroupNorm(groups, width, eps=1e-6, silu=False)
        self.proj_in = nn.Linear(width, width)
        self.norm1, self.self_attention = nn.LayerNorm(width), Attention(width, width, head_dim)
        self.norm2, self.cross_attention = nn.LayerNorm(width), Attention(width, context_width, head_dim)
        self.norm3, self.feed_in, self.feed_out = nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.proj_out = zeroed(nn.Linear(width, width))

    def forward(self, x, context, views, attend_across_views):
        """x [B·V, C, h, w], of the residual stream; context [B, L, D]; views: V -> [B·V, C, h, w]."""
        height = x.shape[2]
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))                # [B·V, h·w, C]
        per_view, tokens = y.shape[:2]
        per_set = per_view // views
        if attend_across_views:                                                  # the one line of 3D attention
            y = y.reshape(per_set, views * tokens, -1)
        z = self.norm1(y)
        y = y + self.self_attention(z, z)
        y = y.reshape(per_set, views * tokens, -1)                               # all tokens of a set read the same text
        y = y + self.cross_attention(self.norm2(y), context)
        value, gate = self.feed_in(self.norm3(y)).chunk(2, dim=-1)               # GEGLU (Shazeer 2020)
        y = y + self.feed_out(value * F.gelu(gate))
        y = self.proj_out(y).reshape(per_view, tokens, -1).transpose(1, 2).unflatten(2, (height, -1))
        return x + y


class Downsample(StreamConv):
    def __init__(self, width):
        super().__init__(width, width, 3, stride=2, padding=1)


class Upsample(StreamConv):
    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One rung of the U: whichever of convolution, ResBlock, transformer and resampling it is given, in this order."""

    def __init__(self, conv=None, res=None, attention=None, down=None, up=None):
        super().__init__()
        self.conv, self.res, self.attention, self.down, self.up = conv, res, attention, down, up

    def forward(self, x, embedding, context, views, attend_across_views):
        """x [B·V, C, h, w], the residual stream; embedding [B·V, E], context [B, L, D] -> [B·V, C', h', w']."""
        if self.conv is not None:
            x = self.conv(x)
        if self.res is not None:
            x = self.res(x, embedding)
        if self.attention is not None:
            x = self.attention(x, context, views, attend_across_views)
        if self.down is not None:
            x = self.down(x)
        if self.up is not None:
            x = self.up(x)
        return x


class MultiViewUNet(nn.Module):
    """eps_θ(x_t; t, text, camera)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width, embedding_width = config.model_channels, 4 * config.model_channels
        self.time_mlp = embedding_mlp(width, embedding_width)
        self.camera_mlp = embedding_mlp(config.camera_dim, embedding_width)

        def res(width_in, width):
            return ResBlock(width_in, width, embedding_width, config.groups)

        def transformer(width):
            return MultiViewTransformer(width, config.context_dim, config.head_dim, config.groups)

        self.encoder = nn.ModuleList([Block(conv=StreamConv(config.in_channels, width, 3, padding=1))])
        skips = [width]                                                          # the widths of what the encoder hands across
        levels = list(enumerate(config.channel_mult))
        attend = [2 ** level in config.attention_resolutions for level, _ in levels]
        for level, mult in levels:
            for _ in range(config.num_res_blocks):
                self.encoder.append(Block(res=res(width, mult * config.model_channels),
                                          attention=transformer(mult * config.model_channels) if attend[level] else None))
                width = mult * config.model_channels
                skips.append(width)
            if level < len(levels) - 1:
                self.encoder.append(Block(down=Downsample(width)))
                skips.append(width)

        self.middle = nn.ModuleList([Block(res=res(width, width)),
                                     Block(attention=transformer(width)),
                                     Block(res=res(width, width))])

        self.decoder = nn.ModuleList()
        for level, mult in reversed(levels):
            for i in range(config.num_res_blocks + 1):
                last = i == config.num_res_blocks
                self.decoder.append(Block(res=res(width + skips.pop(), mult * config.model_channels),
                                          attention=transformer(mult * config.model_channels) if attend[level] else None,
                                          up=Upsample(mult * config.model_channels) if last and level > 0 else None))
                width = mult * config.model_channels

        self.norm_out = GroupNorm(config.groups, width)
        self.conv_out = zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x, t, context, camera=None):
        """The predicted noise (MVDream eq. 2).

        x [B, V, c, h, w]: noisy latents, h and w divisible by 2^(levels - 1); t [B]: time steps 0..999; context [B, L, D]: text;
        camera [B, V, 16] (`cameras.camera_numbers`), or None for the 2D mode. Returns eps [B, V, c, h, w].
        """
        sets, views = x.shape[:2]
        dtype = self.conv_out.weight.dtype
        embedding = self.time_mlp(time_embedding(t, self.config.model_channels).to(dtype))    # [B, E]
        embedding = embedding[:, None].expand(sets, views, -1)
        if camera is not None:
            embedding = embedding + self.camera_mlp(camera.to(dtype))
        embedding = embedding.flatten(0, 1)                                                   # [B·V, E]
        rest = (embedding, context.to(dtype), views, camera is not None)

        h = x.flatten(0, 1)                                                                   # [B·V, c, h, w]
        skips = []
        for block in self.encoder:
            h = block(h, *rest)
            skips.append(h)
        for block in self.middle:
            h = block(h, *rest)
        for block in self.decoder:
            h = block(torch.cat([h, skips.pop()], dim=1), *rest)
        h = self.conv_out(self.norm_out(h))
        return h.unflatten(0, (sets, views))
