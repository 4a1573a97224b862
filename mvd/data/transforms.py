"""transforms.json: pictures, their cameras and lenses in one file, which many tools write.

    {"camera_angle_x": 0.69, "frames": [{"file_path": "000.png", "transform_matrix": [[…]]}, …]}

NeRF's synthetic scenes began it; instant-ngp, nerfstudio and TRELLIS each added something, and
Blender renderers' meta.json with "locations" is alike. One reader takes them all:

- A value of a frame goes before the same at the top level.
- Field of view: `fl_x` (pixels) before `camera_angle_x` (radians) before `x_fov` (degrees), and
  the same for y. The picture's size may be known only when it is opened: `fov_of` is for then.
- `file_path` may lack its extension, and may have "./" or backslashes.
- `applied_transform`, `scale`, `offset`, `aabb…` tell how the world was made. They are passed over:
  the matrices are in the world of the file.

Whether a matrix is what it should be is the matter of poses.py.
"""
import json
import math
import posixpath
import re
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..tools.errors import BadMember
from ..tools.files import write_atomic
from ..tools.photos import SUFFIXES
from .shards import natural


# ---- writing ---------------------------------------------------------------------------------


def write_transforms(folder, names, c2w, fov_deg, *, size=None):
    """Write folder/transforms.json, whole or not at all, in a form that all four tools read.

    names: file names of the pictures, relative to the folder. c2w [n, 4, 4]: tensors or arrays.
    fov_deg: one number, or [n]. size: pixels per side of the square pictures; some tools need it.
    """
    matrices = np.asarray(c2w, dtype=np.float64).tolist()
    fov = np.broadcast_to(np.asarray(fov_deg, dtype=np.float64), len(names))
    lenses = [lens_fields(float(angle), size) for angle in fov]
    content = {}
    if all(lens == lenses[0] for lens in lenses):
        content = lenses[0]
        lenses = [{}] * len(names)
    content["frames"] = [
        {"file_path": name, **lens, "transform_matrix": matrix}
        for name, lens, matrix in zip(names, lenses, matrices, strict=True)
    ]
    text = json.dumps(content, indent=1)
    write_atomic(Path(folder) / "transforms.json", text.encode())


def lens_fields(fov_deg, size):
    """The fields of a lens that sees fov_deg across a square of `size` pixels (None: unsaid)."""
    half = math.radians(fov_deg) / 2
    fields = {"camera_angle_x": 2 * half}
    if size:
        focal = size / 2 / math.tan(half)
        fields |= {"camera_angle_y": 2 * half, "fl_x": focal, "fl_y": focal}
        fields |= {"cx": size / 2, "cy": size / 2, "w": size, "h": size}
    return fields


# ---- reading ---------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One picture of a transforms.json."""
    file: str      # relative to the folder of the file, with "/"
    matrix: list   # 4 rows of 4 numbers, as written
    lens: dict     # {name: number}: what is said of LENS, for `fov_of` and `centre_of`
    mask: str      # file of a mask, black where there is no object; "" if there is none
    background: list  # the colour (r, g, b) that stands for transparency, or None


# The focal length or the angle along one side; the first that is there is taken.
ACROSS = ["fl_x", "camera_angle_x", "x_fov"]
DOWN = ["fl_y", "camera_angle_y", "y_fov"]
SIZES = ["w", "h", "cx", "cy"]
DISTORTION = {"k1", "k2", "k3", "k4", "p1", "p2"}
KINDS = {*ACROSS, *DOWN}
LENS = KINDS | DISTORTION | {*SIZES}


def read_transforms(content, exists=None):
    """The frames of a file in natural order of their names, and what is left out.

    content: the parsed JSON. exists(path) -> bool: whether there is this file, by its path
    relative to the folder; None: unknown, every file is taken to be there. Returns ([Frame],
    [(name, reason)]). Raises BadMember if the file is of no use as a whole.
    """
    if not isinstance(content, dict):
        raise BadMember("it does not hold a JSON object with frames")
    key = "frames" if "frames" in content else "locations"
    frames = content.get(key)
    if not isinstance(frames, list) or not frames:
        raise BadMember("it has no list of frames")
    top = lens_of(content)
    check_model(content)
    check_distortion(top)

    found, left_out = {}, []
    for number, frame in enumerate(frames):
        name = f"frame {number}"
        try:
            if not isinstance(frame, dict):
                raise BadMember("it is no JSON object")
            name = file_of(frame)
            read = read_frame(frame, name, content, top, exists)
            if read.file in found:
                raise BadMember("two frames have this picture; the first is taken")
            found[read.file] = read
        except BadMember as error:
            left_out.append((name, str(error)))
    order = sorted(found, key=natural)
    return [found[file] for file in order], left_out


