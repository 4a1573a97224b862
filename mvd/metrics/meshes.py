"""What the mesh of an object is worth: is it whole, is it as thick as the real thing?

- components: how many parts hang together; watertight: is it closed?
- floaters: the share of its volume outside its largest part.
- volume: its volume over that of the nearest real instance; a shell of paper has less.
- outside: the share of its volume outside the visual hull of that instance, which is what the
  silhouettes of the eight views allow.
The mesh of a real instance comes from its signed distance by the same marching tetrahedra.

Meshes are vertices [M, 3] in the world and faces [F, 3], numpy arrays, as in mesh.py.
"""
import math
from pathlib import Path

import numpy as np
import torch

from .. import mesh, toyworld
from ..cameras import orbit
from ..tools.errors import UserError
from ..toyworld.solids import signed_distance

# Cells along a side of the box [-1, 1]^3 or of a real instance's cube: as many as distill.py
# takes by default.
CELLS = 128


# ---- meshes ----------------------------------------------------------------------------------

def read_obj(path):
    """The vertices and faces of a file that mesh.write_obj wrote, turned back to z up.

    None if there is no such file: distill.py writes none of an object without a surface. Raises
    UserError if it is not a mesh.
    """
    try:
        lines = Path(path).read_text().splitlines()
        corners = [line for line in lines if line.startswith("v ")]
        triangles = [line for line in lines if line.startswith("f ")]
        if not corners or not triangles:
            raise ValueError("it has no faces")
        vertices = np.loadtxt(corners, usecols=(1, 2, 3), ndmin=2)
        faces = np.loadtxt(triangles, usecols=(1, 2, 3), ndmin=2, dtype=np.int64) - 1
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError("a face names a vertex that is not there")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a mesh of distill.py ({error})") from error
    # The world's z is the file's y.
    return vertices[:, [2, 0, 1]], faces


@torch.no_grad()
def real_mesh(thing, seed, edge, device="cpu"):
    """The surface of a Thing in one proportion: vertices, faces.

    edge: how long an edge of its cube [-0.5, 0.5]^3 is in the world.
    """
    shapes = toyworld.build(thing.subject, thing.accessory, [seed], device)
    centres = (torch.arange(CELLS, device=device) + 0.5) / CELLS - 0.5
    points = torch.cartesian_prod(centres, centres, centres).T
    points = (points - shapes.offset[:, :, None]) / shapes.scale[:, None, None]
    distance = [signed_distance(shapes, chunk) for chunk in points.split(2 ** 17, dim=2)]
    distance = torch.cat(distance, 1).view(CELLS, CELLS, CELLS)
    vertices, faces = mesh.marching_tetrahedra(-distance.cpu(), 0.0)
    # Specks go, as in `mesh.extract`; a real surface needs no merging or smoothing.
    vertices, faces = mesh.drop_specks(vertices, faces)
    return ((vertices + 0.5) / CELLS - 0.5) * edge, faces


def largest_share(vertices, faces):
    """Which share of a mesh's volume is in its largest part, and the number of parts.

    A part that looks inward, the wall of a hollow space, has no volume of its own.
    """
    part = mesh.connected_parts(faces)
    volumes = []
    for one in np.unique(part):
        volumes.append(max(mesh.volume(vertices, faces[part == one]), 0.0))
    return max(volumes) / max(sum(volumes), 1e-12), len(volumes)


# ---- the inside ------------------------------------------------------------------------------

def columns_under(corners):
    """The vertical lines through cell centres that may cross each triangle.

    corners [F, 3, 3] in cells, so that line (i, j) is x = i, y = j. Returns three arrays [P]: the
    triangle's number, i and j, for every line in the box around each triangle.
    """
    low = np.ceil(corners[:, :, :2].min(1)).astype(np.int64).clip(0, CELLS)
    high = np.floor(corners[:, :, :2].max(1)).astype(np.int64).clip(-1, CELLS - 1)
    size = (high - low + 1).clip(0)
    count = size.prod(1)
    triangle = np.repeat(np.arange(len(corners)), count)
    # The place of each line among its triangle's.
    first = count.cumsum() - count
    place = np.arange(len(triangle)) - first[triangle]
    i = low[triangle, 0] + place // size[triangle, 1]
    j = low[triangle, 1] + place % size[triangle, 1]
    return triangle, i, j


