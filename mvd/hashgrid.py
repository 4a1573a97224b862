"""Multiresolution hash encoding: a point in space -> learned features.

A level is a grid of vertices over the cube; the levels grow finer geometrically. Every vertex has
an entry, a pair of learned numbers. A point's features are, level by level, the trilinear
interpolation of the entries at the eight corners of its cell. Where the vertices of a level do not
fit into 2^k entries, they share them by a hash of their coordinates, and training sorts out the
collisions. This small table holds all the detail of the NeRF.

`encode_plainly` is the method as two loops; `HashGrid` computes the same fast. Source: Müller et
al. 2022, Instant Neural Graphics Primitives (Instant NGP), §3.
"""
from dataclasses import dataclass
from itertools import product
import math

import torch
from torch import nn
import torch.nn.functional as F

PRIMES = (1, 2654435761, 805459861)     # of the hash, per axis (Instant NGP, eq. 4)
FEATURES = 2                            # per entry: `Lookup` moves them as pairs


@dataclass
class HashGridConfig:
    """The defaults are the full size."""
    levels: int = 16
    log2_entries: int = 19      # k: a level has 2^k entries at most
    coarsest: int = 16          # cells per axis of the first level
    finest: int = 4096          # and of the last
    lr_grid: float = 0.01       # learning rate of the table


# ---- what it computes ------------------------------------------------------------------------

@dataclass
class Level:
    """One grid over the cube, and its part of the table."""
    width: float        # of the cube, in cells
    vertices: int       # per axis
    dense: bool         # every vertex has its own entry; else they share by the hash
    size: int           # entries
    start: int = 0      # index of its first entry in the table


def levels_of(config):
    """The levels of a HashGridConfig, the coarsest first: [Level].

    In the table the hashed levels come first, then the dense ones. `HashGrid.index` relies on it.
    """
    growth = (config.finest / config.coarsest) ** (1 / max(config.levels - 1, 1))
    most = 2 ** config.log2_entries
    levels = []
    for number in range(config.levels):
        # A level has N = coarsest · growth^number cells per axis. Positions are shifted by half a
        # cell, so the cube covers positions 0.5 to N - 0.5: N - 1 cells wide, N + 1 vertices.
        width = config.coarsest * growth ** number - 1
        vertices = math.ceil(width) + 2
        dense = vertices ** 3 <= most
        size = vertices ** 3 if dense else most
        levels.append(Level(width, vertices, dense, size))

    hashed = [level for level in levels if not level.dense]
    dense = [level for level in levels if level.dense]
    start = 0
    for level in hashed + dense:
        level.start = start
        start += level.size
    return levels


def encode_plainly(table, x, config):
    """The encoding as a loop over levels and corners, to read and to check `HashGrid` with.

    table [entries, 2], x [N, 3] in [0, 1] -> features [N, levels * 2], level by level.
    Differentiable by both.
    """
    features = []
    for level in levels_of(config):
        # Rule: half a cell is added. Otherwise the cells of all levels would share borders at 0,
        # 1/2 and 1, and the interpolation has a kink at a border.
        position = x * level.width + 0.5  # [N, 3], in cells
        cell = position.detach().floor()
        fraction = position - cell

        total = 0
        for corner in product((0, 1), repeat=3):
            upper = torch.tensor(corner, device=x.device)
            vx, vy, vz = (cell.long() + upper).unbind(-1)  # [N] each
            if level.dense:
                entry = vx + level.vertices * vy + level.vertices ** 2 * vz
            else:
                entry = (vx * PRIMES[0]) ^ (vy * PRIMES[1]) ^ (vz * PRIMES[2])
                entry = entry % level.size
            weight = torch.where(upper == 1, fraction, 1 - fraction).prod(-1)
            total = total + weight[:, None] * table[level.start + entry]
        features.append(total)
    return torch.cat(features, -1)


# ---- the fast form ---------------------------------------------------------------------------

