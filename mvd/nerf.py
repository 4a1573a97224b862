"""The NeRF: density and colour of every point of the box [-1, 1]³, and a background around it.

An encoding gives the features of a point. One small network turns them into a density, another
into an albedo. There is no view direction: the surface is matte. Shading, where it is wanted, is
computed from the normals (render.py).

The density starts as a soft ball around the origin, so that the first pictures already show
something in the middle. Sources: DreamFusion §3.2, Magic3D, MVDream's appendix.
"""
from dataclasses import dataclass, field
import math

import torch
from torch import nn
import torch.nn.functional as F

from .hashgrid import HashGrid, HashGridConfig

# The encodings that a NeRF can be built on, by name: (class, class of its config). A dense grid or
# a tri-plane is added by one such class and one row here. An encoding is an nn.Module that is built
# from its config and has
#   config              with lr_grid, the learning rate of its parameters
#   output_size         F, the number of features
#   forward(x)          x [N, 3] in [0, 1] -> features [N, F]
#   with_slope(x)       x [N, 3] in [0, 1] -> features [N, F], d features / dx [N, 3, F]
# Both functions are differentiable by the parameters, and no shape in them depends on data.
ENCODINGS = {
    "hash": (HashGrid, HashGridConfig),
}


@dataclass
class NeRFConfig:
    """The defaults are the full size, as published."""
    encoding: str = "hash"          # a name in ENCODINGS
    grid: HashGridConfig = field(default_factory=HashGridConfig)    # config of the encoding
    hidden: int = 64                # width of the hidden layer of both networks
    blob_strength: float = 10.0     # what the ball adds to the raw density at the origin
    blob_radius: float = 0.5        # where it adds nothing; further out it takes away
    background_hidden: int = 16
    lr: float = 0.001               # learning rate of the networks


def over_pi(a, b):
    """The square root of a / (b π)."""
    return math.sqrt(a / (b * math.pi))


def spherical_harmonics(d):
    """The 16 real spherical harmonics of degree 0 to 3 of unit vectors: d [..., 3] -> [..., 16].

    Orthonormal over the sphere; degree by degree, the order m from -l to l.
    """
    x, y, z = d.unbind(-1)
    xx = x * x
    yy = y * y
    zz = z * z
    return torch.stack([
        torch.full_like(x, over_pi(1, 4)),
        over_pi(3, 4) * y,
        over_pi(3, 4) * z,
        over_pi(3, 4) * x,
        over_pi(15, 4) * x * y,
        over_pi(15, 4) * y * z,
        over_pi(5, 16) * (3 * zz - 1),
        over_pi(15, 4) * x * z,
        over_pi(15, 16) * (xx - yy),
        over_pi(35, 32) * y * (3 * xx - yy),
        over_pi(105, 4) * x * y * z,
        over_pi(21, 32) * y * (5 * zz - 1),
        over_pi(7, 16) * z * (5 * zz - 3),
        over_pi(21, 32) * x * (5 * zz - 1),
        over_pi(105, 16) * z * (xx - yy),
        over_pi(35, 32) * x * (xx - 3 * yy),
    ], -1)


def mlp(*widths):
    """Linear layers of these widths, without biases, ReLU between them."""
    layers = []
    for width_in, width_out in zip(widths, widths[1:]):
        layers.append(nn.Linear(width_in, width_out, bias=False))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


def to_unit_cube(x):
    """World -> encoding, [-1, 1]³ -> [0, 1]³; what lies outside the box goes to its wall."""
    return (x.clamp(-1, 1) + 1) / 2


def length(x):
    """|x| [N, 1] of x [N, 3]; kept off 0, where the square root has no derivative."""
    return torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12)


