"""One and the same rendered object, written in every layout and convention.

Made with numpy and Pillow alone, from its own formulas for cameras: what reads it is tested against
them.
"""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 24
# G-Objaverse's constant and Zero-1-to-3's lens, in degrees, are what a reader has to assume.
FOV = 40.0
VIEWS = 8


# ---- the object ------------------------------------------------------------------------------

def look_at(position, up=(0, 0, 1)):
    """c2w [4, 4], OpenGL axes, of a camera at a position that looks at the origin."""
    position = np.asarray(position, float)
    backward = position / np.linalg.norm(position)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(backward, right), backward, position], 1)
    return c2w


def cameras(seed=0, views=VIEWS, even=True):
    """c2w [V, 4, 4] round the origin, z up: evenly at one elevation, or anywhere above -20 degrees.

    The first azimuth and the distances are random.
    """
    rng = np.random.default_rng(seed)
    azimuth = np.deg2rad(rng.uniform(0, 360) + np.arange(views) * 360 / views)
    elevation = np.full(views, np.deg2rad(rng.uniform(5, 30)))
    if not even:
        azimuth = rng.uniform(0, 2 * np.pi, views)
        elevation = np.deg2rad(rng.uniform(-20, 70, views))
    distance = rng.uniform(1.4, 1.6, views)
    x = np.cos(elevation) * np.cos(azimuth)
    y = np.cos(elevation) * np.sin(azimuth)
    positions = distance[:, None] * np.stack([x, y, np.sin(elevation)], 1)
    return np.stack([look_at(position) for position in positions])


def pictures(seed=0, views=VIEWS, size=SIZE):
    """RGBA, uint8 [V, size, size, 4]: a disc of random colours, which nearly fills the picture."""
    rng = np.random.default_rng(seed + 1000)
    pixels = rng.integers(0, 200, (views, size, size, 4), dtype=np.uint8)
    centre = (np.arange(size) + 0.5) / size * 2 - 1
    there = np.hypot(*np.meshgrid(centre, centre)) < 0.9
    pixels[..., 3] = np.where(there, 255, 0)
    # Colours do not matter where nothing is seen, but must be the same in RGB on white.
    pixels[:, ~there, :3] = 255
    return pixels


def expected(seed=0):
    """What is to be read of object `seed`: pictures, uint8 [V, 4, size, size]."""
    return pictures(seed).transpose(0, 3, 1, 2)


# ---- conventions -----------------------------------------------------------------------------

def convention(c2w, inverse=False, opencv=False):
    """The matrices of a convention for cameras c2w [V, 4, 4]."""
    c2w = c2w.copy()
    if opencv:
        c2w[:, :3, 1:3] *= -1
    return np.linalg.inv(c2w) if inverse else c2w


def with_y_up(c2w):
    """The same cameras in a world whose y is up: (x, y, z) -> (x, z, -y)."""
    turn = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
    c2w = c2w.copy()
    c2w[:, :3] = turn @ c2w[:, :3]
    return c2w


# ---- files -----------------------------------------------------------------------------------

def encoded(pixels, suffix="png"):
    """A picture [H, W, 3 or 4] as the bytes of a file."""
    file = io.BytesIO()
    kind = {"webp": dict(format="WEBP", lossless=True, exact=True)}.get(suffix, {"format": "PNG"})
    Image.fromarray(pixels).save(file, **kind)
    return file.getvalue()


def npy(matrix):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, matrix)
    return file.getvalue()


def as_json(value):
    return json.dumps(value).encode()


def frame(name, matrix, **fields):
    """A frame of transforms.json."""
    return {"file_path": name, "transform_matrix": matrix.tolist(), **fields}


def origin_json(matrix, **fields):
    """The bytes of a JSON file with the columns of a matrix."""
    columns = dict(zip(("x", "y", "z", "origin"), matrix[:3].T.tolist()))
    return as_json({**columns, **fields})


RADIANS = np.deg2rad(FOV)


