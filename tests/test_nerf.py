"""The field against closed forms: ball, box, normals of a ball, spherical harmonics."""
from dataclasses import dataclass
import math

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from mvd import nerf as nerf_module
from mvd.hashgrid import HashGridConfig
from mvd.nerf import NeRF, NeRFConfig, spherical_harmonics


def small(**changes):
    grid = HashGridConfig(levels=4, log2_entries=10, coarsest=4, finest=40)
    return NeRF(NeRFConfig(grid=grid, hidden=16, **changes))


def silence(nerf):
    """The networks say 0 everywhere: only the ball is left."""
    for layers in (nerf.to_density, nerf.to_albedo, nerf.to_background):
        nn.init.zeros_(layers[-1].weight)
    return nerf


def test_starts_as_the_ball():
    nerf = silence(small(blob_strength=8.0, blob_radius=0.4))
    x = torch.rand(200, 3) * 2 - 1
    expected = []
    for point in x.tolist():
        blob = 8 * (1 - math.dist(point, (0, 0, 0)) / 0.4)
        expected.append(math.log1p(math.exp(blob)))
    expected = torch.tensor(expected)
    assert torch.allclose(nerf.density(x), expected, rtol=1e-4, atol=1e-6)
    density, albedo = nerf(x)
    assert torch.equal(density, nerf.density(x))
    assert torch.equal(albedo, torch.full((200, 3), 0.5))


def test_nothing_outside_the_box():
    inside = [[0.0, 0, 0], [-0.99, 0.99, 0.99], [1.0, -1.0, 1.0]]
    outside = [[1.001, 0, 0], [0, -1.5, 0], [0, 0, 3.0]]
    nerf = small()
    assert (nerf.density(torch.tensor(inside)) > 0).all()
    assert (nerf.density(torch.tensor(outside)) == 0).all()


def test_networks_by_hand():
    nerf = small()
    nn.init.uniform_(nerf.encoding.table, -1, 1)
    x = torch.rand(50, 3) * 2 - 1
    features = nerf.encoding((x + 1) / 2)

    def by_hand(network):
        inner = network[0].weight
        outer = network[2].weight
        return torch.relu(features @ inner.T) @ outer.T

    blob = 10 * (1 - x.norm(dim=-1) / 0.5)
    raw = by_hand(nerf.to_density)[:, 0] + blob
    density, albedo = nerf(x)
    expected = torch.log1p(torch.exp(raw))
    assert torch.allclose(density, expected, rtol=1e-4, atol=1e-6)
    expected = 1 / (1 + torch.exp(-by_hand(nerf.to_albedo)))
    assert torch.allclose(albedo, expected, atol=1e-6)


def test_the_networks_and_the_encoding_have_their_own_learning_rates():
    grid = HashGridConfig(levels=2, log2_entries=4, coarsest=2, finest=4, lr_grid=0.25)
    nerf = NeRF(NeRFConfig(grid=grid, lr=0.5))
    encoding, networks = nerf.parameter_groups()
    assert encoding["lr"] == 0.25 and networks["lr"] == 0.5
    assert len(encoding["params"]) == 1 and encoding["params"][0] is nerf.encoding.table
    every = encoding["params"] + networks["params"]
    assert [id(p) for p in every] == [id(p) for p in nerf.parameters()], "one is missing or moved"


# ---- another encoding ------------------------------------------------------------------------

@dataclass
class SinesConfig:
    count: int = 32
    lr_grid: float = 0.02


