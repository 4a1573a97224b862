"""Solids made of signed distance functions: a small vocabulary of parts, and batches of objects.

A signed distance function returns the distance from a point to a surface, negative inside. The
union of two solids is the smaller distance, a smooth minimum melts them into each other, and
max(a, -b) cuts b out of a. What is returned here may be less than the true distance, but hardly
ever more: tracer.py relies on that when it walks along rays.

A batch is N objects of one *structure*: the same list of parts, with N sets of numbers. Parts of
one kind are computed together, as one tensor operation. Axes: z up, +x the front (cameras.py).
A new kind of part needs a constructor, its box in `half_edges`, its numbers in `constants`, and
its function in DISTANCES.
Source: I. Quilez, "Distance functions" and "Smooth minimum" (articles on iquilezles.org).
"""
import math
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """One solid of a structure. A number is a float, or a tensor [N] if the N objects differ in it.

    kind, centre (x, y, z) and size: as the functions below fill them in.
    slot: the place of its colour in the palette (paints.py).
    turn: degrees about x, then y, then z.
    blend: the width of the smooth union with the parts before it; 0 leaves a crease.
    mirror: "y" repeats the part at -y, "x" at -x, "xy" at all four.
    spokes: (count, radius) makes count copies around the local z axis, at that radius.
    cut: the part is taken away from those before it.
    """
    kind: str
    centre: tuple
    size: tuple
    slot: int
    turn: tuple = (0, 0, 0)
    blend: float = 0.0
    mirror: str = ""
    spokes: tuple = ()
    cut: bool = False


def ball(centre, radii, slot, **how):
    """A sphere (radii is one number) or an ellipsoid (three)."""
    if isinstance(radii, tuple):
        return Part("ball", centre, radii, slot, **how)
    return Part("sphere", centre, (radii,), slot, **how)


def dome(centre, radii, slot, **how):
    """The upper half of an ellipsoid, flat below; the centre is the middle of its base."""
    return Part("dome", centre, radii, slot, **how)


def box(centre, half, slot, *, round=0.03, **how):
    """A box with half edges `half`, rounded by `round`, which must be several times tracer.HIT."""
    return Part("box", centre, (*half, round), slot, **how)


def cone(centre, bottom, top, half, slot, *, round=0.02, **how):
    """A truncated cone along z, from radius `bottom` to `top`; `half` is half its height.

    Equal radii make a cylinder. Its edges are rounded by `round`.
    """
    return Part("cone", centre, (bottom, top, half, round), slot, **how)


def limb(start, end, radius, end_radius, slot, **how):
    """A capsule from `start` to `end`, whose radius changes on the way."""
    return Part("limb", start, (*end, radius, end_radius), slot, **how)


def ring(centre, radius, thickness, slot, **how):
    """A torus around z; thickness is the radius of its tube."""
    return Part("ring", centre, (radius, thickness), slot, **how)


def roof(centre, half_length, half_width, height, slot, **how):
    """A triangular prism: its ridge lies along x at `height`, its centre is that of the base."""
    return Part("roof", centre, (half_length, half_width, height), slot, **how)


# ---- how far parts extend --------------------------------------------------------------------

def columns(values, n, device="cpu"):
    """Numbers or tensors [N] -> float32 [N, len(values)]."""
    found = []
    for value in values:
        value = torch.as_tensor(value, dtype=torch.float32, device=device)
        found.append(value.expand(n))
    return torch.stack(found, 1)


def rotation(turn):
    """turn [N, 3], degrees about x, then y, then z -> rotation matrices [N, 3, 3]."""
    angles = torch.deg2rad(turn)
    cx, cy, cz = angles.cos().unbind(1)
    sx, sy, sz = angles.sin().unbind(1)
    entries = [
        cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx,
        sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx,
        -sy, cy * sx, cy * cx,
    ]
    return torch.stack(entries, 1).unflatten(1, (3, 3))


def half_edges(kind, size):
    """Half edges [N, 3] of the box around a part that is not a limb. size [N, k]."""
    if kind == "sphere":
        return size.expand(-1, 3)
    if kind == "ring":
        radius, thickness = size.unbind(1)
        outer = radius + thickness
        return torch.stack([outer, outer, thickness], 1)
    if kind == "cone":
        outer = torch.maximum(size[:, 0], size[:, 1])
        return torch.stack([outer, outer, size[:, 2]], 1)
    # ball and dome: their radii. box and roof: half edges, the roof's height.
    return size[:, :3]


