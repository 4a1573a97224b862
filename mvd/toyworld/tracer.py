"""A sphere tracer that draws a batch of solids (solids.py) at once, on a CPU or a GPU.

A ray at distance d from every surface may advance by d without passing through one (J. C. Hart,
"Sphere tracing", 1996). Three ideas make it fast:
- Cones before rays: a cone through a tile of 16 x 16 pixels marches until its distance is less than
  its radius. The cones of its 4 x 4 tiles start where it stopped, and the rays of the pixels where
  those stopped. A cone that leaves the scene ends all its pixels.
- Rays that have ended are taken out between rounds of steps, so that late steps cost little.
- Geometry and colour are apart: `trace` stores per pixel which colour slot it shows and how bright
  it is, and `paint` turns that into pictures, as often as there are palettes.

Objects are in the cube [-0.5, 0.5]^3. Rays are traced in the builder's units: N objects, P rays.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..cameras import rays
from .solids import distance_and_slot, signed_distance, take

# Half the diagonal of the cube: nothing is farther from the origin.
REACH = math.sqrt(3) / 2
# A ray this near to a surface has hit it.
HIT = 1e-3
# A ray this near that still comes nearer after the last round has hit, too.
CREEPING = 0.02
# Steps per round; rays that have ended are taken out between two rounds.
ROUNDS = (3, 3, 4, 6, 8)
# (pixels along a cone's side, steps), from coarse to fine.
TILES = ((16, 6), (4, 5))
# The slot of the background.
NOTHING = 255
# Samples per pixel where it shows more than one surface: one in its middle, the others around it.
SAMPLES = 4
SAMPLE_RADIUS = 0.37
# Neighbours whose shades (of 255) differ by more than this are an edge.
EDGE = 24
# How far along the normal we look for space, to darken narrow places.
PROBE = 0.07
# Towards the light, which is fixed in the world: from above, a little from the front.
LIGHT = (0.35, 0.20, 0.92)


class Buffers(NamedTuple):
    """What pictures of N objects from V views show, without colours.

    slot: uint8 [N, V, SAMPLES, H, W], an index into the palette, or NOTHING.
    shade: uint8 [N, V, SAMPLES, H, W], the brightness, 255 = 1.
    """
    slot: torch.Tensor
    shade: torch.Tensor


# ---- rays that are still of interest ---------------------------------------------------------

def compact(active):
    """The places of the true entries of each row: active [N, P] -> [N, largest count].

    Short rows are filled up with 0: such an entry does the work of ray 0 once more, which does no
    harm. Only reading the count waits for the device.
    """
    place = active.cumsum(1)
    count = int(place[:, -1].max())
    # The k-th true entry goes to column k - 1, all others to one column too many.
    target = torch.where(active, place - 1, count)
    source = torch.arange(active.shape[1], device=active.device).expand_as(target)
    index = torch.zeros(len(active), count + 1, dtype=torch.long, device=active.device)
    return index.scatter_(1, target, source)[:, :count]


def pick(values, index):
    """values [N, P] or [N, 3, P] at index [N, Q] -> [N, Q] or [N, 3, Q]."""
    if values.dim() == 3:
        index = index[:, None].expand(-1, values.shape[1], -1)
    return values.gather(-1, index)


def camera_rays(shapes, c2w, fov_deg, size, shift=(0.0, 0.0)):
    """Rays in builder's units through pixel centres: origins, directions, [N, 3, V*size*size].

    c2w [N, V, 4, 4], fov_deg [N, V]. shift, in pixels to the right and up, moves the points within
    their pixels: the camera's third axis leans, which moves the picture plane and nothing else.
    """
    half = torch.tan(torch.deg2rad(fov_deg) / 2)[..., None]
    right = c2w[..., :3, 0]
    up = c2w[..., :3, 1]
    leaning = c2w.clone()
    leaning[..., :3, 2] -= (shift[0] * right + shift[1] * up) * half * 2 / size
    # [N, V, size, size, 3]
    origins, directions = rays(leaning, fov_deg, size)
    offset = shapes.offset[:, None, None, None]
    scale = shapes.scale[:, None, None, None, None]
    origins = (origins - offset) / scale
    return origins.flatten(1, 3).transpose(1, 2), directions.flatten(1, 3).transpose(1, 2)


# ---- marching --------------------------------------------------------------------------------

def points_at(origins, directions, t):
    """origins + t directions: [N, 3, P] from t [N, P]."""
    return torch.addcmul(origins, directions, t[:, None])


def march_cones(shapes, origins, directions, t, *, spread, steps):
    """Cones that advance while nothing is inside them: t [N, P] -> t [N, P].

    origins, directions [N, 3, P] of the axes; spread [N, 1]: a cone's radius at t is spread * t.
    With d the distance from its axis at t, nothing is in the cone until
        t + (d - spread t) / (1 + spread)
    """
    for _ in range(steps):
        gap = signed_distance(shapes, points_at(origins, directions, t))
        gap -= spread * t
        gap.clamp_(min=0)
        gap /= 1 + spread
        t = t + gap
    return t


def sphere_trace(shapes, origins, directions, t, far):
    """Advance rays from t [N, P] until they hit a surface: t of the hits [N, P], inf for none.

    far [N, 1]: where the scene ends. For one ray this is the loop

        while t < far:
            d = signed_distance(origin + t * direction)
            if d < HIT: return t
            t = t + d
        return inf

    Here it runs in ROUNDS, each with only those rays that are still on their way. A ray that passes
    a surface at a grazing angle creeps: after the last round, it has hit if it is near something
    and still getting nearer.
    """
    near = HIT / shapes.scale[:, None]
    creeping = CREEPING / shapes.scale[:, None]
    result = torch.full_like(t, math.inf)
    d = torch.full_like(t, math.inf)
    index = torch.arange(t.shape[1], device=t.device).expand_as(t)
    for last, steps in enumerate(ROUNDS, 1):
        for _ in range(steps):
            before = d
            d = signed_distance(shapes, points_at(origins, directions, t))
            hit = d < near
            t = torch.where(hit, t, t + d)
        if last == len(ROUNDS):
            hit |= (d < creeping) & (d < before)
        result.scatter_(1, index, t.masked_fill(~hit, math.inf))
        rest = compact(~hit & (t < far))
        if rest.shape[1] == 0 or last == len(ROUNDS):
            break
        origins = pick(origins, rest)
        directions = pick(directions, rest)
        t = pick(t, rest)
        d = pick(d, rest)
        index = pick(index, rest)
    return result


# ---- shading ---------------------------------------------------------------------------------

def shade_surface(shapes, points):
    """What surface points look like: slot and shade, uint8 [N, P], and normal [N, 3, P].

    points [N, 3, P] are in builder's units. The shade (255 is fully lit) is soft light from above
    and a lamp in the direction LIGHT, both dimmed in narrow places: one look along the normal tells
    how much of the way of length PROBE is free.
    """
    _, slot = distance_and_slot(shapes, points)
    normal = normals(shapes, points)

    probe = (PROBE / shapes.scale)[:, None]
    free = signed_distance(shapes, torch.addcmul(points, normal, probe[:, None]))
    free = (free / probe).clamp(0, 1)
    light = F.normalize(torch.tensor(LIGHT, device=points.device), dim=0)
    lambert = (normal * light[:, None]).sum(1).clamp(min=0)
    shade = (0.55 + 0.15 * normal[:, 2] + 0.35 * lambert) * (0.75 + 0.25 * free)
    shade = (shade.clamp(0.3, 1) * 255).round().to(torch.uint8)
    return slot, shade, normal


def normals(shapes, points):
    """Unit gradients [N, 3, P] of the distance at points [N, 3, P].

    The sum of the four corners of a small tetrahedron, weighted with the distances there.
    """
    corners = [[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]
    # [3, 4, 1]
    corners = torch.tensor(corners, dtype=points.dtype, device=points.device)[..., None]
    step = (5e-4 / shapes.scale)[:, None, None, None]
    # [N, 3, 4, P]
    around = points[:, :, None] + step * corners
    four = signed_distance(shapes, around.flatten(2)).unflatten(1, (4, -1))
    return F.normalize((corners * four[:, None]).sum(2), dim=1)


def trace_rays(shapes, origins, directions, near, far):
    """What rays show: depth (inf for nothing), slot and shade (uint8), [N, P] each.

    near [N, P]: where they start. far [N, 1]: where the scene ends.
    """
    depth = sphere_trace(shapes, origins, directions, near, far)
    slot = torch.full_like(depth, NOTHING, dtype=torch.uint8)
    shade = torch.zeros_like(depth, dtype=torch.uint8)
    index = compact(depth < math.inf)
    if index.shape[1] == 0:
        return depth, slot, shade
    t = pick(depth, index)
    # Entries that only fill up a row may have hit nothing.
    miss = t == math.inf
    t = t.masked_fill(miss, 0)
    points = points_at(pick(origins, index), pick(directions, index), t)
    found, bright, _ = shade_surface(shapes, points)
    slot.scatter_(1, index, found.masked_fill(miss, NOTHING))
    shade.scatter_(1, index, bright.masked_fill(miss, 0))
    return depth, slot, shade


# ---- pictures --------------------------------------------------------------------------------

def pixel_width(fov_deg, size):
    """The largest width of a pixel at distance 1, [N, 1]; fov_deg [N, V]."""
    return 2 / size * torch.tan(torch.deg2rad(fov_deg) / 2).amax(1, keepdim=True)


def spread_over(values, grid):
    """Each tile's value for the finer tiles inside it: [N, V, g, g] -> [N, V, grid, grid]."""
    values = values.repeat_interleave(grid // values.shape[2], 2)
    return values.repeat_interleave(grid // values.shape[3], 3)


def free_depth(shapes, c2w, fov_deg, size, *, start, far):
    """How far each pixel's ray is free, by cones from coarse to fine: [N, V*size*size].

    start [N, V], far [N, 1]: where the scene begins and ends. inf: the ray meets nothing.
    """
    views = c2w.shape[1]
    near = start[..., None, None]
    for tile, steps in TILES:
        if size % tile:
            continue
        grid = size // tile
        near = spread_over(near, grid).flatten(1)
        index = compact(near < math.inf)
        if index.shape[1]:
            origins, directions = camera_rays(shapes, c2w, fov_deg, grid)
            # Half the diagonal of a tile.
            spread = pixel_width(fov_deg, size) * (tile / 2 ** 0.5)
            t = march_cones(
                shapes, pick(origins, index), pick(directions, index), pick(near, index),
                spread=spread, steps=steps)
            t.masked_fill_(t > far, math.inf)
            near.scatter_(1, index, t)
        near = near.unflatten(1, (views, grid, grid))
    return spread_over(near, size).flatten(1)


def start_of_rays(shapes, c2w, fov_deg, size):
    """Where each pixel's ray may meet something, and where the scene ends.

    near [N, V*size*size], inf if the ray meets nothing; far [N, 1].
    """
    eye = torch.linalg.vector_norm(c2w[..., :3, 3], dim=-1) / shapes.scale[:, None]
    reach = (REACH / shapes.scale)[:, None]
    start = (eye - reach).clamp(min=0)
    far = eye.amax(1, keepdim=True) + reach
    return free_depth(shapes, c2w, fov_deg, size, start=start, far=far), far


def trace_middles(shapes, c2w, fov_deg, size, *, near, far):
    """One ray through the middle of each pixel, from near [N, V*size*size] on.

    Returns depth, slot and shade, [N, V*size*size] each.
    """
    depth = torch.full_like(near, math.inf)
    slot = torch.full_like(near, NOTHING, dtype=torch.uint8)
    shade = torch.zeros_like(near, dtype=torch.uint8)
    pixels = compact(near < math.inf)
    if pixels.shape[1]:
        origins, directions = camera_rays(shapes, c2w, fov_deg, size)
        found = trace_rays(
            shapes, pick(origins, pixels), pick(directions, pixels), pick(near, pixels), far)
        for values, new in zip((depth, slot, shade), found):
            values.scatter_(1, pixels, new)
    return depth, slot, shade


def find_edges(slot, shade):
    """Which pixels have a neighbour that shows something else: bool [N, V, H, W].

    slot, shade: uint8 [N, V, H, W].
    """
    edge = torch.zeros_like(slot, dtype=torch.bool)
    for dim in (2, 3):
        length = slot.shape[dim] - 1
        other_slot = slot.narrow(dim, 0, length) != slot.narrow(dim, 1, length)
        step = shade.narrow(dim, 0, length).short() - shade.narrow(dim, 1, length).short()
        differs = other_slot | (step.abs() > EDGE)
        edge.narrow(dim, 0, length).logical_or_(differs)
        edge.narrow(dim, 1, length).logical_or_(differs)
    return edge


def trace_edges(shapes, c2w, fov_deg, size, *, pixels, near, far):
    """The other samples of some pixels: slot and shade, uint8 [N, SAMPLES - 1, Q].

    pixels [N, Q]: their indices. near [N, Q]: where their rays start.
    """
    others = SAMPLES - 1
    origins = []
    directions = []
    for k in range(others):
        angle = 2 * math.pi * k / others + 0.3
        shift = (SAMPLE_RADIUS * math.cos(angle), SAMPLE_RADIUS * math.sin(angle))
        some_origins, some_directions = camera_rays(shapes, c2w, fov_deg, size, shift)
        origins.append(pick(some_origins, pixels))
        directions.append(pick(some_directions, pixels))
    _, slot, shade = trace_rays(
        shapes, torch.cat(origins, 2), torch.cat(directions, 2), near.repeat(1, others), far)
    return slot.unflatten(1, (others, -1)), shade.unflatten(1, (others, -1))


def trace_chunk(shapes, c2w, fov_deg, size):
    """`trace` for as many objects and views as fit into memory at once: slot, shade.

    fov_deg [N, V].
    """
    picture = (c2w.shape[1], size, size)
    near, far = start_of_rays(shapes, c2w, fov_deg, size)
    depth, slot, shade = trace_middles(shapes, c2w, fov_deg, size, near=near, far=far)
    # [N, SAMPLES, V*size*size]
    slots = slot[:, None].repeat(1, SAMPLES, 1)
    shades = shade[:, None].repeat(1, SAMPLES, 1)

    edge = find_edges(slot.unflatten(1, picture), shade.unflatten(1, picture)).flatten(1)
    pixels = compact(edge & (near < math.inf))
    if pixels.shape[1]:
        # These rays start at the nearest depth around their pixel, less a pixel.
        around = -F.max_pool2d(-depth.unflatten(1, picture), 3, 1, 1).flatten(1)
        near = torch.maximum(near, around * (1 - pixel_width(fov_deg, size)))
        slot, shade = trace_edges(
            shapes, c2w, fov_deg, size, pixels=pixels, near=pick(near, pixels), far=far)
        index = pixels[:, None].expand(-1, SAMPLES - 1, -1)
        slots[:, 1:].scatter_(2, index, slot)
        shades[:, 1:].scatter_(2, index, shade)
    slots = slots.unflatten(2, picture).transpose(1, 2)
    shades = shades.unflatten(2, picture).transpose(1, 2)
    return slots, shades


def trace_normals_chunk(shapes, c2w, fov_deg, size):
    """`trace_normals` for as many objects and views as fit into memory at once; fov_deg [N, V]."""
    near, far = start_of_rays(shapes, c2w, fov_deg, size)
    normal = near.new_zeros(len(near), 3, near.shape[1])
    coverage = torch.zeros_like(near)
    pixels = compact(near < math.inf)
    if pixels.shape[1]:
        origins, directions = camera_rays(shapes, c2w, fov_deg, size)
        origins = pick(origins, pixels)
        directions = pick(directions, pixels)
        t = sphere_trace(shapes, origins, directions, pick(near, pixels), far)
        hit = t < math.inf
        points = points_at(origins, directions, t.masked_fill(~hit, 0))
        found = normals(shapes, points) * hit[:, None]
        normal.scatter_(2, pixels[:, None].expand_as(found), found)
        coverage.scatter_(1, pixels, hit.float())
    picture = (c2w.shape[1], size, size)
    # [N, V, 3, H, W] and [N, V, 1, H, W]
    normal = normal.unflatten(2, picture).transpose(1, 2)
    return normal, coverage.unflatten(1, picture)[:, :, None]


def rays_at_once(device):
    """How many rays are traced together: what a CPU's cache holds, or a share of a GPU's memory.

    The share is small since toyworld/dataset.py lets up to 16 processes draw on one GPU.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2 ** 14
    return 2 ** 17


def in_chunks(trace_some, shapes, c2w, fov_deg, size):
    """What trace_some(shapes, c2w, fov_deg [N, V], size) returns, a chunk at a time.

    It returns a tuple of tensors [N, V, ...] for some of the objects and views; so does this for
    all of them. c2w [N, V, 4, 4]. fov_deg [N] or [N, V].
    """
    n, views = c2w.shape[:2]
    device = shapes.scale.device
    c2w = c2w.to(device)
    fov_deg = torch.as_tensor(fov_deg, dtype=torch.float32)
    if fov_deg.dim() == 1:
        fov_deg = fov_deg[:, None]
    fov_deg = fov_deg.expand(n, views).to(device)

    budget = rays_at_once(device)
    some_views = min(views, max(1, budget // size ** 2))
    some_objects = max(1, budget // (some_views * size ** 2))
    found = []
    for i in range(0, n, some_objects):
        objects = slice(i, i + some_objects)
        chunk = take(shapes, objects)
        of_chunk = []
        for j in range(0, views, some_views):
            which = (objects, slice(j, j + some_views))
            of_chunk.append(trace_some(chunk, c2w[which], fov_deg[which], size))
        found.append([torch.cat(tensors, 1) for tensors in zip(*of_chunk)])
    return tuple(torch.cat(tensors) for tensors in zip(*found))


@torch.no_grad()
def trace(shapes, c2w, fov_deg, size):
    """Pictures of N objects from V views, without colours: Buffers, for `paint`.

    shapes: solids.Shapes. c2w [N, V, 4, 4]. fov_deg [N] or [N, V]. size: pixels along a side.
    Every pixel has SAMPLES samples; they differ only at edges, where more rays were traced.
    """
    slot, shade = in_chunks(trace_chunk, shapes, c2w, fov_deg, size)
    return Buffers(slot, shade)


@torch.no_grad()
def trace_normals(shapes, c2w, fov_deg, size):
    """Normal maps of N objects from V views: normal [N, V, 3, H, W], coverage [N, V, 1, H, W].

    The normals are unit vectors in the world, 0 where nothing is; there coverage is 0.0, elsewhere
    1.0. One ray per pixel, through its middle. The arguments are those of `trace`.
    """
    return in_chunks(trace_normals_chunk, shapes, c2w, fov_deg, size)


@torch.no_grad()
def paint(buffers, palette):
    """Colours for Buffers: palette [N, slots, 3] in [0, 1] -> rgba [N, V, 4, H, W] in [0, 1].

    Alpha is straight: a pixel's colour is the mean of its samples that show something, its alpha is
    their share. Empty pixels are black.
    """
    n, views, samples, height, width = buffers.slot.shape
    total = torch.zeros(n, 3, views, height, width, device=palette.device)
    covered = torch.zeros(n, views, height, width, device=palette.device)
    for k in range(samples):
        slot = buffers.slot[:, :, k]
        shade = buffers.shade[:, :, k].float() / 255
        there = slot != NOTHING
        index = slot.masked_fill(~there, 0).long().flatten(1)
        index = index[:, None].expand(-1, 3, -1)
        colour = palette.transpose(1, 2).gather(2, index)
        colour = colour.unflatten(2, (views, height, width))
        # The background's shade is 0.
        total += colour * shade[:, None]
        covered += there
    colour = total / covered.clamp(min=1)[:, None]
    alpha = covered[:, None] / samples
    return torch.cat([colour, alpha], 1).transpose(1, 2).clamp(0, 1)
