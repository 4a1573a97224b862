"""From a density field to a coloured triangle mesh: marching tetrahedra (Doi and Koide 1991), then .glb and .obj.

Every cell of a grid is cut into six tetrahedra that share its main diagonal (Kuhn's decomposition). All cells are cut
alike, so two neighbours cut their common face alike. In a tetrahedron the surface is one triangle or two, spanned by
the points where its edges cross the threshold. A crossing belongs to a grid edge, not to a cell: it becomes one vertex,
shared by all around it, and the mesh is watertight with no table of 256 cases and no ambiguous ones.
"""
import itertools
import json
import struct
from typing import NamedTuple

import numpy as np
import torch

from .tools.errors import UserError
from .tools.files import write_atomic


class Mesh(NamedTuple):
    """A closed surface in world units (z up, front +x), faces counter-clockwise seen from outside."""
    vertices: np.ndarray    # [M, 3] float32, in [-1, 1]
    faces: np.ndarray       # [F, 3] int32
    colours: np.ndarray     # [M, 3] float32, in [0, 1], sRGB as in a picture
    normals: np.ndarray     # [M, 3] float32, unit length, outward


CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))       # [8, 3]: corner number 4x + 2y + z of a cell
# From corner 0 to corner 7 along the axes in each order: six tetrahedra of corners whose numbers only gain bits.
TETRAHEDRA = [(0, 4 >> a, 4 >> a | 4 >> b, 7) for a, b, c in itertools.permutations(range(3))]
# The order of the axes decides whether a tetrahedron is right-handed.
RIGHT_HANDED = [np.linalg.det(CORNERS[list(corners[1:])]) > 0 for corners in TETRAHEDRA]


def _triangles_by_case():
    """{which of four corners are inside, as bits: outward triangles, as pairs of corners}, right-handed tetrahedra."""
    cases = {}
    for a, b, c, d in itertools.permutations(range(4)):
        if np.linalg.det(np.eye(4)[[a, b, c, d]]) < 0:              # only even permutations keep it right-handed
            continue
        cases[1 << a] = [((a, b), (a, c), (a, d))]
        cases[15 - (1 << a)] = [((a, b), (a, d), (a, c))]           # the same triangle seen from the other side
        cases[1 << a | 1 << b] = [((a, c), (a, d), (b, d)), ((a, c), (b, d), (b, c))]
    return cases


CASES = _triangles_by_case()


def marching_tetrahedra(values, threshold):
    """The surface values = threshold, linear along the edges of the tetrahedra.

    values [n, n, n] (array or tensor on the CPU; x, y, z): inside is what is larger than the threshold.
    Returns vertices [M, 3] float32 in grid coordinates (values[i, j, k] sits at (i, j, k)), no two alike, and faces
    [F, 3] int32, counter-clockwise seen from outside. What reaches the border is closed at most half a cell outside of
    it. Both may be empty.
    """
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=1e30, neginf=-1e30)
    # The rim is as far below the threshold as the largest value is above: crossings lie at most half-way to it.
    values = np.pad(values, 1, constant_values=threshold - abs(values.max() - threshold))
    shape = values.shape
    corner_step = CORNERS @ np.array([shape[1] * shape[2], shape[2], 1])               # [8] from corner 0, flat
    inside = values > threshold
    cells = tuple(slice(0, size - 1) for size in shape)
    count = sum(inside[tuple(slice(o, o + s - 1) for o, s in zip(corner, shape))].astype(np.int8) for corner in CORNERS)
    mixed = np.zeros(shape, dtype=bool)
    mixed[cells] = (count > 0) & (count < 8)
    first = np.flatnonzero(mixed)                                   # [K] corner 0 of the cells that the surface crosses
    inside, values = inside.ravel(), values.ravel()

    keys = [np.zeros((0, 3), dtype=np.int64)]             # three grid edges, each 8 * flat index of one end + direction
    for corners, right_handed in zip(TETRAHEDRA, RIGHT_HANDED):
        case = sum(inside[first + corner_step[corner]].astype(np.int8) << i for i, corner in enumerate(corners))
        for bits, triangles in CASES.items():
            cell = first[case == bits]
            for triangle in triangles if right_handed else [t[::-1] for t in triangles]:
                ends = [(corners[min(pair)], corners[max(pair)]) for pair in triangle]
                keys.append(np.stack([8 * (cell + corner_step[low]) + (high - low) for low, high in ends], 1))
    edges, faces = np.unique(np.concatenate(keys), return_inverse=True)

    low, direction = edges // 8, edges % 8
    at_low, at_high = values[low], values[low + corner_step[direction]]
    # Kept off the ends, where the crossings of several edges would fall on one point.
    along = np.clip((threshold - at_low) / (at_high - at_low), 1e-3, 1 - 1e-3)         # [M]
    vertices = np.stack(np.unravel_index(low, shape), 1) + along[:, None] * CORNERS[direction] - 1
    return vertices.astype(np.float32), faces.reshape(-1, 3).astype(np.int32)