def limb_bounds(part, n):
    """`bounds` of a limb without its mirror images; a limb is not turned."""
    start = columns(part.centre, n)
    size = columns(part.size, n)
    ends = torch.stack([start, size[:, :3]], 1)
    radii = size[:, 3:5, None]
    low = (ends - radii).amin(1)
    high = (ends + radii).amax(1)
    if part.spokes:
        arm = torch.maximum((low - start).abs(), (high - start).abs())[:, :2]
        radius = columns(part.spokes[1:], n)
        far = radius + torch.linalg.vector_norm(arm, dim=1, keepdim=True)
        low = torch.cat([start[:, :2] - far, low[:, 2:]], 1)
        high = torch.cat([start[:, :2] + far, high[:, 2:]], 1)
    return low, high


def turned_bounds(part, n):
    """`bounds` of any other part without its mirror images."""
    high = half_edges(part.kind, columns(part.size, n))
    low = -high
    if part.kind in ("dome", "roof"):
        low[:, 2] = 0
    if part.spokes:
        radius = columns(part.spokes[1:], n)[:, 0]
        far = torch.hypot(high[:, 0] + radius, high[:, 1])
        low = torch.stack([-far, -far, low[:, 2]], 1)
        high = torch.stack([far, far, high[:, 2]], 1)

    matrix = rotation(columns(part.turn, n))
    middle = (low + high) / 2
    middle = columns(part.centre, n) + (matrix @ middle[..., None])[..., 0]
    half = (high - low) / 2
    if part.kind == "ball" and not part.spokes:
        # An ellipsoid extends less than the turned box around it.
        half = (matrix.square() @ half.square()[..., None])[..., 0].sqrt()
    else:
        half = (matrix.abs() @ half[..., None])[..., 0]
    return middle - half, middle + half


def bounds(part, n):
    """The corners (low, high), [N, 3] each, of a box around a part with its mirrors and spokes."""
    if part.kind == "limb":
        low, high = limb_bounds(part, n)
    else:
        low, high = turned_bounds(part, n)
    for axis in part.mirror:
        i = "xyz".index(axis)
        far = torch.maximum(low[:, i].abs(), high[:, i].abs())
        low[:, i] = -far
        high[:, i] = far
    return low, high


def extent(parts, n):
    """The corners (low, high), [N, 3] each, of the box around all parts that are not cut away."""
    lows = []
    highs = []
    for part in parts:
        if not part.cut:
            low, high = bounds(part, n)
            lows.append(low)
            highs.append(high)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def part_reach(part, n, middle):
    """`reach` of one part: the smaller one of two upper bounds, [N]."""
    # The farthest corner of its box.
    low, high = bounds(part, n)
    corner = torch.maximum((low - middle).abs(), (high - middle).abs())

    # How far its centre is away, and how far it extends from there.
    centre = columns(part.centre, n)
    sides = torch.tensor([-1.0 if axis in part.mirror else 1.0 for axis in "xyz"])
    away = torch.maximum((centre - middle).abs(), (centre * sides - middle).abs())
    low, high = bounds(part._replace(mirror="", turn=(0, 0, 0)), n)
    arm = torch.maximum((low - centre).abs(), (high - centre).abs())
    is_round = part.spokes or part.kind in ("dome", "cone", "ring")
    if is_round and not is_turned(part):
        across = away[:, :2].norm(dim=1) + arm[:, :2].amax(1)
        tighter = torch.hypot(across, corner[:, 2])
    elif part.kind in ("ball", "sphere"):
        tighter = away.norm(dim=1) + arm.amax(1)
    else:
        tighter = away.norm(dim=1) + arm.norm(dim=1)
    return torch.minimum(corner.norm(dim=1), tighter)


def reach(parts, n, middle):
    """Radius [N] of a ball around `middle` [N, 3] that holds all parts that are not cut away."""
    radii = [part_reach(part, n, middle) for part in parts if not part.cut]
    return torch.stack(radii).amax(0)


# ---- from a list of parts to a batch ---------------------------------------------------------

