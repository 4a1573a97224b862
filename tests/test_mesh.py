"""The mesh of fields whose surface is known in closed form, and of noise against a plain loop.

The files are read back by parsers that are written here.
"""
import itertools
import json
import math
import struct

import numpy as np
import pytest
import torch

from agree import agree
from mvd import mesh
from mvd.tools.errors import UserError


def sphere(size=24, radius=7.0, centre=(11.3, 11.8, 11.6)):
    """values [n, n, n] = radius - distance: the surface at 0 is a sphere in grid coordinates."""
    axis = np.arange(size)
    axes = np.meshgrid(axis, axis, axis, indexing="ij")
    squares = [(x - c) ** 2 for x, c in zip(axes, centre)]
    return radius - np.sqrt(sum(squares))


def corners_of(vertices, faces):
    """The three corners of each face, [3, F, 3] float64."""
    return vertices[faces].astype(np.float64).transpose(1, 0, 2)


def area(vertices, faces):
    a, b, c = corners_of(vertices, faces)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2


def edges_of(face):
    """The three edges of a face (a, b, c), in the direction in which it runs along them."""
    a, b, c = face
    return (a, b), (b, c), (c, a)


def assert_closed(vertices, faces):
    """Each edge belongs to two faces that run along it in opposite directions.

    No vertex is unused or there twice.
    """
    seen = {}
    for face in faces.tolist():
        assert len(set(face)) == 3, f"face {face} has a vertex twice"
        for edge in edges_of(face):
            seen[edge] = seen.get(edge, 0) + 1
    for (a, b), count in seen.items():
        assert count == 1, f"{count} faces run from {a} to {b}"
        assert seen.get((b, a)) == 1, f"no face runs back from {b} to {a}: there is a hole"
    used = set(faces.ravel().tolist())
    assert used == set(range(len(vertices))), "a vertex belongs to no face"
    assert len(np.unique(vertices, axis=0)) == len(vertices), (
        "two vertices are at the same place: a crossing is kept 1/1000 off the ends of its edge")


def euler(vertices, faces):
    """Vertices - edges + faces: 2 per part without a hole through it."""
    edges = set()
    for face in faces.tolist():
        edges.update(frozenset(edge) for edge in edges_of(face))
    return len(vertices) - len(edges) + len(faces)


def assert_euler(vertices, faces, expected):
    """`euler` of a mesh is what it should be."""
    found = euler(vertices, faces)
    agree(found, expected, "vertices - edges + faces", "Is there a hole, or a part less?", atol=0)


# ---- against a plain loop --------------------------------------------------------------------

def plain_polygon(points, values, threshold):
    """The surface in one tetrahedron: its corners in order, counter-clockwise from outside.

    points: four corners [3]; values: the field there. Returns [] where nothing is crossed.
    """
    inside = [i for i in range(4) if values[i] > threshold]
    outside = [i for i in range(4) if values[i] <= threshold]
    if not inside or not outside:
        return []
    if len(inside) == 2:
        # Round the quadrilateral: each edge shares one end with the next.
        (a, b), (c, d) = inside, outside
        edges = [(a, c), (a, d), (b, d), (b, c)]
    else:
        edges = list(itertools.product(inside, outside))
    polygon = []
    for p, q in edges:
        t = (threshold - values[p]) / (values[q] - values[p])
        # Kept off the ends of the edge.
        t = min(max(t, 0.001), 0.999)
        polygon.append(points[p] + t * (points[q] - points[p]))
    normal = np.cross(polygon[1] - polygon[0], polygon[2] - polygon[0])
    outward = points[outside[0]] - points[inside[0]]
    if normal @ outward < 0:
        polygon.reverse()
    return polygon


def plain_marching_tetrahedra(values, threshold):
    """The polygons of all tetrahedra of all cells, one at a time; they share no vertices.

    What reaches the border is not closed.
    """
    nx, ny, nz = values.shape
    polygons = []
    for cell in itertools.product(range(nx - 1), range(ny - 1), range(nz - 1)):
        for order in itertools.permutations(range(3)):
            # Walk from one corner of the cell to the opposite one, along one axis at a time.
            point = np.array(cell)
            points = [point]
            for axis in order:
                point = point + np.eye(3, dtype=int)[axis]
                points.append(point)
            at_points = [float(values[tuple(point)]) for point in points]
            polygon = plain_polygon(points, at_points, threshold)
            if polygon:
                polygons.append(polygon)
    return polygons


def from_lowest(face):
    """The same face, (a, b, c) = (b, c, a) = (c, a, b), beginning with its lowest number."""
    start = face.index(min(face))
    return tuple(face[start:] + face[:start])


