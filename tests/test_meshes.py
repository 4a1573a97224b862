"""What a mesh is worth, against closed forms: cubes, hollow cubes, balls and their cones."""
import math

import numpy as np
import pytest
import torch

from mvd import mesh
from mvd.metrics import meshes
from mvd.metrics.candidates import Cameras, even_azimuths
from mvd.metrics.meshes import (
    CELLS,
    inside,
    largest_share,
    mesh_facts,
    outside_hull,
    read_obj,
    real_mesh,
)
from mvd.metrics.shape import draw_maps
from mvd.tools.errors import UserError
from mvd.toyworld import Thing

CAMERAS = Cameras(15.0, even_azimuths(8), 40.0)
# What a picture of distill.py shows, in the world.
EDGE = 1.8


def cube(half, centre=(0.0, 0.0, 0.0), inward=False):
    """Vertices [8, 3] and faces [12, 3] of a cube, counter-clockwise seen from outside."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    faces = np.array([
        [0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
        [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]])
    if inward:
        faces = faces[:, ::-1]
    return corners * half + np.array(centre), faces


def together(*parts):
    """Several meshes as one."""
    vertices = []
    faces = []
    count = 0
    for some_vertices, some_faces in parts:
        vertices.append(some_vertices)
        faces.append(some_faces + count)
        count += len(some_vertices)
    return np.concatenate(vertices), np.concatenate(faces)


def turn():
    """A rotation about a skew axis, [3, 3]."""
    skew = torch.tensor([[0.0, -0.7, 0.3], [0.7, 0.0, -0.5], [-0.3, 0.5, 0.0]])
    return torch.linalg.matrix_exp(skew.double()).numpy()


def centres():
    """All cell centres of the box, [CELLS^3, 3]."""
    along = (np.arange(CELLS) + 0.5) / CELLS * 2 - 1
    return np.stack(np.meshgrid(along, along, along, indexing="ij"), -1).reshape(-1, 3)


def as_set(points):
    """Points as a boolean grid [CELLS, CELLS, CELLS]."""
    grid = np.zeros((CELLS,) * 3, dtype=bool)
    place = np.round((points + 1) / 2 * CELLS - 0.5).astype(int)
    grid[tuple(place.T)] = True
    return grid


# ---- parts and volumes -----------------------------------------------------------------------

def test_floaters_are_what_is_outside_the_largest_part():
    share, components = largest_share(*cube(0.3))
    assert (share, components) == (1.0, 1)
    two = together(cube(0.2, (0.5, 0, 0)), cube(0.4, (-0.3, 0, 0)))
    share, components = largest_share(*two)
    assert components == 2
    assert share == pytest.approx(8 / 9)
    hollow = together(cube(0.4), cube(0.3, inward=True))
    share, components = largest_share(*hollow)
    assert (share, components) == (1.0, 2), "the wall of a hollow space does not float"


def test_facts_of_cubes():
    everywhere = torch.ones(8, 32, 32, dtype=torch.bool)

    def facts(surface):
        return mesh_facts(surface, cube(0.4), everywhere, CAMERAS, EDGE)

    expected = dict(components=1, watertight=True, floaters=0.0, volume=1.0, outside=0.0)
    assert facts(cube(0.4)) == pytest.approx(expected)
    hollow = facts(together(cube(0.4), cube(0.3, inward=True)))
    assert hollow["volume"] == pytest.approx(1 - 0.75 ** 3), "a shell has less volume"
    vertices, faces = cube(0.4)
    assert not facts((vertices, faces[1:]))["watertight"], "a face is missing"
    for nothing in (None, (vertices, faces[:0])):
        assert set(facts(nothing).values()) == {None}


# ---- the inside ------------------------------------------------------------------------------

def test_inside_of_a_turned_hollow_cube():
    shell = together(cube(0.5, (0.05, 0, 0)), cube(0.3, (0.05, 0, 0), inward=True))
    rotation = turn()
    found = as_set(inside(shell[0] @ rotation.T, shell[1])).reshape(-1)
    local = np.abs(centres() @ rotation - np.array([0.05, 0, 0])).max(1)
    expected = (local < 0.5) & (local > 0.3)
    clear = (np.abs(local - 0.5) > 1e-3) & (np.abs(local - 0.3) > 1e-3)
    assert (found == expected)[clear].all()


def test_inside_of_a_ball_of_small_faces():
    grid = centres().reshape(CELLS, CELLS, CELLS, 3)
    distance = np.linalg.norm(grid, axis=-1)
    vertices, faces = mesh.marching_tetrahedra(torch.from_numpy(0.6 - distance), 0.0)
    found = as_set(inside((vertices + 0.5) / CELLS * 2 - 1, faces))
    assert (found == (distance < 0.6))[np.abs(distance - 0.6) > 1e-3].all()


def test_what_is_outside_the_box_has_no_inside_there():
    assert len(inside(*cube(0.2, (2.0, 0, 0)))) == 0
    assert len(inside(*cube(0.2, (0, 0, 2.0)))) == 0
    assert len(inside(*cube(2.0))) == CELLS ** 3, "the whole box is inside a cube around it"


# ---- the hull --------------------------------------------------------------------------------

def test_hull_of_a_ball_is_where_its_cones_meet():
    radius = 0.4
    size = 256
    half = math.tan(math.radians(20))
    distance = EDGE / 2 / half
    # A ball's silhouette is a disc, of the cone that touches it.
    sine = radius / distance
    along = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(along, along)
    tangent = sine / math.sqrt(1 - sine ** 2)
    disc = torch.from_numpy(np.hypot(x, y) * half < tangent).expand(8, size, size)
    points = centres()
    ball = points[np.linalg.norm(points, axis=1) < 0.97 * radius]
    assert outside_hull(ball, disc, CAMERAS, EDGE) == 0

    larger = points[np.linalg.norm(points, axis=1) < 1.4 * radius]
    inside_all = np.ones(len(larger), dtype=bool)
    for azimuth in CAMERAS.azimuth:
        e, a = math.radians(15.0), math.radians(azimuth)
        to_eye = np.array([
            math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        ray = larger - distance * to_eye
        cosine = -(ray @ to_eye) / np.linalg.norm(ray, axis=1)
        inside_all &= np.arccos(cosine) < math.asin(sine)
    expected = 1 - inside_all.mean()
    assert 0.3 < expected < 0.9
    assert outside_hull(larger, disc, CAMERAS, EDGE) == pytest.approx(expected, abs=0.01)
    assert outside_hull(larger[:0], disc, CAMERAS, EDGE) is None


def test_a_real_mesh_is_where_its_pictures_show_it(monkeypatch):
    monkeypatch.setattr(meshes, "CELLS", 64)
    scale = 0.8
    thing = Thing("train", "crown")
    maps = draw_maps(thing, [3], CAMERAS, "cpu", framing=1 / scale, size=128)
    silhouettes = maps.opacity[0, :, 0] > 0.5
    surface = real_mesh(thing, 3, EDGE * scale)
    facts = mesh_facts(surface, surface, silhouettes, CAMERAS, EDGE)
    assert facts["watertight"] and facts["volume"] == 1
    assert facts["outside"] < 0.05
    assert mesh.volume(*surface) > 0, "the faces look inward"
    turned = silhouettes.roll(2, 0)
    assert outside_hull(inside(*surface), turned, CAMERAS, EDGE) > 0.3, "from another side"


# ---- files -----------------------------------------------------------------------------------

def test_read_obj_is_what_was_written(tmp_path):
    vertices, faces = cube(0.4, (0.1, 0.2, 0.3))
    colours = np.full((8, 3), 0.5)
    mesh.write_obj(tmp_path / "mesh.obj", mesh.Mesh(vertices, faces, colours, colours))
    found_vertices, found_faces = read_obj(tmp_path / "mesh.obj")
    assert np.allclose(found_vertices, vertices, atol=1e-6)
    assert (found_faces == faces).all()
    assert read_obj(tmp_path / "nothing.obj") is None


@pytest.mark.parametrize("text", [
    "", "v 1 2 3\n", "v 1 2 three\nf 1 1 1\n", "v 1 2\nf 1 1 1\n", "v 1 2 3\nf 1 2\n",
    "v 1 2 3\nf 1 1 2\n", "v 1 2 3\nf 0 1 1\n", b"\xff\xfe v"])
def test_a_damaged_file_is_a_mistake_of_the_user(tmp_path, text):
    path = tmp_path / "mesh.obj"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="is not a mesh"):
        read_obj(path)
