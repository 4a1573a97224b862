"""Rendering against closed forms, dense quadrature and plain loops."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvd.cameras import orbit, rays
from mvd.nerf import NeRF, NeRFConfig
from mvd.render import (DIAGONAL, OccupancyGrid, Samples, Shading, box_interval, choose, composite, draw_light, draw_offsets,
                        march, orientation_loss, render, render_image, sample, shade)


class Ball:
    """A field with a known formula: a ball round `centre` whose density falls off over `edge`; the colour is the
    place."""

    def __init__(self, density=40.0, radius=0.5, edge=0.02, centre=(0.0, 0.0, 0.0)):
        self.strength, self.radius, self.edge, self.centre = density, radius, edge, centre

    def density(self, x):
        away = torch.linalg.vector_norm(x - torch.tensor(self.centre, dtype=x.dtype), dim=-1)
        return self.strength * torch.sigmoid((self.radius - away) / self.edge)

    def __call__(self, x):
        return self.density(x), 0.5 + 0.5 * x

    def with_normals(self, x):
        return *self(x), torch.nn.functional.normalize(x - torch.tensor(self.centre), dim=-1)

    def background(self, directions):
        return torch.full_like(directions, 0.25)


def grid_of(field, step, visits=8, **settings):
    occupancy = OccupancyGrid(**settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(visits):
        occupancy.update(field.density, step, everywhere=True, generator=generator)
    return occupancy


def view(size=16, elevation=20.0, azimuth=30.0, distance=2.5, fov=40.0):
    origins, directions = rays(orbit(elevation, azimuth, distance), fov, size)
    return origins.reshape(-1, 3), directions.reshape(-1, 3)


def quadrature(field, origins, directions, background, parts=2000):
    """The volume rendering integral on a dense, even grid along each ray, in double precision."""
    origins, directions = origins.double(), directions.double()
    low = torch.linspace(0, 6, parts + 1, dtype=torch.float64)
    t, width = (low[1:] + low[:-1]) / 2, 6 / parts
    x = origins[:, None] + directions[:, None] * t[:, None]
    density, colour = field(x)
    density = density * (x.abs() <= 1).all(-1)
    depth = density * width
    light = torch.exp(-(depth.cumsum(-1) - depth))
    weights = light * (1 - torch.exp(-depth))
    opacity = weights.sum(-1)
    return (weights[..., None] * colour).sum(1) + (1 - opacity)[:, None] * background, opacity, (weights * t).sum(-1)


def plain(n):
    return torch.full((n,), 0.5)


# ---------------------------------------------------------------- occupancy

def test_box_interval_by_looking():
    torch.manual_seed(0)
    origins, directions = torch.randn(300, 3) * 1.5, torch.nn.functional.normalize(torch.randn(300, 3), dim=-1)
    directions[:3] = torch.eye(3)
    near, far = box_interval(origins, directions)
    t = torch.linspace(0, 8, 8001)
    inside = ((origins[:, None] + directions[:, None] * t[:, None]).abs() <= 1).all(-1)
    for i in range(300):
        if inside[i].any():
            assert abs(float(t[inside[i]][0] - near[i])) < 2e-3 and abs(float(t[inside[i]][-1] - far[i])) < 2e-3
        else:
            assert far[i] - near[i] < 2e-3


@pytest.mark.parametrize("everywhere", [True, False])
def test_occupancy_update_is_the_plain_loop(everywhere):
    size, step = 8, 0.05
    occupancy = OccupancyGrid(size=size, decay=0.9)
    generator = torch.Generator().manual_seed(1)
    occupancy.upper.copy_(torch.rand(size ** 3, generator=generator) ** 4)
    occupancy.lower.copy_(torch.rand(size ** 3, generator=generator))
    upper, lower, busy = occupancy.upper.tolist(), occupancy.lower.tolist(), occupancy.occupied(step)
    assert 0 < busy.sum() < size ** 3
    asked = []

    def density(x):
        asked.append((x, torch.rand(len(x), generator=generator)))
        return asked[-1][1]

    occupancy.update(density, step, everywhere, generator)
    (x, answers), = asked
    ix, iy, iz = ((x + 1) / 2 * size).floor().long().T
    cells = (ix * size * size + iy * size + iz).tolist()
    if everywhere:
        assert sorted(cells) == list(range(size ** 3))
    else:
        assert len(cells) == size ** 3 // 2
        assert busy[torch.tensor(cells[size ** 3 // 4:])].all()              # the second half lies among the occupied
        assert 0.7 * size ** 3 / 4 < len(set(cells[:size ** 3 // 4])) < size ** 3 / 4
    for cell in set(cells):
        found = [float(a) for c, a in zip(cells, answers) if c == cell]
        upper[cell] = max(0.9 * upper[cell], max(found))
        lower[cell] = min(lower[cell] / 0.9, min(found))
    assert torch.allclose(occupancy.upper, torch.tensor(upper)) and torch.allclose(occupancy.lower, torch.tensor(lower))


def test_occupied_is_above_the_mean_or_the_threshold():
    occupancy = OccupancyGrid(size=2, threshold=0.01)
    for scale in (1e-3, 1.0):
        occupancy.upper.copy_(torch.tensor([0, 0, 0.15, 0.35, 1, 2, 3, 0]) * scale)
        limit = min(6.5 / 8 * scale * 0.1, 0.01)
        assert occupancy.occupied(0.1).tolist() == [float(v) * 0.1 > limit for v in occupancy.upper]


def test_every_occupied_cell_is_visited_in_time():
    occupancy, busy = OccupancyGrid(size=8), torch.tensor([3, 100, 511])
    occupancy.upper[busy] = 1.0
    asked = []
    occupancy.update(lambda x: asked.append(x) or torch.ones(len(x)), 0.05, everywhere=False)
    ix, iy, iz = ((asked[0][128:] + 1) / 2 * 8).floor().long().T
    assert torch.equal((ix * 64 + iy * 8 + iz).unique(), busy)


def test_update_with_nothing_occupied():
    occupancy = grid_of(Ball(density=0.0), 0.05)
    occupancy.update(Ball(density=0.0).density, 0.05, everywhere=False)
    assert not occupancy.occupied(0.05).any()


# ---------------------------------------------------------------- sampling

def test_march_is_the_plain_loop():
    field, step = Ball(), DIAGONAL / 40
    occupancy = grid_of(field, step, size=8)
    occupancy.lower.zero_()                                                  # nothing hides anything
    origins, directions = view(8, distance=1.8, fov=60)                      # some rays miss the box
    jitter = torch.rand(64)
    first, counts = march(occupancy, origins, directions, step, jitter)
    near, far = box_interval(origins, directions)
    busy, expected = occupancy.occupied(step), []
    for o, d, a, b, j in zip(origins, directions, near, far, jitter):
        for k in range(math.ceil(DIAGONAL / step)):
            t = a + (k + j) * step
            ix, iy, iz = ((o + d * t + 1) / 2 * 8).floor().long().clamp(0, 7)
            expected.append(bool(t < b and busy[ix * 64 + iy * 8 + iz]))
    wanted = counts.diff(prepend=counts.new_zeros(1)).bool()
    assert 200 < wanted.sum() < 0.5 * len(wanted)
    assert (wanted != torch.tensor(expected)).sum() <= 2                     # a step may fall on a cell's border
    assert torch.allclose(first, near + jitter * step)


def setup_choice(n_rays=20, seed=0):
    torch.manual_seed(seed)
    wanted = torch.rand(n_rays, 10) < 0.4
    origins, directions = torch.randn(n_rays, 3), torch.nn.functional.normalize(torch.randn(n_rays, 3), dim=-1)
    return origins, directions, torch.rand(n_rays), wanted, wanted.flatten().cumsum(0, dtype=torch.int32)


def test_choice_gives_every_step_a_slot():
    origins, directions, first, wanted, counts = setup_choice()
    n = int(wanted.sum())
    s = choose(origins, directions, first, counts, 0.1, budget=n + 7, phase=torch.tensor(0.999))
    ray, k = wanted.nonzero().T
    assert torch.equal(s.ray[:n], ray.to(s.ray)) and torch.allclose(s.distance[:n], first[ray] + k * 0.1)
    assert torch.allclose(s.position, origins[s.ray] + directions[s.ray] * s.distance[:, None], atol=1e-6)
    assert torch.allclose(s.width[:n], torch.tensor(0.1)) and (s.width[n:] == 0).all()
    assert (s.ray.diff() >= 0).all()


def test_thinning_is_without_bias():
    """Over all n phases every step is chosen equally often: the mean width it stands for is exactly the step."""
    origins, directions, first, wanted, counts = setup_choice()
    n, budget, total = int(wanted.sum()), 33, torch.zeros(20, 10)
    assert n > 2 * budget
    for i in range(n):
        s = choose(origins, directions, first, counts, 0.1, budget, phase=torch.tensor((i + 0.5) / n))
        assert (s.width > 0).all() and (s.ray.diff() >= 0).all()
        total[s.ray, ((s.distance - first[s.ray]) / 0.1).round().long()] += s.width
    assert torch.allclose(total / n, 0.1 * wanted, atol=1e-6)


def test_no_rays_hit_anything():
    field, step = Ball(density=0.0), DIAGONAL / 64
    origins, directions = view(4)
    out = render(field, grid_of(field, step), origins, directions, torch.tensor([0.1, 0.2, 0.3]), 100, step,
                 *draw_offsets(len(origins), "cpu"))
    assert torch.equal(out.opacity, torch.zeros(16))
    assert torch.allclose(out.rgb, torch.tensor([0.1, 0.2, 0.3]).expand(16, 3))


def test_early_termination_saves_samples_and_changes_nothing():
    field, step = Ball(density=200.0, radius=0.6), DIAGONAL / 128
    occupancy = grid_of(field, step, visits=12)
    origins, directions = view(32)
    pictures, found = [], []
    for lower in (occupancy.lower, torch.zeros_like(occupancy.lower)):
        occupancy.lower = lower
        found.append(int(march(occupancy, origins, directions, step, plain(len(origins)))[1][-1]))
        samples = sample(occupancy, origins, directions, step, 40000, plain(len(origins)), torch.zeros(()))
        density, colour = field(samples.position)
        pictures.append(composite(samples, density, colour, len(origins))[1])
    assert found[0] < 0.5 * found[1]
    assert (pictures[0] - pictures[1]).abs().max() < 1e-3


# ---------------------------------------------------------------- compositing

def ragged(dtype=torch.float64):
    """Rays with 0 to 6 samples, sorted, and three unused slots."""
    torch.manual_seed(3)
    ray = torch.repeat_interleave(torch.arange(6), torch.tensor([3, 0, 6, 1, 0, 2]))
    ray, distance = torch.cat([ray, torch.full((3,), 5)]), torch.rand(15, dtype=dtype)
    width = torch.cat([torch.rand(12, dtype=dtype), torch.zeros(3, dtype=dtype)])
    samples = Samples(ray, torch.zeros(15, 3, dtype=dtype), distance, width)
    return samples, torch.rand(15, dtype=dtype) * 3, torch.rand(15, 4, dtype=dtype)


def test_composite_is_the_plain_loop():
    samples, density, values = ragged()
    weights, seen, opacity, depth = composite(samples, density, values, 6)
    for r in range(6):
        light, expected = 1.0, torch.zeros(6, dtype=torch.float64)
        for s in range(15):
            if samples.ray[s] == r:
                alpha = 1 - math.exp(-float(density[s] * samples.width[s]))
                assert float(weights[s]) == pytest.approx(light * alpha, abs=1e-12)
                expected += light * alpha * torch.cat([values[s], torch.ones(1), samples.distance[s, None]])
                light *= 1 - alpha
        assert torch.allclose(torch.cat([seen[r], opacity[r, None], depth[r, None]]), expected, atol=1e-12)


def test_gradients_of_composite():
    samples, density, values = ragged()
    call = lambda density, values: composite(samples, density, values, 6)
    assert torch.autograd.gradcheck(call, (density.requires_grad_(), values.requires_grad_()))


def test_a_homogeneous_medium():
    """Opacity 1 - exp(-density * length), whatever the number of samples; many rays, so that the running sum grows
    large."""
    lengths = torch.rand(5000) * 2
    ray = torch.arange(5000).repeat_interleave(40)
    width = (lengths / 40).repeat_interleave(40)
    samples = Samples(ray, torch.zeros(len(ray), 3), torch.zeros(len(ray)), width)
    for strength in (0.01, 1.0, 30.0):
        opacity = composite(samples, torch.full_like(width, strength), torch.zeros(len(ray), 1), 5000)[2]
        assert (opacity - (1 - torch.exp(-strength * lengths))).abs().max() < 2e-6


@pytest.mark.parametrize("strength", [3.0, 60.0])
def test_render_is_the_integral(strength):
    field = Ball(density=strength, edge=0.05, centre=(0.1, -0.2, 0.15))
    step, background = DIAGONAL / 512, torch.tensor([0.9, 0.1, 0.4])
    origins, directions = view(8)
    occupancy = grid_of(field, step, visits=4, threshold=1e-6)
    budget = int(march(occupancy, origins, directions, step, plain(64))[1][-1])
    rgb = sum(render(field, occupancy, origins, directions, background, budget + 500, step, *draw_offsets(64, "cpu")).rgb
              for _ in range(4)) / 4
    expected, _, _ = quadrature(field, origins, directions, background)
    assert (rgb - expected).abs().max() < 0.01 and (rgb - expected).abs().mean() < 1e-3


def test_thinned_pictures_agree_on_average():
    field, step, background = Ball(density=2.0, edge=0.05), DIAGONAL / 128, torch.zeros(3)
    origins, directions = view(12)
    occupancy, generator = grid_of(field, step), torch.Generator().manual_seed(0)
    n = int(march(occupancy, origins, directions, step, plain(144))[1][-1])
    full, thin = (sum(render(field, occupancy, origins, directions, background, budget, step,
                             *draw_offsets(144, "cpu", generator)).opacity for _ in range(30)) / 30 for budget in (2 * n, n // 2))
    assert (full - thin).abs().mean() < 7e-3 and abs(float((full - thin).mean())) < 1e-3


# ---------------------------------------------------------------- light

def test_shading_is_its_formula():
    torch.manual_seed(0)
    albedo, normal = torch.rand(30, 3), torch.nn.functional.normalize(torch.randn(30, 3), dim=-1)
    position, light = torch.randn(30, 3) * 0.3, torch.randn(30, 3)
    for softness, textureless in ((0.0, 0.0), (1.0, 0.0), (0.3, 1.0), (torch.tensor(0.6), torch.tensor(1.0))):
        got = shade(albedo, normal, position, light, softness, textureless)
        for i in range(30):
            to_light = (light[i] - position[i]) / math.dist(light[i], position[i])
            lambert = max(0.0, float(to_light @ normal[i]))
            colour = torch.ones(3) if textureless else albedo[i]
            assert torch.allclose(got[i], colour * ((1 - float(softness)) + float(softness) * lambert), atol=1e-5)


def test_lights():
    cameras = orbit(20, [0, 90, 180, 270], 2.0)[:, :3, 3].expand(500, 4, 3)
    lights = draw_light(cameras, torch.Generator().manual_seed(0))
    distance = lights.norm(dim=-1)
    assert lights.shape == (500, 4, 3) and distance.min() >= 0.8 and distance.max() <= 1.5
    assert (distance - distance[:, :1]).abs().max() < 1e-5                   # one draw a set
    assert distance[:, 0].mean() == pytest.approx(1.15, abs=0.03)
    # Undo the formula: the direction times some length, minus the camera, is the noise, the same for the views of a
    # set.
    aside = torch.linalg.cross(lights, cameras)                          # light x camera = scale * (noise x camera)
    assert (aside.norm(dim=-1) > 0.05).float().mean() > 0.9                  # there is noise
    # and the camera's side is preferred
    assert (torch.nn.functional.normalize(lights, dim=-1) * cameras).sum(-1).mean() > 1.0


def test_orientation_loss_is_its_formula():
    torch.manual_seed(0)
    weights, opacity = torch.rand(20, requires_grad=True), torch.tensor([0.0, 0.5, 1e-3])
    normals, directions = torch.randn(20, 3, requires_grad=True), torch.randn(20, 3)
    three = zip(weights.tolist(), normals.detach(), directions)
    expected = sum(w * max(0.0, float(n @ d)) ** 2 for w, n, d in three) / 2
    loss = orientation_loss(weights, normals, directions, opacity)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert weights.grad is None and normals.grad.abs().sum() > 0


# ---------------------------------------------------------------- the whole

def tiny_step(device="cpu", shaded=True):
    """A real field, its rays, and one forward and backward."""
    torch.manual_seed(0)
    nerf = NeRF(NeRFConfig(levels=4, log2_entries=12, coarsest=8, finest=64, hidden=16)).to(device)
    torch.nn.init.uniform_(nerf.grid.table, -0.5, 0.5)
    origins, directions = (v.to(device) for v in view(32))
    occupancy, step = OccupancyGrid().to(device), DIAGONAL / 64
    occupancy.update(nerf.density, step, everywhere=True)
    background = torch.ones(3, device=device)
    shading = Shading(torch.tensor([1.0, 0.5, 1.0], device=device), 0.5, 0.0) if shaded else None

    def run(generator=None):
        for p in nerf.parameters():
            p.grad = None
        out = render(nerf, occupancy, origins, directions, background, 8192, step, *draw_offsets(1024, device, generator), shading)
        loss = (out.rgb ** 2).mean() + out.depth.mean() + out.opacity.mean()
        if shaded:
            along = directions.index_select(0, out.samples.ray)
            loss = loss + orientation_loss(out.weights, out.normals, along, out.opacity)
        loss.backward()
        return [loss.detach()] + [p.grad for p in nerf.parameters() if p.grad is not None]

    return run, lambda: occupancy.update(nerf.density, step, everywhere=False)


@pytest.mark.parametrize("shaded", [False, True])
def test_repeats_bit_for_bit(shaded):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run, _ = tiny_step(shaded=shaded)
        seen = [[v.clone() for v in run(torch.Generator().manual_seed(5))] for _ in range(3)]
        assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))
        assert not torch.equal(seen[0][0], run(torch.Generator().manual_seed(6))[0])
    finally:
        torch.set_num_threads(before)


class NoDataOnTheHost(TorchDispatchMode):
    """What would make a GPU wait for the host, or give a shape that depends on data, fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shaded", [False, True])
