"""Rendered objects in every layout: the same cameras and pictures, whoever wrote the files."""
import io
import json
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
from PIL import Image
from rendered import (
    LAYOUTS, VIEWS, cameras, convention, encoded, expected, layout_files, npy, pictures,
    with_y_up, write, write_tar)

from mvd.data.objects import find_objects
from mvd.tools.errors import BadMember, UserError

SIZE = 24


def found_in(path, **options):
    """The Objects and the one Found of a path."""
    objects, (found,) = find_objects([path], **options)
    return objects, found


def check(objects, i, seed, places=slice(None)):
    """Object i is the one that was made from this seed, or these views of it."""
    rendered = objects.read(i)
    error = np.abs(rendered.c2w.numpy() - cameras(seed)[places]).max()
    assert error < 1e-5, f"cameras differ by {error}"
    rgba = objects.pictures(rendered, range(len(rendered.views)), SIZE)
    assert (rgba == expected(seed)[places]).all(), "pictures differ"
    return rendered


# ---- layouts ---------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_cameras_and_pictures(layout, tmp_path):
    for seed in range(2):
        write(tmp_path / f"data/{seed}", layout_files(layout, seed))
    objects, found = found_in(tmp_path / "data")
    assert len(objects) == found.items == 2
    assert found.up == "z" and found.left_out == []
    for seed in range(2):
        rendered = check(objects, seed, seed)
        assert objects.name(seed).startswith(f"{tmp_path}/data/{seed}")
        assert rendered.name == objects.name(seed)
        assert objects.captions(seed) == ["a ball"]
        assert rendered.left_out == []
        fov = {"zero123": 49.13, "texts": 49.13, "instantmesh": 49.13, "g-objaverse": 39.6}
        assert np.allclose(rendered.fov, fov.get(layout, 40), atol=0.01)
    _, inverse, opencv = LAYOUTS[layout]
    assert ("world-to-camera" in found.convention) == inverse
    assert ("OpenCV" in found.convention) == opencv


@pytest.mark.parametrize("layout", ["nerf", "zero123", "instantmesh", "point-e", "g-objaverse"])
@pytest.mark.parametrize("kind, suffix", [("TIFF", ".TIF"), ("TGA", ".tga"), ("QOI", ".qoi")])
def test_views_are_pictures_of_any_kind(layout, kind, suffix, tmp_path):
    for name, content in layout_files(layout).items():
        if name.endswith(".png"):
            name, file = name.removesuffix(".png") + suffix, io.BytesIO()
            picture = Image.open(io.BytesIO(content))
            # Masks are grey, which QOI does not know.
            (picture.convert("RGB") if picture.mode == "L" else picture).save(file, kind)
            content = file.getvalue()
        write(tmp_path / "x", {name: content})
    if layout in ("zero123", "instantmesh", "point-e"):
        # A preview beside the views is none.
        write(tmp_path / "x", {"turntable.gif": encoded(pictures(0)[0])})
    objects, found = found_in(tmp_path)
    assert found.left_out == [] and check(objects, 0, 0).left_out == []


@pytest.mark.parametrize("there, written", [("e\u0301", "é"), ("é", "e\u0301")])
def test_names_that_a_mac_has_taken_apart(there, written, tmp_path):
    """é is one letter, or an e with an accent, on the disk and in the list of pictures."""
    files = layout_files("trellis", captions=())
    frames = json.loads(files.pop("transforms.json"))
    for frame in frames["frames"]:
        name = frame["file_path"]
        frame["file_path"] = written + name
        files[there + name] = files.pop(name)
    write(tmp_path / there, {**files, "transforms.json": json.dumps(frames).encode()})
    write(tmp_path, {"captions.json": json.dumps({written: "a ball"}).encode()})
    objects, found = found_in(tmp_path)
    assert found.left_out == [] and objects.captions(0) == ["a ball"]
    assert check(objects, 0, 0).left_out == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tar_of_an_object_and_a_tar_of_many_are_like_folders(layout, tmp_path):
    many = {}
    for seed in range(2):
        files = layout_files(layout, seed)
        write_tar(tmp_path / f"each/{seed}.tar", files)
        many |= {f"./ab/{seed}/{name}": content for name, content in files.items()}
    write_tar(tmp_path / "many.tar", many)
    for path in ("each", "many.tar"):
        objects, found = found_in(tmp_path / path)
        assert len(objects) == 2 and found.left_out == [], path
        for seed in range(2):
            check(objects, seed, seed)
            assert objects.captions(seed) == ["a ball"]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("opencv", [False, True])
