"""Conventions, which way is up, centring, angles and view sets, against cameras of known kind."""
import itertools

import numpy as np
import pytest

from mvd.cameras import orbit
from mvd.data.poses import (
    CONVENTIONS, Convention, angles, centre, check_up, other_up, recognise, taken_as, to_c2w,
    upright, view_sets)
from mvd.tools.errors import BadMember, UserError

C2W_GL, W2C_GL, C2W_CV, W2C_CV = CONVENTIONS


def cameras(elevation, azimuth, distance=2.0, at=(0, 0, 0)):
    """c2w [n, 4, 4] round the point `at`."""
    c2w = orbit(elevation, azimuth, distance).double().numpy()
    # Exactly orthonormal, so that an inverse is one to the last digits.
    u, _, v = np.linalg.svd(c2w[:, :3, :3])
    c2w[:, :3, :3] = u @ v
    c2w[:, :3, 3] += at
    return c2w


def sphere(seed=0, n=12, at=(0, 0, 0)):
    """Random cameras at different distances, as Zero-1-to-3 renders them."""
    r = np.random.default_rng(seed)
    return cameras(r.uniform(-30, 80, n), r.uniform(0, 360, n), r.uniform(1.5, 2.2, n), at)


def turntable(n=12, elevation=20.0, **kw):
    return cameras(np.full(n, elevation), np.arange(n) * 360 / n, **kw)


def written(c2w, convention):
    """The matrices of the convention for cameras c2w: what a file would hold."""
    m = c2w.copy()
    if convention.opencv:
        m = m @ np.diag([1, -1, -1, 1])
    return np.linalg.inv(m) if convention.inverse else m


def shaken(c2w, degrees, seed=0):
    """Cameras turned about random axes of their own by about so many degrees."""
    r = np.random.default_rng(seed)
    turned = c2w.copy()
    for matrix in turned:
        x, y, z = np.deg2rad(r.normal(0, degrees, 3) / np.sqrt(3))
        first_order = np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]])
        u, _, v = np.linalg.svd(matrix[:3, :3] @ first_order)
        matrix[:3, :3] = u @ v
    return turned


# ---- which convention ------------------------------------------------------------------------

r = np.random.default_rng(1)
KINDS = {
    "random": sphere(),
    "turntable": turntable(),
    "turntable seen level": turntable(elevation=0.0),
    "turntable from steeply above": turntable(elevation=80.0),
    "off-centre": sphere(at=(0.3, -0.4, 0.2)),
    "far off-centre": sphere(at=(5.0, -4.0, 1.0)),
    "raised turntable": turntable(at=(0, 0, 0.8)),
    "raised turntable from steeply above": turntable(elevation=75.0, at=(0, 0, 0.6)),
    "raised": sphere(at=(0, 0, 0.9)),
    "sunk": sphere(at=(0, 0, -0.9)),
    "half an orbit": cameras(r.uniform(0, 40, 16), r.uniform(0, 180, 16)),
    "a narrow arc": cameras(r.uniform(0, 20, 16), r.uniform(0, 40, 16)),
    "an arc over the top": cameras(np.linspace(0, 85, 8), np.zeros(8)),
    "top and bottom views": np.concatenate([
        turntable(24, elevation=15), cameras([90, -90], [0.0, 0.0]), turntable(elevation=2)]),
    "shaken": shaken(sphere(), 8),
    "shaken half orbit": shaken(cameras(r.uniform(0, 40, 16), r.uniform(0, 180, 16)), 5),
    "off-centre turntable from steeply above": turntable(elevation=75.0, at=(0.3, -0.4, 0.5)),
    "far off-centre turntable from steeply above": turntable(elevation=75.0, at=(0, 1.85, 0)),
    "turntable raised as far as the cameras are away": turntable(elevation=10, at=(0, 0, 1.85)),
    "one view": sphere(n=1),
    "one view of what is raised": cameras([30.0], [40.0], at=(0, 0, 0.9)),
    "two views": sphere(n=2),
    "two near views": shaken(cameras([20, 25], [0, 10]), 2),
    "many views": sphere(n=150),
}


