"""A sphere tracer that draws a whole batch of solids (solids.py) at once, on a CPU or a GPU.

A ray that stands at distance d from everything may advance by d without passing through anything: sphere tracing
(J. C. Hart, 1996). Three ideas make it quick:
- Cones before rays: a cone through a tile of 16 pixels marches while the distance exceeds the cone's radius; the cones
  of its 4-pixel tiles start where it stopped, and the pixels' rays where those stopped. A cone that leaves the scene
  takes all its pixels with it.
- Rays that are done are taken out between rounds of steps, so that late steps only cost the few still on their way.
- Geometry and colour are apart. `render` stores which colour slot each pixel shows and how bright it is; `paint` turns
  that into pictures, as many times as there are palettes.

Objects live in the cube [-0.5, 0.5]^3. Rays are traced in the builder's units: N objects, P points or rays each.
"""
import math
from typing import NamedTuple

import torch

from ..cameras import rays
from .solids import distance, take

REACH = math.sqrt(3) / 2                     # the cube's half diagonal: nothing is farther from the origin
HIT = 1e-3                                   # a ray this near to a surface has arrived
NOTHING = 255                                # the slot of the background
SAMPLES = 4                                  # samples a pixel, where a pixel is not all of one surface
TILES = ((16, 6), (4, 5))                    # pixels along a cone's side, and steps: coarse to fine
ROUNDS = (3, 3, 4, 6, 8)                     # steps between two compactions
CREEPING = 0.02                              # a ray this near that still comes nearer after all rounds has arrived
LIGHT = (0.35, 0.20, 0.92)                  # fixed in the world, not to the camera: from above, a little from the front


def compact(active):
    """Where the true entries of each row are: active [N, P] -> indices [N, largest count], short rows filled up with 0.

    A filled-up entry repeats the work of ray 0, with the same result. Only reading the count waits for the device.
    """
    place = active.cumsum(1)                                                    # 1, 2, ... at the true entries
    count = int(place[:, -1].max())
    target = torch.where(active, place - 1, count)                              # the others go to one column too many
    source = torch.arange(active.shape[1], device=active.device).expand_as(target)
    index = torch.zeros(len(active), count + 1, dtype=torch.long, device=active.device)
    return index.scatter_(1, target, source)[:, :count]


def pick(values, index):
    """values [N, P] or [N, 3, P] at index [N, Q] -> [N, Q] or [N, 3, Q]."""
    return values.gather(-1, index if values.dim() == 2 else index[:, None].expand(-1, values.shape[1], -1))


def march(shapes, origins, directions, t, spread, steps):
    """Cones that move on while nothing is inside them. origins, directions [N, 3, P], t [N, P] -> t [N, P].

    A cone's radius at t is spread * t, spread [N, 1]. With d the distance at its axis, no surface is inside until
    t + (d - spread t) / (1 + spread).
    """
    for _ in range(steps):
        gap = distance(shapes, torch.addcmul(origins, directions, t[:, None])).sub_(spread * t)
        t = t + gap.clamp_(min=0).div_(1 + spread)
    return t


def arrive(shapes, origins, directions, t, far):
    """Rays from t on until they hit: t [N, P] -> t of the hit, inf for none. far [N, 1] ends the scene.

    A ray that meets a surface at a grazing angle creeps. One that after all rounds is still on its way, near something
    and getting nearer, counts as arrived.
    """
    d, result = torch.full((2, *t.shape), math.inf, device=t.device)
    index = torch.arange(t.shape[1], device=t.device).expand_as(t)
    near, creeping = HIT / shapes.scale[:, None], CREEPING / shapes.scale[:, None]
    for last, steps in enumerate(ROUNDS, 1):
        for _ in range(steps):
            before, d = d, distance(shapes, torch.addcmul(origins, directions, t[:, None]))
            hit = d < near
            t = torch.where(hit, t, t + d)
        if last == len(ROUNDS):
            hit |= (d < creeping) & (d < before)
        result.scatter_(1, index, t.masked_fill(~hit, math.inf))
        rest = compact(~hit & (t < far))
        if rest.shape[1] == 0 or last == len(ROUNDS):
            break
        origins, directions, t, index, d = (pick(a, rest) for a in (origins, directions, t, index, d))
    return result


def surface(shapes, points):
    """Slot (uint8), shade (uint8, 255 = fully lit) and normal [N, 3, P] at surface points [N, 3, P], builder's units.

    The normal is the gradient from four points of a tetrahedron. Shade: light from above and a soft lamp, less in
    narrow places (one look along the normal: how much of 0.07 is free).
    """
    _, slot = distance(shapes, points, slots=True)
    step = (5e-4 / shapes.scale)[:, None, None]
    corners = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=points.dtype, device=points.device)
    around = points[:, :, None] + step[..., None] * corners[..., None]                             # [N, 3, 4, P]
    four = distance(shapes, around.flatten(2)).unflatten(1, (4, -1))
    normal = torch.nn.functional.normalize((corners[..., None] * four[:, None]).sum(2), dim=1)     # [N, 3, P]
    probe = (0.07 / shapes.scale)[:, None]
    free = distance(shapes, torch.addcmul(points, normal, probe[:, None])).div_(probe).clamp_(0, 1)
    light = torch.nn.functional.normalize(torch.tensor(LIGHT, device=points.device), dim=0)
    lambert = (normal * light[:, None]).sum(1).clamp_(min=0)
    shade = (0.55 + 0.15 * normal[:, 2] + 0.35 * lambert) * (0.75 + 0.25 * free)
    return slot, shade.clamp_(0.3, 1).mul_(255).round_().to(torch.uint8), normal


