"""transforms.json in the dialects of four tools: the same cameras and lenses come out of all."""
import json
import math

import numpy as np
import pytest
import torch

from mvd.cameras import orbit
from mvd.data.poses import CONVENTIONS, recognise, to_c2w
from mvd.data.transforms import centre_of, fov_of, read_transforms, write_transforms
from mvd.tools.errors import BadMember

FOV = 40.0
N = 12
r = np.random.default_rng(0)
C2W = orbit(r.uniform(-30, 80, N), r.uniform(0, 360, N), r.uniform(1.5, 2.2, N)).double().numpy()


def frames_of(name, matrices=C2W, **fields):
    return [
        {"file_path": name.format(i), "transform_matrix": m.tolist(), **fields}
        for i, m in enumerate(matrices)]


# ---- dialects: written by hand, as each tool's files look ------------------------------------


def nerf_synthetic(m):
    frames = frames_of("./train/r_{}", m, rotation=0.012566)
    return {"camera_angle_x": math.radians(FOV), "frames": frames}, "train/r_{}.png"


def instant_ngp(m):
    content = {
        "x_fov": FOV, "y_fov": FOV, "scale": 0.33, "offset": [0.5, 0.5, 0.5], "aabb_scale": 4,
        "k1": 0.01, "p1": 1e-4, "frames": frames_of("images\\{:04}.jpg", m, sharpness=30.1)[::-1]}
    return content, "images/{:04}.jpg"


def nerfstudio(m):
    focal = 240 / math.tan(math.radians(FOV) / 2)
    content = {
        "w": 640, "h": 480, "fl_x": focal, "fl_y": focal, "cx": 320.4, "cy": 239.1,
        "k1": 0.03, "k2": -0.04, "k3": 0, "camera_model": "OPENCV",
        "applied_transform": [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 5]],
        "frames": frames_of("images/frame_{:05}.png", m, colmap_im_id=7)}
    return content, "images/frame_{:05}.png"


def nerfstudio_by_frame(m):
    content, names = nerfstudio(m)
    lens = {key: content.pop(key) for key in ["w", "h", "fl_x", "fl_y", "cx", "cy"]}
    content["frames"] = [frame | lens for frame in content["frames"]]
    return content, names


def trellis(m):
    frames = frames_of("{:03}.png", m, camera_angle_x=math.radians(FOV))
    return {"aabb": [[-0.5] * 3, [0.5] * 3], "scale": 0.7, "offset": [9, 9, 9],
            "frames": frames}, "{:03}.png"


def moving(m):
    content, names = nerf_synthetic(m)
    for frame in content["frames"]:
        frame["transform_matrix_start"] = frame.pop("transform_matrix")
        frame["transform_matrix_end"] = np.eye(4).tolist()
    return content, names


def blender_locations(m):
    locations = [
        {"index": f"{i:04}" if i % 2 else i, "transform_matrix": matrix.tolist()}
        for i, matrix in enumerate(m)]
    return {"camera_angle_x": math.radians(FOV), "locations": locations}, "render_{:04}.webp"


DIALECTS = [
    nerf_synthetic, instant_ngp, nerfstudio, nerfstudio_by_frame, trellis, moving,
    blender_locations]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("convention", CONVENTIONS, ids=["c2w GL", "w2c GL", "c2w CV", "w2c CV"])
def test_every_dialect_in_every_convention_gives_the_same_cameras(dialect, convention):
    m = C2W @ np.diag([1, -1, -1, 1]) if convention.opencv else C2W
    m = np.linalg.inv(m) if convention.inverse else m
    content, names = dialect(m)
    content = json.loads(json.dumps(content))
    files = {names.format(i) for i in range(N)}
    frames, left_out = read_transforms(content, files.__contains__)
    assert left_out == []
    assert [frame.file for frame in frames] == [names.format(i) for i in range(N)]
    matrices = np.array([frame.matrix for frame in frames])
    found = recognise([("object", matrices)])
    assert found == convention
    assert np.abs(to_c2w(matrices, found) - C2W).max() < 1e-6
    for frame in frames:
        assert fov_of(frame.lens, 640, 480 if "w" in frame.lens else 640) == pytest.approx(FOV)