@pytest.mark.exercise(14)
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_the_mesh_is_that_of_a_plain_loop(threshold):
    """Every triangle of noise, which holds every case; a quadrilateral may be cut either way."""
    noise = np.random.default_rng(3).normal(size=(5, 6, 7))
    # Nothing reaches the border.
    values = np.pad(noise, 1, constant_values=-3.0)
    polygons = plain_marching_tetrahedra(values, threshold)
    vertices, faces = mesh.marching_tetrahedra(values, threshold)

    used = np.zeros(len(vertices), dtype=bool)
    found = {from_lowest(face) for face in faces.tolist()}
    count = 0
    for polygon in polygons:
        distance = np.abs(np.array(polygon)[:, None] - vertices).max(axis=2)
        off = distance.min(axis=1).max()
        assert off < 1e-5, (
            f"the plain loop has a vertex where the mesh has none within {off:.3g}. Is it at "
            "t = (threshold - low) / (high - low) of its edge, and the rim's 1 taken away?")
        numbers = distance.argmin(axis=1).tolist()
        used[numbers] = True
        count += len(polygon) - 2
        a, b, c = numbers[:3]
        ways = [[(a, b, c)]]
        if len(numbers) == 4:
            d = numbers[3]
            ways = [[(a, b, c), (a, c, d)], [(a, b, d), (b, c, d)]]
        there = [all(from_lowest(face) in found for face in way) for way in ways]
        assert any(there), "the mesh lacks a triangle, or has it the wrong way round"
    agree(len(faces), count, "the number of triangles", "Is each cut cell taken once?", atol=0)
    assert used.all(), "the mesh has other vertices too"


# ---- surfaces that are known -----------------------------------------------------------------

@pytest.mark.exercise(14)
def test_sphere_is_closed_round_and_faces_outward():
    centre, radius = np.array([11.3, 11.8, 11.6]), 7.0
    vertices, faces = mesh.marching_tetrahedra(sphere(), 0.0)
    assert vertices.dtype == np.float32, f"vertices are {vertices.dtype}, not float32"
    assert faces.dtype == np.int32, f"faces are {faces.dtype}, not int32"
    assert_closed(vertices, faces)
    assert_euler(vertices, faces, 2)
    distance = np.linalg.norm(vertices - centre, axis=1)
    # Linear interpolation is off by about edge^2 / (8 radius).
    words = "the distance of vertices from the centre"
    hint = "The indices of values are the coordinates; is the padding's 1 taken away?"
    agree(distance, np.full(len(distance), radius), words, hint, atol=0.06)
    # Positive: the faces look outward.
    true_volume = 4 / 3 * np.pi * radius ** 3
    hint = "A negative volume: the faces look inward."
    agree(mesh.volume(vertices, faces), true_volume, "the volume", hint, rtol=0.02, atol=0)
    agree(area(vertices, faces), 4 * np.pi * radius ** 2, "the area", rtol=0.02, atol=0)
    a, b, c = corners_of(vertices, faces)
    of_face = np.cross(b - a, c - a)
    from_centre = (a + b + c) / 3 - centre
    assert ((of_face * from_centre).sum(1) > 0).all(), "a face looks inward"
    normals = mesh.vertex_normals(vertices, faces)
    true_normals = (vertices - centre) / distance[:, None]
    assert ((normals * true_normals).sum(1) > 0.97).all(), "a vertex has another normal"
    agree(np.linalg.norm(normals, axis=1), 1, "the length of normals", atol=1e-6)


@pytest.mark.exercise(14)
def test_volume_converges():
    """Half the cell, a quarter of the error: second order, as linear interpolation promises."""
    error = []
    for n in (16, 32):
        ball = sphere(n, 0.3 * n, (0.49 * n, 0.5 * n, 0.51 * n))
        true_volume = 4 / 3 * np.pi * (0.3 * n) ** 3
        found = mesh.volume(*mesh.marching_tetrahedra(ball, 0.0))
        error.append(abs(found / true_volume - 1))
    hint = "Is the crossing interpolated, not put in the middle of the edge?"
    agree(error[0] / error[1], 4, "by what half the cell divides the error, 3 to 5", hint, atol=1)


@pytest.mark.exercise(14)
def test_threshold_moves_the_surface():
    for threshold in (-2.0, 3.0):
        ball = torch.from_numpy(sphere())
        vertices, faces = mesh.marching_tetrahedra(ball, threshold)
        true_volume = 4 / 3 * np.pi * (7 - threshold) ** 3
        words = f"the volume where values are above {threshold}"
        hint = "Inside is what is larger than the threshold."
        agree(mesh.volume(vertices, faces), true_volume, words, hint, rtol=0.04, atol=0)


