"""Solids made of signed distance functions: a small vocabulary of parts, and a batch of objects put together from them.

A signed distance function gives, for any point, the distance to the surface, negative inside. Solids add up by taking
the smaller distance, melt into each other with a smooth minimum, and are cut by `max(a, -b)`. What these functions
return may be less than the distance, but never much more: sdf.py relies on that when it walks along rays.

A batch is N objects of one *structure*: the same list of parts, every part with N sets of numbers. Parts that are alike
are computed together, so that a tensor operation has much to do. Axes: z up, +x the front (see cameras.py).
"""
import math
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """One solid of a structure. Numbers are floats, or tensors [N] where the objects of a batch differ."""
    kind: str
    centre: tuple                            # x, y, z
    size: tuple                              # what `ball`, `box`, ... below say
    slot: int                                # which colour of the palette it wears
    turn: tuple = (0, 0, 0)                  # degrees about x, then y, then z
    blend: float = 0.0                       # width of the smooth union with the parts before it; 0: a crease
    mirror: str = ""                         # "y": also at -y; "x": also at -x; "xy": four times
    spokes: tuple = ()                       # (n, radius): n copies round the local z axis, at that radius
    cut: bool = False                        # takes away instead of adding


def ball(centre, radii, slot, **how):
    """A sphere (one radius) or an ellipsoid (three)."""
    kind, size = ("ball", radii) if isinstance(radii, tuple) else ("sphere", (radii,))
    return Part(kind, centre, size, slot, **how)


def dome(centre, radii, slot, **how):
    """The upper half of an ellipsoid, flat below; the centre is the middle of its base."""
    return Part("dome", centre, radii, slot, **how)


def box(centre, half, slot, round=0.03, **how):
    """A box with half edges `half`; its edges are rounded by `round`, which must exceed a few HITs of sdf.py."""
    return Part("box", centre, (*half, round), slot, **how)


def cone(centre, bottom, top, half, slot, round=0.02, **how):
    """A truncated cone along z from radius `bottom` to `top`, `half` its height; equal radii make a cylinder."""
    return Part("cone", centre, (bottom, top, half, round), slot, **how)


def limb(start, end, radius, end_radius, slot, **how):
    """A capsule from `start` to `end` whose radius changes on the way."""
    return Part("limb", start, (*end, radius, end_radius), slot, **how)


def ring(centre, radius, thickness, slot, **how):
    """A torus round z."""
    return Part("ring", centre, (radius, thickness), slot, **how)


def roof(centre, half_length, half_width, height, slot, **how):
    """A triangular prism: ridge along x at `height`, base of half_length (x) by half_width (y), centred on the base."""
    return Part("roof", centre, (half_length, half_width, height), slot, **how)


# ---------------------------------------------------------------------------------------------------------------------
# From a list of parts to a batch

class Group(NamedTuple):
    """G parts that are computed in one go: of one kind, folded alike, all or none of them turned."""
    kind: str
    mirror: str
    spokes: int                              # how many round the local z axis; 0: none
    places: list                             # where they stand in the list of parts
    slots: torch.Tensor                      # [G] uint8
    crisp: bool                              # only joined by plain minima: the order among them does not matter
    centre: torch.Tensor                     # [N, 3, G, 1]
    axes: tuple                              # the rows of their rotations, three of [N, 3, G, 1]; () if not turned
    size: tuple                              # what `part_distance` needs of their sizes, each [N, (3,) G, 1]
    radius: torch.Tensor                     # [N, G, 1], of the spokes


class Shapes(NamedTuple):
    """N objects of one structure, ready to be traced: world point = offset + scale * builder's point."""
    parts: list                              # of Part, in order
    groups: list                             # of Group, all parts in some order
    blends: torch.Tensor                     # [N, 2, parts, 1], see `melting`
    offset: torch.Tensor                     # [N, 3]
    scale: torch.Tensor                      # [N]


