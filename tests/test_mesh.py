"""The mesh of fields whose surface is known in closed form; the files are read back by parsers written here."""
import json
import math
import struct

import numpy as np
import pytest
import torch

from mvd import mesh
from mvd.tools.errors import UserError


def sphere(size=24, radius=7.0, centre=(11.3, 11.8, 11.6)):
    """values [n, n, n] = radius - distance: positive inside; the surface at 0 is a sphere in grid coordinates."""
    axes = np.meshgrid(*[np.arange(size)] * 3, indexing="ij")
    return radius - np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, centre)))


def volume(vertices, faces):
    a, b, c = vertices[faces].astype(np.float64).transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def area(vertices, faces):
    a, b, c = vertices[faces].astype(np.float64).transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2


def assert_closed(vertices, faces):
    """Each edge belongs to two faces that run along it in opposite directions; no vertex is unused or there twice."""
    seen = {}
    for a, b, c in faces.tolist():
        assert len({a, b, c}) == 3
        for edge in ((a, b), (b, c), (c, a)):
            seen[edge] = seen.get(edge, 0) + 1
    assert all(count == 1 and seen.get((b, a)) == 1 for (a, b), count in seen.items())
    assert set(faces.ravel().tolist()) == set(range(len(vertices)))
    assert len(np.unique(vertices, axis=0)) == len(vertices)


def euler(vertices, faces):
    edges = {frozenset(e) for a, b, c in faces.tolist() for e in ((a, b), (b, c), (c, a))}
    return len(vertices) - len(edges) + len(faces)


def test_sphere_is_closed_round_and_faces_outward():
    centre, radius = np.array([11.3, 11.8, 11.6]), 7.0
    vertices, faces = mesh.marching_tetrahedra(sphere(), 0.0)
    assert vertices.dtype == np.float32 and faces.dtype == np.int32
    assert_closed(vertices, faces)
    assert euler(vertices, faces) == 2
    distance = np.linalg.norm(vertices - centre, axis=1)
    assert np.abs(distance - radius).max() < 0.06                   # linear interpolation: about edge^2 / (8 radius)
    assert volume(vertices, faces) == pytest.approx(4 / 3 * np.pi * radius ** 3, rel=0.02)       # > 0: outward
    assert area(vertices, faces) == pytest.approx(4 * np.pi * radius ** 2, rel=0.02)
    a, b, c = vertices[faces].astype(np.float64).transpose(1, 0, 2)
    assert ((np.cross(b - a, c - a) * ((a + b + c) / 3 - centre)).sum(1) > 0).all()
    normals = mesh.vertex_normals(vertices, faces)
    assert ((normals * (vertices - centre) / distance[:, None]).sum(1) > 0.97).all()
    assert np.linalg.norm(normals, axis=1) == pytest.approx(1, abs=1e-6)


def test_volume_converges():
    """Half the cell, a quarter of the error: second order, as linear interpolation promises."""
    error = [abs(volume(*mesh.marching_tetrahedra(sphere(n, 0.3 * n, (0.49 * n, 0.5 * n, 0.51 * n)), 0.0))
                 / (4 / 3 * np.pi * (0.3 * n) ** 3) - 1) for n in (16, 32)]
    assert 3 < error[0] / error[1] < 5


def test_threshold_moves_the_surface():
    for threshold in (-2.0, 3.0):
        vertices, faces = mesh.marching_tetrahedra(torch.from_numpy(sphere()), threshold)
        assert volume(vertices, faces) == pytest.approx(4 / 3 * np.pi * (7 - threshold) ** 3, rel=0.04)


def test_plane_is_exact():
    """A field linear in space has its surface exactly where it should be, whatever the tetrahedron."""
    x, y, z = np.meshgrid(*[np.arange(9.0)] * 3, indexing="ij")
    field = 0.31 * x + 0.47 * y - 0.22 * z - 1.7
    vertices, _ = mesh.marching_tetrahedra(field, 0.0)
    inner = vertices[((vertices >= 0) & (vertices <= 8)).all(1)].astype(np.float64)
    assert len(inner) > 100
    assert np.abs(inner @ [0.31, 0.47, -0.22] - 1.7).max() < 1e-3   # crossings are kept 1/1000 off the grid points


@pytest.mark.parametrize("values, genus_0_parts", [
    (np.ones((5, 5, 5)), 1),                                                        # all inside: the border closes it
    (sphere(16, 9.0, (8, 8, 8)), 1),                                                # cut off by six sides
    (sphere(12, 5.0, (0, 0, 11)), 1),                                               # in a corner
])
def test_border_is_closed(values, genus_0_parts):
    vertices, faces = mesh.marching_tetrahedra(values, 0.0)
    assert_closed(vertices, faces)
    assert euler(vertices, faces) == 2 * genus_0_parts
    assert vertices.min() >= -0.5 and vertices.max() <= values.shape[0] - 0.5 and volume(vertices, faces) > 0


