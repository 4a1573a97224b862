"""The hash grid against trilinear interpolation written as plain loops in double precision, and its derivatives
against finite differences."""
import copy
import math

import pytest
import torch

from mvd import hashgrid
from mvd.hashgrid import HashGrid, HashGridConfig, Lookup

CONFIG = HashGridConfig(levels=5, log2_entries=9, coarsest=4, finest=50)    # 2 dense levels, 3 hashed ones


def grid_in_double(config=CONFIG, spread=1.0):
    grid = HashGrid(config)
    torch.nn.init.uniform_(grid.table, -spread, spread)
    return grid.double()


def interpolate(table, x, config):
    """One point [3], level by level, corner by corner; the entries in the order: hashed levels, then dense ones.
    Everything is built of scalars that autograd can follow."""
    growth = (config.finest / config.coarsest) ** (1 / (config.levels - 1))
    cells = [config.coarsest * growth ** level - 1 for level in range(config.levels)]
    vertices = [math.ceil(c) + 2 for c in cells]
    entries = 2 ** config.log2_entries
    is_dense = [v ** 3 <= entries for v in vertices]
    hashed_seen, dense_start = 0, entries * is_dense.count(False)
    features = []
    for c, v, dense in zip(cells, vertices, is_dense):
        position = [p * c + 0.5 for p in x]
        cell = [math.floor(p.item()) for p in position]
        feature = [0.0, 0.0]
        for corner in range(8):
            at, weight = [], 1.0
            for axis in range(3):
                upper = corner >> axis & 1
                part = position[axis] - cell[axis]
                weight *= part if upper else 1 - part
                at.append(cell[axis] + upper)
            if dense:
                assert all(0 <= a < v for a in at)
                entry = dense_start + at[0] + v * at[1] + v * v * at[2]
            else:
                entry = hashed_seen * entries + ((at[0] * 1) ^ (at[1] * 2654435761) ^ (at[2] * 805459861)) % entries
            for f in range(2):
                feature[f] = feature[f] + weight * table[entry, f]
        features += feature
        dense_start += v ** 3 * dense
        hashed_seen += not dense
    return torch.stack(features)


def points(count, seed=0):
    return torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_interpolation_is_the_plain_loop():
    grid = grid_in_double()
    assert 0 < int(grid.dense.sum()) < CONFIG.levels                         # both kinds of level are in play
    x = torch.cat([points(40), torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5]], dtype=torch.float64)])
    expected = torch.stack([interpolate(grid.table.detach(), p, CONFIG) for p in x])
    assert (grid(x) - expected).abs().max() < 1e-5                           # `cells` was rounded to single precision
    single = grid.float()(x.float())
    assert (single - expected).abs().max() < 1e-4


def test_full_size_fits_into_32_bits():
    """At the finest level coordinates times primes leave 32 bits far behind; the hash must wrap, not break."""
    config = HashGridConfig(levels=2, log2_entries=9, coarsest=4000, finest=4096)
    grid = grid_in_double(config)
    x = points(20)
    cells = [4000 - 1.0, 4096 - 1.0]
    assert grid.cells.flatten().tolist() == pytest.approx(cells)
    expected = torch.stack([interpolate(grid.table.detach(), p, config) for p in x])
    assert (grid(x) - expected).abs().max() < 1e-5


def test_published_size():
    grid = HashGrid(HashGridConfig())
    assert grid.output_size == 32 and grid.dense.sum() == 5               # 16 .. 70.6 are dense, 102 and finer hashed
    assert grid.table.abs().max() <= 1e-4
    assert float(grid.table.detach().std()) == pytest.approx(1e-4 / math.sqrt(3), rel=0.01)


def inside_cells(grid, count):
    """Points at least 1e-3 of a cell away from every cell's border, where interpolation has a kink."""
    x = points(4000, seed=1)
    part = (x.T[:, None] * grid.cells + 0.5) % 1
    return x[((part > 1e-3) & (part < 1 - 1e-3)).all(1).all(0)][:count].clone()


