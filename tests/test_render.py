"""Rendering against closed forms, dense quadrature and plain loops."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from agree import agree
from mvd.cameras import orbit, rays
from mvd.hashgrid import HashGridConfig
from mvd.nerf import NeRF, NeRFConfig
from mvd.render import (
    DIAGONAL, OccupancyGrid, Samples, Shading, box_interval, composite, draw_jitter, draw_light,
    cells_along, draw_seen_points, find_in_row, march_rays, orientation_loss, render_rays,
    render_views, sample_rays, select_samples, shade, smoothness_loss)


class Ball:
    """A field with a known formula: a ball around `centre` whose density falls off over `edge`;
    the colour is the place."""

    def __init__(self, density=40.0, radius=0.5, edge=0.02, centre=(0.0, 0.0, 0.0)):
        self.strength = density
        self.radius = radius
        self.edge = edge
        self.centre = centre

    def density(self, x):
        away = x - torch.tensor(self.centre, dtype=x.dtype)
        away = torch.linalg.vector_norm(away, dim=-1)
        return self.strength * torch.sigmoid((self.radius - away) / self.edge)

    def __call__(self, x):
        return self.density(x), 0.5 + 0.5 * x

    def with_normals(self, x):
        density, colour = self(x)
        return density, colour, self.normals(x)

    def normals(self, x):
        return F.normalize(x - torch.tensor(self.centre), dim=-1)

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
    """The rgb of the volume rendering integral, on a dense, even grid along each ray, in double
    precision."""
    origins = origins.double()
    directions = directions.double()
    edges = torch.linspace(0, 6, parts + 1, dtype=torch.float64)
    t = (edges[1:] + edges[:-1]) / 2
    x = origins[:, None] + directions[:, None] * t[:, None]
    density, colour = field(x)
    density = density * (x.abs() <= 1).all(-1)
    depth = density * (6 / parts)
    light = torch.exp(-(depth.cumsum(-1) - depth))
    weights = light * (1 - torch.exp(-depth))
    opacity = weights.sum(-1)
    return (weights[..., None] * colour).sum(1) + (1 - opacity)[:, None] * background


def middle(n):
    """The jitter of rays that look at the middle of each step."""
    return torch.full((n,), 0.5)


def cells_of(x, size):
    """The cells of points [..., 3] along x, y, z: [3, ...]."""
    return ((x + 1) / 2 * size).floor().long().movedim(-1, 0)


# ---- occupancy -------------------------------------------------------------------------------

def test_box_interval_by_looking():
    torch.manual_seed(0)
    origins = torch.randn(300, 3) * 1.5
    directions = F.normalize(torch.randn(300, 3), dim=-1)
    directions[:3] = torch.eye(3)
    near, far = box_interval(origins, directions)
    t = torch.linspace(0, 8, 8001)
    x = origins[:, None] + directions[:, None] * t[:, None]
    inside = (x.abs() <= 1).all(-1)
    for i in range(300):
        seen = t[inside[i]]
        if len(seen):
            agree(near[i], seen[0], f"where ray {i} enters the box", atol=2e-3)
            agree(far[i], seen[-1], f"where ray {i} leaves the box", atol=2e-3)
        else:
            assert far[i] - near[i] < 2e-3, f"ray {i} misses the box"


@pytest.mark.parametrize("everywhere", [True, False])
def test_occupancy_update_is_the_plain_loop(everywhere):
    size = 8
    count = size ** 3
    step = 0.05
    occupancy = OccupancyGrid(size=size, decay=0.9)
    generator = torch.Generator().manual_seed(1)
    occupancy.density_max.copy_(torch.rand(count, generator=generator) ** 4)
    occupancy.density_min.copy_(torch.rand(count, generator=generator))
    upper = occupancy.density_max.tolist()
    lower = occupancy.density_min.tolist()
    busy = occupancy.occupied(step)
    assert 0 < busy.sum() < count, "the case has no occupied cell, or no other"
    asked = []

    def density(x):
        asked.append((x, torch.rand(len(x), generator=generator)))
        return asked[-1][1]

    occupancy.update(density, step, everywhere, generator)
    assert len(asked) == 1, "the density is asked once"
    x, answers = asked[0]
    ix, iy, iz = cells_of(x, size)
    cells = (ix * size * size + iy * size + iz).tolist()
    if everywhere:
        agree(sorted(cells), range(count), "the cells that are visited, all", atol=0)
    else:
        quarter = count // 4
        agree(len(cells), count // 2, "the number of cells that are visited", atol=0)
        assert busy[torch.tensor(cells[quarter:])].all(), "the second half is not occupied"
        assert 0.7 * quarter < len(set(cells[:quarter])) < quarter, "the first is not at random"

    for cell in set(cells):
        found = [float(answer) for c, answer in zip(cells, answers) if c == cell]
        upper[cell] = max(0.9 * upper[cell], max(found))
        lower[cell] = min(lower[cell] / 0.9, min(found))
    hint = "A cell that is drawn twice decays once."
    agree(occupancy.density_max, upper, "the upper bound of the density", hint, rtol=1e-5)
    agree(occupancy.density_min, lower, "the lower bound of the density", hint, rtol=1e-5)


def test_occupied_is_above_the_mean_or_the_threshold():
    occupancy = OccupancyGrid(size=2, threshold=0.01)
    for scale in (1e-3, 1.0):
        density = torch.tensor([0, 0, 0.15, 0.35, 1, 2, 3, 0]) * scale
        occupancy.density_max.copy_(density)
        limit = min(6.5 / 8 * scale * 0.1, 0.01)
        expected = [float(v) * 0.1 > limit for v in density]
        hint = "The optical depth exceeds the mean, or the threshold if that is lower."
        agree(occupancy.occupied(0.1), expected, "which cells are occupied", hint, atol=0)


def test_every_occupied_cell_is_visited_in_time():
    occupancy = OccupancyGrid(size=8)
    busy = torch.tensor([3, 100, 511])
    occupancy.density_max[busy] = 1.0
    asked = []

    def density(x):
        asked.append(x)
        return torch.ones(len(x))

    occupancy.update(density, 0.05, everywhere=False)
    among_occupied = asked[0][128:]
    ix, iy, iz = cells_of(among_occupied, 8)
    cells = (ix * 64 + iy * 8 + iz).unique()
    agree(cells, busy, "the occupied cells that are visited", atol=0)


def test_update_with_nothing_occupied():
    empty = Ball(density=0.0)
    occupancy = grid_of(empty, 0.05)
    occupancy.update(empty.density, 0.05, everywhere=False)
    assert not occupancy.occupied(0.05).any(), "empty space is occupied"


# ---- sampling --------------------------------------------------------------------------------

def test_march_is_the_plain_loop():
    field = Ball()
    step = DIAGONAL / 40
    occupancy = grid_of(field, step, size=8)
    occupancy.density_min.zero_()  # nothing hides anything
    origins, directions = view(8, distance=1.8, fov=60)  # some rays miss the box
    jitter = torch.rand(64)
    first, counts = march_rays(occupancy, origins, directions, step=step, jitter=jitter)
    near, far = box_interval(origins, directions)
    busy = occupancy.occupied(step)
    expected = []
    for r in range(64):
        for k in range(math.ceil(DIAGONAL / step)):
            t = near[r] + (k + jitter[r]) * step
            ix, iy, iz = cells_of(origins[r] + directions[r] * t, 8).clamp(0, 7)
            expected.append(bool(t < far[r] and busy[ix * 64 + iy * 8 + iz]))
    wanted = counts.diff(prepend=counts.new_zeros(len(counts), 1)).bool()
    assert 200 < wanted.sum() < 0.5 * wanted.numel(), "the case has too few steps, or too many"
    different = (wanted.flatten() != torch.tensor(expected)).sum()
    assert different <= 2, "more steps differ than may fall on a cell's border"
    agree(first, near + jitter * step, "the first look of each ray", atol=1e-6)


def test_the_longest_ray_is_marched_to_its_end():
    """From corner to corner of a box that is full of matter, through which light passes."""
    occupancy = OccupancyGrid(4)
    occupancy.density_max.fill_(1.0)
    occupancy.density_min.zero_()
    direction = torch.full((1, 3), 1 / math.sqrt(3))
    step = DIAGONAL / 10.5
    _, counts = march_rays(
        occupancy, -2 * direction, direction, step=step, jitter=torch.zeros(1))
    assert counts[0, -1] == 11, "the last step, the half one, is part of the box"


def test_the_cells_along_a_ray():
    """From the first cell to the last, and never out of the grid."""
    start = torch.tensor([[0.5, 0.5, 0.5], [3.5, 2.5, 1.5], [3.9, 3.9, 3.9]])
    along = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.5], [0.2, 0.2, 0.2]])
    found = cells_along(start, along, torch.arange(4.0), 4)
    expected = [[0, 21, 42, 63], [57, 42, 26, 11], [63, 63, 63, 63]]
    assert found.tolist() == expected, "cell (i, j, k) is at (i · size + j) · size + k"


def steps_to_choose_from(seed=0):
    """What `march_rays` could return for 20 rays of 10 steps of 0.1, and the wanted steps."""
    torch.manual_seed(seed)
    wanted = torch.rand(20, 10) < 0.4
    origins = torch.randn(20, 3)
    directions = F.normalize(torch.randn(20, 3), dim=-1)
    first = torch.rand(20)
    counts = wanted.cumsum(1, dtype=torch.int16)
    return (origins, directions, first, counts), wanted


def test_selection_gives_every_step_a_slot():
    marched, wanted = steps_to_choose_from()
    origins, directions, first, _ = marched
    n = int(wanted.sum())
    s = select_samples(*marched, step=0.1, budget=n + 7, phase=torch.tensor(0.999))
    ray, k = wanted.nonzero().T
    agree(s.ray[:n], ray, "the ray of each slot", atol=0)
    agree(s.distance[:n], first[ray] + k * 0.1, "the distance of each slot", atol=1e-6)
    position = origins[s.ray] + directions[s.ray] * s.distance[:, None]
    agree(s.position[:n], position[:n], "the position of each slot", atol=1e-6)
    agree(s.width[:n], 0.1, "the width of each slot", atol=1e-6)
    assert (s.width[n:] == 0).all(), "a slot that is left weighs something"
    assert (s.ray.diff() >= 0).all(), "the slots are not sorted by ray"


def test_slots_that_are_left_lie_all_over_the_box():
    """On a GPU, points that lie together wait for each other to add to the same entries."""
    marched, wanted = steps_to_choose_from()
    n = int(wanted.sum())
    s = select_samples(*marched, step=0.1, budget=n + 5000, phase=torch.tensor(0.3))
    left = s.position[n:]
    assert left.abs().max() <= 1, "a slot lies outside the box"
    i, j, k = ((left + 1) * 4).long().T  # 512 cells, ten slots for each
    count = torch.bincount((i * 8 + j) * 8 + k, minlength=512)
    assert count.max() < 30, f"{count.max()} of {len(left)} slots lie in one of 512 cells"


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 64, 100])
def test_a_place_in_a_row_is_found(width):
    torch.manual_seed(width)
    counts = (torch.rand(30, width) < 0.5).cumsum(1, dtype=torch.int16)
    row = torch.randint(30, (500,), dtype=torch.int32)
    wanted = torch.randint(1, width + 2, (500,), dtype=torch.int32)
    found = find_in_row(counts, row, wanted)
    for r, number, place in zip(row.tolist(), wanted.tolist(), found.tolist(), strict=True):
        reached = [k for k in range(width) if counts[r, k] >= number]
        first = reached[0] if reached else width - 1
        assert place == first, f"count {number} of {counts[r].tolist()} is at {first}, not {place}"


def test_thinning_is_without_bias():
    """Over all n phases every step is chosen equally often: the mean width it stands for is exactly
    the step."""
    marched, wanted = steps_to_choose_from()
    first = marched[2]
    n = int(wanted.sum())
    budget = 33
    total = torch.zeros(20, 10)
    assert n > 2 * budget, "the case is not thinned"
    for i in range(n):
        phase = torch.tensor((i + 0.5) / n)
        s = select_samples(*marched, step=0.1, budget=budget, phase=phase)
        assert (s.width > 0).all(), "a slot is empty though there are steps enough"
        assert (s.ray.diff() >= 0).all(), "the slots are not sorted by ray"
        k = ((s.distance - first[s.ray]) / 0.1).round().long()
        total[s.ray, k] += s.width
    hint = "Do widths grow by n / budget, and has every step the same chance?"
    agree(total / n, 0.1 * wanted, "the mean width that each step stands for", hint, atol=1e-6)


def test_no_rays_hit_anything():
    field = Ball(density=0.0)
    step = DIAGONAL / 64
    origins, directions = view(4)
    background = torch.tensor([0.1, 0.2, 0.3])
    jitter, phase = draw_jitter(len(origins), "cpu")
    seen = render_rays(
        field, grid_of(field, step), origins, directions, background, budget=100, step=step,
        jitter=jitter, phase=phase)
    agree(seen.opacity, 0, "the opacity of nothing", atol=0)
    agree(seen.rgb, background.expand(16, 3), "the background behind nothing", atol=1e-6)


def test_early_termination_saves_samples_and_changes_nothing():
    field = Ball(density=200.0, radius=0.6)
    step = DIAGONAL / 128
    occupancy = grid_of(field, step, visits=12)
    origins, directions = view(32)
    jitter = middle(len(origins))
    nothing_hides = torch.zeros_like(occupancy.density_min)
    pictures, found = [], []
    for density_min in (occupancy.density_min, nothing_hides):
        occupancy.density_min = density_min
        _, counts = march_rays(occupancy, origins, directions, step=step, jitter=jitter)
        found.append(int(counts[:, -1].sum()))
        samples = sample_rays(
            occupancy, origins, directions, step=step, budget=40000, jitter=jitter,
            phase=torch.zeros(()))
        density, colour = field(samples.position)
        _, rgb, _, _ = composite(samples, density, colour, len(origins))
        pictures.append(rgb)
    assert found[0] < 0.5 * found[1], "rays do not end where light cannot pass"
    agree(pictures[0], pictures[1], "the picture with early termination, and without", atol=1e-3)


# ---- compositing -----------------------------------------------------------------------------

def ragged():
    """Rays with 0 to 6 samples, sorted, and three unused slots; their density and values."""
    torch.manual_seed(3)
    double = torch.float64
    ray = torch.repeat_interleave(torch.arange(6), torch.tensor([3, 0, 6, 1, 0, 2]))
    ray = torch.cat([ray, torch.full((3,), 5)])
    distance = torch.rand(15, dtype=double)
    width = torch.cat([torch.rand(12, dtype=double), torch.zeros(3, dtype=double)])
    samples = Samples(ray, torch.zeros(15, 3, dtype=double), distance, width)
    density = torch.rand(15, dtype=double) * 3
    values = torch.rand(15, 4, dtype=double)
    return samples, density, values


@pytest.mark.exercise(10)
def test_composite_is_the_plain_loop():
    samples, density, values = ragged()
    weights, seen, opacity, depth = composite(samples, density, values, 6)
    expected = torch.zeros(15, dtype=torch.float64)
    sums = torch.zeros(6, 6, dtype=torch.float64)
    for r in range(6):
        light = 1.0
        for s in range(15):
            if samples.ray[s] != r:
                continue
            alpha = 1 - math.exp(-float(density[s] * samples.width[s]))
            expected[s] = light * alpha
            light *= 1 - alpha
            sums[r, :4] += expected[s] * values[s]
            sums[r, 4] += expected[s]
            sums[r, 5] += expected[s] * samples.distance[s]
    total = torch.zeros(6, dtype=weights.dtype).index_add(0, samples.ray, weights)
    assert (total <= 1 + 1e-9).all(), (
        f"weights along a ray sum to {total.max():.3g}; they cannot exceed 1. "
        "Is the light that is left multiplied in?")
    hint = "It is light · alpha, the light being what all earlier samples of the same ray let pass."
    agree(weights, expected, "the weights (NeRF eq. 3)", hint, atol=1e-12)
    hint = "Is it summed over the samples of each ray, and 0 for a ray without samples?"
    agree(seen, sums[:, :4], "the weighted values of each ray", hint, atol=1e-12)
    agree(opacity, sums[:, 4], "the opacity, the sum of the weights", hint, atol=1e-12)
    agree(depth, sums[:, 5], "the weighted distances", hint, atol=1e-12)


@pytest.mark.exercise(10)
def test_gradients_of_composite():
    samples, density, values = ragged()

    def call(density, values):
        return composite(samples, density, values, 6)

    density.requires_grad_()
    values.requires_grad_()
    try:
        torch.autograd.gradcheck(call, (density, values))
    except torch.autograd.gradcheck.GradcheckError:
        pytest.fail(
            "a gradient by the density or the values is not that of finite differences: is "
            "something rounded to float32, or detached?")


@pytest.mark.exercise(10)
def test_a_homogeneous_medium():
    """Opacity 1 - exp(-density * length), whatever the number of samples; many rays, so that the
    running sum grows large."""
    lengths = torch.rand(500) * 2
    ray = torch.arange(500).repeat_interleave(40)
    width = (lengths / 40).repeat_interleave(40)
    nowhere = torch.zeros(len(ray))
    samples = Samples(ray, torch.zeros(len(ray), 3), nowhere, width)
    values = torch.zeros(len(ray), 1)
    for strength in (0.01, 1.0, 30.0):
        density = torch.full_like(width, strength)
        _, _, opacity, _ = composite(samples, density, values, 500)
        expected = 1 - torch.exp(-strength * lengths)
        words = f"the opacity of a medium of density {strength}, 1 - exp(-density · length)"
        agree(opacity, expected, words, "Is the running sum in double precision?", atol=2e-6)


@pytest.mark.exercise(10)
def test_composite_keeps_the_rules_of_a_step():
    """Float32 in, float32 out, and nothing is read from the device."""
    samples, density, values = ragged()
    samples = Samples(
        samples.ray, samples.position.float(), samples.distance.float(), samples.width.float())
    with NoDataOnTheHost():
        results = composite(samples, density.float(), values.float(), 6)
    for name, found in zip(("weights", "values", "opacity", "depth"), results):
        assert found.dtype == torch.float32, f"the {name} of float32 samples are {found.dtype}"


@pytest.mark.parametrize("strength", [3.0, 60.0])
def test_render_is_the_integral(strength):
    field = Ball(density=strength, edge=0.05, centre=(0.1, -0.2, 0.15))
    step = DIAGONAL / 512
    background = torch.tensor([0.9, 0.1, 0.4])
    origins, directions = view(8)
    occupancy = grid_of(field, step, visits=4, threshold=1e-6)
    _, counts = march_rays(occupancy, origins, directions, step=step, jitter=middle(64))
    budget = int(counts[:, -1].sum()) + 500
    rgb = 0
    for _ in range(4):
        jitter, phase = draw_jitter(64, "cpu")
        seen = render_rays(
            field, occupancy, origins, directions, background, budget=budget, step=step,
            jitter=jitter, phase=phase)
        rgb = rgb + seen.rgb / 4
    expected = quadrature(field, origins, directions, background)
    agree(rgb, expected, "the picture, and quadrature of the integral", atol=0.01)
    mean = (rgb - expected).abs().mean()
    assert mean < 1e-3, f"the picture is off from the integral by {mean:.2g} on average"


def test_thinned_pictures_agree_on_average():
    field = Ball(density=2.0, edge=0.05)
    step = DIAGONAL / 128
    background = torch.zeros(3)
    origins, directions = view(12)
    occupancy = grid_of(field, step)
    generator = torch.Generator().manual_seed(0)
    _, counts = march_rays(occupancy, origins, directions, step=step, jitter=middle(144))
    n = int(counts[:, -1].sum())

    def mean_opacity(budget):
        total = 0
        for _ in range(30):
            jitter, phase = draw_jitter(144, "cpu", generator)
            seen = render_rays(
                field, occupancy, origins, directions, background, budget=budget, step=step,
                jitter=jitter, phase=phase)
            total = total + seen.opacity
        return total / 30

    difference = mean_opacity(2 * n) - mean_opacity(n // 2)
    hint = "Do fewer samples stand for more each?"
    agree(difference.abs().mean(), 0, "what thinning changes at a pixel", hint, atol=7e-3)
    agree(difference.mean(), 0, "what thinning changes on average", hint, atol=1e-3)


# ---- light -----------------------------------------------------------------------------------

SOFTNESS_AND_TEXTURELESS = [
    (0.0, 0.0), (1.0, 0.0), (0.3, 1.0), (torch.tensor(0.6), torch.tensor(1.0))]


@pytest.mark.parametrize("softness, textureless", SOFTNESS_AND_TEXTURELESS)
def test_shading_is_its_formula(softness, textureless):
    torch.manual_seed(0)
    albedo = torch.rand(30, 3)
    normals = F.normalize(torch.randn(30, 3), dim=-1)
    position = torch.randn(30, 3) * 0.3
    light = torch.randn(30, 3)
    found = shade(albedo, normals, position, light, softness=softness, textureless=textureless)
    expected = torch.zeros(30, 3)
    for i in range(30):
        to_light = (light[i] - position[i]) / math.dist(light[i], position[i])
        lambert = max(0.0, float(to_light @ normals[i]))
        colour = torch.ones(3) if textureless else albedo[i]
        s = float(softness)
        expected[i] = colour * ((1 - s) + s * lambert)
    words = f"shading with softness {softness}, textureless {textureless}"
    agree(found, expected, words, "Is n · l at least 0, with l from the point to the light?")


def test_lights():
    cameras = orbit(20, [0, 90, 180, 270], 2.0)[:, :3, 3].expand(500, 4, 3)
    lights = draw_light(cameras, torch.Generator().manual_seed(0))
    distance = lights.norm(dim=-1)
    agree(distance, torch.full((500, 4), 1.15), "the distances, 0.8 to 1.5", atol=0.3501)
    assert (distance - distance[:, :1]).abs().max() < 1e-5, "a set has more than one draw"
    agree(distance[:, 0].mean(), 1.15, "the mean distance of a light", atol=0.03)
    # light x camera = scale * (noise x camera)
    aside = torch.linalg.cross(lights, cameras)
    assert (aside.norm(dim=-1) > 0.05).float().mean() > 0.9, "there is no noise"
    towards_camera = (F.normalize(lights, dim=-1) * cameras).sum(-1)
    assert towards_camera.mean() > 1.0, "the camera's side is not preferred"


def test_orientation_loss_is_its_formula():
    torch.manual_seed(0)
    weights = torch.rand(20, requires_grad=True)
    opacity = torch.tensor([0.0, 0.5, 1e-3])  # two rays hit something
    normals = torch.randn(20, 3, requires_grad=True)
    directions = torch.randn(20, 3)
    expected = 0.0
    for w, n, d in zip(weights.tolist(), normals.detach(), directions):
        expected += w * max(0.0, float(n @ d)) ** 2 / 2
    loss = orientation_loss(weights, normals, directions, opacity)
    hint = "Is it divided by the rays that hit something, two of three?"
    agree(loss, expected, "the orientation loss (Ref-NeRF eq. 11)", hint, rtol=1e-5, atol=0)
    loss.backward()
    assert weights.grad is None, "the loss must not move the weights"
    assert normals.grad.abs().sum() > 0, "the loss does not move the normals"


def test_seen_points_are_drawn_by_their_weights():
    torch.manual_seed(0)
    weights = torch.rand(50) * (torch.rand(50) < 0.7)
    position = torch.randn(50, 3)
    nothing = torch.zeros(50)
    samples = Samples(nothing, position, nothing, nothing)
    counts = torch.zeros(50)
    turns, count = 40, 100
    for turn in range(turns):
        phase = torch.tensor((turn + 0.5) / turns)
        points = draw_seen_points(samples, weights, count, phase)
        assert points.shape == (count, 3), f"not {count} points"
        found = (points[:, None] == position).all(-1)
        assert found.any(1).all(), "a point is not the position of a sample"
        counts += found.sum(0)
    assert (counts[weights == 0] == 0).all(), "a sample that nobody sees was drawn"
    expected = turns * count * weights / weights.sum()
    # A systematic draw hits every share of the whole to less than two points.
    assert (counts - expected).abs().max() < 2, "the points do not follow the weights"


def test_seen_points_where_nothing_is_seen():
    samples = Samples(torch.zeros(9), torch.ones(9, 3), torch.zeros(9), torch.zeros(9))
    points = draw_seen_points(samples, torch.zeros(9), 4, torch.tensor(0.3))
    agree(points, 1, "points where nothing is seen, some sample's", atol=0)


def test_smoothness_of_a_ball():
    # Two points at an angle of a degrees, seen from the centre: ‖n - n'‖ = 2 sin(a / 2).
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 60.0, 180.0]))
    points = torch.tensor([[0.5, 0.0, 0.0]]).expand(4, 3)
    others = torch.stack([angles.cos(), angles.sin(), torch.zeros(4)], 1)
    loss = smoothness_loss(Ball(), points, others - points)
    expected = (4 * torch.sin(angles / 2) ** 2).mean().item()
    hint = "Is it ‖n(x) - n(x + δ)‖², summed over the axes, the mean over the points?"
    agree(loss, expected, "the smoothness of a ball", hint, rtol=1e-5, atol=0)


def test_smoothness_makes_a_rough_field_smooth():
    tiny = TinyStep()
    torch.manual_seed(1)
    points = 0.6 * F.normalize(torch.randn(256, 3), dim=-1)
    offsets = 0.05 * torch.randn(256, 3)
    optimizer = torch.optim.Adam([tiny.nerf.encoding.table], lr=0.02)
    losses = []
    for _ in range(30):
        loss = smoothness_loss(tiny.nerf, points, offsets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], f"its gradient leads nowhere: {losses[::10]}"


# ---- the whole -------------------------------------------------------------------------------

class TinyStep:
    """A real field, its rays, and one forward and backward."""

    def __init__(self, device="cpu", shaded=True):
        torch.manual_seed(0)
        self.device = device
        self.step = DIAGONAL / 64
        grid = HashGridConfig(levels=4, log2_entries=12, coarsest=8, finest=64)
        self.nerf = NeRF(NeRFConfig(grid=grid, hidden=16)).to(device)
        torch.nn.init.uniform_(self.nerf.encoding.table, -0.5, 0.5)
        origins, directions = view(32)
        self.origins = origins.to(device)
        self.directions = directions.to(device)
        self.occupancy = OccupancyGrid().to(device)
        self.occupancy.update(self.nerf.density, self.step, everywhere=True)
        self.background = torch.ones(3, device=device)
        light = torch.tensor([1.0, 0.5, 1.0], device=device)
        self.shading = Shading(light, 0.5, 0.0) if shaded else None

    def run(self, generator=None):
        """The loss and all gradients."""
        self.nerf.zero_grad(set_to_none=True)
        jitter, phase = draw_jitter(1024, self.device, generator)
        seen = render_rays(
            self.nerf, self.occupancy, self.origins, self.directions, self.background,
            budget=8192, step=self.step, jitter=jitter, phase=phase, shading=self.shading)
        loss = (seen.rgb ** 2).mean() + seen.depth.mean() + seen.opacity.mean()
        if self.shading is not None:
            along = self.directions.index_select(0, seen.samples.ray)
            loss = loss + orientation_loss(seen.weights, seen.normals, along, seen.opacity)
        loss.backward()
        gradients = [p.grad for p in self.nerf.parameters() if p.grad is not None]
        return [loss.detach(), *gradients]

    def update(self):
        self.occupancy.update(self.nerf.density, self.step, everywhere=False)


@pytest.mark.parametrize("shaded", [False, True])
def test_repeats_bit_for_bit(shaded):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tiny = TinyStep(shaded=shaded)
        seen = []
        for _ in range(3):
            results = tiny.run(torch.Generator().manual_seed(5))
            seen.append([values.clone() for values in results])
        for other in seen[1:]:
            for a, b in zip(seen[0], other):
                hint = "Are sums taken in an order that threads change?"
                agree(b, a, "the loss or a gradient once more, to the bit", hint, atol=0)
        other = tiny.run(torch.Generator().manual_seed(6))
        assert not torch.equal(seen[0][0], other[0]), "another seed gives the same loss"
    finally:
        torch.set_num_threads(before)


class NoDataOnTheHost(TorchDispatchMode):
    """What would make a GPU wait for the host, or give a shape that depends on data, fails."""
    FORBIDDEN = (
        "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, (
            f"{name} reads data from the device: nothing in a step may wait for it (no .item(), "
            "loop over a tensor, nonzero, or branch on a tensor)")
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                is_mask = index is not None and index.dtype == torch.bool
                assert not is_mask, (
                    "a boolean index gives a shape that depends on data: nothing in a step may; "
                    "torch.where, or a product with the mask, keeps the shape")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shaded", [False, True])
def test_a_step_reads_nothing_back(shaded):
    tiny = TinyStep(shaded=shaded)
    with NoDataOnTheHost():
        tiny.run()
        tiny.update()


@pytest.mark.gpu
@pytest.mark.parametrize("shaded", [False, True])
def test_a_graph_holds_the_step(shaded):
    tiny = TinyStep("cuda", shaded)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tiny.run()
        tiny.update()
        tiny.run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            tiny.run()
            tiny.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)

    torch.cuda.manual_seed(1)
    expected = [values.clone() for values in tiny.run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tiny.run()
    torch.cuda.manual_seed(1)
    graph.replay()
    for a, b in zip(expected, captured):
        tolerance = 1e-6 * float(a.abs().max()) + 1e-9
        agree(b, a, "a captured step, and an eager one", rtol=1e-3, atol=tolerance)


TWO_VIEWS = orbit([0.0, 30.0], [0.0, 100.0], 2.0)
FINE = DIAGONAL / 512


@pytest.mark.parametrize("most_samples", [500, 500 * 512, 1 << 20])
def test_pictures_of_a_ball(most_samples, monkeypatch):
    """A ray, 500 rays, or all rays of both views at once."""
    monkeypatch.setattr("mvd.render.MOST_SAMPLES", most_samples)
    field = Ball(density=400.0, radius=0.5, edge=0.002)
    picture = render_views(
        field, grid_of(field, FINE), TWO_VIEWS, 40.0, 33, background=torch.ones(3), step=FINE,
        normals=True)
    position = TWO_VIEWS[:, :3, 3]

    def centre(values):
        return values[:, :, 16, 16]

    words = "at the centre of a ball's picture"
    agree(centre(picture.depth), torch.full((2, 1), 1.5), f"the depth {words}", atol=0.02)
    agree(centre(picture.normal), position / 2, f"the normal {words}", atol=0.02)
    agree(centre(picture.rgb), 0.5 + position / 8, f"the colour {words}", atol=0.02)
    agree(centre(picture.opacity), torch.ones(2, 1), f"the opacity {words}", atol=1e-3)

    # The corner shows nothing.
    agree(picture.rgb[:, :, 0, 0], 1, "the colour beside the ball, the background", atol=0)
    for name in ("opacity", "depth", "normal"):
        agree(getattr(picture, name)[:, :, 0, 0], 0, f"the {name} beside the ball", atol=0)

    # The outline: a ball of radius 0.5 at distance 2 covers asin(1/4) of the view.
    covered = float(picture.opacity[0, 0, 16].gt(0.5).sum() / 33)
    expected = math.tan(math.asin(0.25)) / math.tan(math.radians(20))
    agree(covered, expected, "the share of a row that the ball covers", atol=0.05)


def test_depth_through_a_thin_ball():
    """One unit long and of density 1: one sees to (1 - 2/e) / (1 - 1/e) of it on average."""
    thin = Ball(density=1.0, radius=0.5, edge=0.002)
    occupancy = grid_of(thin, FINE, threshold=1e-6)
    picture = render_views(thin, occupancy, TWO_VIEWS, 40.0, 33, background=0.0, step=FINE)
    expected = 1.5 + (1 - 2 / math.e) / (1 - 1 / math.e)
    hint = "Is the sum of weights · distance divided by the opacity?"
    agree(picture.depth[:, 0, 16, 16], expected, "the depth through a thin ball", hint, atol=0.01)


def test_pictures_over_the_fields_own_background():
    field = Ball(density=400.0, radius=0.5, edge=0.002)
    picture = render_views(
        field, grid_of(field, FINE), TWO_VIEWS, 40.0, 4, background=None, step=FINE)
    assert picture.normal is None, "there are normals that nobody wanted"
    agree(picture.rgb[:, :, 0, 0], 0.25, "the field's own background", atol=1e-6)


def test_looking_at_a_field_that_learns_keeps_no_graph():
    """Neither the visits to the occupancy grid nor the pictures for people are differentiated."""
    grid = HashGridConfig(levels=2, log2_entries=8, coarsest=4, finest=8)
    nerf = NeRF(NeRFConfig(grid=grid, hidden=8))
    occupancy = OccupancyGrid(8)
    occupancy.update(nerf.density, 0.1, everywhere=True)
    assert not occupancy.density_max.requires_grad and not occupancy.density_min.requires_grad
    pictures = render_views(nerf, occupancy, TWO_VIEWS, 40.0, 4, background=None, step=0.1)
    assert pictures.opacity.max() > 0.5 and not pictures.rgb.requires_grad