def test_noise_and_special_values_are_closed():
    """Random fields hold every case; values exactly at the threshold, infinities and NaN must not open the surface."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(9, 9, 9))
    values[generator.random(values.shape) < 0.1] = 0.0
    values[1, 2, 3], values[4, 4, 4], values[5, 6, 7] = np.inf, -np.inf, np.nan
    vertices, faces = mesh.marching_tetrahedra(values, 0.0)
    assert np.isfinite(vertices).all()
    assert_closed(vertices, faces)


def test_empty():
    vertices, faces = mesh.marching_tetrahedra(np.zeros((4, 4, 4)), 1.0)
    assert vertices.shape == (0, 3) and faces.shape == (0, 3)
    with pytest.raises(UserError, match="density stays below 25"):
        mesh.extract(lambda p: p[:, 0] * 0 + 3, lambda p: p, resolution=8)


def test_specks_go_and_parts_stay():
    values = np.max([sphere(40, 8.0, (10, 12, 12)), sphere(40, 7.0, (29, 25, 27)), sphere(40, 0.9, (33, 4, 4))], axis=0)
    vertices, faces = mesh.marching_tetrahedra(values, 0.0)
    assert euler(vertices, faces) == 6
    kept, kept_faces = mesh.drop_specks(vertices, faces)
    assert_closed(kept, kept_faces)
    assert euler(kept, kept_faces) == 4
    speck = np.linalg.norm(vertices - [33, 4, 4], axis=1) < 3
    assert {tuple(v) for v in kept.tolist()} == {tuple(v) for v in vertices[~speck].tolist()}
    assert euler(*mesh.drop_specks(vertices, faces, share=0.9)) == 2


def test_parts_of_a_long_chain():
    """Labels must travel to the far end of a strip whatever the order of its vertices."""
    order = np.random.default_rng(1).permutation(600)
    strip = np.stack([order[:-2], order[1:-1], order[2:]], 1)
    faces = np.concatenate([strip[:299 - 2], strip[300:]])          # two strips: 299 and 300 vertices
    _, kept = mesh.drop_specks(np.zeros((600, 3), np.float32), faces, share=0.5)
    assert len(kept) == len(faces)
    _, kept = mesh.drop_specks(np.zeros((600, 3), np.float32), faces, share=1.0)
    assert len(kept) == 298


@pytest.fixture(scope="module")
def ball():
    """A ball of density round (0.2, -0.1, 0.3), coloured by position."""
    calls = []

    def density(points):
        calls.append(len(points))
        return 25 + 200 * (0.5 - (points - torch.tensor([0.2, -0.1, 0.3])).norm(dim=-1))
    result = mesh.extract(density, lambda points: (points * 1.5 + 1) / 2, resolution=44)
    assert sum(calls[:2]) == 44 ** 3 and max(calls) <= 65536 < 44 ** 3
    return result


def test_extract_in_world_units(ball):
    assert np.abs(np.linalg.norm(ball.vertices - [0.2, -0.1, 0.3], axis=1) - 0.5).max() < 3e-3
    centre, depth = np.array([0.2, -0.1, 0.3]), np.linspace(-0.05, 0.25, 3001)                # along rays to the centre
    optical = (25 + 200 * depth).clip(0) * 1e-4
    weights = np.exp(-np.cumsum(optical)) * optical
    seen_at = 0.5 - (weights * depth).sum() / weights.sum()         # the radius at which the colour, which is linear, is seen
    on_average = centre + (ball.vertices - centre) * seen_at / 0.5
    assert ball.colours == pytest.approx(np.clip((on_average * 1.5 + 1) / 2, 0, 1), abs=0.02)
    assert ball.colours.max() == 1.0                                # clamped: the ball reaches 0.8 in z
    assert all(array.dtype == np.float32 for array in (ball.vertices, ball.colours, ball.normals))


def test_colours_are_those_that_a_ray_collects():
    """Half a space of density 40, its colour the depth: the closed form of the mean depth of a homogeneous medium."""
    points, inward = torch.zeros(3, 3), torch.tensor([1.0, 0.0, 0.0]).expand(3, 3)
    seen = mesh.seen_colours(lambda x: 40.0 * (x[:, 0] > 0), lambda x: x[:, :1].expand(-1, 3), points, inward, samples=3000)
    mean_depth = 1 / 40 - 0.25 * math.exp(-40 * 0.25) / (1 - math.exp(-40 * 0.25))
    assert seen.numpy() == pytest.approx(mean_depth, rel=5e-3)
    nothing = mesh.seen_colours(lambda x: 0 * x[:, 0], lambda x: x, points, inward)
    assert torch.equal(nothing, torch.zeros(3, 3))                  # nothing is seen, and nothing is divided by 0


def test_extract_fills_the_box_when_everything_is_dense():
    box = mesh.extract(lambda p: p[:, 0] * 0 + 100, lambda p: p * 0, resolution=10)
    assert box.vertices.min(0) == pytest.approx(-1) and box.vertices.max(0) == pytest.approx(1)


def read_glb(data):
    """Independent reader: -> (document, [array of each accessor])."""
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    text_length, text_kind = struct.unpack_from("<I4s", data, 12)
    bin_length, bin_kind = struct.unpack_from("<I4s", data, 20 + text_length)
    assert text_kind == b"JSON" and bin_kind == b"BIN\0"
    assert text_length % 4 == 0 and bin_length % 4 == 0 and 28 + text_length + bin_length == length
    document = json.loads(data[20:20 + text_length])
    blob = data[28 + text_length:]
    assert len(document["buffers"]) == 1 and 0 <= bin_length - document["buffers"][0]["byteLength"] <= 3
    arrays = []
    for accessor in document["accessors"]:
        view = document["bufferViews"][accessor["bufferView"]]
        kind = {5123: "<u2", 5125: "<u4", 5126: "<f4"}[accessor["componentType"]]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        assert view["byteOffset"] % 4 == 0
        assert view["byteLength"] == accessor["count"] * width * np.dtype(kind).itemsize
        assert view["byteOffset"] + view["byteLength"] <= document["buffers"][0]["byteLength"]
        arrays.append(np.frombuffer(blob, kind, accessor["count"] * width, view["byteOffset"]).reshape(-1, width))
    return document, arrays


def test_glb(ball, tmp_path):
    mesh.write_glb(tmp_path / "ball.glb", ball)
    assert [p.name for p in tmp_path.iterdir()] == ["ball.glb"]
    document, arrays = read_glb((tmp_path / "ball.glb").read_bytes())
    assert document["asset"]["version"] == "2.0"
    node = document["nodes"][document["scenes"][document["scene"]]["nodes"][0]]
    primitive, = document["meshes"][node["mesh"]]["primitives"]
    positions, normals, colours = (arrays[primitive["attributes"][name]] for name in ("POSITION", "NORMAL", "COLOR_0"))
    indices = arrays[primitive["indices"]].reshape(-1, 3)
    # y up and the front, +x of our world, toward +z; our +y, the left of who looks along +x, becomes +x.
    assert np.array_equal(positions[:, 1], ball.vertices[:, 2]) and np.array_equal(positions[:, 2], ball.vertices[:, 0])
    assert np.array_equal(positions[:, 0], ball.vertices[:, 1])
    accessor = document["accessors"][primitive["attributes"]["POSITION"]]
    assert accessor["min"] == positions.min(0).tolist() and accessor["max"] == positions.max(0).tolist()
    assert len(positions) == len(normals) == len(colours) and np.array_equal(indices, ball.faces)
    # A positive volume: turned, not mirrored.
    assert volume(positions, indices.astype(np.int64)) == pytest.approx(4 / 3 * np.pi * 0.125, rel=0.02)
    assert ((positions - [-0.1, 0.3, 0.2]) * normals).sum(1).min() > 0.48
    assert document["accessors"][primitive["attributes"]["COLOR_0"]]["normalized"] is True
    assert (colours[:, 3] == 65535).all()
    srgb = [c / 65535 * 12.92 if c <= 0.0031308 * 65535 else 1.055 * (c / 65535) ** (1 / 2.4) - 0.055
            for c in colours[:500, :3].ravel().tolist()]
    assert srgb == pytest.approx(ball.colours[:500].ravel().tolist(), abs=2e-4)
    material = document["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert material["metallicFactor"] == 0


def test_linear_colour_of_mid_grey(ball, tmp_path):
    grey = ball._replace(colours=np.full_like(ball.colours, 188 / 255))              # sRGB 188 is half of the light
    mesh.write_glb(tmp_path / "grey.glb", grey)
    assert read_glb((tmp_path / "grey.glb").read_bytes())[1][2][0, :3] / 65535 == pytest.approx([0.5] * 3, abs=0.003)


def test_obj(ball, tmp_path):
    mesh.write_obj(tmp_path / "ball.obj", ball)
    rows = [line.split() for line in (tmp_path / "ball.obj").read_text().splitlines()]
    vertices = np.array([[float(x) for x in row[1:]] for row in rows if row[0] == "v"])
    faces = np.array([[int(x) for x in row[1:]] for row in rows if row[0] == "f"])
    assert len(vertices) + len(faces) == len(rows)
    assert vertices[:, :3] == pytest.approx(ball.vertices[:, [1, 2, 0]], abs=1e-6)
    assert vertices[:, 3:] == pytest.approx(ball.colours, abs=1e-4)
    assert np.array_equal(faces, ball.faces + 1)


def test_unwritable(ball, tmp_path):
    (tmp_path / "file").write_text("")
    for write in (mesh.write_glb, mesh.write_obj):
        with pytest.raises(UserError, match="cannot write"):
            write(tmp_path / "file" / "out", ball)
