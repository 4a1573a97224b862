"""The sphere tracer against closed forms, other resolutions, and one object at a time."""
import math

import pytest
import torch
import torch.nn.functional as F

from mvd.cameras import orbit, rays
from mvd.toyworld import tracer
from mvd.toyworld.solids import ball, box, limb, pack, rotation
from mvd.toyworld.tracer import (
    NOTHING, Buffers, camera_rays, compact, march_cones, paint, shade_surface, sphere_trace, trace,
    trace_normals,
)
from test_solids import one, vector

# ---- single rays -----------------------------------------------------------------------------

def rays_at_origin(count, seed):
    """Rays from a sphere of radius 2 to points near the origin: origins, directions [1, 3, P].

    They are float64.
    """
    generator = torch.Generator().manual_seed(seed)
    origins = torch.randn(1, 3, count, generator=generator, dtype=torch.float64)
    origins = F.normalize(origins, dim=1) * 2
    targets = torch.rand(1, 3, count, generator=generator, dtype=torch.float64)
    targets = (targets - 0.5) * 0.9
    return origins, F.normalize(targets - origins, dim=1)


def hits(shapes, origins, directions):
    """t of the hits [1, P], inf for none, and the normals there [1, 3, P]."""
    origins = origins.float()
    directions = directions.float()
    start = torch.zeros(1, origins.shape[2])
    t = sphere_trace(shapes, origins, directions, start, torch.full((1, 1), 4.0))
    points = origins + directions * t.nan_to_num(posinf=0)[:, None]
    _, _, normal = shade_surface(shapes, points)
    return t, normal


def test_rays_meet_a_sphere_where_the_quadratic_formula_says():
    centre = vector(0.1, -0.05, 0.08)
    radius = 0.31
    origins, directions = rays_at_origin(4000, 0)
    t, normal = hits(one(ball(tuple(centre.tolist()), radius, 0)), origins, directions)

    offset = origins - centre[:, None]
    along = (offset * directions).sum(1)
    root = along.square() - offset.square().sum(1) + radius ** 2
    expected = -along - root.clamp(min=0).sqrt()
    # Rays that only graze it may go either way.
    clear = root.abs() > 0.008
    assert torch.equal((t < math.inf)[clear], (root > 0)[clear])
    assert (root > 0).sum() > 1000
    inside = clear & (root > 0.01)
    error = (t - expected)[inside].abs()
    assert error.max() < 0.02
    assert error.mean() < 0.003
    normals = (offset + directions * expected[:, None]) / radius
    error = (normal - normals).abs()
    assert error.amax(1)[inside].max() < 0.06
    assert error[:, :, inside[0]].mean() < 0.005


@pytest.mark.parametrize("turn", [(0, 0, 0), (20, -35, 70)])
def test_rays_meet_a_box_where_its_slabs_say(turn):
    half = vector(0.3, 0.2, 0.12)
    origins, directions = rays_at_origin(4000, 1)
    shapes = one(box((0, 0, 0), tuple(half.tolist()), 0, round=0.005, turn=turn))
    t, normal = hits(shapes, origins, directions)
    matrix = turn_matrix(*turn)
    local_origins = matrix.T @ origins
    local = matrix.T @ directions

    def slabs(half):
        """Where rays enter and leave the three slabs, [1, 3, P] each."""
        enter = (-half[:, None] * local.sign() - local_origins) / local
        leave = (half[:, None] * local.sign() - local_origins) / local
        return enter, leave

    def meets(half):
        enter, leave = slabs(half)
        return leave.amin(1) > enter.amax(1)

    enter, face = slabs(half)[0].max(1)
    expected = meets(half)
    # Neither passes an edge closely.
    clear = meets(half + 0.006) == meets(half - 0.006)
    # A few creep along a face to its edge.
    wrong = ((t < math.inf) != expected) & clear
    assert wrong.float().mean() < 0.002
    assert clear.float().mean() > 0.9
    assert expected.sum() > 500
    inside = clear & expected & ~wrong
    error = (t - enter)[inside].abs()
    assert error.quantile(0.99) < 0.02
    assert error.mean() < 0.003

    # The normal is that of the face, away from edges.
    axis = F.one_hot(face, 3).transpose(1, 2) * -local.sign()
    points = local_origins + local * enter[:, None]
    flat = inside & (points.abs() < half[:, None] - 0.03).sum(1).eq(2)
    error = (normal - matrix @ axis).abs().amax(1)
    assert error[flat].quantile(0.99) < 0.01


def turn_matrix(x, y, z):
    """Rotation by degrees about x, then y, then z, written out: float64 [3, 3]."""
    x, y, z = math.radians(x), math.radians(y), math.radians(z)
    about_x = [[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]]
    about_y = [[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]]
    about_z = [[math.cos(z), -math.sin(z), 0], [math.sin(z), math.cos(z), 0], [0, 0, 1]]
    return vector(*about_z) @ vector(*about_y) @ vector(*about_x)


