"""Group normalisation (Wu & He 2018), with the SiLU that often follows it, in a form that a compiler can fuse into one pass.

PyTorch's own kernel wants the pixels of a channel side by side, while the fast convolutions of a GPU want the channels of a pixel
side by side: between the two every picture would be copied, twice a norm. Normalising is an affine map of each channel of each
picture, y = scale · (x − mean) + bias, whose numbers follow from the channel's sums of x and x²: two sums and one fused expression.
"""
import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.GroupNorm):
    """x [N, C, h, w] -> SiLU(normalised x), or without the SiLU, in the number format of the weights. The numbers are nn.GroupNorm's,
    which runs where nothing is compiled."""

    def __init__(self, groups, channels, eps=1e-5, silu=True):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x):
        if torch.compiler.is_compiling():
            y = self.written_out(x.float())
        else:
            y = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return (F.silu(y) if self.silu else y).to(self.weight.dtype)

    def written_out(self, x):
        """The same as sums and one affine map: x [N, C, h, w] float32 -> [N, C, h, w]. Each channel is seen from the value of its first
        pixel, so that squares of a large mean do not swallow a small variance."""
        first = x[:, :, :1, :1].detach()
        away = x - first
        offset, square = away.mean((2, 3)), (away * away).mean((2, 3))           # of each channel, [N, C]
        means = (first[..., 0, 0] + offset).unflatten(1, (self.num_groups, -1))  # [N, groups, C / groups]
        within = (square - offset * offset).clamp(min=0).unflatten(1, (self.num_groups, -1))
        mean = means.mean(2, keepdim=True)
        variance = within.mean(2, keepdim=True) + (means - mean).square().mean(2, keepdim=True)      # in channels, and between them
        scale = self.weight.float().unflatten(0, (self.num_groups, -1)) * torch.rsqrt(variance + self.eps)
        mean, scale = (y.expand_as(means).flatten(1)[..., None, None] for y in (mean, scale))        # [N, C, 1, 1]
        return (x - mean) * scale + self.bias.float()[:, None, None]
