"""One rendered object: what its folder looks like, and its views as the files give them.

    transforms.json       pictures and cameras in one file (transforms.py)
    picture + matrix      000.png + 000.npy or 000.txt, beside each other, or in folders such as
                          rgb/ and pose/; or pictures and cameras.npz; intrinsics.npy or .txt
    picture + JSON        00000.png + 00000.json with x, y, z, origin, beside each other, or each
                          view in a folder of its own

A folder is one on the disk, a path (str), or one inside a tar, a dict {name: Place or dict}. The
matrices are given as they are; whether they are camera-to-world, and which way the axes of a
camera point, is found out in poses.py.
"""
import io
import json
import math
import os
import posixpath
import re
from typing import NamedTuple

import numpy as np

from ..tools.errors import BadMember, UserError
from ..tools.photos import SUFFIXES
from .captions import json_of, text_of
from .shards import composed, natural, read_range
from .transforms import ACROSS, DOWN, read_transforms

PICTURE_FOLDERS = ("rgba", "rgb", "images", "image", "imgs", "img", "color", "colors", "renders")
MATRIX_FOLDERS = ("pose", "poses", "camera", "cameras", "cam", "cams", "c2w", "extrinsics",
                  "extrinsic", "matrices")
MASK_FOLDERS = ("mask", "masks", "alpha")
# The name of a mask beside the picture 000.png, without the suffix: 000_MatAlpha, mask_000 …
MASK = re.compile(r"^(.*)[_.](?:matalpha|mask|alpha)$|^mask_(.*)$", re.IGNORECASE)
# Pictures that show something else than colours.
OTHER_PICTURES = re.compile(
    r"[_.](depth|albedo|nd|mr|hdr|normals?|matalpha|mask|alpha)(_mm)?$"
    r"|^(normals?|depth|mask|alpha|albedo|dynamic_mask)_", re.IGNORECASE)
SPLITS = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
INTRINSICS = ("intrinsics.npy", "intrinsics.txt")
# How many files are tried before a folder is taken for something else: the first may be damaged.
TRIES = 3

# Where no file says it: the lens of Zero-1-to-3's renders (35 mm, sensor 32), and of G-Objaverse's
# (1422.222 / 1024 of the width), in degrees.
MATRIX_LENS = {"x_fov": 2 * math.degrees(math.atan(16 / 35))}
ORIGIN_LENS = {"x_fov": 2 * math.degrees(math.atan(512 / 1422.222))}


class Place(NamedTuple):
    """Where the bytes of a file are: a whole file (size -1), or a part of a tar.

    Where a tar holds two files of one name, file is "".
    """
    file: str
    offset: int = 0
    size: int = -1


class View(NamedTuple):
    """A view as the files give it."""
    name: str
    picture: Place
    matrix: np.ndarray             # [4, 4], of any convention
    lens: dict                     # as in transforms.Frame
    assumed: bool = False          # whether the lens is the usual one, which no file names
    mask: Place | None = None
    background: list | None = None  # the colour (r, g, b) that stands for transparency


# ---- folders ---------------------------------------------------------------------------------

def listing(node):
    """What lies directly in a folder: (files {name: Place}, folders {name: node}).

    Hidden ones and what is no file (a pipe, a broken link) are left out. Raises BadMember if the
    folder cannot be listed.
    """
    files, folders = {}, {}
    if isinstance(node, dict):
        for name, inside in node.items():
            (folders if isinstance(inside, dict) else files)[name] = inside
        return files, folders
    try:
        with os.scandir(node) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                if entry.is_dir():
                    if not (entry.is_symlink() and leads_back(entry.path)):
                        folders[entry.name] = entry.path
                elif entry.is_file():
                    files[entry.name] = Place(entry.path)
    except OSError as error:
        raise BadMember(f"the folder cannot be listed ({error.strerror})") from None
    return files, folders