def test_rotation_is_the_written_out_one():
    found = rotation(torch.tensor([[20.0, -35.0, 70.0]]))[0].double()
    assert torch.allclose(found, turn_matrix(20, -35, 70), atol=1e-6)


# ---- silhouettes -----------------------------------------------------------------------------

def silhouette(shapes, elevation, azimuth, distance, *, fov, size):
    """The alpha [size, size] of one view."""
    c2w = orbit(torch.tensor([[elevation]]), torch.tensor([[azimuth]]), distance)
    buffers = trace(shapes, c2w, torch.tensor([fov]), size)
    return paint(buffers, torch.ones(1, 1, 3))[0, 0, 3]


# At 30 pixels there are no tiles.
@pytest.mark.parametrize("size", [30, 64, 128])
def test_a_sphere_covers_the_area_of_its_ellipse(size):
    radius = 0.3
    away = 1.4
    shapes = one(ball((0, 0, 0), radius, 0))
    alpha = silhouette(shapes, 25.0, 40.0, away, fov=45.0, size=size)
    pixels = size / 2 / math.tan(math.radians(45 / 2))
    expected = math.pi * radius ** 2 / (away ** 2 - radius ** 2) * pixels ** 2
    assert abs(alpha.sum().item() / expected - 1) < 0.025
    assert (alpha - alpha.flip(1)).abs().mean() < 0.01, "not in the middle of the picture"


def test_a_box_seen_from_the_front_covers_its_front_face():
    away = 1.5
    depth, width, height = 0.25, 0.35, 0.2
    shapes = one(box((0, 0, 0), (depth, width, height), 0, round=1e-3))
    alpha = silhouette(shapes, 0.0, 0.0, away, fov=40.0, size=96)
    pixels = 96 / 2 / math.tan(math.radians(40 / 2)) / (away - depth)
    assert abs(alpha.sum().item() / (4 * width * height * pixels ** 2) - 1) < 0.02
    assert abs(alpha.sum(1).max() / (2 * width * pixels) - 1) < 0.03
    assert abs(alpha.sum(0).max() / (2 * height * pixels) - 1) < 0.03


# ---- pictures --------------------------------------------------------------------------------

def blobs(n):
    """n objects of one structure with different numbers: (parts, scale)."""
    torch.manual_seed(5)

    def u(low, high):
        return low + (high - low) * torch.rand(n)

    parts = [
        ball((u(-0.1, 0.1), 0, 0), (u(0.2, 0.3), 0.2, u(0.1, 0.3)), 0),
        limb((0, 0, 0), (u(0.2, 0.4), 0.1, 0.3), 0.1, u(0.05, 0.1), 1, blend=0.1),
        box(
            (-0.2, 0.2, u(-0.2, 0.2)), (0.1, 0.1, u(0.1, 0.2)), 2,
            turn=(u(0, 90), 0, 20), mirror="y"),
    ]
    return parts, u(0.8, 1.2)


def cameras(n, views):
    """(c2w [n, views, 4, 4], fov [n])."""
    azimuth = torch.arange(views) * 360 / views + 10
    c2w = orbit(torch.linspace(5, 30, n)[:, None], azimuth, 1.5)
    return c2w, torch.linspace(35, 50, n)


def of_object(part, i):
    """The part with the numbers of object i alone."""
    def of_values(values):
        return tuple(v[i:i + 1] if isinstance(v, torch.Tensor) else v for v in values)

    return part._replace(
        centre=of_values(part.centre), size=of_values(part.size), turn=of_values(part.turn))


def test_a_batch_is_its_objects_one_at_a_time():
    parts, scale = blobs(4)
    c2w, fov = cameras(4, 3)
    shapes = pack(parts, 4, offset=torch.full((4, 3), 0.02), scale=scale)
    together = trace(shapes, c2w, fov, 32)
    assert together.slot.shape == (4, 3, 4, 32, 32)
    assert set(together.slot.unique().tolist()) == {0, 1, 2, NOTHING}
    for i in range(4):
        alone = [of_object(part, i) for part in parts]
        shape = pack(alone, 1, offset=torch.full((1, 3), 0.02), scale=scale[i:i + 1])
        for v in range(3):
            single = trace(shape, c2w[i:i + 1, v:v + 1], fov[i:i + 1], 32)
            same = single.slot[0, 0] == together.slot[i, v]
            assert same.float().mean() > 0.998
            difference = single.shade[0, 0].int() - together.shade[i, v]
            assert difference.abs().float().mean() < 0.5


