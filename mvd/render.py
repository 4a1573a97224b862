"""Volume rendering of the NeRF under a fixed budget of samples: no shape depends on data, a CUDA graph can hold it all.

1. `OccupancyGrid` remembers where matter is (Instant NGP §C), so that empty space costs nothing.
2. `sample` marches all rays in equal steps, asks the grid, and deals a fixed number of slots to the steps that lie in
   occupied cells and are not hidden behind opaque ones, by what the grid knows of a cell (Instant NGP asks the field
   about each sample). Too many steps: it thins them out, evenly and without bias. Too few: the rest weighs nothing.
3. `composite` is the volume rendering equation (NeRF, eq. 3) over those slots, which lie sorted by ray and by distance.
4. `render` does 1-3 for training, with shading if asked; `render_image` draws pictures for people.
"""
from dataclasses import dataclass
import math

import torch
from torch import nn
import torch.nn.functional as F

from .cameras import rays

OPAQUE = -math.log(1e-4)    # optical depth at which a ray has 1e-4 of its light left, and ends
DIAGONAL = 2 * math.sqrt(3)
AT_ONCE = 1 << 25           # steps that `march` looks at in one go: 128 MiB an operation


# ---------------------------------------------------------------- where matter is

class OccupancyGrid(nn.Module):
    """For each of size^3 cells of the box an upper and a lower estimate of the density in it, as buffers (saved).

    Each visit looks at one random point of a cell: upper = max(decay * upper, density), lower = min(lower / decay,
    density). The upper one says where samples are needed; the lower one, where light surely does not pass.
    A new grid is empty: nothing is seen before its first `update`.
    """

    def __init__(self, size=32, decay=0.95, threshold=0.01):
        super().__init__()
        self.size, self.decay, self.threshold = size, decay, threshold
        self.register_buffer("upper", torch.zeros(size ** 3))
        self.register_buffer("lower", torch.full((size ** 3,), math.inf))

    def occupied(self, step):
        """[size^3] bool: where a step of this length has an optical depth above min(mean over cells, threshold)."""
        depth = self.upper * step
        return depth > depth.mean().clamp(max=self.threshold)

    @torch.no_grad()
    def update(self, density, step, everywhere, generator=None):
        """Visit every cell, or (not everywhere) a quarter of them at random and as many among the occupied ones.

        density: points [N, 3] -> [N]; step as in `occupied`. The published schedule: every 16 training steps,
        everywhere during the first 256. Random numbers come from `generator`.
        """
        cells, device = self.size ** 3, self.upper.device
        if everywhere:
            cell = torch.arange(cells, device=device)
        else:
            draw = torch.rand(2, cells // 4, generator=generator, device=device)
            count = self.occupied(step).cumsum(0)
            nth = (draw[1] * count[-1]).long().minimum(count[-1] - 1) + 1            # 1-based rank among the occupied
            among_occupied = torch.searchsorted(count, nth).clamp(max=cells - 1)
            cell = torch.cat([(draw[0] * cells).long().clamp(max=cells - 1), among_occupied])
        corner = torch.stack([cell // self.size ** 2, cell // self.size % self.size, cell % self.size], -1)
        place = torch.rand(len(cell), 3, generator=generator, device=device)
        found = density((corner + place) / self.size * 2 - 1)
        # A cell drawn twice in one visit decays once.
        infinity = torch.full_like(self.upper, math.inf)
        highest = (-infinity).scatter_reduce(0, cell, found, "amax")
        lowest = infinity.scatter_reduce(0, cell, found, "amin")
        visited = highest >= 0
        self.upper.copy_(torch.where(visited, (self.upper * self.decay).maximum(highest), self.upper))
        self.lower.copy_(torch.where(visited, (self.lower / self.decay).minimum(lowest), self.lower))


# ---------------------------------------------------------------- where to look

@dataclass
class Samples:
    """S slots, sorted by ray and by distance. An unused slot has width 0; it lies at the end."""
    ray: torch.Tensor        # [S] which ray
    position: torch.Tensor   # [S, 3]
    distance: torch.Tensor   # [S] from the ray's origin
    width: torch.Tensor      # [S] length of ray that the sample stands for


def box_interval(origins, directions):
    """Where rays [R, 3] enter and leave the box [-1, 1]^3: distances near, far [R]; far <= near if a ray misses it."""
    slope = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    low, high = (-1 - origins) / slope, (1 - origins) / slope
    return low.minimum(high).amax(-1).clamp(min=0), low.maximum(high).amin(-1)


@torch.no_grad()
def march(occupancy, origins, directions, step, jitter):
    """Steps of each ray that are worth a sample: in the box, in an occupied cell, and not surely hidden.

    origins, directions [R, 3] (unit length); step, a number; jitter [R] in [0, 1): how far into its first step a ray
    looks. Returns the distance of the first step [R], and [R * K] int32, how many such steps there are up to and
    including each, over all rays in order, K = as many steps as the longest way through the box can take.
    """
    size, steps = occupancy.size, math.ceil(DIAGONAL / step)
    near, far = box_interval(origins, directions)
    first = near + jitter * step
    start = (origins + directions * first[:, None] + 1) * (size / 2)                            # in cells
    along = directions * (step * size / 2)
    k = torch.arange(steps, device=origins.device, dtype=origins.dtype)
    # One look-up answers both questions: the optical depth that a step has at least, or -1 where nothing is.
    cells = torch.where(occupancy.occupied(step), occupancy.lower * step, -1.0)                 # [size^3]
    wanted = []
    for first_, far_, start_, along_ in zip(*(v.split(AT_ONCE // steps) for v in (first, far, start, along))):
        x, y, z = (torch.addcmul(start_[:, a, None], along_[:, a, None], k).floor_() for a in range(3))  # [r, K] each
        cell = x.mul_(size).add_(y).mul_(size).add_(z).clamp_(0, size ** 3 - 1).to(torch.int32)
        depth = cells.index_select(0, cell.flatten()).view(cell.shape)                          # [r, K]
        inside = first_[:, None] + k * step < far_[:, None]
        solid = depth.clamp(min=0)
        wanted.append((depth >= 0) & inside & (solid.cumsum(-1) - solid < OPAQUE))
    return first, torch.cat(wanted).flatten().cumsum(0, dtype=torch.int32)


@torch.no_grad()
def choose(origins, directions, first, counts, step, budget, phase):
    """Deal `budget` slots to the n steps that `march` found (its results: first, counts): Samples.

    n <= budget: one each. Else every step has the same chance budget / n, the chosen ones lie evenly in the row of
    all, and their widths grow by n / budget: the expected optical depth of any stretch of a ray stays what it was.
    phase: a tensor [], in [0, 1), says where the even row begins.
    """
    n = counts[-1]
    steps = len(counts) // len(origins)
    row = n.clamp(min=budget).long()
    offset = (phase.double() * row).long()
    nth = (torch.arange(budget, device=n.device) * row + offset) // budget          # 0-based rank, in integers: exact
    place = torch.searchsorted(counts, (nth + 1).to(torch.int32), out_int32=True).clamp(max=len(counts) - 1)
    ray = place // steps
    distance = first[ray] + (place % steps) * step
    position = torch.addcmul(origins[ray], directions[ray], distance[:, None])
    width = (nth < n) * (row / budget * step).to(distance.dtype)
    return Samples(ray, position, distance, width)


def sample(occupancy, origins, directions, step, budget, jitter, phase):
    """`march`, then `choose`: Samples of exactly `budget` slots for rays [R, 3]."""
    first, counts = march(occupancy, origins, directions, step, jitter)
    return choose(origins, directions, first, counts, step, budget, phase)


# ---------------------------------------------------------------- what is seen

def composite(samples, density, values, ray_count):
    """The volume rendering equation: what reaches the eye along each ray.

    density [S] >= 0, values [S, C]. Returns weights [S] = T_s (1 - exp(-density_s width_s)), with T_s the light left
    by the samples before s on the same ray, and for each of the rays: sum of weights * values [R, C], opacity = sum
    of weights [R], and sum of weights * distance [R].
    """
    # One running sum over the slots of all rays, minus its value where the ray begins: only double precision makes
    # that exact.
    exact = torch.float32 if density.device.type == "mps" else torch.float64
    depth = (density * samples.width).to(exact)
    before = depth.cumsum(0) - depth
    begin = torch.searchsorted(samples.ray, torch.arange(ray_count, device=density.device, dtype=samples.ray.dtype))
    before = before - before.index_select(0, begin.index_select(0, samples.ray))
    weights = (torch.exp(-before) * -torch.expm1(-depth)).to(density.dtype)
    seen = torch.cat([values, torch.ones_like(values[:, :1]), samples.distance[:, None]], -1) * weights[:, None]
    seen = seen.new_zeros(ray_count, seen.shape[1]).index_add(0, samples.ray, seen)
    return weights, seen[:, :-2], seen[:, -2], seen[:, -1]


# ---------------------------------------------------------------- light

@dataclass
class Shading:
    """A point light. Numbers or tensors; `light` one for all rays [3] or one a ray [R, 3]."""
    light: torch.Tensor
    softness: float = 1.0       # s: 0 is the albedo alone, 1 the lamp alone
    textureless: float = 0.0    # 1 paints everything white, so that only the shape is seen


def draw_light(camera_positions, generator=None):
    """One light for each view of a set: cameras [..., V, 3] -> lights [..., V, 3], in the direction normalize(camera
    + N(0, 1)), 0.8 to 1.5 from the origin. One draw of noise and of distance a set (DreamFusion §3.1)."""
    shape, device = (*camera_positions.shape[:-2], 1), camera_positions.device
    noise = torch.randn(*shape, 3, generator=generator, device=device)
    distance = 0.8 + 0.7 * torch.rand(*shape, 1, generator=generator, device=device)
    return F.normalize(camera_positions + noise, dim=-1) * distance


def shade(albedo, normal, position, light, softness, textureless):
    """Soft shading: colour ((1 - s) + s max(0, n . l)), l the direction from the point to the light; colour is the
    albedo, or white for a textureless picture. albedo, normal, position, light [S, 3] -> [S, 3]."""
    lambert = (normal * F.normalize(light - position, dim=-1)).sum(-1, keepdim=True).clamp(min=0)
    colour = albedo + textureless * (1 - albedo)
    return colour * ((1 - softness) + softness * lambert)


def orientation_loss(weights, normals, directions, opacity):
    """Punishes surfaces that are seen and yet look away (Ref-NeRF, eq. 11): sum of sg(w) max(0, n . d)^2 / rays hit.

    weights [S], normals [S, 3], directions [S, 3] of each sample's ray, opacity [R].
    """
    away = (normals * directions).sum(-1).clamp(min=0) ** 2
    return (weights.detach() * away).sum() / (opacity.detach() > 0).sum().clamp(min=1)


# ---------------------------------------------------------------- the whole

@dataclass
class Rendering:
    """Of R rays through S samples."""
    rgb: torch.Tensor          # [R, 3] in [0, 1], over the background
    opacity: torch.Tensor      # [R] in [0, 1]
    depth: torch.Tensor        # [R] sum of weights * distance; divide by the opacity for the distance
    normal: torch.Tensor       # [R, 3] sum of weights * normal; None without shading
    weights: torch.Tensor      # [S]
    normals: torch.Tensor      # [S, 3]; None without shading
    samples: Samples


def see(nerf, samples, origins, directions, background, shading):
    """Evaluate the field at the samples and composite: Rendering."""
    if shading is None:
        density, values = nerf(samples.position)
        normals = None
    else:
        density, albedo, normals = nerf.with_normals(samples.position)
        light = shading.light if shading.light.ndim == 1 else shading.light.index_select(0, samples.ray)
        colour = shade(albedo, normals, samples.position, light, shading.softness, shading.textureless)
        values = torch.cat([colour, normals], -1)
    weights, seen, opacity, depth = composite(samples, density, values, len(origins))
    rgb = seen[:, :3] + (1 - opacity)[:, None] * background
    return Rendering(rgb, opacity, depth, None if shading is None else seen[:, 3:], weights, normals, samples)


def draw_offsets(ray_count, device, generator=None):
    """The random numbers of one rendering, each uniform in [0, 1): a jitter for every ray [R], one phase for the thinning []."""
    return torch.rand(ray_count, generator=generator, device=device), torch.rand((), generator=generator, device=device)


def render(nerf, occupancy, origins, directions, background, budget, step, jitter, phase, shading=None):
    """One differentiable rendering of rays [R, 3] over a background [3] or [R, 3], with `budget` samples `step` apart; jitter and phase
    as `draw_offsets` gives them."""
    samples = sample(occupancy, origins, directions, step, budget, jitter, phase)
    return see(nerf, samples, origins, directions, background, shading)


@dataclass
class Pictures:
    """Of V views. rgb [V, 3, H, W] in [0, 1]; opacity [V, 1, H, W] in [0, 1]; depth [V, 1, H, W], the mean distance
    along the ray of what is seen, 0 where nothing is; normal [V, 3, H, W], unit vectors in the world, 0 where nothing
    is."""
    rgb: torch.Tensor
    opacity: torch.Tensor
    depth: torch.Tensor
    normal: torch.Tensor        # None if not asked for


@torch.no_grad()
def render_image(nerf, occupancy, c2w, fov_deg, size, background, step, normals=False, chunk=1024):
    """Pictures for people: every step in an occupied cell is looked at, nothing is random, albedo without shading.

    c2w [V, 4, 4], fov_deg a number or [V], size in pixels; background a number or [3] in [0, 1], or None for the
    NeRF's own; normals: are they wanted too (1.6 times the time); chunk: rays at a time. Returns Pictures. Not for a training
    step: the number of samples is read on the host.
    """
    origins, directions = (v.reshape(-1, 3) for v in rays(c2w, fov_deg, size))
    flat = Shading(light=origins.new_zeros(3), softness=0.0) if normals else None    # asks for normals, adds no light
    pictures = []
    for o, d in zip(origins.split(chunk), directions.split(chunk)):
        first, counts = march(occupancy, o, d, step, jitter=o.new_full((len(o),), 0.5))
        samples = choose(o, d, first, counts, step, budget=max(int(counts[-1]), 1), phase=o.new_zeros(()))
        seen = see(nerf, samples, o, d, nerf.background(d) if background is None else background, flat)
        depth = seen.depth / seen.opacity.clamp(min=1e-6)
        normal = [F.normalize(seen.normal, dim=-1)] if normals else []
        pictures.append(torch.cat([seen.rgb, seen.opacity[:, None], depth[:, None], *normal], -1))
    pictures = torch.cat(pictures).unflatten(0, (*c2w.shape[:-2], size, size)).movedim(-1, -3)   # [V, 5 or 8, H, W]
    rgb, opacity, depth, normal = pictures.tensor_split((3, 4, 5), dim=-3)
    return Pictures(rgb, opacity, depth, normal if normals else None)