def nerf(c2w, seed):
    """NeRF-synthetic: three files, no suffix."""
    files, names = {}, ("train", "val", "test")
    frames = {name: [] for name in names}
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        # The order of all is that of the names: test, train, val.
        part = names[(2, 0, 1)[3 * k // len(c2w)]]
        files[f"{part}/r_{k}.png"] = encoded(pixels)
        frames[part].append(frame(f"./{part}/r_{k}", matrix, rotation=0.01))
    for name in names:
        files[f"transforms_{name}.json"] = as_json(
            {"camera_angle_x": RADIANS, "frames": frames[name]})
    return files


def trellis(c2w, seed):
    """TRELLIS: the angle in every frame, and how the object was normalised."""
    files, frames = {}, []
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        files[f"{k:03d}.png"] = encoded(pixels)
        frames.append(frame(f"{k:03d}.png", matrix, camera_angle_x=RADIANS))
    files["transforms.json"] = as_json({
        "aabb": [[-0.5] * 3, [0.5] * 3], "scale": 0.7, "offset": [0.1, 0, 0], "frames": frames})
    return files


def nerfstudio(c2w, seed):
    """nerfstudio: focal lengths, a folder, masks, and a transform that is already applied."""
    files, frames = {}, []
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        files[f"images/frame_{k}.png"] = encoded(np.ascontiguousarray(pixels[..., :3]))
        files[f"masks/frame_{k}.png"] = encoded(np.ascontiguousarray(pixels[..., 3]))
        frames.append(frame(
            f"images/frame_{k}.png", matrix, mask_path=f"masks/frame_{k}.png"))
    f = SIZE / 2 / np.tan(RADIANS / 2)
    files["transforms.json"] = as_json({
        "fl_x": f, "fl_y": f, "cx": SIZE / 2, "cy": SIZE / 2, "w": SIZE, "h": SIZE,
        "camera_model": "OPENCV", "applied_transform": [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]],
        "frames": frames[::-1]})
    return files


def bpy_renderer(c2w, seed):
    """MV-Adapter's meta.json."""
    files, places = {}, []
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        files[f"render_{k:04d}.webp"] = encoded(pixels, "webp")
        files[f"normal_{k:04d}.webp"] = encoded(pixels, "webp")
        places.append({"index": f"{k:04d}", "transform_matrix": matrix.tolist()})
    files["meta.json"] = as_json({"camera_angle_x": RADIANS, "locations": places})
    return files


def zero123(c2w, seed):
    """Zero-1-to-3: 3x4 matrices beside the pictures."""
    files = {"metadata.json": b'{"animation_count": 0}'}
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        files[f"{k:03d}.png"] = encoded(pixels)
        files[f"{k:03d}.npy"] = npy(matrix[:3])
    return files


def texts(c2w, seed):
    """LGM: 16 numbers of text in a folder of their own."""
    files = {}
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        files[f"rgb/{k:03d}.png"] = encoded(pixels)
        files[f"pose/{k:03d}.txt"] = " ".join(map(repr, matrix.flatten().tolist())).encode()
    return files


def openlrm(c2w, seed):
    """OpenLRM: folders of pictures and matrices, and the lens."""
    f = SIZE / 2 / np.tan(RADIANS / 2)
    files = {"intrinsics.npy": npy(np.array([[f, f], [SIZE / 2] * 2, [SIZE] * 2]))}
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        files[f"rgba/{k:03d}.png"] = encoded(pixels)
        files[f"pose/{k:03d}.npy"] = npy(matrix[:3])
    return files


def instantmesh(c2w, seed):
    """InstantMesh: all matrices in one file."""
    file = io.BytesIO()
    np.savez(file, cam_poses=c2w[:, :3])
    files = {"cameras.npz": file.getvalue()}
    for k, pixels in enumerate(pictures(seed)):
        files[f"{k:03d}.png"] = encoded(pixels)
        files[f"{k:03d}_normal.png"] = encoded(pixels)
        files[f"{k:03d}_depth.png"] = encoded(pixels)
    return files


def point_e(c2w, seed):
    """point-e and Cap3D: JSON beside the pictures, with angles in radians."""
    files = {"info.json": b'{"backend": "gpu"}'}
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        files[f"{k:05d}.png"] = encoded(np.ascontiguousarray(pixels[..., :3]))
        files[f"{k:05d}_depth.png"] = encoded(pixels)
        files[f"{k:05d}_MatAlpha.png"] = encoded(np.ascontiguousarray(pixels[..., 3]))
        files[f"{k:05d}.json"] = origin_json(matrix, x_fov=RADIANS, y_fov=RADIANS)
    return files


def g_objaverse(c2w, seed):
    """G-Objaverse: each view in a folder of its own."""
    files = {}
    for k, (matrix, pixels) in enumerate(zip(c2w, pictures(seed))):
        stem = f"campos_512_v4/{k:05d}/{k:05d}"
        files[f"{stem}.png"] = encoded(pixels)
        files[f"{stem}.json"] = origin_json(matrix)
        for other in ("albedo", "nd", "mr"):
            files[f"{stem}_{other}.png"] = encoded(pixels)
    return files


# Writers, each with the convention that the layout usually has: (inverse, opencv).
LAYOUTS = {
    "nerf": (nerf, False, False),
    "trellis": (trellis, False, False),
    "nerfstudio": (nerfstudio, False, False),
    "bpy-renderer": (bpy_renderer, False, False),
    "zero123": (zero123, True, False),
    "texts": (texts, False, True),
    "openlrm": (openlrm, False, False),
    "instantmesh": (instantmesh, True, False),
    "point-e": (point_e, False, True),
    "g-objaverse": (g_objaverse, False, True),
}


def layout_files(layout, seed=0, *, c2w=None, captions=("a ball",)):
    """The files {name: bytes} of object `seed`. c2w: other cameras than its own."""
    writer, inverse, opencv = LAYOUTS[layout]
    matrices = cameras(seed) if c2w is None else c2w
    files = writer(convention(matrices, inverse, opencv), seed)
    if captions:
        files["caption.txt"] = "\n".join(captions).encode()
    return files


def write(folder, files):
    """Write {name: bytes} into a folder; returns the folder."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder)


def write_tar(path, files):
    """Write files as a tar: {name: bytes}, or a list of (name, bytes) where names occur twice."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8") as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return Path(path)