@pytest.mark.parametrize("size", [None, 256])
def test_what_is_written_is_read_again(tmp_path, size):
    names = [f"{i:03}.png" for i in range(N)]
    for fov in [FOV, torch.linspace(20, 60, N)]:
        c2w = torch.tensor(C2W, dtype=torch.float32)
        write_transforms(tmp_path, names, c2w, fov, size=size)
        content = json.loads((tmp_path / "transforms.json").read_text())
        frames, left_out = read_transforms(content)
        assert not left_out and [frame.file for frame in frames] == names
        assert np.array_equal([frame.matrix for frame in frames], c2w.numpy())
        found = [fov_of(frame.lens, 256, 256) for frame in frames]
        assert np.allclose(found, fov), "the field of view is another"
        equal = isinstance(fov, float)
        assert ("camera_angle_x" in content) == equal
        assert ("camera_angle_x" in content["frames"][0]) != equal
        if size:
            lens = content if equal else content["frames"][0]
            focal = 128 / math.tan(lens["camera_angle_x"] / 2)
            assert lens["fl_x"] == pytest.approx(focal) and lens["w"] == 256 == 2 * lens["cx"]
    assert [path.name for path in tmp_path.iterdir()] == ["transforms.json"]


def test_the_field_of_view_is_in_radians_in_the_file(tmp_path):
    write_transforms(tmp_path, ["a.png"], C2W[:1], 40)
    content = json.loads((tmp_path / "transforms.json").read_text())
    assert content["camera_angle_x"] == pytest.approx(0.6981317)
    assert content["frames"][0]["file_path"] == "a.png"


# ---- lenses ----------------------------------------------------------------------------------


def read_one(top=(), **fields):
    """The only frame of a file, of which nothing may be left out."""
    content = {**dict(top), "frames": frames_of("{}.png", C2W[:1], **fields)}
    frames, left_out = read_transforms(content)
    assert not left_out, left_out
    return frames[0]


def fov(width, height, top=(), **fields):
    return fov_of(read_one(top, **fields).lens, width, height)


def test_which_value_goes_first():
    focal = 50 / math.tan(math.radians(25))    # 100 pixels, 50 degrees
    radians = math.radians(40)
    assert fov(100, 100, fl_x=focal, camera_angle_x=radians, x_fov=30) == pytest.approx(50)
    assert fov(100, 100, camera_angle_x=radians, x_fov=30) == pytest.approx(40)
    assert fov(100, 100, x_fov=30) == pytest.approx(30)
    assert fov(100, 100) is None
    # A frame's own, of whatever kind, before the top level's.
    assert fov(100, 100, {"fl_x": focal}, x_fov=30) == pytest.approx(30)
    assert fov(100, 100, {"x_fov": 30}, x_fov=None) == pytest.approx(30), "null is a value"
    assert fov(200, 100, {"y_fov": 30}, x_fov=40) != pytest.approx(30)


def square(angle, longer, shorter):
    """The angle across the shorter side of a picture whose longer one spans `angle`."""
    half = math.tan(math.radians(angle) / 2) * shorter / longer
    return math.degrees(2 * math.atan(half))


def test_the_field_of_view_is_that_of_the_largest_square():
    assert fov(640, 480, x_fov=60) == pytest.approx(square(60, 640, 480))
    assert fov(480, 640, x_fov=60) == pytest.approx(60)
    assert fov(640, 480, y_fov=60) == pytest.approx(60)
    assert fov(480, 640, y_fov=60) == pytest.approx(square(60, 640, 480))
    assert fov(640, 480, camera_angle_x=1.0, camera_angle_y=0.7) == pytest.approx(
        math.degrees(0.7))
    assert fov(640, 480, fl_x=240) == pytest.approx(90)
    assert fov(480, 640, fl_x=240) == pytest.approx(90)


def test_pictures_made_smaller_keep_their_field_of_view():
    lens = {"fl_x": 500, "fl_y": 500, "w": 1000, "h": 800, "cx": 600, "cy": 400}
    assert fov(1000, 800, **lens) == pytest.approx(fov(250, 200, **lens))
    assert fov(1000, 800, **lens) == pytest.approx(math.degrees(2 * math.atan(0.8)))
    frame = read_one(**lens)
    assert centre_of(frame.lens, 1000, 800) == (600, 400)
    assert centre_of(frame.lens, 250, 200) == (150, 100)