@pytest.mark.parametrize("layout", ["trellis", "zero123", "point-e"])
def test_the_convention_is_found_whatever_the_layout_usually_has(
        layout, inverse, opencv, tmp_path):
    _, *usual = LAYOUTS[layout]
    matrices = convention(cameras(3), inverse, opencv)
    # `layout_files` applies the usual one again; undo it.
    undone = np.linalg.inv(matrices) if usual[0] else matrices.copy()
    undone[:, :3, 1:3] *= -1 if usual[1] else 1
    write(tmp_path / "x", layout_files(layout, 3, c2w=undone))
    objects, found = found_in(tmp_path / "x")
    check(objects, 0, 3)
    assert ("world-to-camera" in found.convention) == inverse
    assert ("OpenCV" in found.convention) == opencv


def test_a_world_with_y_up_is_turned(tmp_path):
    write(tmp_path / "x", layout_files("openlrm", 1, c2w=with_y_up(cameras(1))))
    objects, found = found_in(tmp_path)
    assert found.up == "y"
    check(objects, 0, 1)


def test_an_object_with_another_axis_up_is_left_out_and_many_are_an_error(tmp_path):
    for seed in range(21):
        c2w = cameras(seed % 3)
        c2w = with_y_up(c2w) if seed == 20 else c2w
        write(tmp_path / f"many/{seed}", layout_files("texts", seed % 3, c2w=c2w))
    objects, found = found_in(tmp_path / "many")
    assert found.up == "z"
    check(objects, 19, 1)
    with pytest.raises(BadMember, match="y is up in it, z in the other"):
        objects.read(20)
    for seed in (18, 19, 20):
        (tmp_path / f"many/{seed}").rename(tmp_path / f"few-{seed}")
    with pytest.raises(UserError, match="z is up in few-18, few-19; y is up in few-20"):
        find_objects([tmp_path / "few-*"])


def test_an_object_that_is_not_at_the_origin_is_moved_there(tmp_path):
    moved = cameras(1)
    moved[:, :3, 3] += [0.2, -0.3, 0.1]
    write(tmp_path / "x", layout_files("trellis", 1, c2w=moved))
    check(found_in(tmp_path)[0], 0, 1)


def test_angles_and_distances_are_those_of_each_view(tmp_path):
    c2w = cameras(5, even=False)
    write(tmp_path / "x", layout_files("zero123", 5, c2w=c2w))
    rendered = found_in(tmp_path)[0].read(0)
    x, y, z = c2w[:, :3, 3].T
    assert np.allclose(rendered.distance, np.sqrt(x * x + y * y + z * z), atol=1e-5)
    assert np.allclose(rendered.elevation, np.degrees(np.arcsin(z / rendered.distance)), atol=1e-3)
    assert np.allclose(rendered.azimuth, np.degrees(np.arctan2(y, x)) % 360, atol=1e-3)


def test_views_are_in_natural_order_of_their_names(tmp_path):
    files = layout_files("zero123", 2)
    renamed = {}
    for name, content in files.items():
        number, dot, suffix = name.partition(".")
        plain = f"view_{int(number)}" if number.isdigit() else number
        renamed[plain.replace("view_7", "view_10") + dot + suffix] = content
    write(tmp_path / "x", renamed)
    rendered = check(found_in(tmp_path)[0], 0, 2)
    assert rendered.names == [f"view_{k}" for k in (0, 1, 2, 3, 4, 5, 6, 10)]


