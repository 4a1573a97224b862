"""The hash grid against its plain loop in double precision, and against finite differences."""
import copy
import math

import pytest
import torch

from agree import agree
from mvd import hashgrid
from mvd.hashgrid import HashGrid, HashGridConfig, Lookup, encode_plainly, levels_of

# 2 dense levels and 3 hashed ones.
CONFIG = HashGridConfig(levels=5, log2_entries=9, coarsest=4, finest=50)


def grid_in_double(config=CONFIG, spread=1.0):
    grid = HashGrid(config)
    torch.nn.init.uniform_(grid.table, -spread, spread)
    return grid.double()


def points(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, dtype=torch.float64, generator=generator)


# ---- the plain loop --------------------------------------------------------------------------

@pytest.mark.parametrize("config", [CONFIG, HashGridConfig()])
def test_levels_are_laid_out_as_published(config):
    """Geometric sizes, dense where it fits; in the table the hashed levels stand first."""
    entries = 2 ** config.log2_entries
    growth = (config.finest / config.coarsest) ** (1 / (config.levels - 1))
    cells = [config.coarsest * growth ** level - 1 for level in range(config.levels)]
    vertices = [math.ceil(c) + 2 for c in cells]
    is_dense = [v ** 3 <= entries for v in vertices]
    hashed_start = 0
    dense_start = entries * is_dense.count(False)
    for level, c, v, dense in zip(levels_of(config), cells, vertices, is_dense):
        words = f"of the level that is {c:.4g} cells wide"
        agree(level.width, c, f"the width {words}", "Do the widths grow geometrically?")
        agree(level.vertices, v, f"the vertices per axis {words}", atol=0)
        agree(level.dense, dense, f"whether its vertices fit, {words}", atol=0)
        size = v ** 3 if dense else entries
        start = dense_start if dense else hashed_start
        agree(level.size, size, f"the entries {words}", atol=0)
        agree(level.start, start, f"the first entry {words}", atol=0)
        if dense:
            dense_start += size
        else:
            hashed_start += size


@pytest.mark.exercise(9)
def test_a_dense_level_by_hand():
    """One level, 4 - 1 cells: x = 0.5, 0.4, 0.1 lies at 2.0, 1.7, 0.8 of its vertices."""
    config = HashGridConfig(levels=1, log2_entries=9, coarsest=4, finest=4)
    table = torch.rand(5 ** 3, 2, dtype=torch.float64)
    x = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64)
    entry = table.view(5, 5, 5, 2)  # by z, y, x
    line = entry[:, :, 2]
    low, high = (0.3 * line[z, 1] + 0.7 * line[z, 2] for z in (0, 1))
    expected = 0.2 * low + 0.8 * high
    found = encode_plainly(table, x, config)
    assert found.shape == (1, 2), f"the features are {list(found.shape)}, not [N, levels · 2]"
    hint = "Is half a cell added to x · width? Is the entry x + v y + v² z, v vertices per axis?"
    agree(found[0], expected, "the features at (2.0, 1.7, 0.8) of a dense level", hint, atol=1e-12)


@pytest.mark.exercise(9)
def test_a_hashed_vertex_by_hand():
    """On a vertex the features are its entry: at the xor of coordinate times prime, modulo 2^k."""
    config = HashGridConfig(levels=1, log2_entries=9, coarsest=40, finest=40)
    table = torch.rand(512, 2, dtype=torch.float64)
    vertex = (7, 31, 22)
    x = torch.tensor([[(v - 0.5) / 39 for v in vertex]], dtype=torch.float64)
    entry = (7 ^ (31 * 2654435761) ^ (22 * 805459861)) % 512
    found = encode_plainly(table, x, config)[0]
    hint = "Is the entry (x · prime ^ y · prime ^ z · prime) modulo the level's size (eq. 4)?"
    agree(found, table[entry], "the features on a vertex of a hashed level", hint, atol=1e-9)


def test_no_corner_lies_outside_a_dense_level():
    walls = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5]], dtype=torch.float64)
    for level in levels_of(CONFIG):
        cell = (walls * level.width + 0.5).floor()
        inside = cell.min() >= 0 and cell.max() + 1 < level.vertices
        assert inside, f"a corner lies outside the level of {level.vertices} vertices per axis"


# ---- the fast form ---------------------------------------------------------------------------

@pytest.mark.exercise(9)
def test_interpolation_is_the_plain_loop():
    grid = grid_in_double()
    assert 0 < int(grid.dense.sum()) < CONFIG.levels, "both kinds of level are to be in play"
    walls = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5]], dtype=torch.float64)
    x = torch.cat([points(40), walls])
    expected = encode_plainly(grid.table.detach(), x, CONFIG)
    # The grid's `cells` were rounded to single precision.
    hint = "Both interpolate trilinearly (Instant NGP §3); the tests by hand say which errs."
    agree(grid(x), expected, "HashGrid and encode_plainly", hint)
    single = grid.float()(x.float())
    agree(single, expected, "HashGrid in float32, and encode_plainly in float64", atol=1e-4)


def test_full_size_fits_into_32_bits():
    """At the finest level coordinates times primes leave 32 bits: it must wrap, not break."""
    config = HashGridConfig(levels=2, log2_entries=9, coarsest=4000, finest=4096)
    grid = grid_in_double(config)
    x = points(20)
    expected = encode_plainly(grid.table.detach(), x, config)
    hint = "Does the product of coordinate and prime overflow?"
    agree(grid(x), expected, "HashGrid and encode_plainly at 4,096 cells", hint)