class Group(NamedTuple):
    """G parts that are computed together: of one kind, folded alike, all or none of them turned.

    spokes: their count, 0 for none; radius [N, G, 1]: theirs.
    places: the indices of the parts in their list. slots: uint8 [G].
    crisp: they are joined by plain minima only, so that their order does not matter.
    centre: [N, 3, G, 1].
    axes: the three rows of the rotation matrices, [N, 3, G, 1] each; () if none is turned.
    constants: what their distance function needs, from `constants`.
    """
    kind: str
    mirror: str
    spokes: int
    places: list
    slots: torch.Tensor
    crisp: bool
    centre: torch.Tensor
    axes: tuple
    constants: tuple
    radius: torch.Tensor


class Shapes(NamedTuple):
    """N objects of one structure, ready to be traced: world point = offset + scale * own point.

    parts: the list of Part. groups: all parts, in some order. blends: [N, 2, parts, 1], from
    `melting`. offset: [N, 3]. scale: [N].
    """
    parts: list
    groups: list
    blends: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor


def is_zero(value):
    """Whether a value is a plain number, the same for all objects, and zero."""
    return isinstance(value, (int, float)) and value == 0


def is_turned(part):
    return not all(is_zero(angle) for angle in part.turn)


def constants(kind, size, centre):
    """What the distance function of a kind takes after the points: a tuple of [N, (3,) G, 1].

    size [N, k, G] and centre [N, 3, G] of the parts of a group.
    """
    if kind in ("ball", "dome"):
        values = (1 / size,)
    elif kind == "box":
        half = size[:, :3]
        round = size[:, 3]
        values = (half - size[:, 3:], round)
    elif kind == "limb":
        along = size[:, :3] - centre
        start_radius = size[:, 3]
        growth = size[:, 4] - start_radius
        values = (along, 1 / along.square().sum(1), start_radius, growth)
    elif kind == "roof":
        length, width, height = size.unbind(1)
        slant = torch.hypot(width, height)
        values = (length, height / slant, width / slant, -width * height / slant)
    elif kind == "cone":
        bottom, top, half, round = size.unbind(1)
        slope = (top - bottom) / (2 * half)
        cosine = (1 + slope.square()).rsqrt()
        middle = -(bottom + top) / 2 * cosine
        values = (cosine, -slope * cosine, middle, half, *melting(4 * round))
    else:
        # A sphere's radius; a ring's radius and thickness.
        values = size.unbind(1)
    return tuple(value[..., None] for value in values)


def grouped(parts):
    """Which parts are computed together: {(kind, mirror, spokes, turned, crisp): [places]}.

    Parts up to the last one that melts or cuts must be joined in order; those after it are crisp.
    """
    ordered = 0
    for i, part in enumerate(parts):
        if part.cut or not is_zero(part.blend):
            ordered = i + 1
    groups = {}
    for i, part in enumerate(parts):
        spokes = part.spokes[0] if part.spokes else 0
        key = (part.kind, part.mirror, spokes, is_turned(part), i >= ordered)
        groups.setdefault(key, []).append(i)
    return groups


def pack(parts, n, *, offset=None, scale=None, device="cpu"):
    """A list of parts -> Shapes of N objects.

    offset [N, 3] and scale [N] move them into the world; None leaves them where they are.
    """
    groups = []
    for (kind, mirror, spokes, turned, crisp), places in grouped(parts).items():
        members = [parts[i] for i in places]
        centre = torch.stack([columns(part.centre, n) for part in members], 2)
        size = torch.stack([columns(part.size, n) for part in members], 2)
        radius = [columns(part.spokes[1:] or [0.0], n) for part in members]
        slots = torch.tensor([part.slot for part in members], dtype=torch.uint8)
        axes = ()
        if turned:
            matrices = [rotation(columns(part.turn, n)) for part in members]
            axes = torch.stack(matrices, 3)[..., None].to(device).unbind(1)
        groups.append(Group(
            kind, mirror, spokes, places, slots.to(device), crisp,
            centre=centre[..., None].to(device),
            axes=axes,
            constants=tuple(value.to(device) for value in constants(kind, size, centre)),
            radius=torch.stack(radius, 1).to(device)))
    widths = torch.stack([columns([part.blend], n) for part in parts], 1)
    blends = torch.stack(melting(widths), 1)
    offset = torch.zeros(n, 3) if offset is None else offset
    scale = torch.ones(n) if scale is None else scale
    return Shapes(parts, groups, blends.to(device), offset.to(device), scale.to(device))