def test_a_step_reads_nothing_back(shaded):
    run, update = tiny_step(shaded=shaded)
    with NoDataOnTheHost():
        run()
        update()


@pytest.mark.gpu
@pytest.mark.parametrize("shaded", [False, True])
def test_a_graph_holds_the_step(shaded):
    run, update = tiny_step("cuda", shaded)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(), update(), run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(), update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.manual_seed(1)
    expected = [v.clone() for v in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    torch.cuda.manual_seed(1)
    graph.replay()
    for a, b in zip(expected, captured):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(a.abs().max()) + 1e-9)


def test_pictures_of_a_ball():
    field, step = Ball(density=400.0, radius=0.5, edge=0.002), DIAGONAL / 512
    c2w = orbit([0.0, 30.0], [0.0, 100.0], 2.0)
    picture = render_image(field, grid_of(field, step), c2w, 40.0, 33, torch.ones(3), step, normals=True, chunk=500)
    assert [tuple(getattr(picture, k).shape) for k in ("rgb", "opacity", "depth", "normal")] == [
        (2, 3, 33, 33), (2, 1, 33, 33), (2, 1, 33, 33), (2, 3, 33, 33)]
    assert (picture.depth[:, 0, 16, 16] - 1.5).abs().max() < 0.02
    position = c2w[:, :3, 3]
    assert (picture.normal[:, :, 16, 16] - position / 2).abs().max() < 0.02
    assert (picture.rgb[:, :, 16, 16] - (0.5 + 0.5 * position / 4)).abs().max() < 0.02
    for key, empty in (("rgb", 1.0), ("opacity", 0.0), ("depth", 0.0), ("normal", 0.0)):
        assert (getattr(picture, key)[:, :, 0, 0] == empty).all()
    assert picture.opacity[:, 0, 16, 16].min() > 0.999
    # Through a thin ball, one unit long and of density 1, one sees to (1 - 2/e) / (1 - 1/e) of it on average.
    thin = Ball(density=1.0, radius=0.5, edge=0.002)
    depth = render_image(thin, grid_of(thin, step, threshold=1e-6), c2w, 40.0, 33, 0.0, step).depth[:, 0, 16, 16]
    assert (depth - 1.5 - (1 - 2 / math.e) / (1 - 1 / math.e)).abs().max() < 0.01
    # The outline: a ball of radius 0.5 at distance 2 covers asin(1/4) of the view.
    covered = picture.opacity[0, 0, 16].gt(0.5).sum() / 33
    assert float(covered) == pytest.approx(math.tan(math.asin(0.25)) / math.tan(math.radians(20)), abs=0.05)
    own = render_image(field, grid_of(field, step), c2w, 40.0, 4, None, step)
    assert own.normal is None
    assert torch.allclose(own.rgb[:, :, 0, 0], torch.tensor(0.25))