def test_derivatives_are_finite_differences():
    grid = grid_in_double()
    x = inside_cells(grid, 6).requires_grad_()
    assert len(x) == 6
    table = grid.table.detach().clone().requires_grad_()
    call = lambda x, table: torch.func.functional_call(grid, {"table": table}, x)
    assert torch.autograd.gradcheck(call, (x, table), eps=1e-7, atol=1e-4, nondet_tol=0, fast_mode=True)


def test_slope_is_that_of_the_plain_loop_and_finite_differences():
    grid = grid_in_double()
    x = inside_cells(grid, 12)
    features, slope = grid.with_slope(x)
    assert torch.equal(features, grid(x)) and slope.shape == (12, 3, 10)
    h = 1e-7 * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(slope, torch.stack([(grid(x + e) - grid(x - e)) / 2e-7 for e in h], 1), atol=1e-5)
    # The same of the plain loop, and the derivatives by the table of a sum over features and slope.
    table, up, up_slope = grid.table, torch.randn_like(features), torch.randn_like(slope)
    jacobian = torch.autograd.functional.jacobian
    expected = torch.stack([jacobian(lambda p: interpolate(table, p, CONFIG), p, create_graph=True).T for p in x])
    assert (slope - expected).abs().max() < 1e-3                              # `cells` was rounded to single precision
    ours = (features * up).sum() + (slope * up_slope).sum()
    plain = (torch.stack([interpolate(table, p, CONFIG) for p in x]) * up).sum() + (expected * up_slope).sum()
    ours, plain = (torch.autograd.grad(total, table)[0] for total in (ours, plain))
    assert plain.abs().max() > 10 and (ours - plain).abs().max() < 1e-3


def test_pairs_need_not_be_complex(monkeypatch):
    """What a GPU or a compiler gets, on a CPU."""
    grid, x, results = grid_in_double(), points(50), []
    for is_complex in (True, False):
        monkeypatch.setattr(hashgrid, "pairs_are_complex", lambda x: is_complex)
        features, slope = grid.with_slope(x)
        loss = (grid(x) ** 2).sum() + (features ** 3).sum() + (slope ** 2).sum()
        results.append((features, slope, *torch.autograd.grad(loss, grid.table)))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*results))


def test_lookup_and_its_derivative_against_a_loop():
    table, index = torch.randn(7, 2, requires_grad=True), torch.tensor([[3, 3, 0], [6, 3, 1]], dtype=torch.int32)
    assert torch.equal(Lookup.apply(table, index), table[index.long()])
    values = torch.randn(2, 3, 2)
    expected = torch.zeros(7, 2)
    for i in range(2):
        for j in range(3):
            expected[index[i, j]] += values[i, j]
    assert torch.allclose(torch.autograd.grad(Lookup.apply(table, index), table, values)[0], expected, atol=1e-6)


def test_gradients_repeat_bit_for_bit():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grid, x = HashGrid(CONFIG), torch.rand(20000, 3)
        seen = []
        for _ in range(4):
            grid.table.grad = None
            (grid(x) ** 2 * 1e6).sum().backward()
            seen.append(grid.table.grad.clone())
        assert all(torch.equal(seen[0], s) for s in seen)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    original, x = HashGrid(CONFIG), torch.rand(5000, 3)
    results = []
    for device in ("cpu", "cuda"):
        grid = copy.deepcopy(original).to(device)
        y, (features, slope) = grid(x.to(device)), grid.with_slope(x.to(device))
        gradients = [torch.autograd.grad((v ** 2).sum(), grid.table)[0] for v in (y, slope)]
        results.append([v.detach().cpu() for v in (y, features, slope, *gradients)])
    for on_cpu, on_gpu, tolerance in zip(*results, (1e-8, 1e-8, 1e-6, 1e-7, 1e-4)):
        assert torch.allclose(on_cpu, on_gpu, atol=tolerance, rtol=1e-3)
