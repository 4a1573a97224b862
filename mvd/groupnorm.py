"""Group normalisation (Wu & He 2018) in a form that a compiler can fuse into what stands beside it, in any memory layout.

PyTorch's own kernel wants the pixels of a channel side by side, while the fast convolutions of a GPU want the channels of a pixel
side by side: between the two every picture would be copied, twice a norm. Normalising is an affine map of each channel of each
picture, y = scale · x + shift, whose numbers follow from the channel's sums of x and x²: two sums and one fused expression.
"""
import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.GroupNorm):
    """x [N, C, h, w] -> [N, C, h, w]; the same numbers as nn.GroupNorm, which runs where nothing is compiled."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        x32 = x.float()
        mean, square = (y.mean((2, 3)).unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True) for y in (x32, x32 * x32))
        inverse = torch.rsqrt((square - mean * mean).clamp(min=0) + self.eps)                # 1 / standard deviation, [N, groups, 1]
        weight, bias = (p.float().unflatten(0, (self.num_groups, -1)) for p in (self.weight, self.bias))
        scale = weight * inverse                                                             # [N, groups, C / groups]
        shift = bias - mean * scale
        return (x32 * scale.flatten(1)[..., None, None] + shift.flatten(1)[..., None, None]).to(x.dtype)