class Sines(nn.Module):
    """The least that an encoding can be: sines of fixed random frequencies, times a gain each."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.output_size = config.count
        self.register_buffer("frequency", 6 * torch.randn(3, config.count))
        self.gain = nn.Parameter(torch.ones(config.count))

    def forward(self, x):
        return self.gain * torch.sin(x @ self.frequency)

    def with_slope(self, x):
        slope = self.gain * torch.cos(x @ self.frequency)
        return self(x), slope[:, None] * self.frequency


def test_another_encoding_trains_and_has_normals(monkeypatch):
    monkeypatch.setitem(nerf_module.ENCODINGS, "sines", (Sines, SinesConfig))
    torch.manual_seed(0)
    config = NeRFConfig(encoding="sines", grid=SinesConfig(), hidden=16, blob_strength=0.0, lr=0.02)
    nerf = NeRF(config)
    encoding, networks = nerf.parameter_groups()
    assert encoding["lr"] == 0.02 and encoding["params"][0] is nerf.encoding.gain

    # Its normals are those of autograd.
    x = (torch.rand(100, 3) * 2 - 1).requires_grad_()
    slope, = torch.autograd.grad(nerf.density(x).sum(), x)
    _, _, normals = nerf.with_normals(x.detach())
    assert torch.allclose(normals, -F.normalize(slope, dim=-1, eps=1e-6), atol=1e-4)

    # It learns a field: red above, blue below, matter where x is positive.
    x = x.detach()
    red = torch.tensor([1.0, 0, 0])
    blue = torch.tensor([0.0, 0, 1])
    colour = torch.where(x[:, 2:] > 0, red, blue)
    target = 5.0 * (x[:, 0] > 0)
    optimizer = torch.optim.AdamW([encoding, networks])
    losses = []
    for _ in range(100):
        density, albedo, _ = nerf.with_normals(x)
        loss = F.mse_loss(albedo, colour) + 0.1 * F.mse_loss(density, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], "the field with another encoding does not learn"


def test_an_encoding_is_built_from_its_own_config():
    with pytest.raises(ValueError, match="HashGridConfig"):
        NeRF(NeRFConfig(grid=SinesConfig()))


# ---- normals ---------------------------------------------------------------------------------

def normals_of(nerf, x):
    return nerf.with_normals(x)[2]


def test_normals_of_a_ball_point_outward():
    nerf = silence(small())
    x = F.normalize(torch.randn(300, 3), dim=-1)
    x = x * torch.linspace(0.05, 0.6, 300)[:, None]
    with torch.no_grad():  # as for a picture
        normals = normals_of(nerf, x)
    assert not normals.requires_grad
    assert (normals - x / x.norm(dim=-1, keepdim=True)).abs().max() < 1e-4


def test_normals_are_finite_differences_of_the_density():
    nerf = small().double()
    nn.init.uniform_(nerf.encoding.table, -1, 1)
    x = torch.rand(200, 3, dtype=torch.float64) * 1.2 - 0.6
    slope = []
    for step in 1e-7 * torch.eye(3, dtype=torch.float64):
        slope.append((nerf.density(x + step) - nerf.density(x - step)) / 2e-7)
    slope = torch.stack(slope, -1)
    expected = -slope / slope.norm(dim=-1, keepdim=True)
    wrong = (normals_of(nerf, x) - expected).abs().amax(-1) > 1e-4
    assert wrong.sum() <= 2, "more points than may lie within a step of a kink"


def trainable():
    """In double precision, with features that bend the normals; and the density's parameters."""
    nerf = small().double()
    nn.init.uniform_(nerf.encoding.table, -1, 1)
    return nerf, [nerf.encoding.table, *nerf.to_density.parameters()]