def drop_specks(vertices, faces, share=0.02):
    """Keeps connected parts with at least `share` of the faces of the largest: -> (vertices [M', 3], faces [F', 3])."""
    label = np.arange(len(vertices))                                # grows into: the smallest vertex number of its part
    while True:
        roots = label[faces]                                        # [F, 3]
        lowest = roots.min(1, keepdims=True)
        if (roots == lowest).all():
            break
        np.minimum.at(label, roots, np.broadcast_to(lowest, roots.shape))          # hang each root under a lower one
        while not (label[label] == label).all():                    # and let everybody point at the root itself
            label = label[label]
    part = label[faces[:, 0]]                                       # [F]
    size = np.bincount(part)
    faces = faces[size[part] >= share * size.max()]
    kept, faces = np.unique(faces, return_inverse=True)
    return vertices[kept], faces.reshape(-1, 3).astype(np.int32)


def vertex_normals(vertices, faces):
    """Mean of the normals of the faces round each vertex, weighted by area: [M, 3] float32, unit length, outward."""
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    of_face = np.cross(b - a, c - a)                                # [F, 3], twice the area long
    normals = np.stack([np.bincount(faces.ravel(), np.repeat(of_face[:, i], 3), len(vertices)) for i in range(3)], 1)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 0, normals / np.maximum(length, 1e-30), [0.0, 0.0, 1.0]).astype(np.float32)


def seen_colours(density_fn, colour_fn, points, inward, start=-0.05, end=0.25, samples=24):
    """What a viewer sees of a surface that is not sharp: colours [M, 3] volume-rendered along rays that pass `points`
    [M, 3] in the direction `inward` [M, 3], from `start` to `end` (world units): sum w c / sum w (NeRF eq. 3)."""
    step = (end - start) / samples
    along = start + (torch.arange(samples, device=points.device) + 0.5) * step                # [S]
    x = (points[:, None] + along[:, None] * inward[:, None]).reshape(-1, 3)                   # [M * S, 3]
    depth = density_fn(x).view(-1, samples).float() * step                                    # optical, of each sample
    weights = (1 - torch.exp(-depth)) * torch.exp(depth - depth.cumsum(1))                    # [M, S]
    colours = (weights[..., None] * colour_fn(x).view(-1, samples, 3).float()).sum(1)
    return colours / weights.sum(1, keepdim=True).clamp(min=1e-9)