class Buffers(NamedTuple):
    """What the pictures of N objects from V sides show, without colours."""
    slot: torch.Tensor                       # [N, V, SAMPLES, H, W] uint8: index into the palette, 255 the background
    shade: torch.Tensor                      # [N, V, SAMPLES, H, W] uint8: brightness, 255 = 1


def camera_rays(shapes, c2w, fov_deg, size, shift=(0.0, 0.0)):
    """Rays, in builder's units, through the (shifted) pixel centres: origins and directions, [N, 3, V*size*size] each.

    shift is in pixels, right and up. It leans the camera's third axis, which moves the picture plane and nothing else.
    """
    half = torch.tan(torch.deg2rad(fov_deg) / 2)[..., None]                                       # [N, V, 1]
    axis = c2w[..., :3, 2] - (shift[0] * c2w[..., :3, 0] + shift[1] * c2w[..., :3, 1]) * half * 2 / size
    leaning = c2w.clone()
    leaning[..., :3, 2] = axis
    origins, directions = rays(leaning, fov_deg, size)                                           # [N, V, size, size, 3]
    origins = (origins - shapes.offset[:, None, None, None]) / shapes.scale[:, None, None, None, None]
    return origins.flatten(1, 3).transpose(1, 2), directions.flatten(1, 3).transpose(1, 2)


