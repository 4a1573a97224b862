"""The field against closed forms: ball, box, normals of a ball, spherical harmonics."""
from dataclasses import dataclass
import math

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from agree import agree
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
    hint = "It is softplus(strength · (1 - |x| / radius))."
    agree(nerf.density(x), expected, "the density of the ball alone", hint, rtol=1e-4, atol=1e-6)
    density, albedo = nerf(x)
    agree(density, nerf.density(x), "the density of forward, and of `density`", atol=0)
    agree(albedo, 0.5, "the albedo of networks that say 0", "Is it a sigmoid?", atol=0)


def test_nothing_outside_the_box():
    inside = [[0.0, 0, 0], [-0.99, 0.99, 0.99], [1.0, -1.0, 1.0]]
    outside = [[1.001, 0, 0], [0, -1.5, 0], [0, 0, 3.0]]
    nerf = small()
    assert (nerf.density(torch.tensor(inside)) > 0).all(), "there is nothing inside the box"
    agree(nerf.density(torch.tensor(outside)), 0, "the density outside the box", atol=0)


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
    agree(density, expected, "softplus(network + ball)", rtol=1e-4, atol=1e-6)
    expected = 1 / (1 + torch.exp(-by_hand(nerf.to_albedo)))
    agree(albedo, expected, "the albedo, a sigmoid of its network", atol=1e-6)


def test_the_networks_and_the_encoding_have_their_own_learning_rates():
    grid = HashGridConfig(levels=2, log2_entries=4, coarsest=2, finest=4, lr_grid=0.25)
    nerf = NeRF(NeRFConfig(grid=grid, lr=0.5))
    encoding, networks = nerf.parameter_groups()
    agree((encoding["lr"], networks["lr"]), (0.25, 0.5), "the rates of grid and networks", atol=0)
    (table,) = encoding["params"]
    assert table is nerf.encoding.table, "the first group is not the table"
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
    assert encoding["lr"] == 0.02, "the encoding's own rate is not used"
    assert encoding["params"][0] is nerf.encoding.gain, "the encoding's parameters do not learn"

    # Its normals are those of autograd.
    x = (torch.rand(100, 3) * 2 - 1).requires_grad_()
    slope, = torch.autograd.grad(nerf.density(x).sum(), x)
    _, _, normals = nerf.with_normals(x.detach())
    expected = -F.normalize(slope, dim=-1, eps=1e-6)
    agree(normals, expected, "normals through another encoding, and autograd's", atol=1e-4)

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


@pytest.mark.exercise(11)
def test_normals_of_a_ball_point_outward():
    nerf = silence(small())
    x = F.normalize(torch.randn(300, 3), dim=-1)
    x = x * torch.linspace(0.05, 0.6, 300)[:, None]
    with torch.no_grad():  # as for a picture
        normals = normals_of(nerf, x)
    assert not normals.requires_grad, "normals for a picture hold a graph"
    outward = x / x.norm(dim=-1, keepdim=True)
    hint = "A normal is -grad density: the density falls outward."
    agree(normals, outward, "the normals of a ball, which point outward", hint, atol=1e-4)


@pytest.mark.exercise(11)
def test_normals_are_finite_differences_of_the_density():
    nerf = small().double()
    nn.init.uniform_(nerf.encoding.table, -1, 1)
    x = torch.rand(200, 3, dtype=torch.float64) * 1.2 - 0.6
    slope = []
    for step in 1e-7 * torch.eye(3, dtype=torch.float64):
        slope.append((nerf.density(x + step) - nerf.density(x - step)) / 2e-7)
    slope = torch.stack(slope, -1)
    expected = -slope / slope.norm(dim=-1, keepdim=True)
    normals = normals_of(nerf, x)
    # Two points may lie within a step of a kink.
    off = (normals - expected).abs().amax(-1)
    smooth = off <= off.sort().values[-3]
    hint = "Is u = (x + 1) / 2 in the chain rule: d/dx = ½ d/du? Is the ball's slope in it?"
    agree(normals[smooth], expected[smooth], "normals, and finite differences", hint, atol=1e-4)


