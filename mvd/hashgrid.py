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
    """table [T, 2], index [...] int32 -> table[index], [..., 2]. `Lookup` and `AddAt` are each other's derivative, so
    normals (one derivative by position) can be trained through (a second one). PyTorch's own derivative of an
    embedding is ten times slower, and that of `table[index]` does not repeat bit for bit on several threads."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.entries = table.shape[0]
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx, grad):
        return AddAt.apply(grad, ctx.saved_tensors[0], ctx.entries), None


class AddAt(torch.autograd.Function):
    """values [..., 2], index [...] -> table [entries, 2] with table[e] = sum of the values whose index is e."""

    @staticmethod
    def forward(ctx, values, index, entries):
        ctx.save_for_backward(index)
        values, index = values.reshape(-1, 2), index.flatten()
        if pairs_are_complex(values):       # a single serial run, the same every time
            table = torch.zeros(entries, dtype=values.dtype.to_complex())
            return torch.view_as_real(table.index_add_(0, index, torch.view_as_complex(values.contiguous())))
        return values.new_zeros(entries, 2).index_add_(0, index, values)

    @staticmethod
    def backward(ctx, grad):
        return Lookup.apply(grad, ctx.saved_tensors[0]), None, None


class HashGrid(nn.Module):
    """forward: x [N, 3] in [0, 1] -> features [N, levels * features], differentiable twice by x and by the table.

    A point outside [0, 1] is the caller's mistake and gives features of some other place. The table starts at
    U(-1e-4, 1e-4).
    """

    def __init__(self, config):
        super().__init__()
        if config.features != 2:
            raise ValueError("a level has 2 features: Lookup and AddAt move them as pairs")
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

    def forward(self, x):
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
        wx, wy, wz = torch.stack([1 - fraction, fraction], 1)                               # [2, levels, N] each
        weight = wz[:, None, None] * (wy[:, None] * wx)                                     # [2, 2, 2, levels, N]
        corners = Lookup.apply(self.table, index)                                           # [2, 2, 2, levels, N, 2]
        if pairs_are_complex(corners):
            features = torch.view_as_real((weight * torch.view_as_complex(corners)).sum((0, 1, 2)))
        else:
            features = (weight[..., None] * corners).sum((0, 1, 2))                         # [levels, N, 2]
        return features.transpose(0, 1).flatten(1)