def test_scale_and_offset_place_the_object():
    offset = torch.tensor([[0.1, -0.1, 0.05]])
    scale = torch.tensor([0.5])
    c2w, fov = cameras(1, 2)
    moved = one(ball((0.2, 0.1, 0), 0.5, 0), offset=offset, scale=scale)
    plain = one(ball((0.2, -0.05, 0.05), 0.25, 0))
    differs = trace(moved, c2w, fov, 32).slot != trace(plain, c2w, fov, 32).slot
    assert differs.float().mean() < 0.002


def test_pictures_are_antialiased_like_64_samples_per_pixel():
    parts, scale = blobs(1)
    shapes = pack(parts, 1, scale=scale)
    c2w, fov = cameras(1, 2)
    colours = torch.eye(3)[None]

    def premultiplied(size):
        rgba = paint(trace(shapes, c2w, fov, size), colours)[0]
        alpha = rgba[:, 3:]
        return torch.cat([rgba[:, :3] * alpha, alpha], 1)

    small = premultiplied(32)
    expected = F.avg_pool2d(premultiplied(256), 8)
    assert (small - expected).abs().mean() < 0.006
    alpha = small[:, 3]
    hard = (alpha > 0.5).float()
    error_of_hard = (hard - expected[:, 3]).abs().mean()
    assert (alpha - expected[:, 3]).abs().mean() < 0.6 * error_of_hard


def test_light_is_fixed_in_the_world_and_comes_from_above():
    _, fov = cameras(1, 4)
    c2w = orbit(30.0, torch.arange(4) * 90.0, 1.5)[None]
    buffers = trace(one(box((0, 0, 0), (0.3, 0.3, 0.3), 0)), c2w, fov, 64)
    shade = buffers.shade[0, :, 0].float() / 255
    seen = buffers.slot[0, :, 0] == 0
    assert shade[seen].min() > 0.3
    assert shade[seen].max() <= 1
    top = shade[0, 20, 32]
    front = shade[0, 44, 32]
    back = shade[2, 44, 32]
    assert top > front + 0.1
    assert (front - back).abs() > 0.03, "the light is fixed to the camera"


def test_paint_is_the_mean_of_what_is_there():
    # Three pixels of four samples: two of them show something, all do, none does.
    slot = [[0, 2, NOTHING, NOTHING], [1, 1, 1, 1], [NOTHING] * 4]
    shade = [[255, 51, 0, 0], [102, 102, 102, 102], [0, 0, 0, 0]]

    def buffer(rows):
        rows = torch.tensor(rows, dtype=torch.uint8)
        return rows.T.reshape(1, 1, 4, 1, 3).expand(2, -1, -1, -1, -1)

    palette = torch.stack([torch.eye(3), torch.eye(3).flip(0)])
    rgba = paint(Buffers(buffer(slot), buffer(shade)), palette)
    expected = torch.tensor([[0.5, 0, 0.1, 0.5], [0, 0.4, 0, 1], [0, 0, 0, 0]])
    assert torch.allclose(rgba[0, 0, :, 0].T, expected)
    assert torch.allclose(rgba[1, 0, :, 0, 0], torch.tensor([0.1, 0, 0.5, 0.5]))


# ---- its parts -------------------------------------------------------------------------------

def test_compact_lists_what_is_true():
    share = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])[:, None]
    active = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < share
    index = compact(active)
    assert index.shape == (5, 40)
    for row, chosen in zip(active, index):
        expected = row.nonzero()[:, 0].tolist()
        assert chosen.tolist() == expected + [0] * (40 - len(expected))
    assert compact(active[:1]).shape == (1, 0)


def test_shifted_rays_are_those_of_the_pixels_beside():
    shapes = one(ball((0, 0, 0), 0.3, 0))
    c2w = orbit(20.0, 30.0, 1.5)[None, None]
    fov = torch.tensor([[40.0]])
    # [8, 8, 3], the top row first
    plain = rays(c2w, fov, 8)[1][0, 0]

    def shifted(shift):
        _, directions = camera_rays(shapes, c2w, fov, 8, shift)
        return directions[0].T.view(8, 8, 3)

    right = shifted((1, 0))
    up = shifted((0, 1))
    assert torch.allclose(right[:, :-1], plain[:, 1:], atol=1e-6)
    assert torch.allclose(up[1:], plain[:-1], atol=1e-6)


def test_cones_stop_before_anything_in_them():
    shapes = one([ball((0, 0, 0), 0.3, 0), ball((0, 0.4, 0.2), 0.04, 0)])
    c2w = orbit(20.0, 30.0, 1.5)[None, None]
    fov = torch.tensor([[40.0]])
    # 4 x 4 tiles of 16 x 16 pixels each.
    origins, directions = camera_rays(shapes, c2w, fov, 4)
    spread = torch.full((1, 1), math.tan(math.radians(20)) * 2 / 4 / 2 ** 0.5)
    free = march_cones(shapes, origins, directions, torch.zeros(1, 16), spread=spread, steps=20)[0]

    origins, directions = rays(c2w, fov, 64)
    origins = origins.flatten(0, -2).T[None]
    directions = directions.flatten(0, -2).T[None]
    depth, _ = hits(shapes, origins, directions)
    depth = depth.view(4, 16, 4, 16).amin((1, 3)).flatten()
    assert (free <= depth + 2e-3).all()
    hit = depth < math.inf
    assert hit.sum() >= 4
    assert ((depth - free)[hit] < 0.5).all(), "a cone stops long before anything is in it"