def inside(vertices, faces):
    """The centres of the cells of the box [-1, 1]^3 that are inside a mesh: [P, 3].

    A point is inside if the line from below enters the mesh more often than it leaves it: at a
    face that looks down it enters, at one that looks up it leaves.
    """
    cells = (vertices + 1) / 2 * CELLS - 0.5
    # No line should pass through a vertex or an edge.
    cells = cells + np.array([1.2e-5, 2.3e-5, 0.0])
    corners = cells[faces]
    triangle, i, j = columns_under(corners)
    corners = corners[triangle]
    line = np.stack([i, j], 1)
    # Twice the signed area that the line spans with each edge: all of one sign within a triangle.
    to_corner = corners[:, :, :2] - line[:, None]
    following = np.roll(to_corner, -1, axis=1)
    area = to_corner[..., 0] * following[..., 1] - to_corner[..., 1] * following[..., 0]
    crosses = (area > 0).all(1) | (area < 0).all(1)
    area = area[crosses]
    # The edge from corner k to k + 1 is opposite to corner k + 2.
    height = np.roll(corners[crosses, :, 2], -2, axis=1)
    z = (area * height).sum(1) / area.sum(1)
    enters = -np.sign(area[:, 0])

    # The first centre above each crossing; all that is above the box is one cell more.
    k = np.ceil(z).astype(np.int64).clip(0, CELLS)
    place = (i[crosses] * CELLS + j[crosses]) * (CELLS + 1) + k
    change = np.bincount(place, enters, CELLS * CELLS * (CELLS + 1))
    winding = change.reshape(CELLS, CELLS, CELLS + 1).cumsum(2)[..., :CELLS]
    return (np.argwhere(winding > 0.5) + 0.5) / CELLS * 2 - 1


def outside_hull(points, silhouettes, cameras, edge):
    """The share of points [P, 3] outside the visual hull of V silhouettes; None without points.

    silhouettes bool [V, H, W]. A point is in the hull if it is in the silhouette of every view.
    edge: what a picture shows at the distance of the origin, in the world.
    """
    if not len(points):
        return None
    views, height, width = silhouettes.shape
    half = math.tan(math.radians(cameras.fov_deg) / 2)
    c2w = orbit(cameras.elevation, torch.tensor(cameras.azimuth), edge / 2 / half)
    c2w = c2w.double()
    points = torch.from_numpy(points)
    hull = torch.ones(len(points), dtype=torch.bool)
    for view in range(views):
        local = (points - c2w[view, :3, 3]) @ c2w[view, :3, :3]
        # From -1 to 1 along each side of the picture; the camera looks along -z.
        plane = local[:, :2] / -local[:, 2:] / half
        column = ((plane[:, 0] + 1) / 2 * width).floor().long()
        row = ((1 - plane[:, 1]) / 2 * height).floor().long()
        seen = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        shown = silhouettes[view, row.clamp(0, height - 1), column.clamp(0, width - 1)]
        hull &= seen & shown
    return 1 - hull.double().mean().item()


# ---- the verdict -----------------------------------------------------------------------------

def mesh_facts(surface, real, silhouettes, cameras, edge):
    """What the head of this file lists, a dict. Without a mesh, or without faces, all are None.

    surface, real: (vertices, faces) of the object, or None, and of the nearest real instance.
    silhouettes, cameras, edge: of that instance, as in `outside_hull`.
    """
    names = ("components", "watertight", "floaters", "volume", "outside")
    if surface is None or not len(surface[1]):
        return dict.fromkeys(names)
    share, components = largest_share(*surface)
    watertight = mesh.is_watertight(surface[1])
    volume = mesh.volume(*surface) / mesh.volume(*real)
    outside = outside_hull(inside(*surface), silhouettes, cameras, edge)
    return dict(zip(names, (components, watertight, 1 - share, volume, outside)))
