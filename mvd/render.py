"""Volume rendering of the field under a fixed budget of samples.

1. Where matter is: `OccupancyGrid` remembers it, so that empty space costs nothing.
2. Where to look: `march_rays` finds the steps of all rays that are worth a sample,
   `select_samples` fits them into a fixed number of slots.
3. What is seen: `composite`, the volume rendering equation (NeRF, eq. 3).
4. Light: `shade` and `orientation_loss`, where training wants shading; `smoothness_loss`.
5. The whole: `render_rays`, of which a step of training takes the two halves `sample_rays` and
   `shade_samples`; `render_views` for pictures.

Rule for all that a training step calls, so that a CUDA graph can hold it: no shape depends on data,
and no number is read from the device (no `.item()`, `nonzero`, boolean index or branch on a
tensor). The tests check it. `render_views` alone is free of it.
"""
from dataclasses import dataclass
import math
from typing import NamedTuple

import torch
from torch import nn
import torch.nn.functional as F

from .cameras import rays

DIAGONAL = 2 * math.sqrt(3)     # of the box [-1, 1]³: the longest way through it
OPAQUE = -math.log(1e-4)        # optical depth after which 1e-4 of the light is left: a ray ends
# 65536 / φ, φ², φ³ with φ⁴ = φ + 1: multiples of these, modulo 65536, lie evenly in a cube.
SCATTER = (53685, 43977, 36025)
AT_ONCE = 1 << 25               # steps looked up in one go, uncompiled: 128 MiB per operation
MOST_SAMPLES = 1 << 20          # of a picture that the field is asked for in one go


# ---- 1. where matter is ----------------------------------------------------------------------