def spread_over(values, grid):
    """Each tile's value for the finer tiles inside it: [N, V, g, g] -> [N, V, grid, grid]."""
    return values.repeat_interleave(grid // values.shape[2], 2).repeat_interleave(grid // values.shape[3], 3)


def look(shapes, origins, directions, near, far):
    """Rays that start at `near` [N, P] -> depth (inf: nothing), slot and shade (uint8), each [N, P]."""
    depth = arrive(shapes, origins, directions, near, far)
    slot, shade = (torch.full(depth.shape, value, dtype=torch.uint8, device=depth.device) for value in (NOTHING, 0))
    index = compact(depth < math.inf)
    if index.shape[1]:
        t = pick(depth, index)
        miss = t == math.inf                                                    # filled-up entries
        points = torch.addcmul(pick(origins, index), pick(directions, index), t.masked_fill(miss, 0)[:, None])
        found, bright, _ = surface(shapes, points)
        slot.scatter_(1, index, found.masked_fill_(miss, NOTHING))
        shade.scatter_(1, index, bright.masked_fill_(miss, 0))
    return depth, slot, shade


def render_chunk(shapes, c2w, fov_deg, size):
    """`render` for as many objects and views as fit into memory at once; fov_deg [N, V]."""
    n, views = c2w.shape[:2]
    eye = torch.linalg.vector_norm(c2w[..., :3, 3], dim=-1) / shapes.scale[:, None]                # [N, V]
    reach = (REACH / shapes.scale)[:, None]
    far = eye.amax(1, keepdim=True) + reach                                                        # [N, 1]
    pixel = 2 / size * torch.tan(torch.deg2rad(fov_deg) / 2).amax(1, keepdim=True)             # its width at distance 1

    # Cones, coarse to fine: how far is each free? inf: it meets nothing.
    near = (eye - reach).clamp(min=0)[..., None, None]                                             # [N, V, 1, 1]
    for tile, steps in TILES:
        if size % tile:
            continue
        grid = size // tile
        near = spread_over(near, grid).flatten(1)
        index = compact(near < math.inf)
        if index.shape[1]:
            origins, directions = (pick(a, index) for a in camera_rays(shapes, c2w, fov_deg, grid))
            t = march(shapes, origins, directions, pick(near, index), pixel * (tile / 2 ** 0.5), steps)
            near.scatter_(1, index, t.masked_fill_(t > far, math.inf))
        near = near.unflatten(1, (views, grid, grid))
    near = spread_over(near, size).flatten(1)                                                      # [N, V*size*size]

    # One ray through the middle of each pixel that is left.
    slots = torch.full((n, SAMPLES, near.shape[1]), NOTHING, dtype=torch.uint8, device=c2w.device)
    shades, depth = torch.zeros_like(slots), torch.full_like(near, math.inf)
    pixels = compact(near < math.inf)
    if pixels.shape[1]:
        rays_ = (pick(a, pixels) for a in camera_rays(shapes, c2w, fov_deg, size))
        t, slot, shade = look(shapes, *rays_, pick(near, pixels), far)
        depth.scatter_(1, pixels, t)
        everywhere = pixels[:, None].expand(-1, SAMPLES, -1)
        slots.scatter_(2, everywhere, slot[:, None].expand(-1, SAMPLES, -1))
        shades.scatter_(2, everywhere, shade[:, None].expand(-1, SAMPLES, -1))

    # Three more where a neighbour shows something else. They start at the nearest depth around, less a pixel.
    slot, shade = (a[:, 0].unflatten(1, (views, size, size)) for a in (slots, shades))
    edge = torch.zeros_like(slot, dtype=torch.bool)
    for dim in (2, 3):
        here, there = (0, size - 1), (1, size - 1)
        step = (slot.narrow(dim, *here) != slot.narrow(dim, *there)) | (
            (shade.narrow(dim, *here).short() - shade.narrow(dim, *there).short()).abs() > 24)
        edge.narrow(dim, *here).logical_or_(step)
        edge.narrow(dim, *there).logical_or_(step)
    pixels = compact(edge.flatten(1) & (near < math.inf))
    if pixels.shape[1]:
        around = -torch.nn.functional.max_pool2d(-depth.unflatten(1, (views, size, size)), 3, 1, 1).flatten(1)
        near = pick(torch.maximum(near, around * (1 - pixel)), pixels).repeat(1, SAMPLES - 1)
        angles = [2 * math.pi * k / (SAMPLES - 1) + 0.3 for k in range(SAMPLES - 1)]
        rays_ = [camera_rays(shapes, c2w, fov_deg, size, (0.37 * math.cos(a), 0.37 * math.sin(a))) for a in angles]
        origins, directions = (torch.cat([pick(a, pixels) for a in b], 2) for b in zip(*rays_))
        _, slot, shade = look(shapes, origins, directions, near, far)
        pixels = pixels[:, None].expand(-1, SAMPLES - 1, -1)
        slots[:, 1:].scatter_(2, pixels, slot.unflatten(1, (SAMPLES - 1, -1)))
        shades[:, 1:].scatter_(2, pixels, shade.unflatten(1, (SAMPLES - 1, -1)))
    return Buffers(*(a.unflatten(2, (views, size, size)).transpose(1, 2) for a in (slots, shades)))


@torch.no_grad()
def render(shapes, c2w, fov_deg, size):
    """Pictures without colours: shapes of N objects, c2w [N, V, 4, 4], fov_deg [N] or [N, V] -> Buffers.

    Every pixel holds SAMPLES samples; they differ only at edges, where three more rays were traced.
    """
    n, views = c2w.shape[:2]
    device = shapes.scale.device
    fov_deg = torch.as_tensor(fov_deg, dtype=torch.float32)
    fov_deg = (fov_deg[:, None] if fov_deg.dim() == 1 else fov_deg).expand(n, views).to(device)
    c2w = c2w.to(device)
    budget = 2 ** 17                                          # rays at once: what the cache holds;
    if device.type == "cuda":                             # on a GPU a sixteenth of its memory, as toyworld.py shares it
        budget = torch.cuda.get_device_properties(device).total_memory // 2 ** 14
    some_views = min(views, max(1, budget // size ** 2))
    some_objects = max(1, budget // (some_views * size ** 2))
    rows = []
    for i in range(0, n, some_objects):
        chunk = take(shapes, slice(i, i + some_objects))
        cameras, fovs = c2w[i:i + some_objects].split(some_views, 1), fov_deg[i:i + some_objects].split(some_views, 1)
        chunks = [render_chunk(chunk, camera, fov, size) for camera, fov in zip(cameras, fovs)]
        rows.append(Buffers(*(torch.cat(a, 1) for a in zip(*chunks))))
    return Buffers(*(torch.cat(a, 0) for a in zip(*rows)))


@torch.no_grad()
def paint(buffers, palette):
    """Colours for Buffers: palette [N, slots, 3] in [0, 1] -> rgba [N, V, 4, H, W] in [0, 1], straight alpha.

    A pixel's colour is the mean of its samples that show something, its alpha their share. Empty pixels are black.
    """
    n, views, samples, height, width = buffers.slot.shape
    total = torch.zeros(n, 3, views, height, width, device=palette.device)
    covered = torch.zeros(n, views, height, width, device=palette.device)
    for k in range(samples):
        slot, shade = buffers.slot[:, :, k], buffers.shade[:, :, k].float() / 255
        there = slot != NOTHING
        index = slot.masked_fill(~there, 0).long().flatten(1)[:, None].expand(-1, 3, -1)
        colour = palette.transpose(1, 2).gather(2, index).unflatten(2, (views, height, width))
        total += colour * shade[:, None]                                          # the background's shade is 0
        covered += there
    colour = total / covered.clamp(min=1)[:, None]
    return torch.cat([colour, covered[:, None] / samples], 1).transpose(1, 2).clamp_(0, 1)