def test_a_lens_above_the_object_and_a_matrix_k_count(tmp_path):
    f = SIZE / 2 / np.tan(np.deg2rad(30) / 2)
    for seed in range(2):
        write(tmp_path / f"{seed}", layout_files("zero123", seed))
    k = np.array([[f, 0, SIZE / 2], [0, f, SIZE / 2], [0, 0, 1]])
    (tmp_path / "intrinsics.txt").write_text(str(k.tolist()).replace("],", "],\n"))
    objects, _ = found_in(tmp_path)
    rendered = check(objects, 0, 0)
    assert np.allclose(rendered.fov, 30, atol=1e-4)
    assert not any(view.assumed for view in rendered.views)
    # The same in one tar.
    files = {"intrinsics.npy": npy(k)}
    for seed in range(2):
        files |= {f"{seed}/{n}": content for n, content in layout_files("zero123", seed).items()}
    write_tar(tmp_path / "t/all.tar", files)
    objects, _ = found_in(tmp_path / "t")
    assert np.allclose(check(objects, 1, 1).fov, 30, atol=1e-4)


def test_a_declared_background_becomes_transparent(tmp_path):
    files = layout_files("zero123", 0)
    for k, pixels in enumerate(pictures(0)):
        files[f"{k:03d}.png"] = encoded(np.ascontiguousarray(pixels[..., :3]))
    write(tmp_path / "x", files)
    objects, _ = found_in(tmp_path, background="white")
    check(objects, 0, 0)
    objects, _ = found_in(tmp_path)
    with pytest.raises(BadMember, match="--background"):
        objects.pictures(objects.read(0), [0], SIZE)
    with pytest.raises(UserError, match="no background"):
        find_objects([tmp_path], background="no colour")


def test_small_objects_are_cut_out_alike_in_all_views(tmp_path):
    """A disc of half the size, seen from 1 and from 1.25: its radius is the same in both."""
    c2w = cameras(0)
    distance = np.where(np.arange(VIEWS) % 2, 1.0, 1.25)
    c2w[:, :3, 3] *= (distance / np.linalg.norm(c2w[:, :3, 3], axis=1))[:, None]
    files = layout_files("trellis", 0, c2w=c2w)
    size = 200
    middle = np.arange(size) + 0.5 - size / 2
    for k in range(VIEWS):
        pixels = np.zeros((size, size, 4), np.uint8)
        pixels[np.hypot(*np.meshgrid(middle, middle)) < 50 / distance[k]] = [200, 0, 0, 255]
        files[f"{k:03d}.png"] = encoded(pixels)
    write(tmp_path / "x", files)
    objects, found = found_in(tmp_path)
    assert found.cut and 0.4 < found.fill < 0.51
    rgba = objects.pictures(objects.read(0), range(VIEWS), 64)
    # A circle that touches all four sides.
    areas = (rgba[:, 3] > 127).mean((1, 2))
    assert np.abs(areas - np.pi / 4).max() < 0.04, f"the disc fills {areas} of the pictures"
    # One view at a time gives the same picture.
    assert (objects.pictures(objects.read(0), [3], 64)[0] == rgba[3]).all()


# ---- finding ---------------------------------------------------------------------------------

def test_many_tars_of_one_object_are_opened_only_when_they_are_read(tmp_path, monkeypatch):
    for seed in range(24):
        write_tar(tmp_path / f"0/{seed}.tar", layout_files("g-objaverse", seed % 3, captions=()))
    (tmp_path / "text_captions_cap3d.json").write_text('{"0/7": "seven", "0/11": ["a", "b"]}')
    opened = set()

    def counting(path, *arguments):
        opened.add(str(path))
        return real(path, *arguments)

    from mvd.data import search
    real = search.tar_members
    monkeypatch.setattr(search, "tar_members", counting)
    objects, found = found_in(tmp_path)
    assert len(objects) == 24 and found.items == 2
    assert len(opened) <= 16, f"{len(opened)} of 24 tars were opened"
    assert objects.name(11) == f"{tmp_path}/0/11" and objects.captions(11) == ["a", "b"]
    check(objects, 7, 1)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_folder_in_a_tar_with_the_name_of_the_tar_is_no_part_of_a_name(count, tmp_path):
    for seed in range(count):
        files = layout_files("g-objaverse", 0, captions=())
        inside = {f"./{seed}/{name}": content for name, content in files.items()}
        write_tar(tmp_path / f"0/{seed}.tar", inside)
    table = {f"0/{seed}": f"object {seed}" for seed in range(count)}
    (tmp_path / "captions.json").write_text(json.dumps(table))
    objects, found = found_in(tmp_path)
    assert found.items == count and found.left_out == []
    assert objects.captions(count - 1) == [f"object {count - 1}"]
    check(objects, 0, 0)