def test_published_size():
    grid = HashGrid(HashGridConfig())
    agree(grid.output_size, 32, "the number of features", atol=0)
    hint = "16 .. 70.6 are dense, 102 and finer hashed."
    agree(grid.dense.sum(), 5, "the number of dense levels", hint, atol=0)
    assert grid.table.abs().max() <= 1e-4, "the table does not start within ±1e-4"
    uniform = 1e-4 / math.sqrt(3)
    agree(grid.table.std(), uniform, "the deviation of U(-1e-4, 1e-4)", rtol=0.01, atol=0)


def inside_cells(grid, count):
    """Points at least 1e-3 of a cell away from every cell's border, where there is a kink."""
    x = points(4000, seed=1)
    fraction = (x.T[:, None] * grid.cells + 0.5) % 1
    inside = (fraction > 1e-3) & (fraction < 1 - 1e-3)
    return x[inside.all(1).all(0)][:count].clone()


def test_derivatives_are_finite_differences():
    grid = grid_in_double()
    x = inside_cells(grid, 6).requires_grad_()
    assert len(x) == 6, "too few points are inside of cells"
    table = grid.table.detach().clone().requires_grad_()

    def call(x, table):
        return torch.func.functional_call(grid, {"table": table}, x)

    assert torch.autograd.gradcheck(
        call, (x, table), eps=1e-7, atol=1e-4, nondet_tol=0, fast_mode=True)


def plain_slope(table, x):
    """d encode_plainly / dx of points [N, 3]: [N, 3, F], differentiable by the table."""
    slopes = []
    for point in x:
        jacobian = torch.autograd.functional.jacobian(
            lambda p: encode_plainly(table, p[None], CONFIG)[0], point, create_graph=True)
        slopes.append(jacobian.T)
    return torch.stack(slopes)


def test_slope_is_that_of_the_plain_loop_and_finite_differences():
    grid = grid_in_double()
    x = inside_cells(grid, 12)
    features, slope = grid.with_slope(x)
    agree(features, grid(x), "the features of with_slope, and of forward", atol=0)
    differences = []
    for step in 1e-7 * torch.eye(3, dtype=torch.float64):
        differences.append((grid(x + step) - grid(x - step)) / 2e-7)
    words = "d features / dx [N, 3, F]"
    agree(slope, torch.stack(differences, 1), f"{words}, and finite differences")

    expected = plain_slope(grid.table, x)
    # The grid's `cells` were rounded to single precision.
    agree(slope, expected, f"{words}, and autograd of the plain loop", atol=1e-3)

    # The derivatives by the table of a sum over features and slope.
    table = grid.table
    up = torch.randn_like(features)
    up_slope = torch.randn_like(slope)
    plain_features = encode_plainly(table, x, CONFIG)
    ours = (features * up).sum() + (slope * up_slope).sum()
    plain = (plain_features * up).sum() + (expected * up_slope).sum()
    ours, = torch.autograd.grad(ours, table)
    plain, = torch.autograd.grad(plain, table)
    assert plain.abs().max() > 10, "the case is too small"
    agree(ours, plain, "the gradient of the table", "Is it summed over all points?", atol=1e-3)


def test_pairs_need_not_be_complex(monkeypatch):
    """What a GPU or a compiler gets, on a CPU."""
    grid = grid_in_double()
    x = points(50)
    results = []
    for is_complex in (True, False):
        monkeypatch.setattr(hashgrid, "pairs_are_complex", lambda x: is_complex)
        features, slope = grid.with_slope(x)
        loss = (grid(x) ** 2).sum() + (features ** 3).sum() + (slope ** 2).sum()
        gradient, = torch.autograd.grad(loss, grid.table)
        results.append((features, slope, gradient))
    for name, a, b in zip(("features", "slope", "gradient"), *results):
        agree(b, a, f"{name} with pairs of floats, and with complex numbers", atol=1e-9)


def test_lookup_and_its_derivative_against_a_loop():
    table = torch.randn(7, 2, requires_grad=True)
    index = torch.tensor([[3, 3, 0], [6, 3, 1]], dtype=torch.int32)
    found = Lookup.apply(table, index)
    agree(found, table[index.long()], "Lookup and table[index]", atol=0)
    values = torch.randn(2, 3, 2)
    expected = torch.zeros(7, 2)
    for i in range(2):
        for j in range(3):
            expected[index[i, j]] += values[i, j]
    gradient, = torch.autograd.grad(found, table, values)
    hint = "What arrives at an entry from several places is added up."
    agree(gradient, expected, "the gradient of the table", hint, atol=1e-6)


def test_gradients_repeat_bit_for_bit():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grid = HashGrid(CONFIG)
        x = torch.rand(20000, 3)
        seen = []
        for _ in range(4):
            grid.table.grad = None
            (grid(x) ** 2 * 1e6).sum().backward()
            seen.append(grid.table.grad.clone())
        for other in seen[1:]:
            hint = "Are sums taken in an order that threads change?"
            agree(other, seen[0], "the same gradient once more, to the bit", hint, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    original = HashGrid(CONFIG)
    x = torch.rand(5000, 3)
    results = []
    for device in ("cpu", "cuda"):
        grid = copy.deepcopy(original).to(device)
        y = grid(x.to(device))
        features, slope = grid.with_slope(x.to(device))
        by_y, = torch.autograd.grad((y ** 2).sum(), grid.table)
        by_slope, = torch.autograd.grad((slope ** 2).sum(), grid.table)
        results.append([v.detach().cpu() for v in (y, features, slope, by_y, by_slope)])
    tolerances = (1e-8, 1e-8, 1e-6, 1e-7, 1e-4)
    names = "features", "features of with_slope", "slope", "gradient", "gradient by the slope"
    for name, on_cpu, on_gpu, tolerance in zip(names, *results, tolerances):
        agree(on_gpu, on_cpu, f"{name} on a GPU, and on a CPU", atol=tolerance, rtol=1e-3)
