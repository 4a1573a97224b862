"""Multiresolution hash encoding: a point in space -> features, looked up and interpolated (Instant NGP, 2022).

Level l is a grid of (N_l + 1)^3 vertices over the cube, N_0 .. N_last growing geometrically. Where all its vertices
fit into 2^k entries every vertex has its own entry ("dense"); a finer level shares its 2^k entries by a hash of the
vertex's integer coordinates, and training sorts out the collisions. A point's features are, level by level, the
trilinear interpolation of the entries at the eight corners of its cell. A smooth, small, learnable table: this is
where all the detail of the NeRF is kept.

Everything is one expression over [corner, level, point]. The points come last, so that on a CPU each operation is one
long vectorised run and on a GPU a compiler fuses all of it into the gather.
"""
from dataclasses import dataclass
import math

import torch
from torch import nn
import torch.nn.functional as F

PRIMES = (1, 2654435761, 805459861)         # of the spatial hash: xor of coordinate * prime (Instant NGP, eq. 4)


@dataclass
class HashGridConfig:
    """The defaults are the full size; a level has 2^log2_entries entries at most."""
    levels: int = 16
    features: int = 2
    log2_entries: int = 19
    coarsest: int = 16
    finest: int = 4096


def pairs_are_complex(x):
    """Eager CPU operations are faster on a pair of floats as one complex number than along an axis of two."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Lookup(torch.autograd.Function):
    """table [T, 2], index [...] int32 -> table[index], [..., 2]. PyTorch's own derivative of an embedding is ten times
    slower, and that of `table[index]` does not repeat bit for bit on several threads."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.entries = table.shape[0]
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx, grad):
        index, grad = ctx.saved_tensors[0].flatten(), grad.reshape(-1, 2)
        if pairs_are_complex(grad):         # a single serial run, the same every time
            table = torch.zeros(ctx.entries, dtype=grad.dtype.to_complex())
            return torch.view_as_real(table.index_add_(0, index, torch.view_as_complex(grad.contiguous()))), None
        return grad.new_zeros(ctx.entries, 2).index_add_(0, index, grad), None


def by_point(features):
    """[levels, N, 2], or [levels, N] complex -> [N, levels * 2]."""
    features = torch.view_as_real(features) if features.is_complex() else features
    return features.transpose(0, 1).flatten(1)


class HashGrid(nn.Module):
    """forward: x [N, 3] in [0, 1] -> features [N, levels * features], differentiable by x and by the table.
    with_slope: their derivative by x as well, by its formula; both are differentiable by the table.

    A point outside [0, 1] is the caller's mistake and gives features of some other place. The table starts at
    U(-1e-4, 1e-4).
    """

    def __init__(self, config):
        super().__init__()
        if config.features != 2:
            raise ValueError("a level has 2 features: Lookup moves them as pairs")
        entries = 2 ** config.log2_entries
        growth = (config.finest / config.coarsest) ** (1 / max(config.levels - 1, 1))
        cells = [config.coarsest * growth ** level - 1 for level in range(config.levels)]   # half a cell less each end
        vertices = [math.ceil(c) + 2 for c in cells]                                        # per axis
        dense = [v ** 3 <= entries for v in vertices]
        # Hashed levels are stored first: their offsets are multiples of 2^k, so an offset can be xored in like
        # a coordinate.
        sizes = [entries * (not d) for d in dense] + [v ** 3 * d for v, d in zip(vertices, dense)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        offsets = [starts[level + config.levels * dense[level]] for level in range(config.levels)]
        strides = [(1, v, v * v) if d else PRIMES for v, d in zip(vertices, dense)]
        strides = torch.tensor(strides, dtype=torch.int64).T[:, None, :, None]              # [3, 1, levels, 1]
        masks = torch.tensor([-1 if d else entries - 1 for d in dense])                     # & -1 changes nothing
        self.config, self.output_size = config, config.levels * config.features
        self.register_buffer("cells", torch.tensor(cells)[:, None], persistent=False)       # [levels, 1]
        # 32-bit arithmetic wraps round; the low k bits, all that the hash keeps, come out right.
        self.register_buffer("strides", strides.to(torch.int32), persistent=False)
        self.register_buffer("masks", masks.to(torch.int32)[:, None], persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.int32)[:, None], persistent=False)
        self.register_buffer("dense", torch.tensor(dense)[:, None], persistent=False)
        self.table = nn.Parameter(torch.empty(sum(sizes), config.features).uniform_(-1e-4, 1e-4))

    def corners(self, x):
        """x [N, 3] -> the entries at the corners of its cells [2, 2, 2, levels, N, 2], by z, y, x; the weights of a
        cell's two ends along x, y, z [3, 2, levels, N, 1]; and the derivatives of the weights [2, levels, 1, 1], the
        same along each axis. Where pairs are complex, all come without the last axis."""
        # Offset by half a cell: else the cells of all levels would share their borders at 0, 1/2, 1, where
        # interpolation kinks.
        position = x.T[:, None] * self.cells + 0.5                                          # [3, levels, N]
        cell = position.detach().floor()
        fraction = position - cell
        # Coordinates times stride at the two corners of each axis, [2, levels, N] each; x carries the level's
        # offset.
        near = cell.to(torch.int32)[:, None] * self.strides                                 # [3, 1, levels, N]
        ix, iy, iz = torch.cat([near, near + self.strides], 1) & self.masks
        ix = ix + self.offsets
        ixy = torch.where(self.dense, ix + iy[:, None], ix ^ iy[:, None])                   # [2, 2, levels, N]
        index = torch.where(self.dense, ixy + iz[:, None, None], ixy ^ iz[:, None, None])   # [2, 2, 2, levels, N]
        corners = Lookup.apply(self.table, index)                                           # [2, 2, 2, levels, N, 2]
        weights = torch.stack([1 - fraction, fraction], 1)                                  # [3, 2, levels, N]
        slopes = torch.stack([-self.cells, self.cells])                                     # [2, levels, 1]
        if pairs_are_complex(corners):
            return torch.view_as_complex(corners), weights, slopes
        return corners, weights[..., None], slopes[..., None]

    def forward(self, x):
        corners, (wx, wy, wz), _ = self.corners(x)
        return by_point((wz * (wy * (wx * corners).sum(2)).sum(1)).sum(0))

    def with_slope(self, x):
        """x [N, 3] -> features [N, F] as of forward, and d features / d x [N, 3, F]: axis by axis the two ends are
        summed with their weights or, for the derivative by this axis, with the derivatives of the weights."""
        corners, (wx, wy, wz), slopes = self.corners(x)
        on_x = (wx * corners).sum(2)                                                        # [2, 2, levels, N, 2]
        on_xy = (wy * on_x).sum(1)                                                          # [2, levels, N, 2]
        by_x = (wz * (wy * (slopes * corners).sum(2)).sum(1)).sum(0)                        # [levels, N, 2]
        by_y = (wz * (slopes * on_x).sum(1)).sum(0)
        by_z = (slopes * on_xy).sum(0)
        return by_point((wz * on_xy).sum(0)), torch.stack([by_point(by_x), by_point(by_y), by_point(by_z)], 1)