class NeRF(nn.Module):
    """The field. Points x [N, 3] are in world units; outside the box the density is 0."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        encoding_class, config_class = ENCODINGS[config.encoding]
        if not isinstance(config.grid, config_class):
            raise ValueError(f"the encoding {config.encoding!r} takes a {config_class.__name__}")
        self.encoding = encoding_class(config.grid)
        features = self.encoding.output_size
        self.to_density = mlp(features, config.hidden, 1)
        self.to_albedo = mlp(features, config.hidden, 3)
        around = config.background_hidden
        self.to_background = mlp(16, around, around, 3)

    def parameter_groups(self):
        """For an optimizer: [encoding, networks], each {"params": [...], "lr": ...}.

        The table of a grid learns with a higher rate than the networks behind it.
        """
        networks = []
        for network in (self.to_density, self.to_albedo, self.to_background):
            networks += network.parameters()
        encoding = list(self.encoding.parameters())
        return [
            {"params": encoding, "lr": self.encoding.config.lr_grid},
            {"params": networks, "lr": self.config.lr},
        ]

    def forward(self, x):
        """x [N, 3] -> density [N] >= 0, albedo [N, 3] in [0, 1]."""
        features = self.encoding(to_unit_cube(x))
        density = self.activate(self.to_density(features), x)
        return density, self.to_albedo(features).sigmoid()

    def density(self, x):
        """x [N, 3] -> density [N] >= 0, per unit of length."""
        features = self.encoding(to_unit_cube(x))
        return self.activate(self.to_density(features), x)

    def activate(self, raw, x):
        """The network's raw density [N, 1] at x [N, 3] -> density [N]:

            softplus(raw + blob) inside the box, 0 outside,   blob = strength · (1 - |x| / radius).
        """
        strength = self.config.blob_strength
        blob = strength * (1 - length(x) / self.config.blob_radius)
        inside = (x.detach().abs() <= 1).all(-1, keepdim=True)
        return (F.softplus(raw + blob) * inside)[:, 0]

    def with_normals(self, x):
        """x [N, 3] -> density [N], albedo [N, 3], normals [N, 3]: `forward` and `normals`."""
        density, normals, features = self.geometry(x)
        return density, self.to_albedo(features).sigmoid(), normals

    def normals(self, x):
        """x [N, 3] -> -grad density [N, 3], of unit length; near 0 where the density is flat."""
        return self.geometry(x)[1]

    def geometry(self, x):
        """x [N, 3] -> density [N], normals [N, 3] as of `normals`, features [N, F] of the encoding.

        The gradient is the chain rule written out, so that training through the normals takes first
        derivatives only. With u = (x + 1) / 2, f = encoding(u) and raw = W2 relu(W1 f):

            d raw / df     = (W2 ⊙ [W1 f > 0]) W1
            d raw / dx     = ½ d raw / df · df / du
            d blob / dx    = -strength / radius · x / |x|
            d density / dx = softplus'(raw + blob) · (d raw / dx + d blob / dx)

        where softplus' = 1 - exp(-softplus) = 1 - exp(-density). Outside the box the density is 0,
        so this factor is 0 too, and the normal. Where the density is flat the normal is near 0.
        """
        features, features_by_u = self.encoding.with_slope(to_unit_cube(x))
        first, relu, last = self.to_density
        hidden = first(features)
        density = self.activate(last(relu(hidden)), x)

        raw_by_features = ((hidden > 0) * last.weight) @ first.weight  # [N, F]
        raw_by_u = (features_by_u * raw_by_features[:, None]).sum(-1)  # [N, 3]
        raw_by_x = raw_by_u / 2
        steepness = self.config.blob_strength / self.config.blob_radius
        gradient = raw_by_x - steepness * x / length(x)
        # -softplus' is exp(-density) - 1, which makes the gradient the normal's direction.
        downhill = torch.expm1(-density)[:, None] * gradient
        normals = F.normalize(downhill, dim=-1, eps=1e-6)
        return density, normals, features

    def background(self, directions):
        """The colour behind the object: unit directions [..., 3] -> [..., 3] in [0, 1]."""
        return self.to_background(spherical_harmonics(directions)).sigmoid()