@pytest.mark.parametrize("convention", CONVENTIONS, ids=["c2w GL", "w2c GL", "c2w CV", "w2c CV"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_cameras_are_recognised_in_every_convention(kind, convention):
    c2w = KINDS[kind]
    matrices = written(c2w, convention)
    found = recognise([("object", matrices)])
    assert found == convention, f"{kind}: {convention} was taken for {found}"
    assert np.abs(to_c2w(matrices, found) - c2w).max() < 1e-6, "other cameras came back"
    three_rows = to_c2w(matrices[:, :3], found)
    assert np.abs(three_rows - c2w).max() < 1e-6, "3x4 matrices give other cameras"


def test_what_a_layout_usually_has_decides_only_where_the_cameras_do_not():
    # A photographer who began at the origin, with the object as far away as the cameras are.
    # He comes a little nearer, so that the inverse has the object nearer to its origin.
    walk = cameras(np.zeros(12), np.arange(12) * 30.0, np.linspace(2, 1.7, 12))
    walk = np.linalg.inv(walk[0]) @ walk
    assert recognise([("walk", walk)]) == W2C_GL, "the test does not tell anything"
    for expected in [C2W_GL, W2C_GL]:
        found = recognise([("walk", walk)], expected=expected)
        assert not found.opencv and found == expected, "what is expected does not break the tie"
    for convention, expected in itertools.permutations(CONVENTIONS, 2):
        for c2w in [sphere(), turntable(elevation=60.0, at=(0, 0, 0.6))]:
            found = recognise([("a", written(c2w, convention))], expected=expected)
            assert found == convention, "what is expected overrules the cameras"


def test_objects_that_cannot_tell_follow_those_that_can():
    # Straight from above, c2w with OpenGL axes is w2c with OpenCV axes.
    above = cameras([90.0], [90.0])
    for convention in [C2W_GL, W2C_CV]:
        objects = [("above", written(above, convention)), ("b", written(sphere(), convention))]
        assert recognise(objects) == convention


def test_a_few_wrong_views_do_not_change_the_convention():
    c2w = sphere(n=20)
    c2w[3, :3, 3] = [40, -7, 9]
    c2w[7] = np.eye(4)
    for convention in CONVENTIONS:
        matrices = written(c2w, convention)
        matrices[11] = np.nan
        matrices[12, :3, :3] = 0
        assert recognise([("a", matrices)]) == convention
    wrong = np.flatnonzero(taken_as(c2w, C2W_GL)[1])
    assert set(wrong) <= {3, 7} and 3 in wrong, f"{wrong} are taken for wrong views"


def test_objects_that_contradict_each_other_are_an_error_that_says_what_each_looks_like():
    for first, second in itertools.combinations(CONVENTIONS, 2):
        objects = [(f"a{i}", written(sphere(i), first)) for i in range(4)]
        objects += [("odd", written(sphere(9, at=(0, 0, 0.8)), second))]
        with pytest.raises(UserError) as error:
            recognise(objects)
        text = str(error.value)
        assert str(first) in text and f"odd: {second}" in text, text
        assert "\n" not in text and "a0" in text, text


def test_one_object_in_thirty_does_not_stop_the_others():
    objects = [(f"a{i}", written(sphere(i), C2W_CV)) for i in range(29)]
    objects += [("odd", written(sphere(99), W2C_GL))]
    assert recognise(objects) == C2W_CV


def test_an_object_of_another_convention_is_found_out_later():
    for ours, theirs in itertools.product(CONVENTIONS, CONVENTIONS):
        for kind in ["random", "turntable", "raised", "off-centre", "shaken", "half an orbit"]:
            # The inverse of what is raised as far as the cameras are away is a tie.
            if kind == "raised" and ours != theirs:
                continue
            matrices = written(KINDS[kind], theirs)
            if ours == theirs:
                c2w, away = taken_as(matrices, ours)
                assert np.allclose(c2w, KINDS[kind]) and not away.any(), f"{kind}, {ours}"
                continue
            with pytest.raises(BadMember, match="look like") as error:
                taken_as(matrices, ours)
            assert f"like {theirs}; " in str(error.value), f"{kind}: {theirs} as {ours}"
    with pytest.raises(BadMember, match="do not look at one point"):
        taken_as(looking_outward(), C2W_GL)


@pytest.mark.parametrize("few", [3, 6])
def test_views_that_contradict_each_other_are_named(few):
    c2w = sphere()
    for first, second in itertools.permutations(CONVENTIONS, 2):
        matrices = written(c2w, first)
        matrices[:few] = written(c2w[:few], second)
        matrices = np.concatenate([matrices[:1] * np.nan, matrices])
        with pytest.raises(UserError, match="^thing: the views.* contradict") as error:
            recognise([("thing", matrices)])
        text = str(error.value)
        assert "views 1, 2, 3" in text and str(second) in text, text


def looking_outward():
    r = np.random.default_rng(0)
    c2w = sphere(n=30)
    c2w[:, :3, 3] = r.normal(size=(30, 3))
    return c2w


def test_cameras_that_look_at_no_one_point_are_an_error():
    along_a_road = cameras(np.zeros(10), np.zeros(10))
    along_a_road[:, 1, 3] += np.arange(10) * 3
    for matrices in [looking_outward(), along_a_road]:
        with pytest.raises(UserError, match="garden: its cameras do not look at one point"):
            recognise([("garden", matrices)])


DAMAGE = {
    "transposed": lambda m: m.swapaxes(-1, -2),
    "NaN": lambda m: m * np.nan,
    "mirrored": lambda m: m @ np.diag([1, 1, -1, 1]),
    "not orthonormal": lambda m: m @ np.diag([1, 2, 1, 1]),
    "zero": lambda m: m * np.diag([0, 0, 0, 1])[None],
    "last row": lambda m: m * 2,
    "3x3": lambda m: m[..., :3, :3],
    "numbers": lambda m: [["a"] * 4] * 4,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_rigid_motion_is_refused_and_said(damage):
    matrices = DAMAGE[damage](sphere())
    with pytest.raises(BadMember, match=damage):
        to_c2w(matrices, C2W_GL)
    with pytest.raises(UserError, match=damage):
        recognise([("a", matrices)])


def test_a_scale_in_the_rotation_is_taken_out():
    c2w = sphere()
    for convention in CONVENTIONS:
        scaled = written(c2w @ np.diag([3, 3, 3, 1]), convention)
        assert np.abs(to_c2w(scaled, convention) - c2w).max() < 1e-6


def test_conventions_in_words():
    assert str(C2W_GL) == "camera-to-world, OpenGL axes (x right, y up, looks along -z)"
    expected = "world-to-camera, OpenCV axes (x right, y down, looks along +z)"
    assert str(Convention(True, True)) == expected


# ---- which way is up -------------------------------------------------------------------------

# {axis: where it, as the file's up axis, has our z}: rotations written by hand, as columns.
WORLDS = {
    "z": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "y": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "-y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    "-z": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
    "x": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
    "-x": [[0, 0, -1], [0, 1, 0], [1, 0, 0]],
}


@pytest.mark.parametrize("axis", WORLDS)
def test_a_world_with_another_axis_up_is_turned_to_z(axis):
    sets = [
        sphere(0), shaken(turntable(), 3), turntable(elevation=65.0), KINDS["half an orbit"],
        cameras(np.full(9, -45.0), np.linspace(0, 180, 9))]
    for ours in sets:
        theirs = ours.copy()
        theirs[:, :3] = np.array(WORLDS[axis]) @ ours[:, :3]
        turn, name = upright([theirs[:5], theirs[5:]])
        assert name == axis
        assert np.allclose(np.linalg.det(turn), 1), "it mirrors the world"
        assert np.allclose(turn @ theirs[:, :3], ours[:, :3]), "other cameras came back"


def test_y_up_becomes_x_minus_z_y():
    theirs = turntable()
    theirs[:, :3] = np.array(WORLDS["y"]) @ theirs[:, :3]
    turn, _ = upright([theirs])
    assert np.array_equal(turn @ [1, 2, 3], [1, -3, 2])


def test_a_few_views_from_one_side_are_enough_to_see_what_is_up():
    assert upright([cameras([0.0], [0.0])])[1] == "z"
    assert upright([cameras([10.0, 40.0, 70.0], [30.0, 30.0, 30.0])])[1] == "z"
    front = np.eye(4)[None]    # looks along -z, y up: a y-up world's front view
    assert upright([front])[1] == "y"
    above = cameras(np.full(12, 89.0), np.arange(12) * 30)
    assert upright([above])[1] == "z"


def test_rolled_cameras_go_by_their_mean_up():
    rolled = shaken(sphere(n=40), 35)
    assert upright([rolled])[1] == "z"
    assert other_up(rolled, "z") is None, "cameras that roll about every axis contradict nothing"


@pytest.mark.parametrize("axis", WORLDS)
def test_another_axis_than_the_one_said_is_found_out(axis):
    for ours in [sphere(0), shaken(turntable(), 3), turntable(elevation=65.0), turntable(4)]:
        theirs = ours.copy()
        theirs[:, :3] = np.array(WORLDS[axis]) @ ours[:, :3]
        for said in WORLDS:
            assert other_up(theirs, said) == (None if said == axis else axis)


@pytest.mark.parametrize("ours, theirs", [(2, 2), (3, 1), (18, 1), (20, 1), (1, 20)])
def test_the_up_of_most_objects_counts_and_many_others_are_an_error(ours, theirs):
    turned = np.eye(4)
    turned[:3, :3] = WORLDS["y"]
    objects = [(f"a{i}", sphere(i)) for i in range(ours)]
    objects += [(f"b{i}", turned @ sphere(50 + i)) for i in range(theirs)]
    _, axis = upright([c2w for _, c2w in objects])
    if min(ours, theirs) / (ours + theirs) <= 0.05:
        assert axis == ("z" if ours > theirs else "y")
        check_up(objects, axis)
        return
    with pytest.raises(UserError) as error:
        check_up(objects, axis)
    assert "z is up in a0" in str(error.value) and "y is up in b0" in str(error.value)


# ---- where the object is ---------------------------------------------------------------------


def test_the_point_that_is_looked_at_moves_to_the_origin():
    for at in [(0.3, -0.4, 0.2), (0, 0, 1), (50, 0, 0)]:
        assert np.abs(centre(sphere(at=at)) - sphere()).max() < 1e-6
        assert np.abs(centre(turntable(at=at)) - turntable()).max() < 1e-6


def test_wrong_views_hardly_move_the_centre():
    c2w = sphere(n=30, at=(1, 2, 3))
    c2w[4] = np.eye(4)
    c2w[9, :3, 3] = [40, -7, 9]
    moved = centre(c2w)
    good = [i for i in range(30) if i not in (4, 9)]
    assert np.abs(moved[good] - sphere(n=30)[good]).max() < 0.02


def test_centred_and_undetermined_cameras_stay():
    near = sphere(at=(0.01, 0, 0.02))
    assert np.array_equal(centre(near), near), "less than 2% was moved"
    single = sphere(n=1, at=(1, 0, 0))
    assert np.array_equal(centre(single), single), "one view does not tell where the object is"
    side_by_side = shaken(cameras(np.zeros(9), np.zeros(9), at=(0, 3, 0)), 3)
    assert np.array_equal(centre(side_by_side), side_by_side)
    shake = shaken(sphere(n=40), 1)
    assert np.abs(centre(shake) - shake).max() < 0.02 * 2, "shaken cameras were moved"


def test_shaken_cameras_are_centred_nearly():
    c2w = shaken(sphere(n=100, at=(2, 1, 0)), 4)
    moved = centre(c2w)[:, :3, 3] - sphere(n=100)[:, :3, 3]
    assert np.abs(moved).max() < 0.05


# ---- angles ----------------------------------------------------------------------------------


def test_angles_are_those_of_the_orbit():
    r = np.random.default_rng(0)
    elevation = np.append(r.uniform(-90, 90, 50), [90, -90, 90, 0, 0])
    azimuth = np.append(r.uniform(0, 360, 50), [0, 30, 300, 0, 180])
    distance = r.uniform(0.5, 4, 55)
    found = angles(orbit(elevation, azimuth, distance).double().numpy())
    difference = (found[0] - azimuth + 180) % 360 - 180
    assert np.abs(difference).max() < 1e-3, "azimuth"
    # float32 cameras: near a pole the elevation has few digits.
    assert np.abs(found[1] - elevation).max() < 0.05, "elevation"
    assert np.abs(found[2] - distance).max() < 1e-5, "distance"
    assert (0 <= found[0]).all() and (found[0] < 360).all()


def test_a_tiny_negative_azimuth_is_0():
    c2w = cameras([0.0], [0.0])
    c2w[0, 1, 3] = -1e-18
    assert angles(c2w)[0][0] == 0


# ---- sets of views ---------------------------------------------------------------------------


def away(azimuth, elevation, wanted_azimuth, wanted_elevation):
    """Degrees of a great circle by the haversine formula."""
    a, b, c, d = np.deg2rad([azimuth, elevation, wanted_azimuth, wanted_elevation])
    h = np.sin((b - d) / 2) ** 2 + np.cos(b) * np.cos(d) * np.sin((a - c) / 2) ** 2
    return np.rad2deg(2 * np.arcsin(np.sqrt(min(h, 1))))


def worst(azimuth, elevation, chosen):
    """The largest deviation of a set of views from where they are wanted."""
    first, *others = chosen
    return max([0.0] + [
        away(azimuth[j], elevation[j], azimuth[first] + k * 360 / len(chosen), elevation[first])
        for k, j in enumerate(others, 1)])


@pytest.mark.parametrize("n, views", [(8, 4), (12, 3), (32, 4), (6, 2), (5, 1)])
def test_an_even_orbit_gives_exactly_the_even_sets(n, views):
    found = view_sets(17 + np.arange(n) * 360 / n, np.full(n, 15.0), views)
    expected = [[(i + k * n // views) % n for k in range(views)] for i in range(n)]
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_sets_are_nearly_as_good_as_the_best_of_all_choices():
    r = np.random.default_rng(0)
    perfect = total = 0
    for _ in range(3):
        azimuth, elevation = r.uniform(0, 360, 9), r.uniform(-10, 30, 9)
        found = {s[0]: s for s in view_sets(azimuth, elevation, 4, bound=180).tolist()}
        assert sorted(found) == list(range(9)), "not every view is a first one"
        for first, chosen in found.items():
            assert len(set(chosen)) == 4, "a view is taken twice"
            others = [i for i in range(9) if i != first]
            best = min(
                worst(azimuth, elevation, [first, *rest])
                for rest in itertools.permutations(others, 3))
            ours = worst(azimuth, elevation, chosen)
            total += 1
            perfect += ours < best + 1e-3
    # Greedy: where two places want one view, the second gets its next best.
    assert perfect >= 0.8 * total, f"{perfect} of {total} are the best there is"


def test_sets_beyond_the_bound_are_left_out():
    r = np.random.default_rng(3)
    azimuth, elevation = r.uniform(0, 360, 40), r.uniform(-60, 60, 40)
    everything = view_sets(azimuth, elevation, 4, bound=180)
    for bound in [10, 30, 60]:
        within = [s for s in everything.tolist() if worst(azimuth, elevation, s) <= bound]
        assert view_sets(azimuth, elevation, 4, bound).tolist() == within
    assert 0 < len(view_sets(azimuth, elevation, 4)) < 40, "the test does not tell anything"


def test_two_places_do_not_take_one_view():
    # Two views only near the places of four.
    found = view_sets(np.array([0.0, 90, 100, 110]), np.zeros(4), 4, bound=180)
    assert sorted(found[0]) == [0, 1, 2, 3]
    assert found[0].tolist()[:2] == [0, 1], "the view that is right there was not taken"


def test_too_few_views_give_no_set():
    assert view_sets(np.array([0.0, 120, 240]), np.zeros(3), 4).shape == (0, 4)
    assert view_sets(np.zeros(0), np.zeros(0), 4).shape == (0, 4)
    assert view_sets(np.array([10.0, 20.0]), np.zeros(2), 1).tolist() == [[0], [1]]
