"""The judge of shapes, against closed forms and plain loops, and on real renders."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvd import mesh
from mvd.metrics import meshes, shape, things
from mvd.metrics.candidates import even_azimuths, real_seeds
from mvd.metrics.meshes import real_mesh
from mvd.metrics.shape import (
    FINE_SCALES,
    Maps,
    angle_between,
    angle_between_maps,
    draw_maps,
    known,
    maps_of,
    nearest_shapes,
    roughness,
    shape_summary,
    unseen_instances,
    vector_cutouts,
)
from mvd.metrics.things import differences, distractors
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from mvd.toyworld import Thing
from small_judge import FOUR, run_main, save_run

CAMERAS = FOUR._replace(fov_deg=40.0)
BULLDOG = Thing("bulldog", "crown")
LAMP = Thing("lamp", "umbrella")


@pytest.fixture
def small_judge(monkeypatch):
    monkeypatch.setattr(things, "CAPTIONS", 4)
    monkeypatch.setattr(shape, "CANDIDATE_SEEDS", range(3))
    monkeypatch.setattr(meshes, "CELLS", 64)


def random_maps(size, seed=0):
    """Two sets of two views of noise, in silhouettes with holes."""
    generator = torch.Generator().manual_seed(seed)
    normal = F.normalize(torch.randn(2, 2, 3, size, size, generator=generator), dim=2)
    opacity = torch.rand(2, 2, 1, size, size, generator=generator).sqrt().sqrt()
    return Maps(normal, opacity)


# ---- roughness -------------------------------------------------------------------------------

def test_roughness_is_a_loop_over_pixels(monkeypatch):
    monkeypatch.setattr(shape, "ROUGH_SIZE", 20)
    normal, opacity = random_maps(20)
    found = roughness(Maps(normal, opacity))
    for m in range(2):
        angles = []
        for view, y, x in np.ndindex(2, 20, 20):
            if not (2 <= y < 18 and 2 <= x < 18):
                continue
            block = (slice(y - 2, y + 3), slice(x - 2, x + 3))
            if (opacity[m, view, 0][block] <= 0.5).any():
                continue
            around = normal[m, view, :, block[0], block[1]].double().numpy().mean((1, 2))
            own = normal[m, view, :, y, x].double().numpy()
            cosine = own @ around / np.linalg.norm(around)
            angles.append(math.degrees(math.acos(cosine)))
        assert 10 < len(angles) < 400, "the test should have pixels inside and outside"
        assert found[m].item() == pytest.approx(np.mean(angles), rel=1e-5)


def test_a_plane_is_smooth_and_a_crease_is_as_rough_as_its_angle_says():
    size = 128
    normal = torch.zeros(2, 1, 3, size, size)
    normal[:, :, 2] = 1
    bend = math.radians(50)
    normal[1, 0, :, :, 64:] = torch.tensor([math.sin(bend), 0, math.cos(bend)])[:, None, None]
    found = roughness(Maps(normal, torch.ones(2, 1, 1, size, size)))
    assert found[0].item() == pytest.approx(0, abs=1e-4), "a plane is not smooth"

    # One or two of five columns are beyond the crease, on either side.
    angles = []
    for share in (1 / 5, 2 / 5):
        sine = share * math.sin(bend)
        cosine = 1 - share + share * math.cos(bend)
        angles.append(math.degrees(math.atan2(sine, cosine)))
    expected = 2 * sum(angles) / (size - 4)
    assert found[1].item() == pytest.approx(expected, rel=1e-4)


def test_what_is_not_there_does_not_count():
    normal, _ = random_maps(128)
    opacity = torch.zeros(2, 2, 1, 128, 128)
    opacity[1, :, :, 20:100, 30:90] = 0.6
    # Where nothing is, a normal may be anything, not even a number.
    normal[1, :, :, :20] = torch.nan
    normal[1, :, :, 20:100, 30:90] = torch.tensor([0.0, 0.6, 0.8])[:, None, None]
    found = roughness(Maps(normal, opacity))
    assert known(found[0]) is None, "an empty picture has no roughness"
    assert found[1].item() == pytest.approx(0, abs=1e-4)


def test_roughness_hardly_depends_on_the_size_that_was_drawn():
    drawn = [draw_maps(BULLDOG, [5], CAMERAS, "cpu", framing=1.0, size=s) for s in (128, 192)]
    usual, large = [roughness(maps).item() for maps in drawn]
    assert 5 < usual < 14, "the bulldog of the world is as rough as real renders are"
    assert large == pytest.approx(usual, rel=0.25)


# ---- the distance between normals ------------------------------------------------------------

@pytest.mark.parametrize("degrees", [0.0, 0.01, 30.0, 90.0, 179.9])
def test_angle_between(degrees):
    turned = math.radians(degrees)
    a = torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    b = torch.tensor([math.sin(turned), 0.0, math.cos(turned)])[:, None, None]
    assert angle_between(a, b).item() == pytest.approx(degrees, abs=0.01 + 1e-4 * degrees)
    assert angle_between(a, b).shape == (1, 1, 1)


def test_angles_count_where_both_have_something():
    up = torch.zeros(1, 1, 3, 4, 4)
    up[:, :, 2] = 1
    aside = up.flip(2)
    opacity = torch.zeros(1, 1, 1, 4, 4)
    opacity[..., :2] = 1
    other = torch.zeros(1, 1, 1, 4, 4)
    other[..., 1:] = 1
    mixed = torch.where(torch.arange(4) == 1, aside, up)
    assert angle_between_maps(Maps(up, opacity), Maps(mixed, other)).item() == pytest.approx(90)
    nowhere = Maps(up, torch.zeros_like(opacity))
    assert known(angle_between_maps(Maps(up, opacity), nowhere)[0]) is None


def test_cutouts_keep_directions_when_noise_makes_the_mean_short():
    normal, opacity = random_maps(128)
    cutouts = vector_cutouts(Maps(normal, torch.ones_like(opacity)))
    length = torch.linalg.vector_norm(cutouts.rgb, dim=2)
    assert cutouts.rgb.shape == (2, 2, 3, 32, 32)
    assert torch.allclose(length, torch.ones(()), atol=1e-5)
    assert (cutouts.background == 0).all()
    assert (vector_cutouts(Maps(normal, opacity * 0)).rgb == 0).all()


# ---- the nearest of 64 -----------------------------------------------------------------------

def test_distractors_of_a_shape_differ_in_shape():
    for thing in (BULLDOG, Thing("cake")):
        others = distractors(thing, colours=(None,))
        assert len(set(others)) == 63 and thing not in others
        assert all(other.colour is None for other in others)
        apart = [differences(other, thing) for other in others]
        assert apart.count(1) == 32 and apart.count(2) == 31
        assert distractors(thing, colours=(None,)) == others


@pytest.mark.parametrize("place", [6, 12])
def test_the_nearest_instance_is_the_one_that_is_shown(small_judge, place):
    """Also when it is drawn smaller, and when its normals are noisy."""
    framing = torch.tensor([1 / FINE_SCALES[place]])
    shown = draw_maps(LAMP, [1], CAMERAS, "cpu", framing=framing, size=64)
    noise = torch.randn(shown.normal.shape, generator=torch.Generator().manual_seed(0))
    noisy = F.normalize(shown.normal + 0.5 * noise, dim=2)
    for normal in (shown.normal, noisy):
        nearest, instances = nearest_shapes(Maps(normal, shown.opacity), [LAMP], CAMERAS)
        assert nearest == [LAMP]
        assert instances.seeds == [1]
        # A zoomed picture is not quite the picture from a smaller distance.
        assert 1 / instances.framing.item() == pytest.approx(FINE_SCALES[place], rel=0.031)


def test_real_renders_reach_the_ceiling_and_others_do_not(small_judge):
    asked = [BULLDOG, LAMP, LAMP]
    maps = maps_of(asked, unseen_instances(3, CAMERAS, 1), CAMERAS, "cpu", 48)
    # The last one was asked for a lamp and shows a bulldog.
    shown = Maps(*(tensor[[0, 1, 0]] for tensor in maps))
    surfaces = [real_mesh(BULLDOG, 5, 1.8), real_mesh(LAMP, 5, 1.8), None]
    verdicts = shape.judge_shapes(shown, surfaces, [1.8] * 3, asked, cameras=CAMERAS)
    for verdict in verdicts[:2]:
        assert verdict["recognised"]
        assert 0.8 < verdict["ratio"] < 1.25
        assert verdict["angle"] < 15
        assert verdict["watertight"] and verdict["floaters"] < 0.02
        assert 0.8 < verdict["volume"] < 1.25
    assert verdicts[2]["angle"] > 25, "a bulldog's normals are not those of a lamp"
    assert verdicts[2]["volume"] is None


def test_summary():
    verdict = dict(
        recognised=True, angle=10.0, roughness=8.0, ratio=1.0, components=1, watertight=True,
        floaters=0.0, volume=1.0, outside=0.1)
    noisy = {**verdict, "ratio": 3.0, "roughness": 24.0, "recognised": False}
    melted = {**verdict, "ratio": 0.5, "watertight": None, "components": None}
    found = shape_summary([verdict, noisy, melted])
    assert found["smallest_ratio"] == 0.5
    assert found["median_ratio"] == 1.0
    assert found["largest_ratio"] == 3.0
    assert found["r_precision"] == found["watertight"] == pytest.approx(2 / 3)
    assert found["components"] == 1
    assert found["roughness"] == pytest.approx(40 / 3)
    nothing = {**verdict, "ratio": None, "angle": None}
    assert shape_summary([nothing])["median_ratio"] is None


# ---- the command -----------------------------------------------------------------------------

def save_shape_run(folder, thing, seed, with_mesh=True):
    """What distill.py leaves of a run that shows a real instance."""
    save_run(folder, thing)
    tensors, _ = read_safetensors(folder / "views.safetensors")
    maps = draw_maps(thing, [seed], CAMERAS, "cpu", framing=1.0, size=40)
    distance = torch.tensor(0.9 / math.tan(math.radians(20)))
    tensors.update(normal=maps.normal[0], opacity=maps.opacity[0], distance=distance)
    write_safetensors(folder / "views.safetensors", tensors)
    if with_mesh:
        vertices, faces = real_mesh(thing, seed, 1.8)
        normals = np.zeros_like(vertices)
        mesh.write_obj(folder / "mesh.obj", mesh.Mesh(vertices, faces, normals + 0.5, normals))


def test_shapes_of_runs(monkeypatch, capsys, tmp_path, small_judge):
    first, second = [str(tmp_path / name) for name in "ab"]
    save_shape_run(tmp_path / "a", BULLDOG, 77)
    save_shape_run(tmp_path / "b", LAMP, 78, with_mesh=False)
    output = run_main(monkeypatch, capsys, first, second, "--shape", "--json")
    lines = [json.loads(line) for line in output.splitlines()]
    by_split = {line["split"]: line for line in lines}
    assert by_split["all"]["n"] == 2
    assert by_split["all"]["watertight"] == 0.5, "an object without a mesh is not watertight"
    image = by_split["image"]
    assert image["n"] == image["r_precision"] == image["r_precision_real"] == 1
    assert image["largest_ratio"] == pytest.approx(1, abs=0.3)
    assert image["volume"] == pytest.approx(1, abs=0.1)
    assert image["outside"] < 0.1

    table = run_main(monkeypatch, capsys, first, "--shape")
    assert "recognised; normals" in table and "; watertight; volume" in table
    assert "split image, mode 3d, n = 1" in table and "largest_ratio" in table
    assert "split all" not in table, "one split is the same as all"


def test_mistakes_of_the_user(monkeypatch, capsys, tmp_path, small_judge):
    with pytest.raises(UserError, match="--shape judges the folders of runs"):
        run_main(monkeypatch, capsys, "--samples", "1", "--shape")
    save_run(tmp_path / "old", BULLDOG)
    with pytest.raises(UserError, match="no normals"):
        run_main(monkeypatch, capsys, str(tmp_path / "old"), "--shape")


def test_unseen_instances_are_no_candidates():
    instances = unseen_instances(20, CAMERAS._replace(azimuth=even_azimuths(8)), seed=3)
    assert instances.seeds == real_seeds(20, 3)
    assert len(set(instances.seeds)) == 20 and min(instances.seeds) >= 8
    assert ((instances.framing >= 0.9) & (instances.framing <= 1.1)).all()
