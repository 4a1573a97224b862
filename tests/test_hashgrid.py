"""The hash grid against its plain loop in double precision, and against finite differences."""
import copy
import math

import pytest
import torch

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
        assert level.width == pytest.approx(c)
        assert level.vertices == v
        assert level.dense == dense
        if dense:
            assert level.start == dense_start and level.size == v ** 3
            dense_start += v ** 3
        else:
            assert level.start == hashed_start and level.size == entries
            hashed_start += entries


def test_a_dense_level_by_hand():
    """One level, 4 - 1 cells: x = 0.5, 0.4, 0.1 lies at 2.0, 1.7, 0.8 of its vertices."""
    config = HashGridConfig(levels=1, log2_entries=9, coarsest=4, finest=4)
    table = torch.rand(5 ** 3, 2, dtype=torch.float64)
    x = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64)
    entry = table.view(5, 5, 5, 2)  # by z, y, x
    line = entry[:, :, 2]
    low, high = (0.3 * line[z, 1] + 0.7 * line[z, 2] for z in (0, 1))
    expected = 0.2 * low + 0.8 * high
    assert torch.allclose(encode_plainly(table, x, config)[0], expected, atol=1e-12)


def test_a_hashed_vertex_by_hand():
    """On a vertex the features are its entry: at the xor of coordinate times prime, modulo 2^k."""
    config = HashGridConfig(levels=1, log2_entries=9, coarsest=40, finest=40)
    table = torch.rand(512, 2, dtype=torch.float64)
    vertex = (7, 31, 22)
    x = torch.tensor([[(v - 0.5) / 39 for v in vertex]], dtype=torch.float64)
    entry = (7 ^ (31 * 2654435761) ^ (22 * 805459861)) % 512
    found = encode_plainly(table, x, config)[0]
    assert torch.allclose(found, table[entry], atol=1e-9)


def test_no_corner_lies_outside_a_dense_level():
    walls = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5]], dtype=torch.float64)
    for level in levels_of(CONFIG):
        cell = (walls * level.width + 0.5).floor()
        assert cell.min() >= 0 and cell.max() + 1 < level.vertices


# ---- the fast form ---------------------------------------------------------------------------

def test_interpolation_is_the_plain_loop():
    grid = grid_in_double()
    assert 0 < int(grid.dense.sum()) < CONFIG.levels, "both kinds of level are to be in play"
    walls = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5]], dtype=torch.float64)
    x = torch.cat([points(40), walls])
    expected = encode_plainly(grid.table.detach(), x, CONFIG)
    # The grid's `cells` were rounded to single precision.
    assert (grid(x) - expected).abs().max() < 1e-5
    single = grid.float()(x.float())
    assert (single - expected).abs().max() < 1e-4


def test_full_size_fits_into_32_bits():
    """At the finest level coordinates times primes leave 32 bits: it must wrap, not break."""
    config = HashGridConfig(levels=2, log2_entries=9, coarsest=4000, finest=4096)
    grid = grid_in_double(config)
    x = points(20)
    assert grid.cells.flatten().tolist() == pytest.approx([4000 - 1.0, 4096 - 1.0])
    expected = encode_plainly(grid.table.detach(), x, config)
    assert (grid(x) - expected).abs().max() < 1e-5


def test_published_size():
    grid = HashGrid(HashGridConfig())
    assert grid.output_size == 32
    assert grid.dense.sum() == 5, "16 .. 70.6 are dense, 102 and finer hashed"
    assert grid.table.abs().max() <= 1e-4
    assert float(grid.table.detach().std()) == pytest.approx(1e-4 / math.sqrt(3), rel=0.01)


def inside_cells(grid, count):
    """Points at least 1e-3 of a cell away from every cell's border, where there is a kink."""
    x = points(4000, seed=1)
    fraction = (x.T[:, None] * grid.cells + 0.5) % 1
    inside = (fraction > 1e-3) & (fraction < 1 - 1e-3)
    return x[inside.all(1).all(0)][:count].clone()


def test_derivatives_are_finite_differences():
    grid = grid_in_double()
    x = inside_cells(grid, 6).requires_grad_()
    assert len(x) == 6
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
    assert torch.equal(features, grid(x))
    assert slope.shape == (12, 3, 10)
    differences = []
    for step in 1e-7 * torch.eye(3, dtype=torch.float64):
        differences.append((grid(x + step) - grid(x - step)) / 2e-7)
    assert torch.allclose(slope, torch.stack(differences, 1), atol=1e-5)

    expected = plain_slope(grid.table, x)
    # The grid's `cells` were rounded to single precision.
    assert (slope - expected).abs().max() < 1e-3

    # The derivatives by the table of a sum over features and slope.
    table = grid.table
    up = torch.randn_like(features)
    up_slope = torch.randn_like(slope)
    plain_features = encode_plainly(table, x, CONFIG)
    ours = (features * up).sum() + (slope * up_slope).sum()
    plain = (plain_features * up).sum() + (expected * up_slope).sum()
    ours, = torch.autograd.grad(ours, table)
    plain, = torch.autograd.grad(plain, table)
    assert plain.abs().max() > 10
    assert (ours - plain).abs().max() < 1e-3


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
        assert torch.allclose(a, b, atol=1e-9), name


def test_lookup_and_its_derivative_against_a_loop():
    table = torch.randn(7, 2, requires_grad=True)
    index = torch.tensor([[3, 3, 0], [6, 3, 1]], dtype=torch.int32)
    found = Lookup.apply(table, index)
    assert torch.equal(found, table[index.long()])
    values = torch.randn(2, 3, 2)
    expected = torch.zeros(7, 2)
    for i in range(2):
        for j in range(3):
            expected[index[i, j]] += values[i, j]
    gradient, = torch.autograd.grad(found, table, values)
    assert torch.allclose(gradient, expected, atol=1e-6)


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
        assert all(torch.equal(seen[0], other) for other in seen)
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
    for on_cpu, on_gpu, tolerance in zip(*results, tolerances):
        assert torch.allclose(on_cpu, on_gpu, atol=tolerance, rtol=1e-3)
