"""The field against closed forms: blob, box, normals of a ball, spherical harmonics."""
import math

import pytest
import torch

from mvd.nerf import NeRF, NeRFConfig, spherical_harmonics


def small(**changes):
    return NeRF(NeRFConfig(**{**dict(levels=4, log2_entries=10, coarsest=4, finest=40, hidden=16), **changes}))


def silence(nerf):
    """The networks say 0 everywhere: only the blob is left."""
    for layers in (nerf.to_density, nerf.to_albedo, nerf.to_background):
        torch.nn.init.zeros_(layers[-1].weight)
    return nerf


def test_starts_as_the_blob():
    nerf = silence(small(blob_strength=8.0, blob_radius=0.4))
    x = torch.rand(200, 3) * 2 - 1
    expected = [math.log1p(math.exp(8 * (1 - math.dist(p, (0, 0, 0)) / 0.4))) for p in x.tolist()]
    assert torch.allclose(nerf.density(x), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    density, albedo = nerf(x)
    assert torch.equal(density, nerf.density(x)) and torch.equal(albedo, torch.full((200, 3), 0.5))


def test_nothing_outside_the_box():
    nerf = small()
    x = torch.tensor([[0.0, 0, 0], [1.001, 0, 0], [0, -1.5, 0], [0, 0, 3.0], [-0.99, 0.99, 0.99]])
    assert (nerf.density(x) > 0).tolist() == [True, False, False, False, True]


def test_networks_by_hand():
    nerf = small()
    torch.nn.init.uniform_(nerf.grid.table, -1, 1)
    x = torch.rand(50, 3) * 2 - 1
    features = nerf.grid((x + 1) / 2)
    inner, outer = nerf.to_density[0].weight, nerf.to_density[2].weight
    raw = (torch.relu(features @ inner.T) @ outer.T)[:, 0] + 10 * (1 - x.norm(dim=-1) / 0.5)
    inner, outer = nerf.to_albedo[0].weight, nerf.to_albedo[2].weight
    density, albedo = nerf(x)
    assert torch.allclose(density, torch.log1p(torch.exp(raw)), rtol=1e-4, atol=1e-6)
    assert torch.allclose(albedo, 1 / (1 + torch.exp(-torch.relu(features @ inner.T) @ outer.T)), atol=1e-6)


def test_normals_of_a_ball_point_outward():
    nerf = silence(small())
    x = torch.randn(300, 3)
    x = x / x.norm(dim=-1, keepdim=True) * torch.linspace(0.05, 0.6, 300)[:, None]
    with torch.no_grad():                                                   # as for a picture
        normal = nerf.normal(x)
    assert not normal.requires_grad
    assert (normal - x / x.norm(dim=-1, keepdim=True)).abs().max() < 1e-4


def test_normals_are_finite_differences_of_the_density():
    nerf = small().double()
    torch.nn.init.uniform_(nerf.grid.table, -1, 1)
    x = torch.rand(200, 3, dtype=torch.float64) * 1.2 - 0.6
    h = 1e-7
    axes = torch.eye(3, dtype=torch.float64)
    slope = torch.stack([(nerf.density(x + h * e) - nerf.density(x - h * e)) / (2 * h) for e in axes], -1)
    expected = -slope / slope.norm(dim=-1, keepdim=True)
    wrong = (nerf.normal(x) - expected).abs().amax(-1) > 1e-4
    assert wrong.sum() <= 2                                                 # a point may sit within h of a kink


def trainable():
    """In double precision, with features large enough to bend the normals; and the parameters of the density."""
    nerf = small().double()
    torch.nn.init.uniform_(nerf.grid.table, -1, 1)
    return nerf, [nerf.grid.table, *nerf.to_density.parameters()]


def test_normals_are_autograd_of_the_density():
    """Everywhere, outside of the box as well, and so are the gradients through them: there, autograd twice."""
    nerf, parameters = trainable()
    x = torch.rand(300, 3, dtype=torch.float64) * 2.6 - 1.3
    x[0] = 0
    outside = (x.abs() > 1).any(-1)
    assert 50 < outside.sum() < 250
    y = x.clone().requires_grad_()
    expected = nerf(y)
    slope, = torch.autograd.grad(expected[0].sum(), y, create_graph=True)
    expected = *expected, torch.nn.functional.normalize(-slope, dim=-1, eps=1e-6)
    found = nerf.with_normals(x)
    ups = [torch.randn_like(v) for v in found]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected))
    assert (found[2][outside] == 0).all() and (found[2][~outside].norm(dim=-1) > 0).all()
    parameters += nerf.to_albedo.parameters()
    gradients = [torch.autograd.grad(values, parameters, ups) for values in (found, expected)]
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-8) for a, b in zip(*gradients))


def test_normals_train_the_field():
    """The gradient by the table and by each layer, of a loss on the normals, against a finite difference along a
    random direction."""
    nerf, parameters = trainable()
    x = torch.rand(30, 3, dtype=torch.float64) * 0.8 - 0.4
    target = torch.randn(30, 3, dtype=torch.float64)
    loss = lambda: (nerf.normal(x) * target).sum()
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters)):
        move = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * move
            up = loss()
            parameter -= 2e-6 * move
            down = loss()
            parameter += 1e-6 * move
        assert float((up - down) / 2e-6) == pytest.approx(float((gradient * move).sum()), rel=1e-4)


def test_spherical_harmonics_are_orthonormal_and_in_order():
    # Gauss-Legendre in z times an even ring in azimuth integrates products of degree 6 exactly; nodes from the Jacobi
    # matrix.
    k = torch.arange(1, 8, dtype=torch.float64)
    off = k / torch.sqrt(4 * k * k - 1)
    z, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weight = 2 * vectors[0] ** 2
    phi = torch.arange(16, dtype=torch.float64) / 16 * 2 * math.pi
    ring = torch.sqrt(1 - z * z)[:, None]
    d = torch.stack([ring * phi.cos(), ring * phi.sin(), z[:, None].expand(-1, 16)], -1)        # [8, 16, 3]
    y = spherical_harmonics(d)
    gram = torch.einsum("zpi,zpj,z->ij", y, y, weight) * 2 * math.pi / 16
    assert (gram - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12
    # A rotation about z by 90 degrees multiplies what has order m by cos(m 90) and sin(m 90): it fixes the order of
    # the list.
    turned = spherical_harmonics(torch.stack([-d[..., 1], d[..., 0], d[..., 2]], -1))
    orders = [m for degree in range(4) for m in range(-degree, degree + 1)]
    for i, m in enumerate(orders):
        partner = i - 2 * m                                                  # the one with order -m
        c, s = round(math.cos(abs(m) * math.pi / 2)), round(math.sin(abs(m) * math.pi / 2))
        expected = c * y[..., i] + (s if m < 0 else -s) * y[..., partner]
        assert torch.allclose(turned[..., i], expected, atol=1e-12), (i, m)


def test_background():
    nerf = small()
    d = torch.nn.functional.normalize(torch.randn(4, 5, 3), dim=-1)
    assert torch.equal(silence(small()).background(d), torch.full((4, 5, 3), 0.5))
    h = spherical_harmonics(d)
    for layer in nerf.to_background:
        h = h.clamp(min=0) if isinstance(layer, torch.nn.ReLU) else h @ layer.weight.T
    assert torch.allclose(nerf.background(d), 1 / (1 + torch.exp(-h)), atol=1e-6)


def test_the_published_field_has_the_published_size():
    with torch.device("meta"):
        nerf = NeRF(NeRFConfig())
    assert 12e6 < sum(p.numel() for p in nerf.grid.parameters()) < 13e6