def columns(values, n, device="cpu"):
    """Numbers or tensors [N] -> [N, len(values)]."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).expand(n) for v in values], 1)


def rotation(turn):
    """turn [N, 3], degrees about x, then y, then z -> rotation matrices [N, 3, 3]."""
    (cx, cy, cz), (sx, sy, sz) = torch.deg2rad(turn).cos().unbind(1), torch.deg2rad(turn).sin().unbind(1)
    rows = [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx,
            sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx,
            -sy, cy * sx, cy * cx]
    return torch.stack(rows, 1).unflatten(1, (3, 3))


def bounds(part, n):
    """The corners (low, high), [N, 3] each, of a box that holds the part with all its mirror images and spokes."""
    centre, size = columns(part.centre, n), columns(part.size, n)
    if part.kind == "limb":
        ends = torch.stack([centre, size[:, :3]], 1)                                             # [N, 2, 3]
        radii = size[:, 3:5, None]
        low, high = (ends - radii).amin(1), (ends + radii).amax(1)
        if part.spokes:
            arm = torch.maximum((low - centre).abs(), (high - centre).abs())[:, :2]
            far = (columns([part.spokes[1]], n) + torch.linalg.vector_norm(arm, dim=1, keepdim=True)).expand(n, 2)
            low = torch.cat([centre[:, :2] - far, low[:, 2:]], 1)
            high = torch.cat([centre[:, :2] + far, high[:, 2:]], 1)
    else:
        zero = torch.zeros(n)
        if part.kind == "sphere":
            high = size.expand(n, 3)
        elif part.kind == "ring":
            high = torch.stack([size[:, 0] + size[:, 1]] * 2 + [size[:, 1]], 1)
        elif part.kind == "cone":
            high = torch.stack([torch.maximum(size[:, 0], size[:, 1])] * 2 + [size[:, 2]], 1)
        else:
            high = size[:, :3]
        low = -high
        if part.kind in ("dome", "roof"):
            low = torch.stack([low[:, 0], low[:, 1], zero], 1)
        if part.spokes:
            far = torch.hypot(high[:, 0] + columns([part.spokes[1]], n)[:, 0], high[:, 1])
            low, high = torch.stack([-far, -far, low[:, 2]], 1), torch.stack([far, far, high[:, 2]], 1)
        matrix, middle, half = rotation(columns(part.turn, n)), (low + high) / 2, (high - low) / 2
        middle = centre + (matrix @ middle[..., None])[..., 0]
        if part.kind == "ball" and not part.spokes:                                              # tighter than its box
            half = (matrix.square() @ half.square()[..., None])[..., 0].sqrt()
        else:
            half = (matrix.abs() @ half[..., None])[..., 0]
        low, high = middle - half, middle + half
    for axis in part.mirror:
        i = "xyz".index(axis)
        far = torch.maximum(low[:, i].abs(), high[:, i].abs())
        low, high = low.clone(), high.clone()
        low[:, i], high[:, i] = -far, far
    return low, high


def extent(parts, n):
    """The corners (low, high), [N, 3] each, of the box round everything that the parts add."""
    lows, highs = zip(*(bounds(part, n) for part in parts if not part.cut))
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def reach(parts, n, middle):
    """Radius [N] of a ball round `middle` [N, 3] that holds everything that the parts add."""
    radii = []
    for part in (part for part in parts if not part.cut):
        low, high = bounds(part, n)
        corner = torch.maximum((low - middle).abs(), (high - middle).abs())
        centre, plain = columns(part.centre, n), part._replace(mirror="", turn=(0, 0, 0))
        low, high = bounds(plain, n)
        arm = torch.maximum((low - centre).abs(), (high - centre).abs())        # how far it goes from its own centre
        sides = torch.tensor([-1.0 if axis in part.mirror else 1.0 for axis in "xyz"])
        away = torch.maximum((centre - middle).abs(), (centre * sides - middle).abs())
        if all(map(is_zero, part.turn)) and (part.spokes or part.kind in ("dome", "cone", "ring")):
            tighter = torch.hypot(away[:, :2].norm(dim=1) + arm[:, :2].amax(1), corner[:, 2])
        elif part.kind in ("ball", "sphere"):
            tighter = away.norm(dim=1) + arm.amax(1)
        else:
            tighter = away.norm(dim=1) + arm.norm(dim=1)
        radii.append(torch.minimum(corner.norm(dim=1), tighter))
    return torch.stack(radii).amax(0)


def is_zero(value):
    """Is it a plain number, the same for all objects, and zero?"""
    return isinstance(value, (int, float)) and value == 0


def numbers(kind, size, centre):
    """What `part_distance` needs of the sizes [N, k, G] and centres [N, 3, G] of a group: a tuple of [N, (3,) G, 1]."""
    if kind in ("ball", "dome"):
        values = 1 / size,
    elif kind == "box":
        values = size[:, :3] - size[:, 3:], size[:, 3]
    elif kind == "limb":
        along = size[:, :3] - centre
        values = along, 1 / along.square().sum(1), size[:, 3], size[:, 4] - size[:, 3]
    elif kind == "roof":
        length, width, height = size.unbind(1)
        slant = torch.hypot(width, height)
        values = length, height / slant, width / slant, -width * height / slant
    elif kind == "cone":
        bottom, top, half, round = size.unbind(1)
        slope = (top - bottom) / (2 * half)
        cosine = (1 + slope.square()).rsqrt()                       # distance to a slanted side = gap * cosine
        values = cosine, -slope * cosine, -(bottom + top) / 2 * cosine, half, *melting(4 * round)
    else:
        values = size.unbind(1)                                     # sphere: radius; ring: radius, thickness
    return tuple(value[..., None] for value in values)


def pack(parts, n, offset=None, scale=None, device="cpu"):
    """A list of parts -> Shapes. offset [N, 3] and scale [N] move the builder's coordinates into the world's."""
    ordered = 1 + max([i for i, part in enumerate(parts) if part.cut or not is_zero(part.blend)], default=-1)
    alike = {}
    for i, part in enumerate(parts):
        turned = not all(is_zero(angle) for angle in part.turn)
        spokes = part.spokes[0] if part.spokes else 0
        alike.setdefault((part.kind, part.mirror, spokes, turned, i >= ordered), []).append(i)
    groups = []
    for (kind, mirror, spokes, turned, crisp), places in alike.items():
        members = [parts[i] for i in places]
        centre = torch.stack([columns(part.centre, n) for part in members], 2)
        size = torch.stack([columns(part.size, n) for part in members], 2)
        radius = torch.stack([columns(part.spokes[1:] or [0.0], n) for part in members], 1)
        axes = torch.stack([rotation(columns(part.turn, n)) for part in members], 3)[..., None] if turned else None
        slots = torch.tensor([part.slot for part in members], dtype=torch.uint8)
        groups.append(Group(kind, mirror, spokes, places, slots.to(device), crisp, centre[..., None].to(device),
                            axes.to(device).unbind(1) if turned else (),
                            tuple(value.to(device) for value in numbers(kind, size, centre)), radius.to(device)))
    blends = torch.stack(melting(torch.stack([columns([part.blend], n) for part in parts], 1)), 1)
    offset = torch.zeros(n, 3) if offset is None else offset
    scale = torch.ones(n) if scale is None else scale
    return Shapes(parts, groups, blends.to(device), offset.to(device), scale.to(device))


def take(shapes, objects):
    """Some of the N objects: a slice or an index tensor."""
    groups = [g._replace(centre=g.centre[objects], axes=tuple(a[objects] for a in g.axes), radius=g.radius[objects],
                         size=tuple(a[objects] for a in g.size)) for g in shapes.groups]
    return Shapes(shapes.parts, groups, shapes.blends[objects], shapes.offset[objects], shapes.scale[objects])


# ---------------------------------------------------------------------------------------------------------------------
# Distances, in the builder's units.

def norm(q):
    """Length of the vectors in dimension 1."""
    if q.is_cuda:
        return torch.linalg.vector_norm(q, dim=1)
    return q.square().sum(1).sqrt_()                                            # on a CPU thirty times as fast


def melting(width):
    """What `smooth_min` and `smooth_max` need to know of a width: sqrt(width) / 2 and -1 / (2 sqrt(width))."""
    root = width.clamp(min=1e-6).sqrt()
    return root / 2, -0.5 / root


def overlap(a, b, melt):
    """sqrt(width) / 2 - |a - b| / (2 sqrt(width)), or 0 where a and b differ by more than the width."""
    return torch.addcmul(melt[0], (a - b).abs_(), melt[1]).clamp_(min=0)


def smooth_min(a, b, melt):
    """min(a, b), rounded where the two differ by less than a width: min - max(width - |a - b|, 0)^2 / (4 width)."""
    h = overlap(a, b, melt)
    return torch.minimum(a, b).addcmul_(h, h, value=-1)


def smooth_max(a, b, melt):
    """max(a, b), rounded likewise."""
    h = overlap(a, b, melt)
    return torch.maximum(a, b).addcmul_(h, h)


def part_distance(group, points):
    """Signed distance (or a little less) from points [N, 3, P] to each part of a group: [N, G, P]."""
    kind, size = group.kind, group.size
    q = points[:, :, None] - group.centre                                       # [N, 3, G, P]
    if group.axes:                                                           # local = R^T q, one row of R after another
        rotated = group.axes[0] * q[:, 0:1]
        q = rotated.addcmul_(group.axes[1], q[:, 1:2]).addcmul_(group.axes[2], q[:, 2:3])
    if group.spokes:                                                            # fold the plane into one sector
        x, y, z = q.unbind(1)
        sector = 2 * math.pi / group.spokes
        angle, far = torch.atan2(y, x), torch.hypot(x, y)
        angle = angle - (angle / sector).round_().mul_(sector)
        q = torch.stack([far * angle.cos() - group.radius, far * angle.sin(), z], 1)
    if kind == "sphere":
        radius, = size
        return norm(q).sub_(radius)
    if kind in ("ball", "dome"):                                             # first order in the distance, exact at the
        inverse, = size                                                         # surface and on the axes
        scaled = q * inverse
        k0 = norm(scaled)
        d = (k0 - 1).mul_(k0).div_(norm(scaled.mul_(inverse)))
        return torch.maximum(d, -q[:, 2]) if kind == "dome" else d
    if kind == "box":                                                       # inside: -round, enough for what it is used
        half, round = size
        return norm(q.abs_().sub_(half).clamp_(min=0)).sub_(round)
    if kind == "limb":
        along, inverse, radius, growth = size
        t = (q * along).sum(1).mul_(inverse).clamp_(0, 1)                       # 0 at the start, 1 at the end
        return norm(q.addcmul_(along, t[:, None], value=-1)).sub_(radius).addcmul_(t, growth, value=-1)
    if kind == "roof":
        x, y, z = q.unbind(1)
        length, steep, flat, eaves = size
        slope = torch.addcmul(eaves, y.abs(), steep).addcmul_(z, flat)
        return torch.maximum(torch.maximum(slope, -z), x.abs().sub_(length))
    x, y, z = q.unbind(1)
    around = torch.hypot(x, y)
    if kind == "ring":
        radius, thickness = size
        return torch.hypot(around.sub_(radius), z).sub_(thickness)
    if kind == "cone":
        cosine, sine, middle, half, *melt = size
        return smooth_max(torch.addcmul(middle, around, cosine).addcmul_(z, sine), z.abs().sub_(half), melt)
    raise ValueError(f"no such kind of part: {kind}")


def distance(shapes, points, slots=False):
    """Distance of the union at points [N, 3, P]: [N, P]; with slots, also the nearest part's slot, uint8 [N, P].

    Parts up to the last one that melts or cuts are joined in their order; the others, in any order.
    """
    folded, rows, crisp = {"": points}, {}, []
    for group in shapes.groups:
        if group.mirror not in folded:
            axes = [points[:, i].abs() if axis in group.mirror else points[:, i] for i, axis in enumerate("xyz")]
            folded[group.mirror] = torch.stack(axes, 1)
        d = part_distance(group, folded[group.mirror])                          # [N, G, P]
        if group.crisp:
            crisp.append((group, d))
        else:
            rows.update(zip(group.places, d.unbind(1)))
    total = slot = None
    for i, d in sorted(rows.items()):
        part = shapes.parts[i]
        d = d.neg() if part.cut else d
        if total is None:
            total, slot = d, torch.full(d.shape, part.slot, dtype=torch.uint8, device=d.device)
            continue
        if slots:
            slot = torch.where(d > total if part.cut else d < total, part.slot, slot)
        if part.cut:
            total = torch.maximum(total, d)
        else:
            melt = shapes.blends[:, :, i].unbind(1)
            total = torch.minimum(total, d) if is_zero(part.blend) else smooth_min(total, d, melt)
    for group, d in crisp:
        if slots:
            d, which = d.min(1)
            worn = group.slots[which]
            slot = worn if total is None else torch.where(d < total, worn, slot)
        else:
            d = d.amin(1) if d.shape[1] > 1 else d[:, 0]
        total = d if total is None else torch.minimum(total, d)
    return (total, slot) if slots else total