def test_a_pattern_is_one_path_and_paths_keep_their_settings(tmp_path):
    for seed in range(4):
        layout = "zero123" if seed < 2 else "trellis"
        write(tmp_path / f"{layout}_{seed}", layout_files(layout, seed))
    objects, founds = find_objects([tmp_path / "zero*", tmp_path / "trellis*"])
    assert [found.items for found in founds] == [2, 2]
    for seed in range(4):
        check(objects, seed, seed)
    assert objects.name(0) == f"{tmp_path}/zero*/zero123_0"


def test_the_object_itself_can_be_named(tmp_path):
    write(tmp_path / "abc", layout_files("zero123", 0))
    objects, _ = found_in(tmp_path / "abc")
    assert objects.name(0).endswith("/abc")
    check(objects, 0, 0)


def test_objects_are_small_and_reach_other_processes(tmp_path):
    for seed in range(3):
        write(tmp_path / f"{seed}", layout_files("zero123", seed))
    objects, _ = found_in(tmp_path)
    again = pickle.loads(pickle.dumps(objects))
    check(again, 2, 2)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        name = pool.apply(objects.name, (1,))
    assert name == f"{tmp_path}/1"


def test_objects_of_one_name_under_two_paths_have_two_names(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "0", layout_files("zero123", 0))
    objects, _ = find_objects([f"{tmp_path}/a/", tmp_path / "b"])
    assert [objects.name(i) for i in range(2)] == [f"{tmp_path}/a/0", f"{tmp_path}/b/0"]
    assert objects.read(1).name == objects.name(1)


def test_contradicting_objects_end_in_an_error_that_says_what_they_look_like(tmp_path):
    for seed in range(4):
        layout = "trellis" if seed % 2 else "zero123"
        write(tmp_path / f"{seed}", layout_files(layout, seed))
    with pytest.raises(UserError) as error:
        find_objects([tmp_path])
    text = str(error.value)
    assert "world-to-camera" in text and "camera-to-world" in text and "\n" not in text


def test_one_object_of_another_convention_is_left_out(tmp_path):
    for seed in range(21):
        write(tmp_path / f"{seed}", layout_files("zero123", seed % 4))
    write(tmp_path / "17", layout_files("zero123", 1, c2w=np.linalg.inv(cameras(1))))
    objects, _ = found_in(tmp_path)
    with pytest.raises(BadMember, match="look like camera-to-world"):
        objects.read(17)
    check(objects, 18, 2)


@pytest.mark.parametrize("files, reason", [
    ({"meta.pkl": b"", "000.png": b""}, "^/.*/x is SyncDreamer.*pickle"),
    ({"rgb_000_front.webp": b"", "000_front_RT.txt": b"1"}, "^/.*/x is Wonder3D.*orthographic"),
    ({"model.glb": b""}, "meshes; render them"),
    ({"0.zip": b""}, "zip"),
    ({"a.jpg": b"", "a.txt": b"a ball"}, "holds no rendered objects, but captioned .*--images"),
    ({"a.jpg": b""}, "holds no rendered objects: what is wanted"),
    ({"index.jsonl": b'{"file": "sets/0.png", "kind": "set"}\n'}, "older version.*mvd.toyworld"),
])
def test_what_is_not_supported_is_named(files, reason, tmp_path):
    write(tmp_path / "x", files)
    with pytest.raises(UserError, match=reason) as error:
        find_objects([tmp_path])
    assert "\n" not in str(error.value)


# ---- bad members -----------------------------------------------------------------------------

def broken(layout, changes):
    """The files of object 0 with some replaced: {name: bytes, or None: missing}."""
    files = {**layout_files(layout, 0), **changes}
    return {name: content for name, content in files.items() if content is not None}