def trainable():
    """In double precision, with features that bend the normals; and the density's parameters."""
    nerf = small().double()
    nn.init.uniform_(nerf.encoding.table, -1, 1)
    return nerf, [nerf.encoding.table, *nerf.to_density.parameters()]


@pytest.mark.exercise(11)
def test_normals_are_autograd_of_the_density():
    """Outside the box as well; and so are the gradients through them, by autograd twice."""
    nerf, parameters = trainable()
    x = torch.rand(300, 3, dtype=torch.float64) * 2.6 - 1.3
    x[0] = 0
    outside = (x.abs() > 1).any(-1)
    assert 50 < outside.sum() < 250, "the case has too few points on one side of the wall"
    y = x.clone().requires_grad_()
    density, albedo = nerf(y)
    slope, = torch.autograd.grad(density.sum(), y, create_graph=True)
    expected = density, albedo, F.normalize(-slope, dim=-1, eps=1e-6)
    found = nerf.with_normals(x)
    names = ("density", "albedo", "normals")
    for name, a, b in zip(names, found, expected):
        agree(a, b, f"the {name} of with_normals, and autograd's", atol=1e-8)
    normals = found[2]
    hint = "There the density is 0, so softplus' = 1 - exp(-density) is 0."
    agree(normals[outside], 0, "the normals outside the box", hint, atol=0)
    assert (normals[~outside].norm(dim=-1) > 0).all(), "a point in the box has no normal"

    ups = [torch.randn_like(values) for values in found]
    parameters += nerf.to_albedo.parameters()
    ours = torch.autograd.grad(found, parameters, ups)
    twice = torch.autograd.grad(expected, parameters, ups)
    for a, b in zip(ours, twice):
        words = f"the gradient of a parameter {list(a.shape)}, and autograd twice"
        hint = "Was something detached, or computed from .data, on its way to the normals?"
        agree(a, b, words, hint, rtol=1e-8, atol=1e-8)


@pytest.mark.exercise(11)
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
        words = f"the gradient along a direction of a parameter {list(parameter.shape)}"
        agree(expected, difference, f"{words}, and a finite difference", rtol=1e-4, atol=1e-9)


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
    agree(gram, torch.eye(16), "the integral of Y_i Y_j over the sphere", "Is a factor wrong?",
          atol=1e-12)

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
        words = f"harmonic {i}, of order {m}, turned by 90 degrees about z"
        agree(turned[..., i], expected, words, "The order goes from -l to l.", atol=1e-12)


def test_spherical_harmonics_begin_with_plus():
    """30 degrees from the pole, where every P_l^|m| is positive, at the first crest of cos(m φ), or
    of sin(|m| φ) for m < 0."""
    for i, m in enumerate(m for degree in range(4) for m in range(-degree, degree + 1)):
        azimuth = 0.0 if m >= 0 else math.pi / 2 / -m
        polar = math.pi / 6
        d = torch.tensor([
            math.sin(polar) * math.cos(azimuth), math.sin(polar) * math.sin(azimuth),
            math.cos(polar)])
        value = spherical_harmonics(d)[i]
        assert value > 0, f"harmonic {i}, of order {m}, is {value:.3f} on its crest: wrong sign"


def test_background():
    d = F.normalize(torch.randn(4, 5, 3), dim=-1)
    agree(silence(small()).background(d), 0.5, "the background of networks that say 0", atol=0)
    nerf = small()
    h = spherical_harmonics(d)
    for layer in nerf.to_background:
        if isinstance(layer, nn.ReLU):
            h = h.clamp(min=0)
        else:
            h = h @ layer.weight.T
    expected = 1 / (1 + torch.exp(-h))
    agree(nerf.background(d), expected, "the background, a sigmoid of its network", atol=1e-6)


def test_the_published_field_has_the_published_size():
    with torch.device("meta"):
        nerf = NeRF(NeRFConfig())
    count = sum(p.numel() for p in nerf.encoding.parameters())
    agree(count, 12.5e6, "the size of the table, 12 to 13 million", atol=0.5e6)
