"""The solids and their renderer against closed forms, brute force in float64, and one ray at a time."""
import math

import pytest
import torch

from mvd.cameras import orbit, rays
from mvd.toyworld.tracer import NOTHING, Buffers, arrive, camera_rays, compact, march, paint, render, surface
from mvd.toyworld.solids import (ball, box, cone, distance, dome, extent, limb, melting, pack, reach, ring, roof, rotation,
                        smooth_min)


def one(part, **how):
    return pack([part] if not isinstance(part, list) else part, 1, **how)


def rays_at_origin(count, seed):
    """Rays from a sphere of radius 2 toward points near the origin: float64 origins, directions [1, 3, P]."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(1, 3, count, generator=generator, dtype=torch.float64), dim=1) * 2
    targets = (torch.rand(1, 3, count, generator=generator, dtype=torch.float64) - 0.5) * 0.9
    return origins, torch.nn.functional.normalize(targets - origins, dim=1)


def hits(shapes, origins, directions):
    origins, directions = origins.float(), directions.float()
    t = arrive(shapes, origins, directions, torch.zeros(origins.shape[::2]), torch.full((1, 1), 4.0))
    points = origins + directions * t.nan_to_num(posinf=0)[:, None]
    return t, surface(shapes, points)[2]


def test_rays_meet_a_sphere_where_the_quadratic_formula_says():
    centre, radius = torch.tensor([0.1, -0.05, 0.08], dtype=torch.float64), 0.31
    origins, directions = rays_at_origin(4000, 0)
    t, normal = hits(one(ball(tuple(centre.tolist()), radius, 0)), origins, directions)
    offset = origins - centre[:, None]
    along = (offset * directions).sum(1)
    root = along.square() - offset.square().sum(1) + radius ** 2
    expected = -along - root.clamp(min=0).sqrt()
    clear = root.abs() > 0.008                                      # rays that only graze may go either way
    assert torch.equal((t < math.inf)[clear], (root > 0)[clear]) and (root > 0).sum() > 1000
    inside = clear & (root > 0.01)
    assert (t - expected)[inside].abs().max() < 0.02 and (t - expected)[inside].abs().mean() < 0.003
    normals = (offset + directions * expected[:, None]) / radius
    assert (normal - normals).abs().amax(1)[inside].max() < 0.06 and (normal - normals)[:, :, inside[0]].abs().mean() < 0.005


@pytest.mark.parametrize("turn", [(0, 0, 0), (20, -35, 70)])
def test_rays_meet_a_box_where_its_slabs_say(turn):
    half = torch.tensor([0.3, 0.2, 0.12], dtype=torch.float64)
    origins, directions = rays_at_origin(4000, 1)
    t, normal = hits(one(box((0, 0, 0), tuple(half.tolist()), 0, round=0.005, turn=turn)), origins, directions)
    x, y, z = (math.radians(a) for a in turn)
    about_x = torch.tensor([[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]], dtype=torch.float64)
    about_y = torch.tensor([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]], dtype=torch.float64)
    about_z = torch.tensor([[math.cos(z), -math.sin(z), 0], [math.sin(z), math.cos(z), 0], [0, 0, 1]], dtype=torch.float64)
    matrix = about_z @ about_y @ about_x
    local_origins, local = matrix.T @ origins, matrix.T @ directions

    def slabs(half):                                                # near and far side of the three slabs, [1, 3, P] each
        return (-half[:, None] * local.sign() - local_origins) / local, (half[:, None] * local.sign() - local_origins) / local

    near, far = slabs(half)
    enter, face = near.max(1)
    gap = far.amin(1) - enter                                       # > 0: the ray is inside all slabs for a while
    (near_, far_), (near__, far__) = slabs(half + 0.006), slabs(half - 0.006)
    clear = (far_.amin(1) > near_.amax(1)) == (far__.amin(1) > near__.amax(1))            # neither passes an edge closely
    wrong = ((t < math.inf) != (gap > 0)) & clear                   # a few that creep along a face to its edge
    assert wrong.float().mean() < 0.002 and clear.float().mean() > 0.9 and (gap > 0).sum() > 500
    inside = clear & (gap > 0) & ~wrong
    error = (t - enter)[inside].abs()
    assert error.quantile(0.99) < 0.02 and error.mean() < 0.003
    axis = torch.nn.functional.one_hot(face, 3).transpose(1, 2) * -local.sign()
    flat = inside & ((local_origins + local * enter[:, None]).abs() < half[:, None] - 0.03).sum(1).eq(2)      # not at an edge
    assert (normal - matrix @ axis).abs().amax(1)[flat].quantile(0.99) < 0.01


def silhouette(shapes, fov, size, distance):
    c2w = orbit(torch.tensor([[25.0]]), torch.tensor([[40.0]]), distance)
    return paint(render(shapes, c2w, torch.tensor([fov]), size), torch.ones(1, 1, 3))[0, 0, 3]


@pytest.mark.parametrize("size", [30, 64, 128])                     # 30 has no tiles
def test_a_sphere_covers_the_area_of_its_ellipse(size):
    radius, away, fov = 0.3, 1.4, 45.0
    alpha = silhouette(one(ball((0, 0, 0), radius, 0)), fov, size, away)
    expected = math.pi * radius ** 2 / (away ** 2 - radius ** 2) * (size / 2 / math.tan(math.radians(fov / 2))) ** 2
    assert abs(alpha.sum().item() / expected - 1) < 0.025
    flipped = alpha.flip(1)
    assert (alpha - flipped).abs().mean() < 0.01                    # in the middle of the picture


def test_a_box_seen_from_the_front_covers_its_front_face():
    size, away, fov, half = 96, 1.5, 40.0, (0.25, 0.35, 0.2)
    c2w = orbit(torch.tensor([[0.0]]), torch.tensor([[0.0]]), away)
    alpha = paint(render(one(box((0, 0, 0), half, 0, round=1e-3)), c2w, torch.tensor([fov]), size), torch.ones(1, 1, 3))[0, 0, 3]
    pixels = size / 2 / math.tan(math.radians(fov / 2)) / (away - half[0])
    assert abs(alpha.sum().item() / (4 * half[1] * half[2] * pixels ** 2) - 1) < 0.02
    rows, columns = alpha.sum(1).max(), alpha.sum(0).max()          # width in y, height in z
    assert abs(rows / (2 * half[1] * pixels) - 1) < 0.03 and abs(columns / (2 * half[2] * pixels) - 1) < 0.03


# Points on the surface of each kind of part, drawn without its distance function.

def on_sphere(count):
    return torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=1)


def on_box(count, low, high):
    points = low + (high - low) * torch.rand(count, 3, dtype=torch.float64)
    axis, side = torch.randint(3, (count,)), torch.randint(2, (count,)).bool()
    points[torch.arange(count), axis] = torch.where(side, high[axis], low[axis])
    return points


def on_revolved(count, radius, height):
    """Round z through the corners (radius, height) of a profile."""
    radius, height = torch.tensor(radius, dtype=torch.float64), torch.tensor(height, dtype=torch.float64)
    i, u = torch.randint(len(radius) - 1, (count,)), torch.rand(count, dtype=torch.float64)
    r, z = radius[i] + (radius[i + 1] - radius[i]) * u, height[i] + (height[i + 1] - height[i]) * u
    a = 2 * math.pi * torch.rand(count, dtype=torch.float64)
    return torch.stack([r * a.cos(), r * a.sin(), z], 1)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def samples_of(kind, count=30000):
    """(part, points on its surface)."""
    torch.manual_seed(0)
    if kind == "sphere":
        return ball((0, 0, 0), 0.3, 0), on_sphere(count) * 0.3
    if kind == "ball":
        return ball((0, 0, 0), (0.4, 0.25, 0.1), 0), on_sphere(count) * vector(0.4, 0.25, 0.1)
    if kind == "dome":
        upper = on_sphere(count) * vector(0.4, 0.3, 0.25)
        base = on_sphere(count) * vector(0.4, 0.3, 0) * torch.rand(count, 1, dtype=torch.float64)
        return dome((0, 0, 0), (0.4, 0.3, 0.25), 0), torch.cat([upper * vector(1, 1, 0) + upper.abs() * vector(0, 0, 1), base])
    if kind == "box":
        return box((0, 0, 0), (0.4, 0.2, 0.1), 0, round=1e-3), on_box(count, vector(-0.4, -0.2, -0.1), vector(0.4, 0.2, 0.1))
    if kind == "cone":
        return cone((0, 0, 0), 0.35, 0.1, 0.25, 0, round=1e-3), on_revolved(count, [0, 0.35, 0.1, 0], [-0.25, -0.25, 0.25, 0.25])
    if kind == "ring":
        a = 2 * math.pi * torch.rand(count, dtype=torch.float64)
        tube = torch.rand(count, dtype=torch.float64) * 2 * math.pi
        r = 0.3 + 0.08 * tube.cos()
        return ring((0, 0, 0), 0.3, 0.08, 0), torch.stack([r * a.cos(), r * a.sin(), 0.08 * tube.sin()], 1)
    if kind == "limb":                                              # many spheres between the ends; keep what is outside all
        t = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        centres, radii = vector(-0.3, 0, 0) + t * vector(0.55, 0.2, 0.1), 0.15 - 0.09 * t
        points = (centres[:, None] + radii[:, None] * on_sphere(600)[None]).flatten(0, 1)
        outside = (torch.cdist(points, centres) - radii.T).amin(1) > -1e-4
        return limb((-0.3, 0, 0), (0.25, 0.2, 0.1), 0.15, 0.06, 0), points[outside]
    corners = [vector(x, y, z) for x in (-0.35, 0.35) for y, z in ((-0.3, 0), (0.3, 0), (0, 0.25))]     # a roof: its 5 faces
    faces = [(0, 1, 2), (3, 4, 5), (0, 1, 3), (4, 1, 3), (0, 2, 3), (5, 2, 3), (1, 2, 4), (5, 2, 4)]
    weights = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((count // 8,))
    return roof((0, 0, 0), 0.35, 0.3, 0.25, 0), torch.cat([weights @ torch.stack([corners[i] for i in face]) for face in faces])


@pytest.mark.parametrize("kind", ["sphere", "ball", "dome", "box", "cone", "ring", "limb", "roof"])
def test_a_part_is_never_farther_away_than_it_says(kind):
    part, surface_points = samples_of(kind)
    shapes = one(part)
    at_surface = distance(shapes, surface_points.float().T[None])
    assert at_surface.abs().max() < 0.004
    points = (torch.rand(1500, 3, dtype=torch.float64) - 0.5) * 1.6
    true = torch.cdist(points, surface_points).amin(1)              # a little too much: the samples have gaps
    told = distance(shapes, points.float().T[None])[0].double()
    outside = told > 0
    assert outside.sum() > 500
    assert (told <= 1.05 * true + 0.005)[outside].all()
    assert (told >= 0.3 * true - 0.02)[outside].all()               # nor so careful that a ray never arrives
    low, high = (corner[0].double() for corner in extent([part], 1))
    assert (surface_points >= low - 1e-3).all() and (surface_points <= high + 1e-3).all()
    assert ((surface_points.amax(0) - high).abs() < 0.03).all() and ((surface_points.amin(0) - low).abs() < 0.03).all()


def test_inside_and_outside_have_the_right_sign():
    for kind in ("sphere", "ball", "box", "cone", "limb", "roof", "dome"):
        part, surface_points = samples_of(kind, 4000)
        middle = surface_points.mean(0)
        for factor, sign in ((0.9, -1), (1.1, 1)):
            assert (distance(one(part), (middle + (surface_points - middle) * factor).float().T[None]).sign() == sign).all(), kind


# Ways to put parts together.

POINTS = (torch.rand(1, 3, 500, generator=torch.Generator().manual_seed(3)) - 0.5) * 2


def test_turn_is_about_x_then_y_then_z():
    turn = (30.0, -50.0, 110.0)
    e = torch.eye(3)
    x_first = rotation(torch.tensor([[90.0, 90.0, 0.0]]))[0]        # y goes to z about x, then z to x about y
    assert torch.allclose(x_first @ e[1], e[0], atol=1e-6) and torch.allclose(x_first @ e[0], -e[2], atol=1e-6)
    matrix = rotation(torch.tensor([turn]))[0]
    plain, turned = (one(box((0.1, 0.2, 0), (0.3, 0.2, 0.1), 0, turn=t)) for t in ((0, 0, 0), turn))
    centre = torch.tensor([0.1, 0.2, 0])[:, None]
    assert torch.allclose(distance(turned, centre + matrix @ (POINTS - centre)), distance(plain, POINTS), atol=1e-5)


def test_mirrors_and_spokes_are_copies():
    mirrored = one(ball((0.3, 0.25, 0.1), 0.1, 0, mirror="xy"))
    copies = one([ball((x, y, 0.1), 0.1, 0) for x in (-0.3, 0.3) for y in (-0.25, 0.25)])
    assert torch.allclose(distance(mirrored, POINTS), distance(copies, POINTS), atol=1e-6)
    spokes = one(ball((0.1, -0.1, 0.05), 0.08, 0, spokes=(5, 0.4)))
    angles = [2 * math.pi * k / 5 for k in range(5)]
    copies = one([ball((0.1 + 0.4 * math.cos(a), -0.1 + 0.4 * math.sin(a), 0.05), 0.08, 0) for a in angles])
    assert torch.allclose(distance(spokes, POINTS), distance(copies, POINTS), atol=1e-5)
    for part, parts in ((ball((0.3, 0.25, 0.1), 0.1, 0, mirror="xy"), mirrored),
                        (ball((0.1, -0.1, 0.05), 0.08, 0, spokes=(5, 0.4)), spokes)):
        low, high = extent([part], 1)
        outside = ((POINTS[0].T < low) | (POINTS[0].T > high)).any(1)
        far = POINTS[0].norm(dim=0) > reach([part], 1, torch.zeros(1, 3))
        assert (distance(parts, POINTS)[0, outside] > 0).all() and (distance(parts, POINTS)[0, far] > 0).all() and far.any()


def test_melting_and_cutting():
    a, b = ball((-0.2, 0, 0), 0.3, 3), ball((0.2, 0, 0), 0.3, 5)
    halfway = torch.tensor([0.0, 0, 0.5]).view(1, 3, 1)
    crease = distance(one([a, b]), halfway)
    assert torch.allclose(distance(one([a, b._replace(blend=0.2)]), halfway), crease - 0.05)          # width / 4
    far, melt = torch.tensor([[0.0, 1.0]]), melting(torch.tensor([[0.2]]))
    assert torch.equal(smooth_min(far, far + 0.3, melt), far)      # more than the width apart: a plain minimum
    cut = one([a, b._replace(cut=True)])
    inside_b = torch.tensor([0.05, 0, 0]).view(1, 3, 1)
    d, slot = distance(cut, inside_b, slots=True)
    assert d > 0.1 and slot == 5 and distance(one(a), inside_b) < 0
    _, slot = distance(one([a, b]), torch.tensor([[-0.6, 0, 0], [0.6, 0, 0]]).T[None], slots=True)
    assert slot.tolist() == [[3, 5]]


def test_a_crisp_part_between_melting_ones_keeps_its_place():
    """Groups are computed out of order; the result must be that of joining the parts one after the other."""
    parts = [ball((0, 0, 0), (0.3, 0.25, 0.3), 0), box((0.3, 0, 0), (0.1, 0.1, 0.3), 1), ball((0.2, 0.2, 0), (0.3, 0.2, 0.1), 2, blend=0.2),
             box((0, 0, 0.3), (0.1, 0.2, 0.1), 3), ball((0, 0.3, 0), 0.1, 4)]
    total, slot = distance(one(parts[0]), POINTS), torch.zeros(1, 500, dtype=torch.long)
    for i, part in enumerate(parts[1:], 1):
        d = distance(one(part._replace(blend=0)), POINTS)
        slot = torch.where(d < total, i, slot)
        total = smooth_min(total, d, melting(torch.tensor([[part.blend]]))) if part.blend else torch.minimum(total, d)
    found, found_slot = distance(one(parts), POINTS, slots=True)
    assert torch.allclose(found, total, atol=1e-6) and torch.equal(found_slot.long(), slot)
    assert torch.equal(found, distance(one(parts), POINTS))


# Pictures.

def blobs(n):
    """n objects of one structure with different numbers."""
    torch.manual_seed(5)
    u = lambda low, high: low + (high - low) * torch.rand(n)  # noqa: E731
    parts = [ball((u(-0.1, 0.1), 0, 0), (u(0.2, 0.3), 0.2, u(0.1, 0.3)), 0),
             limb((0, 0, 0), (u(0.2, 0.4), 0.1, 0.3), 0.1, u(0.05, 0.1), 1, blend=0.1),
             box((-0.2, 0.2, u(-0.2, 0.2)), (0.1, 0.1, u(0.1, 0.2)), 2, turn=(u(0, 90), 0, 20), mirror="y")]
    return parts, u(0.8, 1.2)


def cameras(n, views):
    return orbit(torch.linspace(5, 30, n)[:, None], torch.arange(views) * 360 / views + 10, 1.5), torch.linspace(35, 50, n)


def test_a_batch_is_its_objects_one_at_a_time():
    parts, scale = blobs(4)
    c2w, fov = cameras(4, 3)
    shapes = pack(parts, 4, offset=torch.full((4, 3), 0.02), scale=scale)
    together = render(shapes, c2w, fov, 32)
    assert together.slot.shape == (4, 3, 4, 32, 32) and set(together.slot.unique().tolist()) == {0, 1, 2, NOTHING}

    def only(value, i):
        return value[i:i + 1] if isinstance(value, torch.Tensor) else value

    for i in range(4):
        alone = [part._replace(**{name: tuple(only(v, i) for v in getattr(part, name)) for name in ("centre", "size", "turn")})
                 for part in parts]
        shape = pack(alone, 1, offset=torch.full((1, 3), 0.02), scale=scale[i:i + 1])
        for v in range(3):
            single = render(shape, c2w[i:i + 1, v:v + 1], fov[i:i + 1], 32)
            same = (single.slot[0, 0] == together.slot[i, v]).float().mean()
            assert same > 0.998 and (single.shade[0, 0].int() - together.shade[i, v]).abs().float().mean() < 0.5


def test_scale_and_offset_place_the_object():
    offset, scale = torch.tensor([[0.1, -0.1, 0.05]]), torch.tensor([0.5])
    c2w, fov = cameras(1, 2)
    moved = render(one(ball((0.2, 0.1, 0), 0.5, 0), offset=offset, scale=scale), c2w, fov, 32)
    plain = render(one(ball((0.2, -0.05, 0.05), 0.25, 0)), c2w, fov, 32)
    assert (moved.slot != plain.slot).float().mean() < 0.002


def test_pictures_are_antialiased_like_64_samples_a_pixel():
    parts, scale = blobs(1)
    shapes, (c2w, fov), colours = pack(parts, 1, scale=scale), cameras(1, 2), torch.eye(3)[None]
    small = paint(render(shapes, c2w, fov, 32), colours)
    large = paint(render(shapes, c2w, fov, 256), colours)
    large = torch.cat([large[:, :, :3] * large[:, :, 3:], large[:, :, 3:]], 2)
    expected = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 8).unflatten(0, (1, 2))
    small = torch.cat([small[:, :, :3] * small[:, :, 3:], small[:, :, 3:]], 2)
    assert (small - expected).abs().mean() < 0.006
    hard = (paint(render(shapes, c2w, fov, 32), colours)[:, :, 3] > 0.5).float()
    assert (small[:, :, 3] - expected[:, :, 3]).abs().mean() < 0.6 * (hard - expected[:, :, 3]).abs().mean()


def test_light_is_fixed_in_the_world_and_comes_from_above():
    c2w, fov = cameras(1, 4)
    buffers = render(one(box((0, 0, 0), (0.3, 0.3, 0.3), 0)), orbit(30.0, torch.arange(4) * 90.0, 1.5)[None], fov, 64)
    shade = buffers.shade[0, :, 0].float() / 255
    seen = buffers.slot[0, :, 0] == 0
    assert shade[seen].min() > 0.3 and shade[seen].max() <= 1
    top, side = shade[0, 20, 32], shade[0, 44, 32]
    assert top > side + 0.1                                         # the same box: its top is brighter than its side
    assert (shade[0, 44, 32] - shade[2, 44, 32]).abs() > 0.03       # the front is not lit like the back: no light on the camera


def test_paint_is_the_mean_of_what_is_there():
    slot = torch.tensor([0, 2, NOTHING, NOTHING, 1, 1, 1, 1, NOTHING, NOTHING, NOTHING, NOTHING], dtype=torch.uint8)
    shade = torch.tensor([255, 51, 0, 0, 102, 102, 102, 102, 0, 0, 0, 0], dtype=torch.uint8)
    buffers = Buffers(*(a.view(3, 4).T.reshape(1, 1, 4, 1, 3) for a in (slot, shade)))
    palette = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 1.0], [0, 1, 0], [1, 0, 0]]])
    rgba = paint(Buffers(*(a.expand(2, -1, -1, -1, -1) for a in buffers)), palette)
    assert torch.allclose(rgba[0, 0, :, 0].T, torch.tensor([[0.5, 0, 0.1, 0.5], [0, 0.4, 0, 1], [0, 0, 0, 0]]))
    assert torch.allclose(rgba[1, 0, :, 0, 0], torch.tensor([0.1, 0, 0.5, 0.5]))


def test_compact_lists_what_is_true():
    active = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])[:, None]
    index = compact(active)
    assert index.shape == (5, 40)
    for row, chosen in zip(active, index):
        expected = row.nonzero()[:, 0].tolist()
        assert chosen.tolist() == expected + [0] * (40 - len(expected))
    assert compact(active[:1]).shape == (1, 0)


def test_shifted_rays_are_those_of_the_pixels_beside():
    shapes = one(ball((0, 0, 0), 0.3, 0))
    c2w, fov = orbit(20.0, 30.0, 1.5)[None, None], torch.tensor([[40.0]])
    plain = rays(c2w, fov, 8)[1][0, 0]                              # [8, 8, 3], the top row first
    for shift, ours, theirs in (((1, 0), plain[:, 1:], slice(0, 7)), ((0, 1), plain[:-1], slice(1, 8))):
        shifted = camera_rays(shapes, c2w, fov, 8, shift)[1][0].T.view(8, 8, 3)
        assert torch.allclose(shifted[:, theirs] if shift[0] else shifted[theirs], ours, atol=1e-6)


def test_cones_stop_before_anything_in_them():
    shapes = one([ball((0, 0, 0), 0.3, 0), ball((0, 0.4, 0.2), 0.04, 0)])
    c2w, fov = orbit(20.0, 30.0, 1.5)[None, None], torch.tensor([[40.0]])
    origins, directions = camera_rays(shapes, c2w, fov, 4)          # 16 tiles of a picture of 64 pixels
    spread = torch.full((1, 1), math.tan(math.radians(20)) * 2 / 4 / 2 ** 0.5)
    free = march(shapes, origins, directions, torch.zeros(1, 16), spread, 20)
    origins, directions = (a.flatten(0, -2).T[None] for a in rays(c2w, fov, 64))
    depth = hits(shapes, origins, directions)[0].view(4, 16, 4, 16).amin((1, 3)).flatten()
    assert (free[0] <= depth + 2e-3).all()
    assert (depth < math.inf).sum() >= 4 and ((depth - free[0])[depth < math.inf] < 0.5).all()


@pytest.mark.gpu
def test_the_gpu_draws_the_same():
    parts, scale = blobs(3)
    c2w, fov = cameras(3, 2)
    colours = torch.rand(3, 3, 3)
    on_cpu = paint(render(pack(parts, 3, scale=scale), c2w, fov, 64), colours)
    on_gpu = paint(render(pack(parts, 3, scale=scale, device="cuda"), c2w.cuda(), fov.cuda(), 64), colours.cuda()).cpu()
    assert (on_cpu - on_gpu).abs().mean() < 1e-3