def take(shapes, objects):
    """Some of the N objects, by a slice or an index tensor."""
    groups = []
    for group in shapes.groups:
        groups.append(group._replace(
            centre=group.centre[objects],
            axes=tuple(row[objects] for row in group.axes),
            constants=tuple(value[objects] for value in group.constants),
            radius=group.radius[objects]))
    return shapes._replace(
        groups=groups, blends=shapes.blends[objects],
        offset=shapes.offset[objects], scale=shapes.scale[objects])


# ---- distances -------------------------------------------------------------------------------
#
# One function per kind: points q [N, 3, G, P] in the part's own axes, about its centre, and the
# group's constants -> [N, G, P]. They are most of the time of a picture, so they work in place
# (q may be overwritten) and call torch.addcmul(a, b, c), which is a + b c in one pass.

def norm(q):
    """Length of the vectors in dimension 1."""
    if q.is_cuda:
        return torch.linalg.vector_norm(q, dim=1)
    # Thirty times as fast on a CPU.
    squares = q.square().sum(1)
    return squares.sqrt_()


def sphere_distance(q, radius):
    """|q| - radius."""
    d = norm(q)
    d -= radius
    return d


def ellipsoid_distance(q, inverse):
    """k0 (k0 - 1) / k1 with k0 = |q / r|, k1 = |q / r^2|: r are the radii, inverse = 1 / r.

    A first-order estimate of the distance, exact at the surface and along the axes.
    """
    scaled = q * inverse
    k0 = norm(scaled)
    scaled *= inverse
    k1 = norm(scaled)
    d = k0 - 1
    d *= k0
    d /= k1
    return d


def dome_distance(q, inverse):
    """The part of an ellipsoid above z = 0."""
    return torch.maximum(ellipsoid_distance(q, inverse), -q[:, 2])


def box_distance(q, inner, round):
    """|max(|q| - inner, 0)| - round, where inner = half edges - round. Inside it is just -round."""
    q.abs_()
    q -= inner
    q.clamp_(min=0)
    d = norm(q)
    d -= round
    return d


def limb_distance(q, along, inverse_square, radius, growth):
    """|q - t along| - (radius + t growth): distance to the axis, less the radius there.

    t = q.along / |along|^2 runs from 0 at the start to 1 at the end, and no further.
    """
    t = (q * along).sum(1)
    t *= inverse_square
    t.clamp_(0, 1)
    q.addcmul_(along, t[:, None], value=-1)
    d = norm(q)
    d -= radius
    return d.addcmul_(t, growth, value=-1)


def roof_distance(q, length, steep, flat, eaves):
    """The largest of the distances to the planes of the slopes, the base and the gables."""
    x, y, z = q.unbind(1)
    slope = torch.addcmul(eaves, y.abs(), steep)
    slope.addcmul_(z, flat)
    gable = x.abs()
    gable -= length
    return torch.maximum(torch.maximum(slope, -z), gable)


def ring_distance(q, radius, thickness):
    """Distance to the circle in the middle of the tube, less the tube's radius."""
    x, y, z = q.unbind(1)
    to_circle = torch.hypot(x, y)
    to_circle -= radius
    d = torch.hypot(to_circle, z)
    d -= thickness
    return d


def cone_distance(q, cosine, sine, middle, half, *melt):
    """The slanted side, cut with rounded edges by the slab |z| <= half."""
    x, y, z = q.unbind(1)
    side = torch.addcmul(middle, torch.hypot(x, y), cosine)
    side.addcmul_(z, sine)
    slab = z.abs()
    slab -= half
    return smooth_max(side, slab, melt)


DISTANCES = {
    "sphere": sphere_distance,
    "ball": ellipsoid_distance,
    "dome": dome_distance,
    "box": box_distance,
    "limb": limb_distance,
    "roof": roof_distance,
    "ring": ring_distance,
    "cone": cone_distance,
}


def part_distance(group, points):
    """Signed distances (or a little less) of points [N, 3, P] to a group's parts: [N, G, P]."""
    q = points[:, :, None] - group.centre
    if group.axes:
        # R^T q, one row of R after another.
        row_x, row_y, row_z = group.axes
        turned = row_x * q[:, 0:1]
        turned.addcmul_(row_y, q[:, 1:2])
        turned.addcmul_(row_z, q[:, 2:3])
        q = turned
    if group.spokes:
        q = fold_spokes(q, group.spokes, group.radius)
    return DISTANCES[group.kind](q, *group.constants)