@torch.no_grad()
def extract(density_fn, colour_fn, resolution=128, threshold=25.0, device="cpu"):
    """The surface density = threshold inside the box [-1, 1]^3, with the colours that are seen of it from outside.

    density_fn: points [N, 3] in world units on `device` -> [N]; colour_fn: points -> [N, 3] in [0, 1]. Densities are
    taken in the middle of resolution^3 cells. Raises UserError if nothing is denser than the threshold.
    """
    centre = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    points = torch.cartesian_prod(centre, centre, centre)           # [n^3, 3], x slowest
    chunks = points.split(65536)                                    # a hash grid needs kilobytes a point
    density = torch.cat([density_fn(chunk.to(device)).float().cpu() for chunk in chunks]).view(3 * (resolution,))
    vertices, faces = marching_tetrahedra(density, threshold)
    if len(faces) == 0:
        raise UserError(f"there is no object to make a mesh of: the density stays below {threshold:g} "
                        f"(largest {density.max():.3g}); run more steps")
    vertices, faces = drop_specks(vertices, faces)
    vertices = (vertices + 0.5) / resolution * 2 - 1
    normals = vertex_normals(vertices, faces)
    rays = zip(torch.from_numpy(vertices).split(2048), torch.from_numpy(-normals).split(2048))
    colours = torch.cat([seen_colours(density_fn, colour_fn, points.to(device), inward.to(device)).cpu() for points, inward in rays])
    return Mesh(vertices, faces, colours.clamp(0, 1).numpy(), normals)


def _y_up(vectors):
    """From z up, front +x to y up, front +z, as glTF demands and importers of OBJ assume: a rotation, no mirror."""
    return np.ascontiguousarray(vectors[:, [1, 2, 0]], dtype=np.float32)


def write_glb(path, mesh):
    """One binary glTF 2.0 file with vertex colours and a matte material; whole or not at all.

    glTF multiplies the material with COLOR_0 and wants that linear, so the sRGB curve (IEC 61966-2-1) is undone here.
    """
    colours = mesh.colours.astype(np.float64)
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    rgba = np.ones((len(linear), 4))                                # four 16-bit numbers keep every vertex on 4 bytes
    rgba[:, :3] = linear
    positions = _y_up(mesh.vertices)
    count = len(positions)
    UNSIGNED_SHORT, UNSIGNED_INT, FLOAT, VERTICES, INDICES = 5123, 5125, 5126, 34962, 34963   # numbers of the standard
    parts = [                                                       # (data, its use, its description)
        (positions.astype("<f4"), VERTICES, {"componentType": FLOAT, "type": "VEC3", "count": count,
                                             "min": positions.min(0).tolist(), "max": positions.max(0).tolist()}),
        (_y_up(mesh.normals).astype("<f4"), VERTICES, {"componentType": FLOAT, "type": "VEC3", "count": count}),
        (np.round(rgba * 65535).astype("<u2"), VERTICES, {"componentType": UNSIGNED_SHORT, "normalized": True,
                                                          "type": "VEC4", "count": count}),
        (mesh.faces.astype("<u4"), INDICES, {"componentType": UNSIGNED_INT, "type": "SCALAR",
                                               "count": mesh.faces.size})]
    starts = np.cumsum([0] + [part.nbytes for part, _, _ in parts]).tolist()               # all multiples of 4
    document = {
        "asset": {"version": "2.0", "generator": "mvd"},
        "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2},
                                    "indices": 3, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}],
        "accessors": [{"bufferView": i, **accessor} for i, (_, _, accessor) in enumerate(parts)],
        "bufferViews": [{"buffer": 0, "byteOffset": starts[i], "byteLength": part.nbytes, "target": target}
                        for i, (part, target, _) in enumerate(parts)],
        "buffers": [{"byteLength": starts[-1]}]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    write_atomic(path, b"".join([
        struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + starts[-1]),
        struct.pack("<I4s", len(text), b"JSON"), text,
        struct.pack("<I4s", starts[-1], b"BIN\0"), *(part.tobytes() for part, _, _ in parts)]))


def write_obj(path, mesh):
    """One Wavefront OBJ text file, y up, sRGB colours behind the coordinates: "v x y z r g b"; whole or not at all."""
    rows = np.concatenate([_y_up(mesh.vertices), mesh.colours], 1).tolist()
    lines = ["v %.6f %.6f %.6f %.4f %.4f %.4f\n" % tuple(row) for row in rows]
    lines += ["f %d %d %d\n" % tuple(face) for face in (mesh.faces + 1).tolist()]
    write_atomic(path, "".join(lines).encode())
