"""The NeRF: density and colour of every point of the box [-1, 1]^3, its normals, and a background that surrounds it.

A hash grid (hashgrid.py) gives a point's features; one small network turns them into a density, another into an
albedo. There is no view direction: the surface is matte, and shading, where wanted, is computed from the normals
(render.py). The density starts as a soft ball round the origin, so that the first pictures already hold something in
the middle (DreamFusion §3.2, Magic3D; MVDream's appendix).
"""
from dataclasses import dataclass
import math

import torch
from torch import nn
import torch.nn.functional as F

from .hashgrid import HashGrid, HashGridConfig


@dataclass
class NeRFConfig(HashGridConfig):
    """The defaults are the full size, as published."""
    hidden: int = 64                # width of the hidden layer of the density and of the colour network
    blob_strength: float = 10.0     # what the centre adds to the raw density
    blob_radius: float = 0.5        # where the blob adds nothing; further out it takes away
    background_hidden: int = 16


def spherical_harmonics(d):
    """The 16 real spherical harmonics of degree 0 to 3 of unit vectors d [..., 3]: [..., 16], orthonormal.

    Order: degree by degree, m from -l to l.
    """
    x, y, z = d.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    pi = math.pi
    return torch.stack([
        torch.full_like(x, math.sqrt(1 / (4 * pi))),
        *(math.sqrt(3 / (4 * pi)) * v for v in (y, z, x)),
        math.sqrt(15 / (4 * pi)) * x * y,
        math.sqrt(15 / (4 * pi)) * y * z,
        math.sqrt(5 / (16 * pi)) * (3 * zz - 1),
        math.sqrt(15 / (4 * pi)) * x * z,
        math.sqrt(15 / (16 * pi)) * (xx - yy),
        math.sqrt(35 / (32 * pi)) * y * (3 * xx - yy),
        math.sqrt(105 / (4 * pi)) * x * y * z,
        math.sqrt(21 / (32 * pi)) * y * (5 * zz - 1),
        math.sqrt(7 / (16 * pi)) * z * (5 * zz - 3),
        math.sqrt(21 / (32 * pi)) * x * (5 * zz - 1),
        math.sqrt(105 / (16 * pi)) * z * (xx - yy),
        math.sqrt(35 / (32 * pi)) * x * (xx - 3 * yy),
    ], -1)


def network(*widths):
    """Linear layers without biases, ReLU between them."""
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Linear(i, o, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def in_grid(x):
    """World units to the hash grid's, [-1, 1] -> [0, 1]; what lies outside the box goes to its wall."""
    return (x.clamp(-1, 1) + 1) / 2


def length(x):
    """|x| [N, 1] of x [N, 3]; the square root has no derivative at 0."""
    return torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12)


class NeRF(nn.Module):
    """The field. Points x [N, 3] in world units; outside the box the density is 0."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grid = HashGrid(config)
        self.to_density = network(self.grid.output_size, config.hidden, 1)
        self.to_albedo = network(self.grid.output_size, config.hidden, 3)
        self.to_background = network(16, config.background_hidden, config.background_hidden, 3)

    def density_of(self, raw, x):
        """softplus(raw + blob), blob = strength * (1 - |x| / radius); raw [N, 1]: [N], per unit of length."""
        blob = self.config.blob_strength * (1 - length(x) / self.config.blob_radius)
        inside = (x.detach().abs() <= 1).all(-1, keepdim=True)
        return (F.softplus(raw + blob) * inside)[:, 0]

    def density(self, x):
        """x [N, 3] -> density [N] >= 0."""
        return self.density_of(self.to_density(self.grid(in_grid(x))), x)

    def forward(self, x):
        """x [N, 3] -> density [N], albedo [N, 3] in [0, 1]."""
        features = self.grid(in_grid(x))
        return self.density_of(self.to_density(features), x), self.to_albedo(features).sigmoid()

    def with_normals(self, x):
        """x [N, 3] -> density [N], albedo [N, 3], normal [N, 3] = -grad density, of unit length.

        The gradient is the chain rule written out, so training through the normals takes first derivatives only.
        Where the density is flat the normal is near 0; outside the box it is 0.
        """
        features, slope = self.grid.with_slope(in_grid(x))
        first, relu, last = self.to_density
        hidden = first(features)
        density = self.density_of(last(relu(hidden)), x)
        by_features = ((hidden > 0) * last.weight) @ first.weight                   # [N, F], of the raw density
        by_x = (slope * by_features[:, None]).sum(-1) / 2                           # [N, 3]; in_grid halves x
        by_x = by_x - self.config.blob_strength / self.config.blob_radius * x / length(x)
        # softplus' = 1 - exp(-softplus), which makes it 0 outside the box, where the density is 0.
        normal = F.normalize(torch.expm1(-density)[:, None] * by_x, dim=-1, eps=1e-6)
        return density, self.to_albedo(features).sigmoid(), normal

    def normal(self, x):
        """x [N, 3] -> unit normals [N, 3]; see with_normals."""
        return self.with_normals(x)[2]

    def background(self, directions):
        """Colour of what lies behind, by unit direction: [..., 3] -> [..., 3] in [0, 1]."""
        return self.to_background(spherical_harmonics(directions)).sigmoid()