def test_a_principal_point_in_the_middle_is_none():
    assert centre_of(read_one().lens, 100, 100) is None
    assert centre_of(read_one(cx=50.4, cy=49.7).lens, 100, 100) is None
    assert centre_of(read_one(cx=60).lens, 100, 100) == (60, 50)
    assert centre_of(read_one({"cx": 30}, cx=60).lens, 100, 100) == (60, 50), "not the frame's own"
    with pytest.raises(BadMember, match="outside"):
        centre_of(read_one(cx=-7).lens, 100, 100)


@pytest.mark.parametrize("lens, reason", [
    ({"camera_model": "OPENCV_FISHEYE"}, "lens distortion"),
    ({"camera_model": "EQUIRECTANGULAR"}, "lens distortion"),
    ({"is_fisheye": True}, "lens distortion"),
    ({"k1": -0.3, "x_fov": 60}, "lens distortion"),
    ({"k1": -0.3, "fl_x": 500, "w": 600, "h": 600}, "lens distortion"),
    ({"p1": 0.1}, "lens distortion"),
    ({"ortho_scale": 1.25}, "orthographic"),
    ({"camera_model": "ORTHOPHOTO"}, "orthographic"),
    ({"x_fov": "40"}, "x_fov is no number"),
    ({"camera_angle_x": True}, "camera_angle_x is no number"),
    ({"fl_x": float("nan")}, "fl_x is no number"),
    ({"fl_x": -500.0}, "fl_x is -500"),
    ({"camera_angle_x": 40}, "radians"),
    ({"x_fov": 180}, "degrees"),
    ({"w": 0}, "w is 0"),
    ({"cx": [3]}, "cx is no number"),
])
def test_a_lens_that_cannot_be_used_is_said(lens, reason):
    content = {**lens, "frames": frames_of("{}.png")}
    with pytest.raises(BadMember, match=reason):
        read_transforms(content)
    content = {"frames": frames_of("{}.png")}
    content["frames"][3] |= lens
    frames, left_out = read_transforms(content)
    assert len(frames) == N - 1, "the other frames are gone, too"
    assert left_out[0][0] == "3.png" and reason in left_out[0][1], left_out


@pytest.mark.parametrize("lens", [
    {"camera_model": "PINHOLE"}, {"camera_model": "OPENCV", "k1": 0.058, "k2": -0.08},
    {"k1": -0.3, "fl_x": 3000, "w": 600, "h": 600}, {"is_fisheye": False}, {"ortho_scale": None},
])
def test_a_lens_that_is_nearly_a_pinhole_is_taken(lens):
    assert len(read_transforms({**lens, "frames": frames_of("{}.png")})[0]) == N


def test_a_field_of_view_that_cannot_be_is_said():
    # A focal length in units of the width.
    with pytest.raises(BadMember, match="field of view of 180"):
        fov(512, 512, fl_x=1.1)


# ---- frames that cannot be used --------------------------------------------------------------

NAN = C2W[0].tolist()
NAN[1][2] = float("nan")
WORDS = C2W[0].tolist()
WORDS[1][2] = "0.5"


@pytest.mark.parametrize("frame, name, reason", [
    ({"file_path": "a.png"}, "a.png", "transform_matrix is missing"),
    ({"file_path": "a.png", "transform_matrix": NAN}, "a.png", "NaN"),
    ({"file_path": "a.png", "transform_matrix": WORDS}, "a.png", "no number"),
    ({"file_path": "a.png", "transform_matrix": [[10 ** 400] * 4] * 4}, "a.png", "infinity"),
    ({"file_path": "a.png", "transform_matrix": np.eye(3).tolist()}, "a.png", "rows"),
    ({"file_path": "a.png", "transform_matrix": [1] * 16}, "a.png", "rows"),
    ({"file_path": "a.png", "transform_matrix": {"a": 1}}, "a.png", "rows"),
    ({"transform_matrix": C2W[0].tolist()}, "frame 12", "file_path"),
    ({"file_path": 7, "transform_matrix": C2W[0].tolist()}, "frame 12", "file_path"),
    ({"file_path": " ", "transform_matrix": C2W[0].tolist()}, "frame 12", "file_path"),
    ({"file_path": "a\0", "transform_matrix": C2W[0].tolist()}, "frame 12", "file_path"),
    ({"file_path": "x" * 300, "transform_matrix": C2W[0].tolist()}, "frame 12", "file_path"),
    ({"file_path": "\ud800", "transform_matrix": C2W[0].tolist()}, "frame 12", "file_path"),
    ({"file_path": "./0.png", "transform_matrix": C2W[0].tolist()}, "0.png", "two frames"),
    ({"file_path": "gone.png", "transform_matrix": C2W[0].tolist()}, "gone.png", "missing"),
    ({"file_path": "a.png", "transform_matrix": C2W[0].tolist(), "mask_path": 5}, "a.png", "mask"),
    ({"file_path": "a.png", "transform_matrix": C2W[0].tolist(), "mask_path": "gone"}, "a.png",
     "mask is missing"),
    (None, "frame 12", "no JSON object"),
    ("a.png", "frame 12", "no JSON object"),
])
def test_a_frame_that_cannot_be_used_is_left_out_and_named(frame, name, reason):
    content = {"frames": [*frames_of("{}.png"), frame]}
    frames, left_out = read_transforms(content, lambda path: not path.startswith("gone"))
    assert [frame.file for frame in frames] == [f"{i}.png" for i in range(N)]
    assert len(left_out) == 1 and left_out[0][0] == name, left_out
    assert reason in left_out[0][1], left_out