def leads_back(link):
    """Whether a link to a folder leads to one that it lies in: a walk would never end."""
    here, there = os.path.realpath(os.path.dirname(link)), os.path.realpath(link)
    return os.path.commonpath([here, there]) == there


def tree(members):
    """Files inside a tar, [(name "a/b.png", Place)], as a node: nested dicts.

    A name with ../ is that of a file above the node; such a one is kept as it is.
    """
    root = {}
    for name, place in members:
        if name.startswith("../"):
            root[name] = place
            continue
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        *folders, last = parts
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                break  # A file has the folder's name.
        else:
            node[last] = Place("") if last in node else place
    return root


def folder_in(node, path):
    """The node of a folder "a/b" under another; for a part of a tar {} if there is none."""
    if isinstance(node, str):
        return os.path.join(node, path)
    for part in posixpath.normpath(path).split("/"):
        node = node.get(part, {}) if part != "." else node
        if not isinstance(node, dict):
            return {}
    return node


def finder(node):
    """A function: the path "images/000.png" of a file under a folder -> its Place, or None.

    Each folder is listed once only.
    """
    known = {}

    def find(path):
        folder, _, name = path.rpartition("/")
        if folder not in known:
            try:
                files = listing(folder_in(node, folder))[0]
            except BadMember:
                files = {}
            known[folder] = {composed(name): place for name, place in files.items()} | files
        return known[folder].get(name) or known[folder].get(composed(name))

    return find


def read_place(place):
    """The bytes of a file. Raises BadMember if it cannot be read."""
    if not place.file:
        raise BadMember("the tar holds two files of this name")
    return read_range(*place)


# ---- which layout ----------------------------------------------------------------------------

class Pairing(NamedTuple):
    """Pictures and cameras that may belong together: {stem of the name: [Place]}."""
    layout: str      # in words
    pictures: dict
    cameras: dict
    masks: dict      # {stem: Place}
    read: callable   # a camera's bytes -> (matrix [4, 4], lens)

    def fits(self):
        """Whether there is a picture whose camera file holds a camera."""
        both = [stem for stem, places in self.pictures.items() if places and self.cameras.get(stem)]
        for stem in sorted(both, key=natural)[:TRIES]:
            try:
                self.read(read_place(self.cameras[stem][0]))
                return True
            except BadMember:
                continue
        return False


def pairing_of(files, folders, most_folders=None):
    """The Pairing in a folder with these files and folders, or None.

    most_folders: look into so many folders of views only.
    """
    for pairing in pairings(files, folders, most_folders):
        if pairing.fits():
            return pairing
    return None


def pairings(files, folders, most_folders):
    """The Pairings that there may be, the likelier first."""
    pictures = stems(files, SUFFIXES)
    if pictures:
        masks = masks_of(files)
        for suffix, read in ((".npy", matrix_of), (".txt", matrix_of), (".json", origin_of)):
            cameras = stems(files, (suffix,))
            yield Pairing(f"picture + {suffix}", pictures, cameras, masks, read)
    if folders:
        yield from two_folders(folders)
        yield view_folders(folders, most_folders)


def layout_of(files, folders):
    """How the object lies that has these files and folders, in words; "" if it is no object.

    Raises UserError for an old data folder of this project, BadMember for a folder that cannot be
    listed.
    """
    check_old(files)
    found = transforms_in(files)
    if found:
        return found[0]
    if "cameras.npz" in files and stems(files, SUFFIXES):
        return "pictures + cameras.npz"
    pairing = pairing_of(files, folders, TRIES)
    return pairing.layout if pairing else ""


def check_old(files):
    """Raises UserError for the folder that earlier versions of mvd.toyworld wrote."""
    if "index.jsonl" not in files:
        return
    try:
        first = json.loads(read_place(files["index.jsonl"]).split(b"\n", 1)[0])
    except (BadMember, ValueError):
        return
    if isinstance(first, dict) and "kind" in first:
        raise UserError(
            f"{files['index.jsonl'].file} is of an older version of mvd; make the data again "
            "with `python -m mvd.toyworld --out DIR`")


