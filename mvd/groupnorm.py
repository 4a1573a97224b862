"""Group normalisation (Wu & He 2018) in a form that a compiler can fuse.

Why not PyTorch's kernel alone? It wants the pixels of a channel side by side in memory, while the
fast convolutions of a GPU want the channels of a pixel side by side: every picture would be copied
twice per norm. But to normalise is an affine map per channel, y = scale · x + shift, and its two
numbers follow from two sums per channel, of x and of x². Written out like that, a compiler makes
two sums and one fused pass of it, in any memory layout.
"""
import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.GroupNorm):
    """x [N, C, h, w] -> normalised x: float32 where it is compiled, else in x's number format.

    The numbers are those of nn.GroupNorm, whose kernel runs where nothing is compiled. The result
    is not rounded before the SiLU that follows; the next convolution does that (`unet.Conv2d`).
    """

    def forward(self, x):
        """x [N, C, h, w] -> normalised x, of the same shape (Wu & He 2018, eq. 1)."""
        if torch.compiler.is_compiling():
            return self.written_out(x.float())
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    def written_out(self, x):
        """The same as sums and one affine map: x [N, C, h, w] float32 -> [N, C, h, w].

        With the mean m and the variance v of each channel, a group of channels has

            mean = E[m],    variance = E[v] + E[(m - mean)²],

        the variance within the channels plus that between them. Rule: v = E[a²] - E[a]² is taken of
        a = x - (the channel's first pixel), so that the squares of a large mean do not swallow a
        small variance. (It is one of the h·w pixels, so v is at least E[a]² / (h·w), which is far
        above rounding.)
        """
        by_group = (self.num_groups, -1)
        first = x[:, :, :1, :1].detach()
        away = x - first
        offset = away.mean((2, 3), keepdim=True)  # [N, C, 1, 1]
        within = (away * away).mean((2, 3), keepdim=True) - offset * offset
        within = within.unflatten(1, by_group)  # [N, groups, C / groups, 1, 1]
        channel_mean = (first + offset).unflatten(1, by_group)
        between, mean = torch.var_mean(channel_mean, 2, correction=0, keepdim=True)
        variance = within.mean(2, keepdim=True) + between  # [N, groups, 1, 1, 1]

        weight = self.weight.view(*by_group, 1, 1)
        bias = self.bias.view(*by_group, 1, 1)
        scale = weight * torch.rsqrt(variance + self.eps)  # [N, groups, C / groups, 1, 1]
        shift = bias - mean * scale
        return x * scale.flatten(1, 2) + shift.flatten(1, 2)