NAN = np.full((3, 4), np.nan)
ZERO = np.zeros((3, 4))
BAD_VIEWS = {
    "NaN matrix": ("zero123", {"003.npy": npy(NAN)}, "NaN"),
    "zero matrix": ("zero123", {"003.npy": npy(ZERO)}, "rotation"),
    "text for a matrix": ("zero123", {"003.npy": b"not a matrix"}, "numbers"),
    "half a matrix": ("zero123", {"003.npy": npy(ZERO)[:-9]}, "damaged"),
    "too few numbers": ("texts", {"pose/003.txt": b"1 2 3"}, "3 numbers, not 12 or 16"),
    "no camera": ("zero123", {"003.npy": None}, "camera file is missing"),
    "no picture": ("zero123", {"003.png": None}, "picture is missing"),
    "two pictures": ("zero123", {"003.webp": encoded(pictures(0)[0], "webp")}, "two pictures"),
    "broken JSON": ("point-e", {"00003.json": b'{"x": [1, 0'}, "no valid JSON"),
    "no origin": ("point-e", {"00003.json": b'{"x": [1, 0, 0]}'}, "x, y, z and origin"),
    "Latin-1": ("point-e", {"00003.json": b'{"x": "\xe9"}'}, "UTF-8"),
    "no picture in a folder": (
        "g-objaverse", {"campos_512_v4/00003/00003.png": None}, "picture is missing"),
    "no JSON in a folder": (
        "g-objaverse", {"campos_512_v4/00003/00003.json": None}, "camera file is missing"),
    "no picture of a frame": ("trellis", {"003.png": None}, "picture is missing"),
    "looks away": ("zero123", {"003.npy": npy(np.linalg.inv(cameras(0)[3])[:3] * -1)}, "mirrored"),
}


@pytest.mark.parametrize("what", BAD_VIEWS)
def test_a_bad_view_is_left_out_and_the_others_stay(what, tmp_path):
    layout, changes, reason = BAD_VIEWS[what]
    write(tmp_path / "x", broken(layout, changes))
    write_tar(tmp_path / "t/x.tar", broken(layout, changes))
    for path in ("x", "t"):
        objects, _ = found_in(tmp_path / path)
        rendered = check(objects, 0, 0, [0, 1, 2, 4, 5, 6, 7])
        (name, text), = rendered.left_out
        assert "3" in name and reason in text, rendered.left_out


def test_a_view_that_looks_elsewhere_is_left_out(tmp_path):
    c2w = cameras(0)
    c2w[3, :3, :3] = c2w[3, :3, :3] @ np.diag([1, -1, -1])
    write(tmp_path / "x", layout_files("zero123", 0, c2w=c2w))
    rendered = check(found_in(tmp_path)[0], 0, 0, [0, 1, 2, 4, 5, 6, 7])
    assert [name for name, _ in rendered.left_out] == ["003"]


def test_an_inverse_that_looks_at_a_point_is_left_out_among_others(tmp_path):
    """Round a point below the origin both readings look at a point: the likelier one counts."""
    for seed in range(2):
        write(tmp_path / f"{seed}", layout_files("zero123", seed))
    lowered = cameras(1, even=False)
    lowered[:, 2, 3] -= 0.6
    write(tmp_path / "2", layout_files("zero123", 1, c2w=lowered))
    objects, _ = found_in(tmp_path)
    error = objects.read(2).c2w.numpy() - cameras(1, even=False)
    assert np.abs(error).max() < 1e-5, "the same cameras, rightly written, are not read"
    wrong = np.linalg.inv(convention(lowered, opencv=True))
    write(tmp_path / "2", layout_files("zero123", 1, c2w=wrong))
    with pytest.raises(BadMember, match="look like camera-to-world, OpenCV"):
        objects.read(2)


def test_a_view_whose_lens_cannot_be_is_left_out(tmp_path):
    files = layout_files("trellis", 0)
    content = json.loads(files["transforms.json"])
    content["frames"][3]["fl_x"] = 0.5  # in units of the width
    write(tmp_path / "x", files | {"transforms.json": json.dumps(content).encode()})
    rendered = check(found_in(tmp_path)[0], 0, 0, [0, 1, 2, 4, 5, 6, 7])
    assert np.allclose(rendered.fov, 40), "fields of view of other views"
    (name, reason), = rendered.left_out
    assert name == "003.png" and "field of view" in reason


