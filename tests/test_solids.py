"""Signed distances against points on the surface, drawn without them, and against each other.

`samples_of` draws the points, in float64; a new kind of part needs a sampler there.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from mvd.toyworld.solids import (
    DISTANCES, ball, box, cone, distance_and_slot, dome, extent, limb, melting, pack, reach, ring,
    roof, rotation, signed_distance, smooth_min,
)

POINTS = (torch.rand(1, 3, 500, generator=torch.Generator().manual_seed(3)) - 0.5) * 2


def one(part, **how):
    """One object of a part or of a list of parts."""
    parts = part if isinstance(part, list) else [part]
    return pack(parts, 1, **how)


# ---- points on the surface of each kind of part ----------------------------------------------

def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def uniform(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def on_sphere(count):
    return F.normalize(torch.randn(count, 3, dtype=torch.float64), dim=1)


def on_dome(count, radii):
    upper = on_sphere(count) * radii
    upper[:, 2] = upper[:, 2].abs()
    base = on_sphere(count) * radii * uniform(count, 1)
    base[:, 2] = 0
    return torch.cat([upper, base])


def on_box(count, half):
    points = -half + 2 * half * uniform(count, 3)
    axis = torch.randint(3, (count,))
    side = torch.randint(2, (count,)).bool()
    points[torch.arange(count), axis] = torch.where(side, half[axis], -half[axis])
    return points


def on_revolved(count, radius, height):
    """Around z through the corners (radius, height) of a profile."""
    i = torch.randint(len(radius) - 1, (count,))
    u = uniform(count)
    r = radius[i] + (radius[i + 1] - radius[i]) * u
    z = height[i] + (height[i + 1] - height[i]) * u
    angle = 2 * math.pi * uniform(count)
    return torch.stack([r * angle.cos(), r * angle.sin(), z], 1)


def on_ring(count, radius, thickness):
    angle = 2 * math.pi * uniform(count)
    tube = 2 * math.pi * uniform(count)
    r = radius + thickness * tube.cos()
    return torch.stack([r * angle.cos(), r * angle.sin(), thickness * tube.sin()], 1)


def on_limb(start, end, radius, end_radius):
    """Of many spheres between the ends, the points that are outside all others."""
    t = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
    centres = start + t * (end - start)
    radii = radius + t * (end_radius - radius)
    points = centres[:, None] + radii[:, None] * on_sphere(600)
    points = points.flatten(0, 1)
    outside = (torch.cdist(points, centres) - radii.T).amin(1) > -1e-4
    return points[outside]


def on_roof(count, length, width, height):
    """Triangles: the two gables, and two for each of the three rectangles between them."""
    corners = []
    for x in (-length, length):
        for y, z in ((-width, 0), (width, 0), (0, height)):
            corners.append(vector(x, y, z))
    faces = [
        (0, 1, 2), (3, 4, 5), (0, 1, 3), (4, 1, 3),
        (0, 2, 3), (5, 2, 3), (1, 2, 4), (5, 2, 4),
    ]
    weights = torch.distributions.Dirichlet(vector(1, 1, 1)).sample((count // 8,))
    points = []
    for face in faces:
        points.append(weights @ torch.stack([corners[i] for i in face]))
    return torch.cat(points)


def samples_of(kind, count=30000):
    """(a part of this kind, points [count, 3] on its surface)."""
    torch.manual_seed(0)
    o = (0, 0, 0)
    if kind == "sphere":
        return ball(o, 0.3, 0), on_sphere(count) * 0.3
    if kind == "ball":
        return ball(o, (0.4, 0.25, 0.1), 0), on_sphere(count) * vector(0.4, 0.25, 0.1)
    if kind == "dome":
        return dome(o, (0.4, 0.3, 0.25), 0), on_dome(count, vector(0.4, 0.3, 0.25))
    if kind == "box":
        half = (0.4, 0.2, 0.1)
        return box(o, half, 0, round=1e-3), on_box(count, vector(*half))
    if kind == "cone":
        radius = vector(0, 0.35, 0.1, 0)
        height = vector(-0.25, -0.25, 0.25, 0.25)
        return cone(o, 0.35, 0.1, 0.25, 0, round=1e-3), on_revolved(count, radius, height)
    if kind == "ring":
        return ring(o, 0.3, 0.08, 0), on_ring(count, 0.3, 0.08)
    if kind == "limb":
        points = on_limb(vector(-0.3, 0, 0), vector(0.25, 0.2, 0.1), 0.15, 0.06)
        return limb((-0.3, 0, 0), (0.25, 0.2, 0.1), 0.15, 0.06, 0), points
    if kind == "roof":
        return roof(o, 0.35, 0.3, 0.25, 0), on_roof(count, 0.35, 0.3, 0.25)
    raise ValueError(f"no sampler of the surface of a {kind}")


def at(part, points):
    """Signed distances, float64 [P], at points [P, 3]."""
    return signed_distance(one(part), points.float().T[None])[0].double()


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_part_is_never_farther_away_than_it_says(kind):
    part, surface = samples_of(kind)
    assert at(part, surface).abs().max() < 0.004, "not zero at the surface"
    points = (uniform(1500, 3) - 0.5) * 1.6
    # A little too much, since the samples have gaps.
    true = torch.cdist(points, surface).amin(1)
    told = at(part, points)
    outside = told > 0
    assert outside.sum() > 500
    assert (told <= 1.05 * true + 0.005)[outside].all(), "a ray would pass through it"
    assert (told >= 0.3 * true - 0.02)[outside].all(), "a ray would take too many steps"


@pytest.mark.parametrize("kind", DISTANCES)
def test_extent_is_the_box_around_a_part(kind):
    part, surface = samples_of(kind)
    low, high = extent([part], 1)
    low, high = low[0].double(), high[0].double()
    assert (surface >= low - 1e-3).all()
    assert (surface <= high + 1e-3).all()
    assert ((surface.amax(0) - high).abs() < 0.03).all(), "the box is too large"
    assert ((surface.amin(0) - low).abs() < 0.03).all(), "the box is too large"


@pytest.mark.parametrize("kind", sorted(set(DISTANCES) - {"ring"}))
def test_inside_and_outside_have_the_right_sign(kind):
    """A ring is left out: its middle is outside."""
    part, surface = samples_of(kind, 4000)
    middle = surface.mean(0)
    assert (at(part, middle + (surface - middle) * 0.9) < 0).all(), "not negative inside"
    assert (at(part, middle + (surface - middle) * 1.1) > 0).all(), "not positive outside"


# ---- ways to put parts together --------------------------------------------------------------

def test_turn_is_about_x_then_y_then_z():
    e = torch.eye(3)
    # About x first: y goes to z, which then goes to x about y.
    x_first = rotation(torch.tensor([[90.0, 90.0, 0.0]]))[0]
    assert torch.allclose(x_first @ e[1], e[0], atol=1e-6)
    assert torch.allclose(x_first @ e[0], -e[2], atol=1e-6)

    turn = (30.0, -50.0, 110.0)
    matrix = rotation(torch.tensor([turn]))[0]
    plain = one(box((0.1, 0.2, 0), (0.3, 0.2, 0.1), 0))
    turned = one(box((0.1, 0.2, 0), (0.3, 0.2, 0.1), 0, turn=turn))
    centre = torch.tensor([0.1, 0.2, 0])[:, None]
    found = signed_distance(turned, centre + matrix @ (POINTS - centre))
    assert torch.allclose(found, signed_distance(plain, POINTS), atol=1e-5)


def mirrored():
    """(a ball at one corner, mirrored; four balls)."""
    part = ball((0.3, 0.25, 0.1), 0.1, 0, mirror="xy")
    copies = []
    for x in (-0.3, 0.3):
        for y in (-0.25, 0.25):
            copies.append(ball((x, y, 0.1), 0.1, 0))
    return part, copies


def with_spokes():
    """(a ball with five spokes; five balls)."""
    part = ball((0.1, -0.1, 0.05), 0.08, 0, spokes=(5, 0.4))
    copies = []
    for k in range(5):
        angle = 2 * math.pi * k / 5
        x = 0.1 + 0.4 * math.cos(angle)
        y = -0.1 + 0.4 * math.sin(angle)
        copies.append(ball((x, y, 0.05), 0.08, 0))
    return part, copies


@pytest.mark.parametrize("case, tolerance", [(mirrored, 1e-6), (with_spokes, 1e-5)])
def test_mirrors_and_spokes_are_copies(case, tolerance):
    part, copies = case()
    d = signed_distance(one(part), POINTS)
    assert torch.allclose(d, signed_distance(one(copies), POINTS), atol=tolerance)
    low, high = extent([part], 1)
    points = POINTS[0].T
    outside = ((points < low) | (points > high)).any(1)
    assert (d[0, outside] > 0).all(), "outside its extent, but inside it"
    far = points.norm(dim=1) > reach([part], 1, torch.zeros(1, 3))
    assert far.any() and (d[0, far] > 0).all(), "beyond its reach, but inside it"


def test_melting_adds_at_most_a_quarter_of_the_width():
    a = ball((-0.2, 0, 0), 0.3, 3)
    b = ball((0.2, 0, 0), 0.3, 5)
    halfway = torch.tensor([0.0, 0, 0.5]).view(1, 3, 1)
    crease = signed_distance(one([a, b]), halfway)
    melted = signed_distance(one([a, b._replace(blend=0.2)]), halfway)
    assert torch.allclose(melted, crease - 0.2 / 4)
    far = torch.tensor([[0.0, 1.0]])
    melt = melting(torch.tensor([[0.2]]))
    assert torch.equal(smooth_min(far, far + 0.3, melt), far), "not the minimum beyond the width"


def test_a_cut_takes_away_and_shows_its_own_slot():
    a = ball((-0.2, 0, 0), 0.3, 3)
    b = ball((0.2, 0, 0), 0.3, 5)
    inside_b = torch.tensor([0.05, 0, 0]).view(1, 3, 1)
    assert signed_distance(one(a), inside_b) < 0
    d, slot = distance_and_slot(one([a, b._replace(cut=True)]), inside_b)
    assert d > 0.1
    assert slot == 5
    on_both_sides = torch.tensor([[-0.6, 0, 0], [0.6, 0, 0]]).T[None]
    _, slot = distance_and_slot(one([a, b]), on_both_sides)
    assert slot.tolist() == [[3, 5]]


def test_a_crisp_part_between_melting_ones_keeps_its_place():
    """Groups are computed out of order; the result is that of joining one part after the other."""
    parts = [
        ball((0, 0, 0), (0.3, 0.25, 0.3), 0),
        box((0.3, 0, 0), (0.1, 0.1, 0.3), 1),
        ball((0.2, 0.2, 0), (0.3, 0.2, 0.1), 2, blend=0.2),
        box((0, 0, 0.3), (0.1, 0.2, 0.1), 3),
        ball((0, 0.3, 0), 0.1, 4),
    ]
    total = signed_distance(one(parts[0]), POINTS)
    slot = torch.zeros(1, 500, dtype=torch.long)
    for i, part in enumerate(parts[1:], 1):
        d = signed_distance(one(part._replace(blend=0)), POINTS)
        slot = torch.where(d < total, i, slot)
        if part.blend:
            total = smooth_min(total, d, melting(torch.tensor([[part.blend]])))
        else:
            total = torch.minimum(total, d)
    found, found_slot = distance_and_slot(one(parts), POINTS)
    assert torch.allclose(found, total, atol=1e-6)
    assert torch.equal(found_slot.long(), slot)
    assert torch.equal(found, signed_distance(one(parts), POINTS)), "depends on asking for slots"