@pytest.mark.exercise(14)
def test_plane_is_exact():
    """A field linear in space has its surface exactly where it should be in each tetrahedron."""
    axis = np.arange(9.0)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    field = 0.31 * x + 0.47 * y - 0.22 * z - 1.7
    vertices, _ = mesh.marching_tetrahedra(field, 0.0)
    within = ((vertices >= 0) & (vertices <= 8)).all(1)
    inner = vertices[within].astype(np.float64)
    assert len(inner) > 100, "the surface of a plane is not there"
    # Crossings are kept 1/1000 off the grid points.
    level = inner @ [0.31, 0.47, -0.22]
    agree(level, 1.7, "a linear field at the vertices, its threshold", atol=1e-3)


@pytest.mark.exercise(14)
@pytest.mark.parametrize("values, genus_0_parts", [
    # All inside: the border closes it.
    (np.ones((5, 5, 5)), 1),
    # Cut off by six sides.
    (sphere(16, 9.0, (8, 8, 8)), 1),
    # In a corner.
    (sphere(12, 5.0, (0, 0, 11)), 1),
])
def test_border_is_closed(values, genus_0_parts):
    vertices, faces = mesh.marching_tetrahedra(values, 0.0)
    assert_closed(vertices, faces)
    assert_euler(vertices, faces, 2 * genus_0_parts)
    hint = "the rim lies as far below the threshold as the largest value lies above it"
    low, high = vertices.min(), vertices.max()
    assert low >= -0.5, f"a vertex lies at {low:.3g}, more than half a cell outside: {hint}"
    assert high <= len(values) - 0.5, f"a vertex lies at {high:.3g} of {len(values)}: {hint}"
    assert mesh.volume(vertices, faces) > 0, "the faces look inward"


@pytest.mark.exercise(14)
def test_the_border_is_closed_half_a_cell_outside_at_most():
    """Also if what is inside is far more above the threshold than the rest is below it."""
    values = np.full((4, 4, 4), -1.0)
    values[0] = 100.0
    vertices, _ = mesh.marching_tetrahedra(values, 0.0)
    hint = "Is the rim as far below the threshold as the largest value is above it?"
    agree(vertices.min(), -0.5, "the outermost vertex", hint, atol=1e-6)


