"""From a density field to a coloured triangle mesh, written as .glb and .obj.

The surface is found by marching tetrahedra. Every cell of a grid is cut into six
tetrahedra, all cells alike, so that two neighbours cut their common face alike. In a
tetrahedron the surface is a triangle or a quadrilateral; its corners are the points where
the tetrahedron's edges cross the threshold. Such a point belongs to an edge of the grid
and not to a cell: it becomes one vertex that all triangles around it share. The mesh is
therefore watertight, without marching cubes' table of 256 cases and its ambiguous ones.

It has many small and thin triangles: vertices that lie close together are merged, and
what is left is smoothed. Neither opens the mesh, closes a hole or loses a part.

Doi and Koide, An efficient method of triangulating equi-valued surfaces (1991); Treece,
Prager and Gee, Regularised marching tetrahedra (1999); Taubin, A signal processing
approach to fair surface design (1995); glTF 2.0.
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
    """A closed surface, z up, front +x; faces are counter-clockwise seen from outside."""
    vertices: np.ndarray    # [M, 3] float32, world units
    faces: np.ndarray       # [F, 3] int32, numbers of vertices
    colours: np.ndarray     # [M, 3] float32, in [0, 1], sRGB as in a picture
    normals: np.ndarray     # [M, 3] float32, unit length, outward


# ---- the surface -----------------------------------------------------------------------------

# [8, 3]: where the corners of a cell lie; corner (x, y, z) has the number 4x + 2y + z.
CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))

# The six tetrahedra of a cell, as corners of the cell (Kuhn's decomposition). Each is a
# walk from corner 0 to corner 7 along the three axes; there is one walk per order of the
# axes. Numbers only gain bits on the way, so later minus earlier is itself the number of
# a corner: the direction of the edge between them.
TETRAHEDRA = [
    (0, 4, 6, 7),    # x, y, z
    (0, 4, 5, 7),    # x, z, y
    (0, 2, 6, 7),    # y, x, z
    (0, 2, 3, 7),    # y, z, x
    (0, 1, 5, 7),    # z, x, y
    (0, 1, 3, 7),    # z, y, x
]

# The surface in a tetrahedron. Key: which of its corners 0 to 3 are inside, as bits.
# Value: the polygon between inside and outside, counter-clockwise seen from outside if
# the tetrahedron is right-handed. The pair (a, b) is the point on the edge between
# corners a and b. One corner inside gives a triangle round it, three inside the same
# triangle seen from its other side, two inside a quadrilateral. (The order of the entries
# is the order of the faces in the mesh.)
POLYGONS = {
    0b0001: [(0, 3), (0, 1), (0, 2)],
    0b1110: [(0, 3), (0, 2), (0, 1)],
    0b0011: [(1, 3), (1, 2), (0, 2), (0, 3)],
    0b0101: [(2, 1), (2, 3), (0, 3), (0, 1)],
    0b1001: [(3, 2), (3, 1), (0, 1), (0, 2)],
    0b0010: [(1, 3), (1, 2), (1, 0)],
    0b1101: [(1, 3), (1, 0), (1, 2)],
    0b0110: [(2, 3), (2, 0), (1, 0), (1, 3)],
    0b1010: [(3, 0), (3, 2), (1, 2), (1, 0)],
    0b0100: [(2, 3), (2, 0), (2, 1)],
    0b1011: [(2, 3), (2, 1), (2, 0)],
    0b1100: [(3, 1), (3, 0), (2, 0), (2, 1)],
    0b1000: [(3, 2), (3, 1), (3, 0)],
    0b0111: [(3, 2), (3, 0), (3, 1)],
}


def _crossed_cells(inside):
    """The cells that the surface crosses: flat indices of their corners 0, [K].

    inside [nx, ny, nz] bool. A cell is crossed if some of its corners are inside, not all.
    """
    nx, ny, nz = inside.shape
    corners_inside = np.zeros((nx - 1, ny - 1, nz - 1), dtype=np.int8)
    for x, y, z in CORNERS:
        corners_inside += inside[x:x + nx - 1, y:y + ny - 1, z:z + nz - 1]
    crossed = np.zeros(inside.shape, dtype=bool)
    crossed[:-1, :-1, :-1] = (corners_inside > 0) & (corners_inside < 8)
    return np.flatnonzero(crossed)


def _triangles(inside, cells, corner_step):
    """The triangles of the surface as three grid edges each: [F, 3] int64.

    inside [N] bool: all grid points. cells [K]: the flat indices of the crossed cells'
    corners 0. corner_step [8]: from there to each corner. A grid edge is one number:
    8 * (flat index of its lower end) + (its direction, the number of a corner, 1 to 7).
    """
    found = [np.zeros((0, 3), dtype=np.int64)]
    for tetrahedron in TETRAHEDRA:
        right_handed = np.linalg.det(CORNERS[list(tetrahedron[1:])]) > 0
        bits = np.zeros(len(cells), dtype=np.int8)
        for i, corner in enumerate(tetrahedron):
            bits += inside[cells + corner_step[corner]].astype(np.int8) << i

        for case, polygon in POLYGONS.items():
            cell = cells[bits == case]
            edges = []
            for pair in polygon:
                low = tetrahedron[min(pair)]
                high = tetrahedron[max(pair)]
                edges.append(8 * (cell + corner_step[low]) + (high - low))
            # A triangle, or the two triangles of a quadrilateral.
            for second, third in zip(edges[1:], edges[2:]):
                triangle = [edges[0], second, third]
                if not right_handed:
                    triangle.reverse()
                found.append(np.stack(triangle, axis=1))
    return np.concatenate(found)


def marching_tetrahedra(values, threshold):
    """The surface values = threshold as a closed mesh: (vertices [M, 3], faces [F, 3]).

    values [nx, ny, nz] (array, or tensor on the CPU): inside is what is larger than the
    threshold; NaN counts as 0, infinity as 1e30. Vertices are float32 in grid coordinates:
    values[i, j, k] sits at (i, j, k). No two are alike: t is kept in 0.001 .. 0.999. Faces
    are int32, counter-clockwise seen from outside. Both may be empty. What reaches the
    border is closed at most half a cell outside of it, by a rim of lower values.

    Between the ends of an edge the field is taken to be linear. The idea is a plain loop:

        for each cell, for each of its six tetrahedra:
            for each edge between a corner p inside and a corner q outside:
                t = (threshold - value[p]) / (value[q] - value[p])
                the surface crosses the edge at p + t * (q - p)
            join these points: three make a triangle, four a quadrilateral

    tests/test_mesh.py has it written out (`plain_marching_tetrahedra`). Here each line
    runs for all cells at once, and an edge's point is computed once, for all the cells
    that share the edge.
    """
    values = np.asarray(values, dtype=np.float64)
    values = np.nan_to_num(values, posinf=1e30, neginf=-1e30)
    # A rim that is as far below the threshold as the largest value is above it: the
    # surface lies at most half-way between the border and the rim.
    margin = abs(values.max() - threshold)
    values = np.pad(values, 1, constant_values=threshold - margin)
    shape = values.shape
    inside = values > threshold
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    corner_step = CORNERS @ strides    # [8]

    cells = _crossed_cells(inside)
    triangles = _triangles(inside.ravel(), cells, corner_step)
    # One vertex per grid edge that occurs, however many triangles name it.
    edges, faces = np.unique(triangles, return_inverse=True)

    values = values.ravel()
    low = edges // 8
    direction = edges % 8
    at_low = values[low]
    at_high = values[low + corner_step[direction]]
    along = (threshold - at_low) / (at_high - at_low)    # [M]
    # At the end of an edge, the points of several edges would coincide.
    along = np.clip(along, 1e-3, 1 - 1e-3)
    low_ends = np.stack(np.unravel_index(low, shape), axis=1)
    # Minus 1: the rim is not part of the grid.
    vertices = low_ends + along[:, None] * CORNERS[direction] - 1
    return vertices.astype(np.float32), faces.reshape(-1, 3).astype(np.int32)


def _edges(faces):
    """The edges of the faces [F, 3], as the faces run along them: starts, ends [3 F] int64."""
    starts = faces.ravel().astype(np.int64)
    ends = faces[:, [1, 2, 0]].ravel().astype(np.int64)
    return starts, ends


def _sums(weights, numbers, count):
    """The sum of the rows of weights [N, 3] that have the same number: [count, 3] float64."""
    sums = [np.bincount(numbers, column, count) for column in weights.T]
    return np.stack(sums, axis=1)


def _count_within(groups, count):
    """How many of the rows [N, k] of group numbers name this group only, by group: [count]."""
    same = (groups == groups[:, :1]).all(axis=1)
    return np.bincount(groups[same, 0], minlength=count)


def _labels(rows, count):
    """A label for each of `count` vertices: the same for those that the rows connect, [count].

    rows [N, k]: numbers of vertices that hang together. Every vertex carries a label, at
    first its own number. Labels are lowered until they agree within each row.
    """
    label = np.arange(count)
    while True:
        labels = label[rows]    # [N, k]
        lowest = labels.min(axis=1, keepdims=True)
        if (labels == lowest).all():
            return label
        # A label is the number of a vertex: that vertex takes the row's lowest label ...
        np.minimum.at(label, labels, np.broadcast_to(lowest, labels.shape))
        # ... and every vertex takes the label at the end of its chain of labels.
        while not (label[label] == label).all():
            label = label[label]


def _discs(vertices, faces):
    """Groups of vertices that may become one: (group of each vertex [M], may it [groups]).

    vertices, faces: a closed mesh in grid coordinates. A group is a patch: vertices that
    are nearest to the same grid point, and that edges between them connect. The two sides
    of a thin sheet are two groups. A patch may become one vertex if it is a disc, for which
    vertices - edges + faces = 1; the ring round a thin bar is none.
    """
    nearest = np.floor(vertices + 0.5)
    starts, ends = _edges(faces)
    # In a closed mesh each edge occurs in both directions.
    once = starts < ends
    edges = np.stack([starts[once], ends[once]], axis=1)
    within = (nearest[edges[:, 0]] == nearest[edges[:, 1]]).all(axis=1)
    label = _labels(edges[within], len(vertices))
    group = np.unique(label, return_inverse=True)[1]
    count = group.max() + 1
    vertex_count = np.bincount(group)
    edge_count = _count_within(group[edges], count)
    face_count = _count_within(group[faces], count)
    return group, vertex_count - edge_count + face_count == 1


def merge_vertices(vertices, faces):
    """About a third of the vertices, the same surface: (vertices [M', 3], faces [F', 3]).

    vertices, faces: a closed mesh as `marching_tetrahedra` returns it, in grid coordinates.
    There, many vertices lie on the edges round one grid point, and their faces are small or
    thin. Such a group becomes one vertex, the mean, if it is a disc (see `_discs`). A face
    that has two corners of the same vertex then goes.

    Groups stay as they are where the surface would touch itself: where an edge would lie
    between four faces, or a vertex have fewer than three. The mesh is therefore closed as
    before, and has as many parts and holes.
    """
    group, is_merged = _discs(vertices, faces)
    # A vertex that is not merged is a group of its own.
    alone = len(is_merged) + np.arange(len(vertices))
    while True:
        label = np.where(is_merged[group], group, alone)
        number = np.unique(label, return_inverse=True)[1]
        count = number.max() + 1
        a, b, c = number[faces].T
        whole = (a != b) & (b != c) & (c != a)
        merged = number[faces[whole]]

        starts, ends = _edges(merged)
        edges, times = np.unique(starts * count + ends, return_counts=True)
        crowded = edges[times > 1]
        around = np.bincount(merged.ravel(), minlength=count)
        flat = merged[(around[merged] < 3).any(axis=1)]
        gone = np.flatnonzero(around == 0)
        wrong = np.concatenate([crowded // count, crowded % count, flat.ravel(), gone])
        if len(wrong) == 0:
            break
        is_merged[group[np.isin(number, wrong)]] = False

    means = _sums(vertices, number, count) / np.bincount(number)[:, None]
    return means.astype(np.float32), merged.astype(np.int32)


def smooth(vertices, faces, rounds=10):
    """The vertices without the bumps that are as small as a face: [M, 3] float32.

    vertices [M, 3], faces [F, 3]: a closed mesh. In a round each vertex goes half of the
    way to the mean of its neighbours, which smooths and shrinks; then it goes away
    from their new mean, by 0.53 of the distance, which undoes the shrinking (Taubin). A ripple of
    which the means are 1 - k times the ripple is multiplied by (1 - 0.5 k) (1 + 0.53 k)
    per round: about 1 for the large shapes, where k is near 0, and far less for the small.
    """
    starts, ends = _edges(faces)
    count = len(vertices)
    # In a closed mesh each vertex is the start of an edge to each neighbour.
    neighbours = np.bincount(starts, minlength=count)[:, None]
    vertices = vertices.astype(np.float64)
    for _ in range(rounds):
        for share in (0.5, -0.53):
            mean = _sums(vertices[ends], starts, count) / neighbours
            vertices = vertices + share * (mean - vertices)
    return vertices.astype(np.float32)


def connected_parts(faces):
    """Which part each face belongs to: [F], a vertex's number, the same for all of a part.

    faces [F, 3]: numbers of vertices. A part is what hangs together by its vertices.
    """
    return _labels(faces, faces.max(initial=-1) + 1)[faces[:, 0]]


def drop_specks(vertices, faces, share=0.02):
    """The mesh without its small parts: (vertices [M', 3], faces [F', 3] int32).

    A part stays if it has at least `share` of the faces of the largest part.
    """
    part = connected_parts(faces)    # [F]
    size = np.bincount(part)
    faces = faces[size[part] >= share * size.max()]
    kept, faces = np.unique(faces, return_inverse=True)
    return vertices[kept], faces.reshape(-1, 3).astype(np.int32)


def volume(vertices, faces):
    """The volume inside a closed mesh: a float, negative if its faces look inward.

    vertices [M, 3], faces [F, 3], counter-clockwise seen from outside. By the divergence
    theorem it is a sum over the faces (a, b, c): each spans with the origin a tetrahedron
    of the volume a · (b × c) / 6, which counts as negative where the face looks at it.
    """
    corners = vertices[faces].astype(np.float64)    # [F, 3, 3]
    a, b, c = corners.transpose(1, 0, 2)
    return float((a * np.cross(b, c)).sum() / 6)


def is_watertight(faces):
    """Whether the mesh is closed and has an inside: a bool; faces [F, 3].

    Then each face's neighbour runs along their common edge the other way round: each edge
    occurs once in each direction. A mesh without faces is not watertight.
    """
    starts, ends = _edges(faces)
    count = faces.max(initial=-1) + 1
    there = np.sort(starts * count + ends)
    back = np.sort(ends * count + starts)
    once = (np.diff(there) > 0).all()
    return bool(len(faces) > 0 and once and (there == back).all())


def vertex_normals(vertices, faces):
    """Outward unit normals of the vertices: [M, 3] float32.

    Each is the mean of the normals of the faces round the vertex, weighted by area.
    """
    vertices = vertices.astype(np.float64)
    a = vertices[faces[:, 0]]
    b = vertices[faces[:, 1]]
    c = vertices[faces[:, 2]]
    # The length of the cross product is twice the area of the face.
    of_face = np.cross(b - a, c - a)
    normals = _sums(np.repeat(of_face, 3, axis=0), faces.ravel(), len(vertices))
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    unit = normals / np.maximum(length, 1e-30)
    # Where the normals cancel out, any direction will do.
    return np.where(length > 0, unit, [0.0, 0.0, 1.0]).astype(np.float32)


# ---- from a field ----------------------------------------------------------------------------

def seen_colours(density_fn, colour_fn, points, inward, *, start=-0.05, end=0.25, samples=24):
    """The colours that a viewer sees at a surface that is not sharp: [M, 3].

    Rays pass `points` [M, 3] in the direction `inward` [M, 3]; along each, the field is
    rendered from `start` to `end` (world units, 0 is the point): sum w c / sum w, with
    the weights w of NeRF eq. 3. Where nothing is dense the colour is 0.
    """
    step = (end - start) / samples
    middles = torch.arange(samples, device=points.device) + 0.5
    along = start + middles * step    # [S]
    x = points[:, None] + along[:, None] * inward[:, None]
    x = x.reshape(-1, 3)    # [M * S, 3]
    depth = density_fn(x).view(-1, samples).float() * step
    # The share that a sample absorbs, times the share that the samples before it let pass.
    weights = (1 - torch.exp(-depth)) * torch.exp(depth - depth.cumsum(1))    # [M, S]
    colours = colour_fn(x).view(-1, samples, 3).float()
    total = (weights[..., None] * colours).sum(1)
    return total / weights.sum(1, keepdim=True).clamp(min=1e-9)


def sample_density(density_fn, size, device="cpu"):
    """The density at the centres of size^3 cells that fill the box: [size, size, size]."""
    centres = (torch.arange(size) + 0.5) / size * 2 - 1
    points = torch.cartesian_prod(centres, centres, centres)    # [n^3, 3], x slowest
    # In chunks, since a hash grid needs kilobytes per point.
    density = []
    for chunk in points.split(65536):
        density.append(density_fn(chunk.to(device)).float().cpu())
    return torch.cat(density).view(size, size, size)


@torch.no_grad()
def extract(density_fn, colour_fn, *, resolution=128, threshold=25.0, device="cpu"):
    """The Mesh of the surface density = threshold, with the colours seen from outside.

    density_fn: points [N, 3] in world units on `device` -> [N]; colour_fn: the same
    points -> [N, 3] in [0, 1]. The density is taken at the centres of resolution^3
    cells that fill the box [-1, 1]^3. Small loose parts are dropped. Raises UserError if the
    density is nowhere above the threshold.
    """
    density = sample_density(density_fn, resolution, device)
    vertices, faces = marching_tetrahedra(density, threshold)
    if len(faces) == 0:
        raise UserError(
            "there is no object to make a mesh of: the density stays below "
            f"{threshold:g} (largest {density.max():.3g}); run more steps")
    vertices, faces = drop_specks(vertices, faces)
    vertices, faces = merge_vertices(vertices, faces)
    vertices = smooth(vertices, faces)
    vertices = (vertices + 0.5) / resolution * 2 - 1
    normals = vertex_normals(vertices, faces)

    points = torch.from_numpy(vertices).split(2048)
    inward = torch.from_numpy(-normals).split(2048)
    colours = []
    for x, direction in zip(points, inward):
        seen = seen_colours(density_fn, colour_fn, x.to(device), direction.to(device))
        colours.append(seen.cpu())
    colours = torch.cat(colours).clamp(0, 1).numpy()
    return Mesh(vertices, faces, colours, normals)


# ---- files -----------------------------------------------------------------------------------

# Numbers of the glTF 2.0 standard: types of components, then uses of a buffer view.
UNSIGNED_SHORT = 5123
UNSIGNED_INT = 5125
FLOAT = 5126
ARRAY_BUFFER = 34962
ELEMENT_ARRAY_BUFFER = 34963


def _y_up(vectors):
    """From z up, front +x to y up, front +z: [M, 3] float32.

    This is a rotation, not a mirror image. glTF demands it, programs that import OBJ
    assume it.
    """
    return np.ascontiguousarray(vectors[:, [1, 2, 0]], dtype=np.float32)


def _linear_rgb(colours):
    """sRGB colours [M, 3] in [0, 1] -> linear RGB [M, 3] (IEC 61966-2-1).

    glTF multiplies vertex colours with the material and wants them linear in light.
    """
    colours = colours.astype(np.float64)
    dark = colours / 12.92
    bright = ((colours + 0.055) / 1.055) ** 2.4
    return np.where(colours <= 0.04045, dark, bright)


def _gltf_document(arrays):
    """The JSON part of a .glb file, as a dict.

    arrays: positions, normals, colours, vertex numbers, which lie one behind the other in
    the binary part. A buffer view says where an array lies, an accessor how its bytes are
    read, the primitive what it means.
    """
    positions, _, _, indices = arrays
    count = len(positions)
    type_of_indices = UNSIGNED_SHORT if indices.itemsize == 2 else UNSIGNED_INT
    views = []
    start = 0
    for array in arrays:
        target = ELEMENT_ARRAY_BUFFER if array is indices else ARRAY_BUFFER
        views.append({
            "buffer": 0, "byteOffset": start, "byteLength": array.nbytes, "target": target})
        start += array.nbytes
    low = positions.min(axis=0).tolist()
    high = positions.max(axis=0).tolist()
    accessors = [
        {"bufferView": 0, "componentType": FLOAT, "type": "VEC3", "count": count,
         "min": low, "max": high},
        {"bufferView": 1, "componentType": FLOAT, "type": "VEC3", "count": count},
        {"bufferView": 2, "componentType": FLOAT, "type": "VEC3", "count": count},
        {"bufferView": 3, "componentType": type_of_indices, "type": "SCALAR",
         "count": indices.size},
    ]
    primitive = {
        "attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2},
        "indices": 3,
    }
    return {
        "asset": {"version": "2.0", "generator": "mvd"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": start}],
    }


def write_glb(path, mesh):
    """Write a binary glTF 2.0 file with vertex colours; it is whole or not there.

    Colours are floats, and there is no material: trimesh takes 16-bit colours modulo 256,
    and forgets the colours of a mesh that has a material without a texture.

    The file is a header of 12 bytes and two chunks, JSON and binary; before each stand its
    length and its kind. All numbers are little-endian.
    """
    # 65535 is no vertex: there, graphics libraries begin a new strip of triangles.
    short = len(mesh.vertices) <= 65535
    arrays = [
        _y_up(mesh.vertices).astype("<f4"),
        _y_up(mesh.normals).astype("<f4"),
        _linear_rgb(mesh.colours).astype("<f4"),
        mesh.faces.astype("<u2" if short else "<u4"),
    ]
    text = json.dumps(_gltf_document(arrays), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(array.tobytes() for array in arrays)
    binary += b"\0" * (-len(binary) % 4)

    chunks = [
        struct.pack("<I4s", len(text), b"JSON"),
        text,
        struct.pack("<I4s", len(binary), b"BIN\0"),
        binary,
    ]
    length = 12 + sum(len(chunk) for chunk in chunks)
    header = struct.pack("<4sII", b"glTF", 2, length)
    write_atomic(path, header + b"".join(chunks))


def write_obj(path, mesh):
    """Write a Wavefront OBJ text file, y up; the file is whole or not there.

    sRGB colours follow the coordinates, as many programs read them: "v x y z r g b".
    """
    rows = np.concatenate([_y_up(mesh.vertices), mesh.colours], axis=1)
    lines = []
    for row in rows.tolist():
        lines.append("v %.6f %.6f %.6f %.4f %.4f %.4f\n" % tuple(row))
    # OBJ counts vertices from 1.
    for face in (mesh.faces + 1).tolist():
        lines.append("f %d %d %d\n" % tuple(face))
    write_atomic(path, "".join(lines).encode())