def test_normals_are_autograd_of_the_density():
    """Outside the box as well; and so are the gradients through them, by autograd twice."""
    nerf, parameters = trainable()
    x = torch.rand(300, 3, dtype=torch.float64) * 2.6 - 1.3
    x[0] = 0
    outside = (x.abs() > 1).any(-1)
    assert 50 < outside.sum() < 250
    y = x.clone().requires_grad_()
    density, albedo = nerf(y)
    slope, = torch.autograd.grad(density.sum(), y, create_graph=True)
    expected = density, albedo, F.normalize(-slope, dim=-1, eps=1e-6)
    found = nerf.with_normals(x)
    names = ("density", "albedo", "normals")
    for name, a, b in zip(names, found, expected):
        assert torch.allclose(a, b, atol=1e-12), name
    normals = found[2]
    assert (normals[outside] == 0).all(), "there are normals outside the box"
    assert (normals[~outside].norm(dim=-1) > 0).all()

    ups = [torch.randn_like(values) for values in found]
    parameters += nerf.to_albedo.parameters()
    ours = torch.autograd.grad(found, parameters, ups)
    twice = torch.autograd.grad(expected, parameters, ups)
    for a, b in zip(ours, twice):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def test_normals_train_the_field():
    """The gradient by the table and each layer, of a loss on the normals, against a finite
    difference along a random direction."""
    nerf, parameters = trainable()
    x = torch.rand(30, 3, dtype=torch.float64) * 0.8 - 0.4
    target = torch.randn(30, 3, dtype=torch.float64)

    def loss():
        return (normals_of(nerf, x) * target).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients):
        move = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * move
            up = loss()
            parameter -= 2e-6 * move
            down = loss()
            parameter += 1e-6 * move
        difference = float((up - down) / 2e-6)
        expected = float((gradient * move).sum())
        assert difference == pytest.approx(expected, rel=1e-4), tuple(parameter.shape)


# ---- background ------------------------------------------------------------------------------

def quadrature_on_the_sphere():
    """Directions [8, 16, 3] and weights [8] that integrate products of degree 6 exactly.

    Gauss-Legendre in z, its nodes from the Jacobi matrix, times an even ring in azimuth.
    """
    k = torch.arange(1, 8, dtype=torch.float64)
    off = k / torch.sqrt(4 * k * k - 1)
    z, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weight = 2 * vectors[0] ** 2 * (2 * math.pi / 16)
    azimuth = torch.arange(16, dtype=torch.float64) / 16 * 2 * math.pi
    ring = torch.sqrt(1 - z * z)[:, None]
    z = z[:, None].expand(-1, 16)
    directions = torch.stack([ring * azimuth.cos(), ring * azimuth.sin(), z], -1)
    return directions, weight


def test_spherical_harmonics_are_orthonormal_and_in_order():
    d, weight = quadrature_on_the_sphere()
    y = spherical_harmonics(d)
    gram = torch.einsum("zpi,zpj,z->ij", y, y, weight)
    assert (gram - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12, "not orthonormal"

    # A rotation about z by 90 degrees mixes the orders m and -m by cos(m 90) and sin(m 90): it
    # fixes the order of the list.
    turned = spherical_harmonics(torch.stack([-d[..., 1], d[..., 0], d[..., 2]], -1))
    orders = [m for degree in range(4) for m in range(-degree, degree + 1)]
    for i, m in enumerate(orders):
        partner = i - 2 * m  # the one with order -m
        cosine = round(math.cos(abs(m) * math.pi / 2))
        sine = round(math.sin(abs(m) * math.pi / 2))
        if m > 0:
            sine = -sine
        expected = cosine * y[..., i] + sine * y[..., partner]
        assert torch.allclose(turned[..., i], expected, atol=1e-12), (i, m)


def test_background():
    d = F.normalize(torch.randn(4, 5, 3), dim=-1)
    grey = torch.full((4, 5, 3), 0.5)
    assert torch.equal(silence(small()).background(d), grey)
    nerf = small()
    h = spherical_harmonics(d)
    for layer in nerf.to_background:
        if isinstance(layer, nn.ReLU):
            h = h.clamp(min=0)
        else:
            h = h @ layer.weight.T
    assert torch.allclose(nerf.background(d), 1 / (1 + torch.exp(-h)), atol=1e-6)


def test_the_published_field_has_the_published_size():
    with torch.device("meta"):
        nerf = NeRF(NeRFConfig())
    assert 12e6 < sum(p.numel() for p in nerf.encoding.parameters()) < 13e6