@pytest.mark.exercise(14)
def test_noise_and_special_values_are_closed():
    """Values exactly at the threshold, infinities and NaN must not open the surface."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(9, 9, 9))
    values[generator.random(values.shape) < 0.1] = 0.0
    values[1, 2, 3] = np.inf
    values[4, 4, 4] = -np.inf
    values[5, 6, 7] = np.nan
    vertices, faces = mesh.marching_tetrahedra(values, 0.0)
    assert np.isfinite(vertices).all(), "infinities and NaN of the field reach the vertices"
    assert_closed(vertices, faces)


@pytest.mark.exercise(14)
def test_empty():
    vertices, faces = mesh.marching_tetrahedra(np.zeros((4, 4, 4)), 1.0)
    assert vertices.shape == faces.shape == (0, 3), "a field below the threshold has a surface"
    with pytest.raises(UserError, match="density stays below 25"):
        mesh.extract(lambda p: p[:, 0] * 0 + 3, lambda p: p, resolution=8)


# ---- parts -----------------------------------------------------------------------------------

def test_specks_go_and_parts_stay():
    balls = [
        sphere(40, 8.0, (10, 12, 12)),
        sphere(40, 7.0, (29, 25, 27)),
        sphere(40, 0.9, (33, 4, 4)),
    ]
    vertices, faces = mesh.marching_tetrahedra(np.max(balls, axis=0), 0.0)
    assert_euler(vertices, faces, 6)
    kept, kept_faces = mesh.drop_specks(vertices, faces)
    assert_closed(kept, kept_faces)
    assert_euler(kept, kept_faces, 4)
    speck = np.linalg.norm(vertices - [33, 4, 4], axis=1) < 3
    expected = {tuple(v) for v in vertices[~speck].tolist()}
    assert {tuple(v) for v in kept.tolist()} == expected, "a vertex has moved, or is a speck's"
    assert_euler(*mesh.drop_specks(vertices, faces, share=0.9), 2)


def test_parts_of_a_long_chain():
    """Labels must travel to the far end of a strip whatever the order of its vertices."""
    order = np.random.default_rng(1).permutation(600)
    strip = np.stack([order[:-2], order[1:-1], order[2:]], 1)
    # Two strips: 299 and 300 vertices.
    faces = np.concatenate([strip[:299 - 2], strip[300:]])
    vertices = np.zeros((600, 3), np.float32)
    _, kept = mesh.drop_specks(vertices, faces, share=0.5)
    assert len(kept) == len(faces), "a part as large as the share went"
    _, kept = mesh.drop_specks(vertices, faces, share=1.0)
    assert len(kept) == 298, "a part below the share stayed, or one above it went"


# ---- fewer and smoother ----------------------------------------------------------------------

def shortest_and_longest(vertices, faces):
    """The median over the faces of shortest side / longest side: 1 if they are equilateral."""
    a, b, c = corners_of(vertices, faces)
    sides = [np.linalg.norm(p - q, axis=1) for p, q in ((a, b), (b, c), (c, a))]
    return np.median(np.min(sides, axis=0) / np.max(sides, axis=0))


def test_merging_leaves_a_third_of_a_sphere():
    vertices, faces = mesh.marching_tetrahedra(sphere(), 0.0)
    merged, merged_faces = mesh.merge_vertices(vertices, faces)
    assert merged.dtype == np.float32, f"vertices are {merged.dtype}, not float32"
    assert merged_faces.dtype == np.int32, f"faces are {merged_faces.dtype}, not int32"
    assert_closed(merged, merged_faces)
    assert_euler(merged, merged_faces, 2)
    assert len(merged) < 0.33 * len(vertices), (
        f"{len(merged)} of {len(vertices)} vertices are left, not a third")
    # Means of points of a sphere lie below it: by at most a half of 0.87² / (2 radius).
    distance = np.linalg.norm(merged - [11.3, 11.8, 11.6], axis=1)
    agree(distance, 7, "the distance of merged vertices from the centre", atol=0.06)
    true_volume = 4 / 3 * np.pi * 343
    agree(mesh.volume(merged, merged_faces), true_volume, "the volume", rtol=0.02, atol=0)
    assert shortest_and_longest(vertices, faces) < 0.6, "the case has no thin triangles"
    assert shortest_and_longest(merged, merged_faces) > 0.65, "merging leaves thin triangles"


def test_merged_vertices_are_means_of_those_nearest_to_a_grid_point():
    vertices, faces = mesh.marching_tetrahedra(sphere(), 0.0)
    groups = {}
    for vertex in vertices.tolist():
        nearest = tuple(math.floor(x + 0.5) for x in vertex)
        groups.setdefault(nearest, []).append(vertex)
    expected = np.array(sorted(np.mean(group, axis=0).tolist() for group in groups.values()))
    merged, _ = mesh.merge_vertices(vertices, faces)
    found = merged[np.lexsort(merged.T[::-1])]
    agree(found, expected, "merged vertices, the mean of their group")


@pytest.mark.parametrize("seed", range(4))
def test_merging_noise_opens_and_closes_nothing(seed):
    """It is full of sheets and bars thinner than a cell, and of the cases that fall back."""
    noise = np.random.default_rng(seed).normal(size=(12, 12, 12))
    vertices, faces = mesh.marching_tetrahedra(noise, 0.3 * seed)
    merged, merged_faces = mesh.merge_vertices(vertices, faces)
    assert len(merged) < 0.8 * len(vertices), "the case merges nothing"
    assert_closed(merged, merged_faces)
    assert_euler(merged, merged_faces, euler(vertices, faces))
    parts = [len(np.unique(mesh.connected_parts(f))) for f in (faces, merged_faces)]
    assert parts[0] == parts[1], "a part is lost, or two have become one"


@pytest.mark.parametrize("cells", [
    [(2, 2, 2)],
    [(2, 2, 2), (2, 2, 3)],
    [(2, 2, 2), (3, 3, 3)],
    [(2, 2, 2), (2, 3, 2), (3, 3, 2)],
    # A ring, which has a hole.
    [(x, y, 2) for x in (1, 2, 3) for y in (1, 2, 3) if (x, y) != (2, 2)],
])
def test_the_smallest_parts_survive_merging(cells):
    """All their vertices lie near one grid point or two: they would be a point or flat."""
    values = np.full((6, 6, 6), -1.0)
    for cell in cells:
        values[cell] = 0.5
    vertices, faces = mesh.marching_tetrahedra(values, 0.0)
    merged, merged_faces = mesh.merge_vertices(vertices, faces)
    assert_closed(merged, merged_faces)
    assert_euler(merged, merged_faces, euler(vertices, faces))
    assert mesh.volume(merged, merged_faces) > 0.3 * mesh.volume(vertices, faces), (
        "merging takes most of the volume")


def test_thin_parts_survive_merging():
    """A sheet half a cell thick and a bar of one grid point: two sides near each point."""
    values = np.full((16, 16, 16), -1.0)
    values[3, 3:13, 3:13] = 1 / 3
    values[8, 8, 2:14] = 1 / 3
    vertices, faces = mesh.marching_tetrahedra(values, 0.0)
    merged, merged_faces = mesh.merge_vertices(vertices, faces)
    assert_closed(merged, merged_faces)
    parts = len(np.unique(mesh.connected_parts(merged_faces)))
    agree(parts, 2, "the number of parts", atol=0)
    # The rim of the sheet becomes an edge, the ends of the bar points.
    before = mesh.volume(vertices, faces)
    assert mesh.volume(merged, merged_faces) > 0.75 * before, (
        "merging takes more than a quarter of the volume")


def test_smoothing_multiplies_ripples_as_it_says():
    """By the eigenvectors of a dense matrix: those of the means with eigenvalue 1 - k."""
    vertices, faces = mesh.merge_vertices(*mesh.marching_tetrahedra(sphere(10, 3.0, [4.6] * 3), 0))
    means = np.zeros((len(vertices), len(vertices)))
    for face in faces.tolist():
        for a, b in edges_of(face):
            means[a, b] = 1
    means /= means.sum(axis=1, keepdims=True)
    eigenvalues, ripples = np.linalg.eig(means)
    k = 1 - eigenvalues
    for rounds in (1, 10):
        factor = ((1 - 0.5 * k) * (1 + 0.53 * k)) ** rounds
        inverse = np.linalg.inv(ripples)
        expected = (ripples * factor) @ (inverse @ vertices)
        assert np.abs(expected.imag).max() < 1e-9, "the oracle is not real"
        found = mesh.smooth(vertices, faces, rounds)
        assert found.dtype == np.float32, f"vertices are {found.dtype}, not float32"
        words = f"ripples after {rounds} rounds"
        agree(found, expected.real, words, "(1 - 0.5 k) (1 + 0.53 k) per round?", atol=1e-4)


def test_smoothing_takes_the_noise_and_leaves_the_size():
    centre = np.array([11.3, 11.8, 11.6])
    vertices, faces = mesh.merge_vertices(*mesh.marching_tetrahedra(sphere(), 0.0))
    outward = (vertices - centre) / 7
    noise = np.random.default_rng(0).normal(0, 0.2, (len(vertices), 1))
    smoothed = mesh.smooth(vertices + noise * outward, faces)
    distance = np.linalg.norm(smoothed - centre, axis=1)
    assert distance.std() < 0.4 * 0.2, f"noise of 0.2 is {distance.std():.3f} after smoothing"
    agree(distance.mean(), 7, "the radius after smoothing", "Does it shrink?", atol=0.05)
    plain = mesh.smooth(vertices, faces)
    before = mesh.volume(vertices, faces)
    agree(mesh.volume(plain, faces), before, "the volume after smoothing", rtol=0.01, atol=0)


# ---- what a mesh is like ---------------------------------------------------------------------

# The unit cube's corners in the order of mesh.CORNERS, and its sides as quadrilaterals,
# counter-clockwise seen from outside.
CUBE = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
SIDES = [
    (0, 1, 3, 2),    # x = 0
    (4, 6, 7, 5),    # x = 1
    (0, 4, 5, 1),    # y = 0
    (2, 3, 7, 6),    # y = 1
    (0, 2, 6, 4),    # z = 0
    (1, 5, 7, 3),    # z = 1
]


def cube(edge=1.0, origin=(0, 0, 0)):
    """(vertices [8, 3], faces [12, 3]) of a cube; faces 0 and 1 are the side x = origin."""
    faces = []
    for a, b, c, d in SIDES:
        faces += [(a, b, c), (a, c, d)]
    return CUBE * edge + origin, np.array(faces)


def both(first, second):
    """Two meshes as one."""
    vertices = np.concatenate([first[0], second[0]])
    faces = np.concatenate([first[1], second[1] + len(first[0])])
    return vertices, faces


def test_volume_of_cubes():
    """Wherever they are; a cube that looks inward is a hollow in the other."""
    agree(mesh.volume(*cube(2.0, (5, -7, 3))), 8, "the volume of a cube of edge 2")
    two = both(cube(2.0), cube(1.0, (-4, 0, 0)))
    agree(mesh.volume(*two), 9, "the volume of two cubes")
    corners, faces = cube(1.0, (0.5, 0.5, 0.5))
    hollow = corners, faces[:, ::-1]
    agree(mesh.volume(*hollow), -1, "the volume of a cube inside out")
    agree(mesh.volume(*both(cube(2.0), hollow)), 7, "the volume of a cube with a hollow")
    agree(mesh.volume(np.zeros((0, 3)), np.zeros((0, 3), int)), 0, "the volume of nothing")


def test_watertight():
    vertices, faces = cube()
    two = both(cube(), cube(1.0, (3, 0, 0)))
    assert mesh.is_watertight(faces), "a cube is closed"
    assert mesh.is_watertight(two[1]), "two cubes are closed"
    assert mesh.is_watertight(faces[:, ::-1]), "turned inside out it is closed still"
    assert not mesh.is_watertight(faces[1:]), "half a side is missing"
    assert not mesh.is_watertight(two[1][:-2]), "a side of the second cube is missing"
    assert not mesh.is_watertight(np.concatenate([faces, faces[:1]])), "a face is there twice"
    turned = faces.copy()
    turned[0] = turned[0, ::-1]
    assert not mesh.is_watertight(turned), "one face looks inward"
    # A second cube has its edge 0, 1 where the first has 6, 7: four faces meet there.
    joined = np.array([6, 7, 8, 9, 10, 11, 12, 13])[faces]
    assert not mesh.is_watertight(np.concatenate([faces, joined])), "an edge of four faces"
    assert not mesh.is_watertight(np.zeros((0, 3), int)), "no faces close nothing"


def test_connected_parts():
    vertices, faces = both(cube(), cube(1.0, (3, 0, 0)))
    order = np.random.default_rng(2).permutation(24)
    part = mesh.connected_parts(faces[order])
    agree(len(np.unique(part)), 2, "the number of parts of two cubes", atol=0)
    assert np.array_equal(part == part[order == 0], order < 12), "a face is in the wrong part"
    # Cubes that have one corner in common hang together.
    joined = mesh.connected_parts(np.where(faces == 8, 7, faces))
    agree(len(np.unique(joined)), 1, "the number of parts of cubes with a common corner", atol=0)
    agree(len(mesh.connected_parts(faces[:0])), 0, "the number of parts of nothing", atol=0)


# ---- from a field ----------------------------------------------------------------------------

CENTRE = [0.2, -0.1, 0.3]


@pytest.fixture(scope="module")
def ball():
    """A ball of density, coloured by position."""
    calls = []

    def density(points):
        calls.append(len(points))
        distance = (points - torch.tensor(CENTRE)).norm(dim=-1)
        return 25 + 200 * (radius - distance)

    def colour(points):
        return (points * 1.5 + 1) / 2

    # As of a field that learns: nothing of it is differentiated.
    radius = torch.tensor(0.5, requires_grad=True)

    result = mesh.extract(density, colour, resolution=44)
    assert sum(calls[:2]) == 44 ** 3, "not one density per cell"
    assert max(calls) <= 65536 < 44 ** 3, "too many points at once"
    return result


def test_extract_in_world_units(ball):
    distance = np.linalg.norm(ball.vertices - CENTRE, axis=1)
    agree(distance, 0.5, "the radius of a ball in world units", atol=3e-3)
    # Along rays to the centre.
    depth = np.linspace(-0.05, 0.25, 3001)
    optical = (25 + 200 * depth).clip(0) * 1e-4
    weights = np.exp(-np.cumsum(optical)) * optical
    # The radius at which the colour, which is linear, is seen.
    seen_at = 0.5 - (weights * depth).sum() / weights.sum()
    on_average = CENTRE + (ball.vertices - CENTRE) * seen_at / 0.5
    expected = np.clip((on_average * 1.5 + 1) / 2, 0, 1)
    agree(ball.colours, expected, "the colours that a ray to the centre collects", atol=0.02)
    # Clamped: the ball reaches 0.8 in z.
    agree(ball.colours.max(), 1, "the greatest colour", "Are colours clamped?", atol=0)
    for array in (ball.vertices, ball.colours, ball.normals):
        assert array.dtype == np.float32, f"an array of the mesh is {array.dtype}, not float32"


def test_colours_are_those_that_a_ray_collects():
    """Half a space of density 40, its colour the depth.

    The closed form is the mean depth of a homogeneous medium.
    """
    points = torch.zeros(3, 3)
    inward = torch.tensor([1.0, 0.0, 0.0]).expand(3, 3)

    def density(x):
        return 40.0 * (x[:, 0] > 0)

    def colour(x):
        return x[:, :1].expand(-1, 3)

    seen = mesh.seen_colours(density, colour, points, inward, samples=3000)
    passed = math.exp(-40 * 0.25)
    mean_depth = 1 / 40 - 0.25 * passed / (1 - passed)
    agree(seen, mean_depth, "the mean depth of a homogeneous medium", rtol=5e-3, atol=0)
    # Where hardly anything is dense, all samples count the same: their mean is the middle.
    thin = mesh.seen_colours(
        lambda x: torch.full_like(x[:, 0], 1e-3), lambda x: x, points, inward, start=-0.1, end=0.3)
    middle = points + 0.1 * inward
    agree(thin, middle, "the mean of thin samples", "Are the samples off centre?", atol=1e-4)
    # Where nothing is seen, nothing is divided by 0.
    nothing = mesh.seen_colours(lambda x: 0 * x[:, 0], lambda x: x, points, inward)
    agree(nothing, 0, "the colour of nothing", atol=0)


def mean_angle(vertices, faces):
    """The mean angle between the normals of faces that share an edge, in degrees."""
    a, b, c = corners_of(vertices, faces)
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    face_at = {}
    for number, face in enumerate(faces.tolist()):
        for edge in edges_of(face):
            face_at[edge] = number
    cosines = [normals[f] @ normals[face_at[end, start]] for (start, end), f in face_at.items()]
    return np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean()


def test_extract_is_smooth_where_the_field_is_rough():
    """A ball of noise: a third of the vertices, and still an angle that is smaller."""
    noise = np.random.default_rng(5).normal(0, 0.02, 32 ** 3)
    noise = torch.from_numpy(noise).float()
    centres = (torch.arange(32) + 0.5) / 16 - 1

    def density(points):
        cell = torch.bucketize(points.contiguous(), centres - 1 / 32, right=True) - 1
        x, y, z = cell.clamp(0, 31).T
        return 25 + 200 * (0.6 - points.norm(dim=-1) + noise[(x * 32 + y) * 32 + z])

    rough = mesh.sample_density(density, 32)
    vertices, faces = mesh.marching_tetrahedra(rough, 25.0)
    result = mesh.extract(density, lambda p: p * 0, resolution=32)
    assert len(result.vertices) < 0.4 * len(vertices), "vertices are not merged"
    assert mean_angle(result.vertices, result.faces) < 0.75 * mean_angle(vertices, faces), (
        "extract is not smoother than marching tetrahedra")
    true_volume = 4 / 3 * np.pi * 0.6 ** 3
    agree(mesh.volume(*result[:2]), true_volume, "the volume of a rough ball", rtol=0.03, atol=0)
    assert mesh.is_watertight(result.faces), "the mesh of a rough ball is open"


def test_extract_fills_the_box_when_everything_is_dense():
    box = mesh.extract(lambda p: p[:, 0] * 0 + 100, lambda p: p * 0, resolution=10)
    # Smoothing rounds the edges, and swings a little over.
    agree(box.vertices.min(0), -1, "the low sides of the box", atol=0.03)
    agree(box.vertices.max(0), 1, "the high sides of the box", atol=0.03)


# ---- files -----------------------------------------------------------------------------------

COMPONENTS = {5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC3": 3}


def read_glb(data):
    """Independent reader: bytes -> (document, [array of each accessor])."""
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data)), (
        "the header is not glTF, 2, the length")
    text_length, text_kind = struct.unpack_from("<I4s", data, 12)
    bin_length, bin_kind = struct.unpack_from("<I4s", data, 20 + text_length)
    assert text_kind == b"JSON" and bin_kind == b"BIN\0", "the chunks are not JSON, then BIN"
    assert text_length % 4 == 0 and bin_length % 4 == 0, "a chunk does not end at a multiple of 4"
    assert 28 + text_length + bin_length == length, "the chunks do not fill the file"
    document = json.loads(data[20:20 + text_length])
    blob = data[28 + text_length:]
    assert len(document["buffers"]) == 1, "there is not one buffer"
    buffer_length = document["buffers"][0]["byteLength"]
    assert 0 <= bin_length - buffer_length <= 3, "the buffer is not the binary chunk"
    arrays = []
    for accessor in document["accessors"]:
        view = document["bufferViews"][accessor["bufferView"]]
        kind = COMPONENTS[accessor["componentType"]]
        width = WIDTHS[accessor["type"]]
        size = accessor["count"] * width
        offset = view["byteOffset"]
        assert offset % 4 == 0, "an array does not begin at a multiple of 4"
        assert view["byteLength"] == size * np.dtype(kind).itemsize, "a view has another length"
        assert offset + view["byteLength"] <= buffer_length, "a view ends behind the buffer"
        array = np.frombuffer(blob, kind, size, offset)
        arrays.append(array.reshape(-1, width))
    return document, arrays


def test_glb(ball, tmp_path):
    mesh.write_glb(tmp_path / "ball.glb", ball)
    assert [p.name for p in tmp_path.iterdir()] == ["ball.glb"], "another file is left"
    document, arrays = read_glb((tmp_path / "ball.glb").read_bytes())
    assert document["asset"]["version"] == "2.0"
    scene = document["scenes"][document["scene"]]
    node = document["nodes"][scene["nodes"][0]]
    primitive, = document["meshes"][node["mesh"]]["primitives"]
    attributes = primitive["attributes"]
    positions = arrays[attributes["POSITION"]]
    normals = arrays[attributes["NORMAL"]]
    colours = arrays[attributes["COLOR_0"]]
    indices = arrays[primitive["indices"]].reshape(-1, 3)
    # y is up, and the front, +x of our world, looks toward +z. Our +y, which is on the left
    # of who looks along +x, becomes +x.
    hint = "glTF's y is our z, its z our x, its x our y."
    agree(positions, ball.vertices[:, [1, 2, 0]], "positions in the file", hint, atol=0)
    accessor = document["accessors"][attributes["POSITION"]]
    assert accessor["min"] == positions.min(0).tolist(), "min is not the least position"
    assert accessor["max"] == positions.max(0).tolist(), "max is not the greatest position"
    assert len(positions) == len(normals) == len(colours), "arrays differ in length"
    agree(indices, ball.faces, "faces in the file", atol=0)
    # A positive volume: turned, not mirrored.
    true_volume = 4 / 3 * np.pi * 0.125
    found = mesh.volume(positions, indices.astype(np.int64))
    hint = "A negative volume: mirrored, not turned."
    agree(found, true_volume, "the volume of what the file holds", hint, rtol=0.02, atol=0)
    outward = positions - [-0.1, 0.3, 0.2]
    assert (outward * normals).sum(1).min() > 0.48, "a normal in the file does not look outward"
    srgb = []
    for c in colours[:500].ravel().tolist():
        if c <= 0.0031308:
            srgb.append(c * 12.92)
        else:
            srgb.append(1.055 * c ** (1 / 2.4) - 0.055)
    expected = ball.colours[:500].ravel()
    agree(srgb, expected, "colours in the file, as sRGB", "Are they linear in light?")
    # Colours of 16 bits are wrong in trimesh.
    assert colours.dtype == np.float32, f"colours are {colours.dtype}, not float32"
    # Readers that look for a texture where there is a material would miss the colours.
    assert "material" not in primitive, "the mesh has a material"
    assert "materials" not in document, "the file has a material"


@pytest.mark.parametrize("count, kind", [(65535, 5123), (65536, 5125)])
def test_vertex_numbers_take_two_bytes_as_long_as_they_fit(count, kind, tmp_path):
    arrays = np.zeros((3, count, 3), np.float32)
    # An odd number of faces: 2-byte numbers do not end at a multiple of 4 bytes.
    faces = np.array([[0, 1, count - 1]], np.int32)
    mesh.write_glb(tmp_path / "large.glb", mesh.Mesh(arrays[0], faces, arrays[1], arrays[2]))
    document, found = read_glb((tmp_path / "large.glb").read_bytes())
    assert document["accessors"][3]["componentType"] == kind, (
        f"vertex numbers are not of type {kind}")
    agree(found[3].ravel(), [0, 1, count - 1], "the numbers of vertices in the file", atol=0)


def test_linear_colour_of_mid_grey(ball, tmp_path):
    # sRGB 188 is half of the light.
    grey = ball._replace(colours=np.full_like(ball.colours, 188 / 255))
    mesh.write_glb(tmp_path / "grey.glb", grey)
    _, arrays = read_glb((tmp_path / "grey.glb").read_bytes())
    agree(arrays[2][0], 0.5, "sRGB 188, half of the light", atol=0.003)


def test_obj(ball, tmp_path):
    mesh.write_obj(tmp_path / "ball.obj", ball)
    vertices, faces = [], []
    for line in (tmp_path / "ball.obj").read_text().splitlines():
        kind, *numbers = line.split()
        if kind == "v":
            vertices.append([float(number) for number in numbers])
        else:
            assert kind == "f", f"a line of another kind: {line}"
            faces.append([int(number) for number in numbers])
    vertices = np.array(vertices)
    agree(vertices[:, :3], ball.vertices[:, [1, 2, 0]], "positions in the file", atol=1e-6)
    agree(vertices[:, 3:], ball.colours, "colours in the file", atol=1e-4)
    agree(faces, ball.faces + 1, "faces in the file", "OBJ counts from 1.", atol=0)


def test_unwritable(ball, tmp_path):
    (tmp_path / "file").write_text("")
    for write in (mesh.write_glb, mesh.write_obj):
        with pytest.raises(UserError, match="cannot write"):
            write(tmp_path / "file" / "out", ball)