@pytest.mark.gpu
def test_the_gpu_draws_the_same():
    parts, scale = blobs(3)
    c2w, fov = cameras(3, 2)
    colours = torch.rand(3, 3, 3)
    on_cpu = paint(trace(pack(parts, 3, scale=scale), c2w, fov, 64), colours)
    shapes = pack(parts, 3, scale=scale, device="cuda")
    on_gpu = paint(trace(shapes, c2w.cuda(), fov.cuda(), 64), colours.cuda()).cpu()
    assert (on_cpu - on_gpu).abs().mean() < 1e-3


# ---- normal maps -----------------------------------------------------------------------------

def two_balls():
    """Balls of two centres and radii, moved and scaled into the world, seen by three cameras.

    Returns shapes, c2w [2, 3, 4, 4], and the centres [2, 3] and radii [2] in the world.
    """
    centre = torch.tensor([[0.1, -0.05, 0.08], [-0.06, 0.1, 0.0]])
    radius = torch.tensor([0.31, 0.22])
    offset = torch.tensor([[0.02, 0.03, -0.04], [0.05, 0.0, 0.02]])
    scale = torch.tensor([0.9, 1.3])
    shapes = pack(
        [ball(tuple(centre.T), radius, 0)], 2, offset=offset, scale=scale)
    azimuth = torch.tensor([[0.0, 75.0, 200.0]])
    c2w = orbit(25.0, azimuth, torch.tensor([[1.5], [1.8]]))
    return shapes, c2w, centre * scale[:, None] + offset, radius * scale


@pytest.mark.parametrize("size", [30, 64])
def test_normal_maps_of_balls(size):
    shapes, c2w, centre, radius = two_balls()
    normal, coverage = trace_normals(shapes, c2w, torch.tensor([40.0, 35.0]), size)
    assert normal.shape == (2, 3, 3, size, size) and coverage.shape == (2, 3, 1, size, size)
    fov_deg = torch.tensor([[40.0] * 3, [35.0] * 3])
    origins, directions = rays(c2w, fov_deg, size)
    origins = origins.double() - centre[:, None, None, None]
    directions = directions.double()
    along = (origins * directions).sum(-1)
    root = along ** 2 - (origins ** 2).sum(-1) + radius[:, None, None, None].double() ** 2
    expected = origins + directions * (-along - root.clamp(min=0).sqrt())[..., None]
    expected = F.normalize(expected, dim=-1).movedim(-1, 2)

    there = root > 0
    clear = root.abs() > 0.008
    assert torch.equal((coverage[:, :, 0] == 1)[clear], there[clear])
    assert ((coverage == 0) | (coverage == 1)).all()
    length = torch.linalg.vector_norm(normal, dim=2)
    assert torch.allclose(length, coverage[:, :, 0], atol=1e-5), "unit vectors, or 0 for nothing"
    apart = torch.linalg.vector_norm(normal - expected, dim=2)[clear & there]
    assert apart.mean() < 0.01 and apart.max() < 0.1
    # The mean of a front is towards the camera.
    facing = (normal * c2w[..., :3, 2][..., None, None]).sum(2)
    assert (facing[clear & there] > -0.05).all(), "a normal looks away from the camera"


def test_normal_maps_do_not_depend_on_how_much_fits_into_memory(monkeypatch):
    shapes, c2w, _, _ = two_balls()
    at_once = trace_normals(shapes, c2w, torch.tensor([40.0, 35.0]), 16)
    for budget in (256, 600, 900):
        monkeypatch.setattr(tracer, "rays_at_once", lambda device: budget)
        in_parts = trace_normals(shapes, c2w, torch.tensor([40.0, 35.0]), 16)
        for found, expected in zip(in_parts, at_once):
            assert torch.allclose(found, expected, atol=1e-5)


def test_normal_maps_of_nothing():
    shapes = one(ball((0, 0, 0), 0.1, 0))
    c2w = orbit(torch.tensor([[0.0]]), torch.tensor([[0.0]]), 2.0)
    # It looks away.
    c2w[..., :3, 0] *= -1
    c2w[..., :3, 2] *= -1
    normal, coverage = trace_normals(shapes, c2w, torch.tensor([40.0]), 16)
    assert (normal == 0).all() and (coverage == 0).all()