def transforms_in(files):
    """The names of the files that list pictures and cameras, those of one object."""
    if "transforms.json" in files:
        return ["transforms.json"]
    if any(name in files for name in SPLITS):
        return [name for name in SPLITS if name in files]
    if "meta.json" in files:
        try:
            content = json_of(read_place(files["meta.json"]), "meta.json")
            ours = isinstance(content, dict) and "locations" in content
        except BadMember:
            # It may have been: whoever reads the object will report it.
            ours = bool(stems(files, SUFFIXES))
        if ours:
            return ["meta.json"]
    return []


def stems(files, suffixes):
    """{name without suffix: [Places]} of the files with one of these suffixes.

    Pictures of depth, normals and so on are left out.
    """
    found = {}
    for name, place in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and not OTHER_PICTURES.search(stem):
            found.setdefault(stem, []).append(place)
    return found


def masks_of(files):
    """{stem of the picture: Place} of the masks among the files."""
    found = {}
    for name, place in files.items():
        stem, suffix = os.path.splitext(name)
        mask = MASK.search(stem)
        if mask and suffix.lower() in SUFFIXES:
            found[mask[1] or mask[2]] = place
    return found


def two_folders(folders):
    """The Pairings of rgb/ + pose/ and their like."""
    masks = {}
    for name in MASK_FOLDERS:
        if name in folders:
            inside = stems(listing(folders[name])[0], SUFFIXES)
            masks.update({stem: places[0] for stem, places in inside.items()})
    for first in (name for name in PICTURE_FOLDERS if name in folders):
        for second in (name for name in MATRIX_FOLDERS if name in folders):
            files, _ = listing(folders[first])
            pictures = stems(files, SUFFIXES)
            cameras = stems(listing(folders[second])[0], (".npy", ".txt"))
            yield Pairing(
                f"{first}/ + {second}/", pictures, cameras, {**masks, **masks_of(files)},
                matrix_of)


def view_folders(folders, most=None):
    """The Pairing of folders 00000/, 00001/ … with one view each: stems are "00000/00000".

    most: look into so many folders only; if one of these holds several views it is an object of
    its own, and the Pairing is empty.
    """
    result = Pairing("picture + .json in a folder for each view", {}, {}, {}, origin_of)
    numbered = sorted((name for name in folders if name.isdecimal()), key=natural)
    for folder in numbered[:most]:
        files, _ = listing(folders[folder])
        pictures, cameras = stems(files, SUFFIXES), stems(files, (".json",))
        names = pictures.keys() or cameras.keys()
        if most and len(names) > 1:
            return result._replace(pictures={})
        # A folder with nothing in it is a view that is missing.
        for stem in names if len(names) == 1 else {folder}:
            name = f"{folder}/{stem}"
            result.pictures[name] = pictures.get(stem, [])
            result.cameras[name] = cameras.get(stem, [])
            result.masks[name] = masks_of(files).get(stem)
    return result


# ---- the views -------------------------------------------------------------------------------

def read_views(node):
    """The Views of an object, in natural order of their names, and what is left out of them.

    Returns (views, [(view name, reason)]). Raises BadMember if the object is damaged.
    """
    files, folders = listing(node)
    lists = transforms_in(files)
    if lists:
        views, left_out = transform_views(node, lists)
    elif "cameras.npz" in files:
        views, left_out = stacked_views(node, files)
    else:
        views, left_out = paired_views(node, pairing_of(files, folders))
    finite = np.isfinite([view.matrix for view in views]).reshape(-1, 16).all(1)
    for view, fine in zip(views, finite):
        if not fine:
            left_out.append((view.name, "its matrix holds NaN or infinity"))
    return [view for view, fine in zip(views, finite) if fine], left_out