def test_half_a_picture_is_found_when_it_is_decoded(tmp_path):
    whole = layout_files("zero123", 0)["003.png"]
    write(tmp_path / "x", broken("zero123", {"003.png": whole[:len(whole) // 2]}))
    objects, _ = found_in(tmp_path)
    rendered = objects.read(0)
    with pytest.raises(BadMember):
        objects.pictures(rendered, [3], SIZE)
    assert objects.pictures(rendered, [2, 4], SIZE).shape == (2, 4, SIZE, SIZE)


def test_two_members_of_one_name_are_left_out(tmp_path):
    members = list(layout_files("zero123", 0).items())
    members += [(name, content) for name, content in members if name.startswith("003.png")]
    write_tar(tmp_path / "x.tar", members)
    objects, _ = found_in(tmp_path / "x.tar")
    rendered = check(objects, 0, 0, [0, 1, 2, 4, 5, 6, 7])
    assert rendered.left_out == [("003", "there are two pictures of this name")]


def test_an_object_without_a_usable_view_is_a_bad_member(tmp_path):
    bad = {f"{k:03d}.npy": npy(NAN) for k in range(VIEWS)}
    write(tmp_path / "a", broken("zero123", bad))
    write(tmp_path / "b", layout_files("zero123", 1))
    objects, _ = found_in(tmp_path)
    with pytest.raises(BadMember, match="none of its views.*NaN"):
        objects.read(0)
    check(objects, 1, 1)
    with pytest.raises(UserError, match="no object can be read.*NaN"):
        find_objects([tmp_path / "a"])


def test_broken_transforms_and_a_damaged_tar_are_left_out(tmp_path):
    write(tmp_path / "a", broken("trellis", {"transforms.json": b'{"frames": ['}))
    write(tmp_path / "b", layout_files("trellis", 1))
    (tmp_path / "c.tar").write_bytes(b"no tar" * 200)
    objects, found = found_in(tmp_path)
    assert [name for name, _, _ in found.left_out] == [f"{tmp_path}/c"]
    with pytest.raises(BadMember, match="transforms.json is no valid JSON"):
        objects.read(0)
    check(objects, 1, 1)


def test_an_orthographic_camera_is_a_bad_member(tmp_path):
    files = layout_files("bpy-renderer", 0)
    files["meta.json"] = files["meta.json"].replace(b'"camera_angle_x"', b'"ortho_scale"')
    write(tmp_path / "a", files)
    with pytest.raises(UserError, match="orthographic"):
        find_objects([tmp_path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_folder_that_cannot_be_listed_is_left_out(tmp_path):
    for seed in range(2):
        write(tmp_path / f"{seed}", layout_files("zero123", seed))
    (tmp_path / "0").chmod(0)
    try:
        objects, found = found_in(tmp_path)
    finally:
        (tmp_path / "0").chmod(0o755)
    assert len(objects) == 1 and found.left_out[0][0] == f"{tmp_path}/0"


def test_pictures_without_cameras_beside_objects_are_left_out(tmp_path):
    write(tmp_path / "a/0", layout_files("zero123", 0))
    files = layout_files("zero123", 1)
    write(tmp_path / "a/1", {name: files[name] for name in files if ".npy" not in name})
    write_tar(tmp_path / "a/2.tar", {"000.png": encoded(pictures(0)[0])})
    write(tmp_path / "b", {"photo.png": encoded(pictures(0)[0]), "photo.txt": b"a ball"})
    objects, found = found_in(tmp_path)
    assert len(objects) == 1
    assert [(name, count) for name, _, count in found.left_out] == [
        (f"{tmp_path}/a/1", VIEWS), (f"{tmp_path}/b", 0), (f"{tmp_path}/a/2", 1)]


def test_captioned_images_and_other_pictures_by_objects_are_told_but_not_bad(tmp_path):
    picture = encoded(pictures(0)[0])
    write(tmp_path / "a/0", layout_files("zero123", 0))
    write(tmp_path, {"photo.png": picture, "photo.txt": b"a ball"})
    write(tmp_path / "a/1", {"x.png": picture, "x.json": b'{"caption": "a ball"}'})
    write(tmp_path / "b/c", {"x.png": picture, "x.txt": b"1 2 3", "y.png": picture})
    write(tmp_path / "d", {"x.png": picture, "metadata.jsonl": b""})
    write_tar(tmp_path / "e/0.tar", {"x.png": picture, "x.txt": "une boule dorée".encode()})
    _, found = found_in(tmp_path)
    images = "captioned images: name it with --images"
    reasons = {name.removeprefix(f"{tmp_path}/"): reason for name, reason, _ in found.left_out}
    assert reasons == {
        str(tmp_path): images, "a/1": images, "d": images, "e/0": images,
        "b/c": "it has pictures, but no cameras that can be read"}
    assert not any(count for *_, count in found.left_out)


def test_pictures_above_objects_and_many_shards_by_them_are_told(tmp_path):
    picture = encoded(pictures(0)[0])
    write(tmp_path / "0", layout_files("zero123", 0))
    write(tmp_path, {"preview.png": picture})
    for number in range(9):
        write_tar(tmp_path / f"shards/{number}.tar", {"x.png": picture, "x.txt": b"a ball"})
    _, found = found_in(tmp_path)
    above, *shards = found.left_out
    assert above[0] == str(tmp_path) and above[2] == 0, above
    assert shards and all("--images" in reason for _, reason, _ in shards), found.left_out


def test_a_picture_in_two_lists_is_one_view(tmp_path):
    files = layout_files("nerf", 0)
    files["transforms_val.json"] = files["transforms_test.json"]
    content = json.loads(files["transforms_test.json"])
    assert len(content["frames"]) > 1, "the test does not tell anything"
    content["frames"][0]["transform_matrix"] = cameras(1)[0].tolist()
    files["transforms_test.json"] = json.dumps(content).encode()
    write(tmp_path / "x", files)
    rendered = found_in(tmp_path)[0].read(0)
    assert len(rendered.names) == len(set(rendered.names))
    (name, reason), = rendered.left_out
    assert name in rendered.names and "transforms_test.json has another camera" in reason


def test_a_link_to_a_folder_above_does_not_lead_in_circles(tmp_path):
    write(tmp_path / "a/0", layout_files("zero123", 0))
    (tmp_path / "a/again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a/0")
    assert len(found_in(tmp_path)[0]) == 2


def test_a_pipe_and_a_broken_link_are_no_files(tmp_path):
    """Whoever opened the pipes would wait for ever: an alarm ends that."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a pipe was opened"))
    signal.alarm(5)
    write(tmp_path / "a", broken("zero123", {"003.png": None, "caption.txt": None}))
    for name in ("a/caption.txt", "a/captions.json", "a/x.json", "captions.csv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "a/003.png").symlink_to("nowhere.png")
    objects, _ = found_in(tmp_path)
    rendered = check(objects, 0, 0, [0, 1, 2, 4, 5, 6, 7])
    signal.alarm(0)
    assert rendered.left_out == [("003", "its picture is missing")]


def test_what_vanishes_later_is_a_bad_member(tmp_path):
    write(tmp_path / "a", layout_files("zero123", 0))
    objects, _ = found_in(tmp_path)
    rendered = objects.read(0)
    (tmp_path / "a/002.png").unlink()
    with pytest.raises(BadMember, match="cannot be read"):
        objects.pictures(rendered, [2], SIZE)
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    with pytest.raises(BadMember):
        objects.read(0)


def test_numbers_in_a_picture_of_text_do_not_make_captions_cameras(tmp_path):
    """Captioned images beside each other are no object, even if one caption is a number."""
    write(tmp_path, {"1.jpg": b"", "1.txt": b"7", "2.jpg": b"", "2.txt": b"a ball"})
    with pytest.raises(UserError, match="no rendered objects"):
        find_objects([tmp_path])