def read_frame(frame, path, content, top, exists):
    """A Frame of one entry. path: `file_of` it; content: the whole file; top: its lens."""
    lens = lens_of(frame)
    # A frame's own focal length, of whatever kind, goes before all kinds at the top level.
    if not KINDS.isdisjoint(lens):
        top = {key: value for key, value in top.items() if key not in KINDS}
    check_model(frame)
    if lens:
        lens = top | lens
        check_distortion(lens)
    else:
        lens = top
    matrix = frame.get("transform_matrix")
    if matrix is None:
        matrix = frame.get("transform_matrix_start")    # of a moving camera
    matrix = matrix_of(matrix)
    file = picture_of(path, exists)

    background = None
    for key, colour in [("white_transparent", 255), ("black_transparent", 0)]:
        if frame.get(key, content.get(key)) is True:
            background = [colour] * 3
    return Frame(file, matrix, lens, mask_of(frame, file, exists), background)


# ---- files -----------------------------------------------------------------------------------


# What no file system takes for a name.
NO_NAME = re.compile("[\0\ud800-\udfff]|[^/]{256}")


def tidy(path):
    """A path with "/" and without "./"."""
    path = path.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return ("/" if path.startswith("/") else "") + "/".join(parts) or "."


def file_of(frame):
    """The name of a frame's picture as written, tidied; it may lack its extension."""
    path = frame.get("file_path")
    index = frame.get("index")
    if path is None and isinstance(index, int | str):
        path = f"render_{index:0>4}"    # Blender renderers number their pictures
    if not isinstance(path, str) or not path.strip():
        raise BadMember("file_path is missing or no text")
    if NO_NAME.search(path):
        raise BadMember("file_path is no name of a file")
    return tidy(path)


def picture_of(path, exists):
    """The path of the picture that a frame means, with its extension.

    An absolute path of the machine that wrote the file is looked for from its end:
    /home/ann/fox/images/1.png is images/1.png here, if that exists.
    """
    if exists is None:
        known = posixpath.splitext(path)[1].lower() in SUFFIXES
        return path if known else path + ".png"
    endings = ["", *SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)]
    paths = [path]
    if path.startswith("/") or path[1:2] == ":":
        parts = path.split("/")
        paths += ["/".join(parts[i:]) for i in range(1, len(parts))]
    for name in paths:
        for ending in endings:
            if exists(name + ending):
                return name + ending
    raise BadMember("the picture is missing")


def mask_of(frame, file, exists):
    """The path of a frame's mask, or "".

    nerfstudio names it; instant-ngp takes x.alpha.png for x.png. Its dynamic_mask_x.png is no
    mask of the object: it hides what moves.
    """
    path = frame.get("mask_path")
    if path is not None:
        if not isinstance(path, str):
            raise BadMember("mask_path is no text")
        if exists and not exists(tidy(path)):
            raise BadMember("its mask is missing")
        return tidy(path)
    beside = ".alpha".join(posixpath.splitext(file))
    return beside if exists and exists(beside) else ""


# ---- numbers ---------------------------------------------------------------------------------


def is_number(value):
    """True and False are no numbers here, nor are NaN and infinity."""
    # An int may be too large for math.isfinite.
    return type(value) in (float, int) and -1e12 < value < 1e12


def matrix_of(value):
    """4 rows of 4 numbers; a fourth row is added to three."""
    if value is None:
        raise BadMember("transform_matrix is missing")
    rows = value if isinstance(value, list) else []
    if [isinstance(row, list) and len(row) for row in rows] not in ([4] * 3, [4] * 4):
        raise BadMember("transform_matrix is not 3 or 4 rows of 4 numbers")
    if not all(map(is_number, chain.from_iterable(rows))):
        raise BadMember("transform_matrix holds NaN, infinity or what is no number")
    return rows if len(rows) == 4 else rows + [[0.0, 0.0, 0.0, 1.0]]