def transform_views(node, lists):
    """Views of the files named `lists`, which list pictures and cameras."""
    find = finder(node)
    views, left_out, seen = [], [], {}
    for name in lists:
        content = json_of(read_place(find(name)), name)
        frames, bad = read_transforms(content, find)
        left_out += bad
        for frame in frames:
            first = seen.setdefault(frame.file, frame)
            if first is not frame:
                # Lists for training and testing may share views.
                if not np.array_equal(first.matrix, frame.matrix):
                    reason = f"{name} has another camera for it than the list before"
                    left_out.append((frame.file, reason))
                continue
            mask = find(frame.mask) if frame.mask else None
            picture = find(frame.file)
            if frame.mask and mask is None:
                left_out.append((frame.file, f"its mask {frame.mask} is missing"))
            elif not picture.file:
                left_out.append((frame.file, "the tar holds two pictures of this name"))
            else:
                matrix = np.array(frame.matrix, float)
                lens, assumed = frame.lens, False
                if not any(key in lens for key in ACROSS + DOWN):
                    lens, assumed = {**lens, **MATRIX_LENS}, True
                views.append(View(
                    frame.file, picture, matrix, lens, assumed, mask, frame.background))
    if len(lists) > 1:
        views.sort(key=lambda view: natural(view.name))
    return views, left_out


def paired_views(node, pairing):
    """Views whose cameras are files of their own; None: there is no such Pairing."""
    if pairing is None:
        raise BadMember("no picture has a camera file of its own that can be read")
    both = pairing.pictures.keys() & pairing.cameras.keys()
    # A preview or a table beside the views is none; a number more than the others have is one.
    usual = {shape_of(stem) for stem in both}
    names = [n for n in pairing.pictures.keys() | pairing.cameras.keys() if shape_of(n) in usual]
    lens, usual_lens = {}, ORIGIN_LENS
    if pairing.read is matrix_of:
        lens, usual_lens = intrinsics(node), MATRIX_LENS
    views, left_out = [], []
    for name in sorted(names, key=natural):
        try:
            picture = only(pairing.pictures.get(name), "picture")
            camera = only(pairing.cameras.get(name), "camera file")
            matrix, own_lens = pairing.read(read_place(camera))
            own_lens = own_lens or lens
            views.append(View(
                name, picture, matrix, own_lens or usual_lens, assumed=not own_lens,
                mask=pairing.masks.get(name)))
        except BadMember as problem:
            left_out.append((name, str(problem)))
    return views, left_out


def shape_of(name):
    """A name with every number replaced by 0."""
    return re.sub(r"\d+", "0", name)


def only(places, what):
    """The one Place in a list. Raises BadMember if there is none, or if there are several."""
    if not places:
        raise BadMember(f"its {what} is missing")
    if len(places) > 1 or not places[0].file:
        raise BadMember(f"there are two {what}s of this name")
    return places[0]


def stacked_views(node, files):
    """Views whose matrices lie in one array, in natural order of the pictures."""
    content = read_place(files["cameras.npz"])
    try:
        matrices = np.load(io.BytesIO(content), allow_pickle=False)["cam_poses"]
        matrices = [square(matrix) for matrix in np.asarray(matrices, float)]
    # A damaged archive raises nearly anything.
    except Exception as error:
        raise BadMember(f"cameras.npz has no matrices cam_poses ({error})") from None
    pictures = stems(files, SUFFIXES)
    if len(pictures) > len(matrices):
        # A preview beside the views is none.
        shapes = [shape_of(stem) for stem in pictures]
        usual = max(shapes, key=shapes.count)
        pictures = {stem: pictures[stem] for stem in pictures if shape_of(stem) == usual}
    if len(pictures) != len(matrices):
        raise BadMember(f"{len(pictures)} pictures, but {len(matrices)} matrices in cameras.npz")
    lens = intrinsics(node)
    masks = masks_of(files)
    views, left_out = [], []
    for name, matrix in zip(sorted(pictures, key=natural), matrices):
        try:
            picture = only(pictures[name], "picture")
            views.append(View(
                name, picture, matrix, lens or MATRIX_LENS, assumed=not lens,
                mask=masks.get(name)))
        except BadMember as problem:
            left_out.append((name, str(problem)))
    return views, left_out