def pairs_are_complex(x):
    """Is a pair of features held as one complex number? On a CPU, where nothing is compiled.

    There an operation on [..., N] complex numbers is one long vectorised run; on [..., N, 2] floats
    it stops after every two.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Lookup(torch.autograd.Function):
    """table [T, 2], index [...] int32 -> table[index], [..., 2], with a derivative of our own.

    The derivative adds up what arrives at each entry. PyTorch's own for an embedding is ten times
    slower, and its own for `table[index]` does not repeat bit for bit on several threads.
    """

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.entries = table.shape[0]
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx, grad):
        """grad [..., 2] -> the gradient of the table [T, 2]; the index has none."""
        index = ctx.saved_tensors[0].flatten()
        grad = grad.reshape(-1, FEATURES)
        if not pairs_are_complex(grad):
            total = grad.new_zeros(ctx.entries, FEATURES)
            return total.index_add_(0, index, grad), None
        # A single run over the index in order: the sums are the same every time.
        grad = torch.view_as_complex(grad.contiguous())
        total = torch.zeros(ctx.entries, dtype=grad.dtype)
        total.index_add_(0, index, grad)
        return torch.view_as_real(total), None


def by_point(features):
    """[levels, N, 2], or [levels, N] complex -> [N, levels * 2]."""
    if features.is_complex():
        features = torch.view_as_real(features)
    return features.transpose(0, 1).flatten(1)


class HashGrid(nn.Module):
    """The encoding of `encode_plainly` as one expression over [corner, level, point].

    forward(x): x [N, 3] in [0, 1] -> features [N, levels * 2], differentiable by x and the table.
    with_slope(x): their derivatives by x as well, by formula; both differentiable by the table.

    A point outside [0, 1] is the caller's mistake and gets features of some other place. The table
    starts at U(-1e-4, 1e-4). The points are the last axis, so that on a CPU every operation is one
    long vectorised run; on a GPU, where a compiler fuses them, only the lookup goes point by point.
    No shape depends on data.

    Dense and hashed levels are computed alike, each from four constants:
    - strides: what a step along x, y, z adds to the index: 1, v, v² if dense, the primes if hashed;
    - masks: entries - 1 if hashed, to keep the low k bits; -1 if dense, which keeps all bits;
    - starts: where the level begins in the table;
    - dense: whether the three axes are joined by a sum or by an exclusive or.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.output_size = config.levels * FEATURES
        levels = levels_of(config)
        strides, masks = [], []
        for level in levels:
            if level.dense:
                strides.append((1, level.vertices, level.vertices ** 2))
                masks.append(-1)
            else:
                strides.append(PRIMES)
                masks.append(level.size - 1)

        # 32-bit arithmetic wraps round; the low k bits, all that the hash keeps, come out right.
        strides = torch.tensor(strides, dtype=torch.int64).to(torch.int32)
        self.constant("strides", strides.T[:, None, :, None])  # [3, 1, levels, 1]
        masks = torch.tensor(masks, dtype=torch.int32)
        self.constant("masks", masks[:, None])  # [levels, 1], as all that follow
        starts = torch.tensor([level.start for level in levels], dtype=torch.int32)
        self.constant("starts", starts[:, None])
        dense = torch.tensor([level.dense for level in levels])
        self.constant("dense", dense[:, None])
        cells = torch.tensor([level.width for level in levels])
        self.constant("cells", cells[:, None])

        entries = sum(level.size for level in levels)
        table = torch.empty(entries, FEATURES).uniform_(-1e-4, 1e-4)
        self.table = nn.Parameter(table)

    def constant(self, name, value):
        """A buffer: it moves to the device with the module, and is not saved."""
        self.register_buffer(name, value, persistent=False)

    def forward(self, x):
        """x [N, 3] in [0, 1] -> features [N, F] (Instant NGP §3)."""
        corners, weights, _ = self.corners(x)
        wx, wy, wz = weights
        along_x = (wx * corners).sum(2)
        along_xy = (wy * along_x).sum(1)
        return by_point((wz * along_xy).sum(0))

    def with_slope(self, x):
        """x [N, 3] -> features [N, F] as of forward, and d features / dx [N, 3, F].

        Along each axis the two ends are summed with their weights, f = Σz wz Σy wy Σx wx entry, or,
        for the derivative by this axis, with the derivatives of the weights.
        """
        corners, weights, slopes = self.corners(x)
        wx, wy, wz = weights
        along_x = (wx * corners).sum(2)  # [2, 2, levels, N, 2]
        along_xy = (wy * along_x).sum(1)  # [2, levels, N, 2]

        slope_x = (slopes * corners).sum(2)
        slope_xy = (wy * slope_x).sum(1)
        by_x = (wz * slope_xy).sum(0)  # [levels, N, 2], as all that follow
        slope_y = (slopes * along_x).sum(1)
        by_y = (wz * slope_y).sum(0)
        by_z = (slopes * along_xy).sum(0)

        features = by_point((wz * along_xy).sum(0))
        slope = torch.stack([by_point(by_x), by_point(by_y), by_point(by_z)], 1)
        return features, slope

    def corners(self, x):
        """What is interpolated at x [N, 3], and with which weights. Returns

        corners [2, 2, 2, levels, N, 2]: the entries at the corners of the cell, by z, y, x;
        weights [3, 2, levels, N, 1]: of the two ends along x, y, z: 1 - fraction and fraction;
        slopes [2, levels, 1, 1]: the derivatives of the weights, the same along each axis.

        Where pairs are complex, all three come without their last axis.
        """
        # Half a cell is added; see `encode_plainly`.
        position = x.T[:, None] * self.cells + 0.5  # [3, levels, N]
        cell = position.detach().floor()
        fraction = position - cell
        index = self.index(cell)
        weights = torch.stack([1 - fraction, fraction], 1)  # [3, 2, levels, N]
        slopes = torch.stack([-self.cells, self.cells])  # [2, levels, 1]
        if pairs_are_complex(x):
            corners = Lookup.apply(self.table, index)
            return torch.view_as_complex(corners), weights, slopes
        # The eight corners of a point are looked up together, since many are neighbours in the
        # table. In the derivative, points one after another would wait to add to the same entry.
        index = index.permute(3, 4, 0, 1, 2).contiguous()  # [levels, N, 2, 2, 2]
        corners = Lookup.apply(self.table, index).permute(2, 3, 4, 0, 1, 5)
        return corners, weights[..., None], slopes[..., None]

    def index(self, cell):
        """cell [3, levels, N] -> index of the entries at its corners [2, 2, 2, levels, N], int32.

        The corners are ordered by z, y, x.
        Each axis is multiplied by its stride and masked alone, at its two ends; then the three are
        joined. A hashed level starts at a multiple of 2^k, since the hashed ones are stored first.
        Its start has no bit in common with the hash, so the exclusive or joins it too.
        """
        near = cell.to(torch.int32)[:, None] * self.strides  # [3, 1, levels, N]
        far = near + self.strides
        ix, iy, iz = torch.cat([near, far], 1) & self.masks  # [2, levels, N] each
        ix = ix + self.starts
        iy = iy[:, None]
        iz = iz[:, None, None]
        ixy = torch.where(self.dense, ix + iy, ix ^ iy)  # [2, 2, levels, N]
        return torch.where(self.dense, ixy + iz, ixy ^ iz)