class OccupancyGrid(nn.Module):
    """Bounds of the density in each of size³ cells of the box [-1, 1]³ (Instant NGP, §C).

    A visit asks for the density at one random point of a cell, and then

        density_max = max(decay · density_max, density)
        density_min = min(density_min / decay, density).

    The first says where samples are needed, the second where light surely does not pass. Both are
    buffers [size³], saved with the module; cell (i, j, k) is at (i · size + j) · size + k, with i
    along x. A new grid is empty: nothing is seen before its first `update`.
    """

    def __init__(self, size=32, decay=0.95, threshold=0.01):
        super().__init__()
        self.size = size
        self.decay = decay
        self.threshold = threshold
        cells = size ** 3
        self.register_buffer("density_max", torch.zeros(cells))
        self.register_buffer("density_min", torch.full((cells,), math.inf))

    @property
    def device(self):
        return self.density_max.device

    def occupied(self, step):
        """[size³] bool: the cells in which a step of this length needs a sample.

        They are those whose greatest optical depth, density_max · step, exceeds the mean over all
        cells, or the threshold if that is lower.
        """
        depth = self.density_max * step
        return depth > depth.mean().clamp(max=self.threshold)

    @torch.no_grad()
    def update(self, density, step, everywhere, generator=None):
        """Visit every cell, or (not everywhere) the cells that `draw_cells` gives.

        density: a function, points [N, 3] -> [N]; step as in `occupied`. Random numbers come from
        `generator`, those of the cells before those of the points. The published schedule: every 16
        training steps, everywhere during the first 256.
        """
        if everywhere:
            cell = torch.arange(self.size ** 3, device=self.device)
        else:
            cell = self.draw_cells(step, generator)
        i = cell // self.size ** 2
        j = cell // self.size % self.size
        k = cell % self.size
        corner = torch.stack([i, j, k], -1)
        place = torch.rand(len(cell), 3, generator=generator, device=self.device)
        found = density((corner + place) / self.size * 2 - 1)

        # Over the visits to each cell, so that a cell that is drawn twice decays once.
        infinity = torch.full_like(self.density_max, math.inf)
        highest = (-infinity).scatter_reduce(0, cell, found, "amax")
        lowest = infinity.scatter_reduce(0, cell, found, "amin")
        visited = highest >= 0
        upper = (self.density_max * self.decay).maximum(highest)
        lower = (self.density_min / self.decay).minimum(lowest)
        self.density_max.copy_(torch.where(visited, upper, self.density_max))
        self.density_min.copy_(torch.where(visited, lower, self.density_min))

    def draw_cells(self, step, generator=None):
        """A quarter of all cells at random, then as many among the occupied ones: [size³ / 2]."""
        cells = self.size ** 3
        draw = torch.rand(2, cells // 4, generator=generator, device=self.device)
        anywhere = (draw[0] * cells).long().clamp(max=cells - 1)
        # The n-th occupied cell is where the running count of the occupied ones reaches n.
        count = self.occupied(step).cumsum(0)
        n = (draw[1] * count[-1]).long().minimum(count[-1] - 1) + 1
        among_occupied = torch.searchsorted(count, n).clamp(max=cells - 1)
        return torch.cat([anywhere, among_occupied])


# ---- 2. where to look ------------------------------------------------------------------------

class Samples(NamedTuple):
    """S slots, sorted by ray and by distance.

    Unused slots come last. They have width 0, and a position of their own anywhere in the box.
    """
    ray: torch.Tensor       # [S] number of the ray
    position: torch.Tensor  # [S, 3]
    distance: torch.Tensor  # [S] from the ray's origin
    width: torch.Tensor     # [S] length of ray that the sample stands for


def box_interval(origins, directions):
    """Where rays enter and leave the box [-1, 1]³: origins, directions [R, 3] -> near, far [R].

    Distances along the ray; far <= near if the ray misses the box.
    """
    tiny = torch.full_like(directions, 1e-9)
    slope = torch.where(directions.abs() < 1e-9, tiny, directions)
    low = (-1 - origins) / slope
    high = (1 - origins) / slope
    near = low.minimum(high).amax(-1).clamp(min=0)
    far = low.maximum(high).amin(-1)
    return near, far


@torch.no_grad()
def march_rays(occupancy, origins, directions, *, step, jitter):
    """Find the steps of each ray that are worth a sample.

    A ray looks at the distances first, first + step, first + 2 step ... A step is worth a sample if
    it lies in the box, in an occupied cell, and not behind so much matter that no light passes.
    (Instant NGP asks the field itself how much light is left; here the lower bounds of the density
    decide before the field is asked.)

    origins, directions [R, 3], of unit length; step: a number; jitter [R] in [0, 1): how far behind
    the wall of the box a ray looks first, as a share of a step. Returns
      first [R]: distance of the first look;
      counts [R, K] int16: the running count of such steps along each ray. Every ray has K steps, as
        many as the longest way through the box can take.
    """
    size = occupancy.size
    steps = math.ceil(DIAGONAL / step)
    near, far = box_interval(origins, directions)
    first = near + jitter * step
    start = (origins + directions * first[:, None] + 1) * (size / 2)  # in cells
    along = directions * (step * size / 2)
    k = torch.arange(steps, device=origins.device, dtype=origins.dtype)

    # One look-up answers both questions: the optical depth that a step has at least, or -1 where
    # the cell is not occupied.
    at_least = occupancy.density_min * step
    at_least = torch.where(occupancy.occupied(step), at_least, -1.0)  # [size³]

    # Compiled, the look-ups are fused and never stored: all rays at once.
    rows = len(origins) if torch.compiler.is_compiling() else AT_ONCE // steps
    counts = []
    for begin in range(0, len(origins), rows):
        part = slice(begin, begin + rows)
        cell = cells_along(start[part], along[part], k, size)  # [r, K]
        depth = at_least.index_select(0, cell.flatten()).view(cell.shape)
        distance = first[part, None] + k * step
        inside = distance < far[part, None]
        solid = depth.clamp(min=0)
        before = solid.cumsum(-1) - solid
        wanted = (depth >= 0) & inside & (before < OPAQUE)
        # A compiler has no running sum of 16 bits. A ray has a few thousand steps at most.
        counts.append(wanted.cumsum(-1, dtype=torch.int32).to(torch.int16))
    return first, torch.cat(counts)


def cells_along(start, along, k, size):
    """The cells that rays come through: start + k * along, [r, 3] each -> numbers [r, K] int32.

    In place, since this is most of the time of `march_rays`.
    """
    x = torch.addcmul(start[:, 0, None], along[:, 0, None], k).floor_()
    y = torch.addcmul(start[:, 1, None], along[:, 1, None], k).floor_()
    z = torch.addcmul(start[:, 2, None], along[:, 2, None], k).floor_()
    cell = x.mul_(size)
    cell.add_(y)
    cell.mul_(size)
    cell.add_(z)
    cell.clamp_(0, size ** 3 - 1)
    return cell.to(torch.int32)


@torch.no_grad()
def select_samples(origins, directions, first, counts, *, step, budget, phase):
    """Fit the n steps that `march_rays` found into `budget` slots: Samples.

    With `wanted` the list of these steps, by ray and then by distance:

        n <= budget: slot s takes wanted[s]; the slots that are left get width 0
        n >  budget: slot s takes wanted[floor((s + phase) n / budget)], widths grow by n / budget

    So every step has the same chance, the chosen ones lie evenly among all, and the expected
    optical depth of any stretch of a ray stays what it was.

    first [R] and counts [R, K] as `march_rays` returns them; phase [], a tensor in [0, 1).
    """
    ends = counts[:, -1].cumsum(0, dtype=torch.int32)  # [R]: of the rays up to this one
    n = ends[-1]
    # Over how many steps the slots are spread: n or, if that is more, the budget. Integers are
    # exact (phase is cut to 32 bits, and n < 2^31), and no shape depends on n.
    spread = n.clamp(min=budget).long()
    offset = ((phase * 2**32).long() * spread) >> 32  # floor(phase · spread)
    slot = torch.arange(budget, device=n.device)
    index = ((slot * spread + offset) // budget).to(torch.int32)
    ray = torch.searchsorted(ends, index, right=True, out_int32=True)
    ray = ray.clamp(max=len(ends) - 1)
    before = ends[ray] - counts[ray, -1]
    k = find_in_row(counts, ray, index - before + 1)

    distance = first[ray] + k * step
    position = torch.addcmul(origins[ray], directions[ray], distance[:, None])
    used = index < n
    width = used * (spread / budget * step).to(distance.dtype)
    # Slots that are left lie all over the box. At one point they would wait for each other, on a
    # GPU, to add nothing to the same entries of a hash grid.
    anywhere = torch.stack([slot * multiple % 65536 for multiple in SCATTER], -1) / 32768 - 1
    position = torch.where(used[:, None], position, anywhere.to(position.dtype))
    return Samples(ray, position, distance, width)


def find_in_row(counts, row, number):
    """The first k with counts[row, k] >= number, for S pairs of row and number: [S].

    counts [R, K]; the last k if there is none. A row never falls, so each turn halves what is left;
    `torch.searchsorted` would first copy the rows.
    """
    last = counts.shape[1] - 1
    place = torch.zeros_like(row)
    stride = 1 << last.bit_length()
    while stride > 1:
        stride //= 2
        further = (place + stride).clamp(max=last)
        place = torch.where(counts[row, further - 1] < number, further, place)
    return place


def sample_rays(occupancy, origins, directions, *, step, budget, jitter, phase):
    """Samples, exactly `budget` of them, of rays [R, 3]: `march_rays`, then `select_samples`."""
    first, counts = march_rays(occupancy, origins, directions, step=step, jitter=jitter)
    return select_samples(
        origins, directions, first, counts, step=step, budget=budget, phase=phase)


# ---- 3. what is seen -------------------------------------------------------------------------

def composite(samples, density, values, ray_count):
    """The volume rendering equation: what reaches the eye along each ray (NeRF, eq. 3).

    samples: Samples of R = ray_count rays; density [S] >= 0; values [S, C]: what a sample shows.
    Returns the weights [S], and the weighted sums over each ray of the values [R, C], of 1 (the
    opacity) [R], and of the distances [R], all in the number format of density. A ray without
    samples gets 0.

    For the samples of a single ray it is

        alpha = 1 - exp(-density * width)
        passed = cumprod(1 - alpha)
        light = cat([1, passed[:-1]])
        weights = light * alpha
        sum of values = (weights[:, None] * values).sum(0)

    Rays have different numbers of samples, which would be a shape that depends on data. So all
    slots are taken in one row. The light that is left is exp(-the optical depth before), and that
    depth is one running sum over the whole row, minus its value where the ray begins. Rule: this
    sum is in double precision, since a small difference of large numbers is not exact in single.
    """
    # MPS has no double precision.
    exact = torch.float32 if density.device.type == "mps" else torch.float64
    depth = (density * samples.width).to(exact)
    before = depth.cumsum(0) - depth
    numbers = torch.arange(ray_count, device=density.device, dtype=samples.ray.dtype)
    begin = torch.searchsorted(samples.ray, numbers)  # [R], the first slot of each ray
    begin = begin.index_select(0, samples.ray)  # [S]
    before = before - before.index_select(0, begin)
    alpha = -torch.expm1(-depth)
    weights = (torch.exp(-before) * alpha).to(density.dtype)

    one = torch.ones_like(values[:, :1])
    summed = torch.cat([values, one, samples.distance[:, None]], -1)
    summed = summed * weights[:, None]  # [S, C + 2]
    sums = summed.new_zeros(ray_count, summed.shape[1])
    sums = sums.index_add(0, samples.ray, summed)
    return weights, sums[:, :-2], sums[:, -2], sums[:, -1]


# ---- 4. light, and the shape under it --------------------------------------------------------

@dataclass
class Shading:
    """A point light. The two numbers may be tensors []."""
    light: torch.Tensor     # [3] where it stands, or [R, 3], one per ray
    softness: float = 1.0       # 0: the albedo alone; 1: the lamp alone
    textureless: float = 0.0    # 1 paints everything white, so that only the shape is seen


def draw_light(camera_positions, generator=None):
    """One light per view: camera positions [..., V, 3] -> lights [..., V, 3] (DreamFusion §3.1).

    It stands in the direction normalize(camera + N(0, 1)), 0.8 to 1.5 from the origin. The views of
    a set share one draw of the noise and of the distance.
    """
    per_set = camera_positions.shape[:-2] + (1,)
    device = camera_positions.device
    noise = torch.randn(per_set + (3,), generator=generator, device=device)
    distance = torch.rand(per_set + (1,), generator=generator, device=device)
    distance = 0.8 + 0.7 * distance
    return F.normalize(camera_positions + noise, dim=-1) * distance


def shade(albedo, normals, position, light, *, softness, textureless):
    """Soft shading of S points: albedo, normals, position, light [S, 3] -> colour [S, 3].

    colour · ((1 - softness) + softness · max(0, n · l)), with l the direction from the point to the
    light. The colour is the albedo, or white for a textureless picture.
    """
    to_light = F.normalize(light - position, dim=-1)
    lambert = (normals * to_light).sum(-1, keepdim=True).clamp(min=0)
    colour = albedo + textureless * (1 - albedo)
    return colour * ((1 - softness) + softness * lambert)


def orientation_loss(weights, normals, directions, opacity):
    """Punishes surfaces that are seen and yet look away from the camera (Ref-NeRF, eq. 11): []

        sum of sg(w) max(0, n · d)² / the number of rays that hit something.

    weights [S]; normals [S, 3]; directions [S, 3], of each sample's ray; opacity [R].
    """
    away = (normals * directions).sum(-1).clamp(min=0) ** 2
    hits = (opacity.detach() > 0).sum().clamp(min=1)
    return (weights.detach() * away).sum() / hits


def draw_seen_points(samples, weights, count, phase):
    """Points that the rays see: `count` of the samples' positions, [count, 3].

    The chance of a sample is in proportion to its weight. The draw is systematic: point i lies
    where the running sum of the weights [S] reaches the share (i + phase) / count of the whole, so
    that the points spread evenly over all rays. phase: a tensor [] in [0, 1).
    """
    reached = weights.detach().cumsum(0)
    share = (torch.arange(count, device=weights.device) + phase) / count
    index = torch.searchsorted(reached, share * reached[-1]).clamp(max=len(weights) - 1)
    return samples.position[index]


def smoothness_loss(nerf, points, offsets):
    """How far surfaces turn within a small distance: the mean of ‖n(x) - n(x + δ)‖², [].

    points x, offsets δ [P, 3]; n: the field's unit normals. With points of `draw_seen_points` it
    estimates Σ w ‖n(x) - n(x + δ)‖² / Σ w over all samples, w their weights.
    """
    here, beside = nerf.normals(torch.cat([points, points + offsets])).chunk(2)
    return ((here - beside) ** 2).sum(-1).mean()


# ---- 5. the whole ----------------------------------------------------------------------------

@dataclass
class Rendering:
    """What R rays through S samples see."""
    rgb: torch.Tensor       # [R, 3] in [0, 1], over the background
    opacity: torch.Tensor   # [R] in [0, 1]
    depth: torch.Tensor     # [R] sum of weights * distance; / opacity is the distance
    normal: torch.Tensor    # [R, 3] sum of weights * normals; None without shading
    weights: torch.Tensor   # [S]
    normals: torch.Tensor   # [S, 3]; None without shading
    samples: Samples


def draw_jitter(ray_count, device, generator=None):
    """The random numbers of one rendering, uniform in [0, 1): jitter [R], then phase []."""
    jitter = torch.rand(ray_count, generator=generator, device=device)
    phase = torch.rand((), generator=generator, device=device)
    return jitter, phase


def render_rays(nerf, occupancy, origins, directions, background, *, budget, step, jitter, phase,
                shading=None):
    """A differentiable Rendering of rays, with `budget` samples that stand `step` apart.

    origins, directions [R, 3]; background [3] or [R, 3]; jitter [R] and phase [] as `draw_jitter`
    returns them; shading: a Shading, or None for the albedo alone.
    """
    samples = sample_rays(
        occupancy, origins, directions, step=step, budget=budget, jitter=jitter, phase=phase)
    return shade_samples(nerf, samples, origins, directions, background, shading=shading)


def shade_samples(nerf, samples, origins, directions, background, *, shading=None):
    """Ask the field at the Samples, and composite: Rendering. Arguments as of `render_rays`."""
    if shading is None:
        density, values = nerf(samples.position)
        normals = None
    else:
        density, albedo, normals = nerf.with_normals(samples.position)
        light = shading.light
        if light.ndim == 2:
            light = light.index_select(0, samples.ray)
        colour = shade(
            albedo, normals, samples.position, light,
            softness=shading.softness, textureless=shading.textureless)
        values = torch.cat([colour, normals], -1)

    weights, seen, opacity, depth = composite(samples, density, values, len(origins))
    rgb = seen[:, :3] + (1 - opacity)[:, None] * background
    normal = None if shading is None else seen[:, 3:]
    return Rendering(rgb, opacity, depth, normal, weights, normals, samples)


class Pictures(NamedTuple):
    """Of V views."""
    rgb: torch.Tensor       # [V, 3, H, W] in [0, 1]
    opacity: torch.Tensor   # [V, 1, H, W] in [0, 1]
    depth: torch.Tensor     # [V, 1, H, W] mean distance of what is seen; 0: nothing is
    normal: torch.Tensor    # [V, 3, H, W] unit vectors in the world, 0: nothing is; or None


@torch.no_grad()
def render_views(nerf, occupancy, c2w, fov_deg, size, *, background, step, normals=False):
    """Pictures of the field for people: nothing is random or thinned, and there is no shading.

    c2w [V, 4, 4]; fov_deg, a number or [V]; size: pixels per side; background: a number or [3] in
    [0, 1], or None for the NeRF's own; normals: are they wanted too (1.6 times the time). Returns
    Pictures. Not for a training step: the number of samples is read from the device.
    """
    origins, directions = rays(c2w, fov_deg, size)
    origins = origins.reshape(-1, 3)
    directions = directions.reshape(-1, 3)
    # The normals are asked for by a light that changes nothing.
    flat = Shading(light=origins.new_zeros(3), softness=0.0) if normals else None

    rows = max(1, MOST_SAMPLES // math.ceil(DIAGONAL / step))
    chunks = []
    for o, d in zip(origins.split(rows), directions.split(rows)):
        middle = o.new_full((len(o),), 0.5)
        first, counts = march_rays(occupancy, o, d, step=step, jitter=middle)
        budget = max(int(counts[:, -1].sum()), 1)
        samples = select_samples(
            o, d, first, counts, step=step, budget=budget, phase=o.new_zeros(()))
        behind = nerf.background(d) if background is None else background
        seen = shade_samples(nerf, samples, o, d, behind, shading=flat)

        depth = seen.depth / seen.opacity.clamp(min=1e-6)
        pixels = [seen.rgb, seen.opacity[:, None], depth[:, None]]
        if normals:
            pixels.append(F.normalize(seen.normal, dim=-1))
        chunks.append(torch.cat(pixels, -1))

    pictures = torch.cat(chunks)  # [V * H * W, 5 or 8]
    pictures = pictures.unflatten(0, c2w.shape[:-2] + (size, size)).movedim(-1, -3)
    rgb, opacity, depth, normal = pictures.tensor_split((3, 4, 5), dim=-3)
    return Pictures(rgb, opacity, depth, normal if normals else None)