# ---- cameras ---------------------------------------------------------------------------------

def numbers(content):
    """The numbers in a text file, parted by blanks, commas or brackets: float64 [n]."""
    words = re.split(r"[\s,;\[\]]+", text_of(content, "its camera file"))
    try:
        return np.array([float(word) for word in words if word])
    except ValueError:
        raise BadMember("its camera file holds something else than numbers") from None


def array(content):
    """What a .npy file, or a text with numbers, holds: float64. Raises BadMember."""
    if not content.startswith(b"\x93NUMPY"):
        return numbers(content)
    try:
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False), float)
    # A damaged header raises nearly anything.
    except Exception as error:
        raise BadMember(f"its camera file is damaged ({error})") from None


def square(values):
    """12 or 16 numbers as a matrix [4, 4]. Raises BadMember."""
    if values.size not in (12, 16):
        raise BadMember(f"its camera file holds {values.size} numbers, not 12 or 16")
    matrix = np.eye(4)
    rows = values.reshape(-1, 4)
    matrix[:len(rows)] = rows
    return matrix


def matrix_of(content):
    """The camera of a file with a matrix: (float64 [4, 4], lens {}). Raises BadMember."""
    return square(array(content)), {}


def origin_of(content):
    """The camera of a JSON file with x, y, z, origin, the columns of a matrix.

    Returns (float64 [4, 4], lens, {} if it has none). Raises BadMember.
    """
    camera = json_of(content, "its camera file")
    try:
        columns = [np.array(camera[name], float) for name in ("x", "y", "z", "origin")]
        matrix = square(np.stack(columns, -1))
        lens = {}
        # Blender's angles, in radians.
        for name, theirs in (("camera_angle_x", "x_fov"), ("camera_angle_y", "y_fov")):
            if camera.get(theirs):
                lens[name] = float(camera[theirs])
    except (KeyError, TypeError, ValueError, AttributeError, BadMember):
        raise BadMember("its camera file has no x, y, z and origin of three numbers") from None
    if not all(0 < angle < math.pi for angle in lens.values()):
        raise BadMember("its field of view is not between 0 and pi: it is in radians")
    return matrix, lens


def intrinsics(node):
    """The lens that intrinsics.npy or .txt beside the views, or one folder above, names, or {}.

    Raises BadMember if the file is of no use.
    """
    for name in INTRINSICS + tuple(f"../{name}" for name in INTRINSICS):
        if isinstance(node, str):
            path = os.path.join(node, name)
            place = Place(path) if os.path.isfile(path) else None
        else:
            place = node.get(name)
        if place:
            break
    else:
        return {}
    values = array(read_place(place)).flatten().tolist()
    if len(values) == 6:  # OpenLRM: [[fx, fy], [cx, cy], [width, height]]
        named = ("fl_x", "fl_y", "cx", "cy", "w", "h")
    elif len(values) == 9:  # a matrix K
        named = ("fl_x", "", "cx", "", "fl_y", "cy")
    elif len(values) == 10:  # ShapeNet-SRN: f, cx, cy, …, height, width
        named = ("fl_x", "cx", "cy", "", "", "", "", "", "h", "w")
    else:
        raise BadMember(f"{place.file} holds {len(values)} numbers, not 6 or 9")
    lens = {name: value for name, value in zip(named, values) if name}
    if lens["cx"] < 2 and "w" not in lens:
        lens |= {"w": 1.0, "h": 1.0}  # shares of the picture, not pixels
    if not all(0 < value < 1e6 for value in lens.values()):
        raise BadMember(f"{place.file} holds numbers that are no lens")
    return lens