def fold_spokes(q, count, radius):
    """Turn points q [N, 3, G, P] about z to the nearest spoke's sector, relative to its centre."""
    x, y, z = q.unbind(1)
    sector = 2 * math.pi / count
    angle = torch.atan2(y, x)
    far = torch.hypot(x, y)
    nearest = (angle / sector).round_()
    nearest *= sector
    angle -= nearest
    return torch.stack([far * angle.cos() - radius, far * angle.sin(), z], 1)


def fold_mirror(points, mirror):
    """Points [N, 3, P] on the side that the parts are given for: |x| or |y| or both."""
    folded = []
    for axis, values in zip("xyz", points.unbind(1)):
        folded.append(values.abs() if axis in mirror else values)
    return torch.stack(folded, 1)


# ---- joining parts ---------------------------------------------------------------------------

def melting(width):
    """What `smooth_min` and `smooth_max` need of a width: sqrt(width) / 2, -1 / (2 sqrt(width))."""
    root = width.clamp(min=1e-6).sqrt()
    return root / 2, -0.5 / root


def overlap(a, b, melt):
    """max(sqrt(width) / 2 - |a - b| / (2 sqrt(width)), 0): 0 if a and b differ by the width."""
    half_root, slope = melt
    gap = a - b
    gap.abs_()
    h = torch.addcmul(half_root, gap, slope)
    return h.clamp_(min=0)


def smooth_min(a, b, melt):
    """A minimum, rounded where a and b differ by less than the width of `melting`:

        min(a, b) - max(width - |a - b|, 0)^2 / (4 width)
    """
    h = overlap(a, b, melt)
    return torch.minimum(a, b).addcmul_(h, h, value=-1)


def smooth_max(a, b, melt):
    """max(a, b), rounded likewise."""
    h = overlap(a, b, melt)
    return torch.maximum(a, b).addcmul_(h, h)


def part_distances(shapes, points):
    """Distances to all parts at points [N, 3, P]: of the ordered ones, and of the crisp ones.

    Returns a list of (part, melt, [N, P]) in the parts' order, and of (group, [N, G, P]). The
    distance of a part that is cut is negated: it is that of all space but the part.
    """
    folded = {}
    ordered = {}
    crisp = []
    for group in shapes.groups:
        mirror = group.mirror
        if mirror not in folded:
            folded[mirror] = fold_mirror(points, mirror) if mirror else points
        d = part_distance(group, folded[mirror])
        if group.crisp:
            crisp.append((group, d))
        else:
            ordered.update(zip(group.places, d.unbind(1)))
    in_order = []
    for place in sorted(ordered):
        part = shapes.parts[place]
        melt = shapes.blends[:, :, place].unbind(1)
        d = -ordered[place] if part.cut else ordered[place]
        in_order.append((part, melt, d))
    return in_order, crisp


def joined(total, d, part, melt):
    """The distance of a union `total` after a part at distance d is added to it, or cut from it."""
    if part.cut:
        return torch.maximum(total, d)
    if is_zero(part.blend):
        return torch.minimum(total, d)
    return smooth_min(total, d, melt)


def signed_distance(shapes, points):
    """Signed distance of whole objects at points [N, 3, P], in the builder's units: [N, P].

    The result is that of joining the parts one after the other, in their order.
    """
    ordered, crisp = part_distances(shapes, points)
    total = None
    for part, melt, d in ordered:
        total = d if total is None else joined(total, d, part, melt)
    for _, d in crisp:
        d = d.amin(1) if d.shape[1] > 1 else d[:, 0]
        total = d if total is None else torch.minimum(total, d)
    return total


def distance_and_slot(shapes, points):
    """`signed_distance` at points [N, 3, P], and the slot of the nearest part, uint8 [N, P].

    On the surface of a cut the slot is that of the part that was cut away.
    """
    ordered, crisp = part_distances(shapes, points)
    total = None
    slot = None
    for part, melt, d in ordered:
        if total is None:
            total = d
            slot = torch.full(d.shape, part.slot, dtype=torch.uint8, device=d.device)
            continue
        nearest = d > total if part.cut else d < total
        slot = torch.where(nearest, part.slot, slot)
        total = joined(total, d, part, melt)
    for group, d in crisp:
        d, which = d.min(1)
        worn = group.slots[which]
        if total is None:
            total = d
            slot = worn
        else:
            slot = torch.where(d < total, worn, slot)
            total = torch.minimum(total, d)
    return total, slot