# {name: what a number must lie between, and what it is}.
LIMITS = {
    **dict.fromkeys(["fl_x", "fl_y", "w", "h"], (1e-3, 1e6, "in pixels")),
    **dict.fromkeys(["camera_angle_x", "camera_angle_y"], (1e-3, math.pi, "in radians")),
    **dict.fromkeys(["x_fov", "y_fov"], (0.05, 180, "in degrees")),
}


def lens_of(entry):
    """{name: number} of what an entry says of LENS. Raises BadMember for what cannot be."""
    lens = {key: entry[key] for key in entry if key in LENS and entry[key] is not None}
    for key, value in lens.items():
        if not is_number(value):
            raise BadMember(f"{key} is no number")
        low, high, unit = LIMITS.get(key, (-math.inf, math.inf, ""))
        if not low <= value < high:
            raise BadMember(f"{key} is {value:g}: it must be {unit}, from {low:g} to {high:.4g}")
    return lens


# Lenses that are no pinholes, by a part of their names.
NO_PINHOLE = re.compile("fisheye|equirect|omni|vr180|ftheta|latlong")
# The most that a lens may move the middle of a side, as a share of its way from the centre.
MOST_DISTORTION = 0.05


DISTORTED = "its lens distortion is large; undistort the pictures first"


def check_model(entry):
    """Raise BadMember if the entry says that its lens is no pinhole."""
    model = str(entry.get("camera_model", "")).lower()
    if entry.get("ortho_scale") is not None or "ortho" in model:
        raise BadMember("the camera is orthographic")
    if NO_PINHOLE.search(model) or entry.get("is_fisheye") is True:
        raise BadMember(DISTORTED)


def check_distortion(lens):
    """Raise BadMember if a lens is no pinhole, nearly, by its numbers."""
    fov = None
    if "w" in lens and "h" in lens:
        fov = fov_of(lens, lens["w"], lens["h"])
    if DISTORTION.isdisjoint(lens):
        return
    # k1, …: a point at r from the axis, in focal lengths, is seen at r (1 + k1 r² + k2 r⁴ + …).
    r = math.tan(math.radians(fov or 50) / 2)
    radial = [lens.get(f"k{i}", 0) * r ** (2 * i) for i in range(1, 5)]
    sideways = 3 * r * (abs(lens.get("p1", 0)) + abs(lens.get("p2", 0)))
    if abs(sum(radial)) + sideways > MOST_DISTORTION:
        raise BadMember(DISTORTED)


# ---- the square that is cut out of a picture -------------------------------------------------


def fov_of(lens, width, height):
    """The field of view in degrees of the largest square of a picture, or None if not said.

    lens: that of a Frame. width, height: the picture's pixels, which need not be the lens's w and
    h: pictures may have been made smaller since. Raises BadMember if it cannot be.
    """
    sides = [(ACROSS, width, "w"), (DOWN, height, "h")]
    if height < width:
        sides.reverse()
    # Along the shorter side; if only the longer one's is said, the same focal length holds.
    for kinds, pixels, declared in sides:
        for kind in kinds:
            if kind not in lens:
                continue
            value = lens[kind]
            if kind.startswith("fl"):
                focal = value * pixels / lens.get(declared, pixels)
            else:
                angle = math.radians(value) if kind.endswith("fov") else value
                focal = pixels / 2 / math.tan(angle / 2)
            fov = math.degrees(2 * math.atan(min(width, height) / 2 / focal))
            if not 0.5 < fov < 170:
                raise BadMember(f"{kind} gives a field of view of {fov:.3g} degrees")
            return fov
    return None


def centre_of(lens, width, height):
    """The point (x, y) in pixels of a picture that the camera is aimed at, or None: the middle.

    None also within 1% of the shorter side: that is not worth moving a picture for. Raises
    BadMember if it lies outside.
    """
    x = lens.get("cx", lens.get("w", width) / 2) * width / lens.get("w", width)
    y = lens.get("cy", lens.get("h", height) / 2) * height / lens.get("h", height)
    if max(abs(x - width / 2), abs(y - height / 2)) <= 0.01 * min(width, height):
        return None
    if not (0 <= x <= width and 0 <= y <= height):
        raise BadMember("cx, cy lie outside the picture")
    return x, y