@pytest.mark.parametrize("content", [
    None, [], "frames", {}, {"frames": []}, {"frames": {}}, {"frames": None}, {"locations": 3}])
def test_a_file_without_frames_is_of_no_use(content):
    with pytest.raises(BadMember):
        read_transforms(content)


def test_three_rows_get_a_fourth():
    content = {"frames": frames_of("{}.png", C2W[:, :3])}
    frames, _ = read_transforms(content)
    assert np.array_equal([frame.matrix for frame in frames][2][3], [0, 0, 0, 1])


# ---- names of files --------------------------------------------------------------------------


def file_for(written, *there):
    frames, left_out = read_transforms(
        {"frames": [{"file_path": written, "transform_matrix": C2W[0].tolist()}]},
        (lambda path: path in there) if there else None)
    return frames[0].file if frames else left_out[0][1]


def test_names_of_pictures():
    assert file_for("./train/r_0") == "train/r_0.png"
    assert file_for(".\\train\\r_0.JPG") == "train/r_0.JPG"
    assert file_for("r_0.5") == "r_0.5.png", "a number was taken for an extension"
    assert file_for("r_0", "r_0.jpg", "r_0.png") == "r_0.png"
    assert file_for("r_0", "r_0.webp") == "r_0.webp"
    assert file_for("r_0", "r_0") == "r_0"
    assert file_for("r_0.tif") == "r_0.tif" and file_for("r_0.AVIF") == "r_0.AVIF"
    assert file_for("r_0", "r_0.PNG") == "r_0.PNG" and file_for("r_0", "r_0.jfif") == "r_0.jfif"
    assert file_for("../images/a.png", "../images/a.png") == "../images/a.png"
    assert file_for("/home/ann/fox/images/a.png", "images/a.png") == "images/a.png"
    assert file_for("C:\\fox\\images\\a", "images/a.jpg") == "images/a.jpg"
    assert file_for("images/a.png", "a.png") == "the picture is missing"


def test_frames_come_in_natural_order():
    names = ["r_10", "r_9", "b/r_1", "r_100", "r_2"]
    content = {"frames": [
        {"file_path": name, "transform_matrix": C2W[0].tolist()} for name in names]}
    found = [frame.file for frame in read_transforms(content)[0]]
    assert found == ["b/r_1.png", "r_2.png", "r_9.png", "r_10.png", "r_100.png"]


def test_masks_and_backgrounds():
    everywhere = {"file_path": "images/a.jpg", "transform_matrix": C2W[0].tolist()}
    there = {"images/a.jpg", "images/b.png", "images/b.alpha.png", "masks/a.png",
             "images/dynamic_mask_a.png"}
    named = everywhere | {"mask_path": "./masks/a.png"}
    beside = everywhere | {"file_path": "images/b"}

    def read(frame, **top):
        return read_transforms({**top, "frames": [frame]}, there.__contains__)[0][0]

    assert read(named).mask == "masks/a.png"
    assert read(beside).mask == "images/b.alpha.png"
    assert read(everywhere).mask == "", "what moves was taken for the object"
    assert read(everywhere).background is None
    assert read(everywhere, white_transparent=True).background == [255, 255, 255]
    assert read(everywhere, black_transparent=True).background == [0, 0, 0]
    own = everywhere | {"white_transparent": False}
    assert read(own, white_transparent=True).background is None
