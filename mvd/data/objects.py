"""Rendered objects as they lie on people's disks: found by looking, read one at a time.

`find_objects` walks through folders and tars and lists the objects (layouts.py says what one looks
like). Of each path it looks closely at some of them: what convention their matrices have, which way
is up, how much of the picture they fill. All objects of a path must agree in that. An object's
cameras and pictures are read when they are wanted.

Every camera comes out as cameras.py has it: camera-to-world, OpenGL axes, z up, and the point that
an object's cameras look at is the origin.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..tools.errors import BadMember, UserError
from ..tools.photos import open_picture
from . import poses
from .captions import Table, captions_from, own_captions, tables_near
from .decode import decode_view
from .found import Found, full_name
from .layouts import listing, read_place, read_views
from .search import FEW_TARS, node_of, search_places
from .shards import Records, expand
from .transforms import centre_of, fov_of

# The convention that a layout usually has, by how its name begins. It decides where the cameras
# themselves do not.
USUAL = {
    "transforms.json": poses.Convention(inverse=False, opencv=False),
    "meta.json": poses.Convention(inverse=False, opencv=False),
    "pictures + cameras.npz": poses.Convention(inverse=True, opencv=False),
    "picture + .npy": poses.Convention(inverse=True, opencv=False),
    "picture + .json": poses.Convention(inverse=False, opencv=True),
}
# Objects and views whose pictures are looked at for how much they fill.
FILL_OBJECTS, FILL_VIEWS = 16, 4
# Objects that reach less far from the middle than this share of the way are cut out closer.
LEAST_FILL = 0.6
# But not smaller than this share of a side: there is nothing to see in so few pixels.
LEAST_SHARE = 0.25
NO_CAPTION = "no caption"
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}


class Rendered(NamedTuple):
    """The cameras of one object: n views in natural order of their names."""
    name: str                # of the object, with its path
    names: list              # of the views
    c2w: torch.Tensor        # float32 [n, 4, 4], as in cameras.py
    fov: np.ndarray          # degrees [n], of the largest square of the picture
    azimuth: np.ndarray      # degrees [n], in [0, 360)
    elevation: np.ndarray    # degrees [n]
    distance: np.ndarray     # [n]
    left_out: list           # [(view name, reason)]
    views: list              # layouts.View [n]: where the pictures are
    settings: dict           # those of its path


class NoObjects(UserError):
    """There are no rendered objects under a path."""


@dataclass
class Objects:
    """Rendered objects of several paths. Small, and shared by processes."""
    records: Records         # one an object: its name, and where it is
    texts: Records           # its captions; None: they are in a tar that was not opened yet
    settings: Records        # one a path: what its matrices and pictures are like
    starts: torch.Tensor     # int64 [paths]: the first object of each path

    def __len__(self):
        return len(self.records)

    def settings_of(self, i):
        """The settings of the path of object i, a dict."""
        return self.settings[torch.searchsorted(self.starts, i, right=True).item() - 1]

    def name(self, i):
        """Where object i lies, in words: its path, and its name below that."""
        return full_name(self.settings_of(i)["path"], self.records[i]["name"])

    def captions(self, i):
        """The wordings of object i, at least one. Raises BadMember."""
        texts = self.texts[i]
        if texts is None:
            files, _ = listing(node_of(self.records[i]))
            texts = own_captions(files, lambda name: read_place(files[name]))
        if not texts:
            raise BadMember(NO_CAPTION)
        return texts

    def read(self, i):
        """The cameras of object i as a Rendered. Raises BadMember if none of them can be used."""
        settings = self.settings_of(i)
        views, left_out = read_views(node_of(self.records[i]))
        views, c2w, fov = usable_views(views, convention_of(settings), left_out)
        other = poses.other_up(c2w, settings["up"])
        if other:
            raise BadMember(f"{other} is up in it, {settings['up']} in the other objects")
        c2w[:, :3] = np.array(settings["turn"]) @ c2w[:, :3]
        c2w = poses.centre(c2w)
        return Rendered(
            self.name(i), [view.name for view in views], torch.tensor(c2w, dtype=torch.float32),
            fov, *poses.angles(c2w), left_out, views, settings)

    def pictures(self, rendered, which, size):
        """Views `which` of an object, uint8 [len(which), 4, size, size] with straight alpha.

        Raises BadMember, the first one's, if one of them cannot be used.
        """
        return np.stack([picture_of(rendered, k, size) for k in which])


# ---- cameras ---------------------------------------------------------------------------------

def convention_of(settings):
    """The Convention in the settings of a path."""
    return poses.Convention(*settings["convention"])


def usable_views(views, convention, left_out):
    """Those Views whose cameras can be used, their matrices, c2w float64 [n, 4, 4], and fov [n].

    The others go to left_out [(name, reason)]. Raises BadMember if there is none, or if the
    matrices do not look as if they were of this convention.
    """
    fov = fields_of_view(views, left_out)
    views = [views[k] for k in fov]
    fov = np.array(list(fov.values()))
    try:
        matrices, numbers, reasons = poses.usable([view.matrix for view in views])
    except BadMember as problem:
        left_out += [(view.name, str(problem)) for view in views]
        name, reason = left_out[0] if left_out else ("", "it has none")
        raise BadMember(f"none of its views can be used: {name}: {reason}") from None
    c2w, away = poses.taken_as(matrices, convention)
    left_out += [(views[k].name, reason) for k, reason in reasons.items()]
    for k in numbers[away]:
        left_out.append((views[k].name, "its camera does not look at what the others look at"))
    good = numbers[~away]
    return [views[k] for k in good], c2w[~away], fov[good]


def fields_of_view(views, left_out):
    """{k: degrees}, across the largest square of the picture of Views[k]; the others left out.

    Where no file says how large the pictures are, they are taken to be as large as the first.
    """
    shape = None
    fovs = {}
    for k, view in enumerate(views):
        if "w" in view.lens and "h" in view.lens:
            size = view.lens["w"], view.lens["h"]
        else:
            size = shape = shape or shape_of(view)
        try:
            fovs[k] = fov_of(view.lens, *size)
        except BadMember as problem:
            left_out.append((view.name, str(problem)))
    return fovs


def shape_of(view):
    """(width, height) of a View's picture; a square if it cannot be opened."""
    try:
        return open_picture(read_place(view.picture)).size
    except BadMember:
        return 1, 1


# ---- pictures --------------------------------------------------------------------------------

def picture_of(rendered, k, size):
    """View k of an object: uint8 [4, size, size]. Raises BadMember."""
    view, settings = rendered.views[k], rendered.settings
    content = read_place(view.picture)
    centre = None
    if "cx" in view.lens or "cy" in view.lens:
        centre = centre_of(view.lens, *open_picture(content).size)
    # The whole is made so large that the part need not be resized again.
    edge = round((size / share_of(rendered, k) - size) / 2)
    whole = size + 2 * edge
    planes = decode_view(
        content, whole, background=view.background or settings["background"],
        mask=read_place(view.mask) if view.mask else None, centre=centre)
    return planes[:, edge:edge + size, edge:edge + size]


def share_of(rendered, k):
    """Which share of a picture's side is taken: all, or what shows the frame around the object.

    The frame is as large in all views, measured at the object's centre, so that views agree.
    """
    frame = rendered.settings["frame"]
    if frame is None:
        return 1.0
    return min(1.0, max(LEAST_SHARE, frame / half_width(rendered, k)))


def half_width(rendered, k):
    """Half of what view k shows at the object's centre, in units of the world."""
    return rendered.distance[k] * math.tan(math.radians(rendered.fov[k]) / 2)


def reach_of(planes):
    """How far what is seen reaches from the middle, 1 is the border: planes uint8 [4, H, H]."""
    places = np.argwhere(planes[3] >= 128)
    if not len(places):
        return 0.0
    half = planes.shape[-1] / 2
    return max(half - places.min(), places.max() + 1 - half) / half


# ---- finding ---------------------------------------------------------------------------------

def find_objects(paths, *, captions=(), background=None, checked=256):
    """All rendered objects in folders and tars: (Objects, [Found], one for each path).

    paths: folders, .tar files and patterns. captions: files with tables of captions, which go
    before those that are found. background: what is transparent in pictures without alpha, a name
    or (r, g, b). checked: of how many objects of a path the cameras are looked at. Raises UserError
    if a path has no objects, or if its objects contradict each other.
    """
    searches, settings = [], []
    for path in dict.fromkeys(str(Path(path)) for path in paths):
        found = Found(path, "objects")
        search = search_places(expand([path]), found)
        if not search.names:
            raise NoObjects(nothing_found(search))
        searches.append(search)
        settings.append(look_closely(search, colour_of(background), checked))
    texts = gather_captions(searches, captions)
    lines = [line for search in searches for line in search.lines]
    counts = torch.tensor([0] + [len(search.names) for search in searches])
    objects = Objects(
        Records(lines), as_records(texts), as_records(settings), counts.cumsum(0)[:-1])
    return objects, [search.found for search in searches]


def as_records(values):
    return Records(json.dumps(value).encode() for value in values)


def nothing_found(search):
    """What is said of a path without objects."""
    found = search.found
    if search.refused:
        return search.refused[0]
    if found.left_out:
        name, reason, _ = found.left_out[0]
        return f"no object can be read: {name}: {reason}"
    if any(bare.captioned for bare in search.bare):
        return (f"{found.path} holds no rendered objects, but captioned images: name it with "
                "--images")
    return (f"{found.path} holds no rendered objects: what is wanted are folders or tars with "
            "transforms.json, or with a .npy, .txt or .json file for each picture")


def colour_of(background):
    """(r, g, b) of "white", "black", "grey", "r,g,b" or (r, g, b); None is None.

    Raises UserError for anything else.
    """
    if background is None:
        return None
    try:
        if isinstance(background, str):
            known = COLOURS.get(background.lower().replace("gray", "grey"))
            background = known or [int(part) for part in background.split(",")]
        red, green, blue = background
        if all(0 <= part <= 255 for part in background):
            return [red, green, blue]
    except (ValueError, TypeError):
        pass
    raise UserError(f"{background} is no background: say white, black, grey, or three numbers up "
                    "to 255 such as 128,128,128")


def spread(count, most):
    """Up to `most` of the numbers below `count`, evenly spread."""
    most = min(count, most)
    return [k * count // most for k in range(most)]


# ---- looking closely -------------------------------------------------------------------------

def look_closely(search, background, checked):
    """The settings of a path, a dict, by looking at some of its objects; fills search.found.

    Raises UserError if they contradict each other, or none can be read.
    """
    records = Records(search.lines)
    last = records[len(records) - 1]
    if "at" not in last and "files" not in last:
        checked = min(checked, FEW_TARS)  # Tars that were not opened yet.
    looked, problems, views = [], [], 0
    for i in spread(len(records), checked):
        try:
            there, left_out = read_views(node_of(records[i]))
            problems += left_out
        except BadMember as problem:
            problems.append((search.names[i], str(problem)))
            continue
        if there:
            looked.append((search.names[i], np.stack([view.matrix for view in there])))
            views += len(there)
    found = search.found
    if not looked:
        name, reason = problems[0]
        raise UserError(f"{found.path}: no object can be read: {name}: {reason}")
    found.layout = ", ".join(search.layouts)
    begins = [usual for name, usual in USUAL.items() if found.layout.startswith(name)]
    try:
        convention = poses.recognise(looked, expected=begins[0] if begins else None)
        worlds = list(readable(looked, convention))
        turn, found.up = poses.upright([c2w for _, c2w in worlds])
        poses.check_up(worlds, found.up)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from None
    found.convention = str(convention)
    found.views = views / len(looked)
    settings = {
        "path": found.path, "convention": convention, "up": found.up, "turn": turn.tolist(),
        "background": background, "frame": None}
    settings["frame"] = measure(found, records, settings, min(checked, FILL_OBJECTS))
    return settings


def readable(looked, convention):
    """(name, c2w [n, 4, 4]) of those objects [(name, matrices)] that can be read."""
    for name, matrices in looked:
        try:
            yield name, poses.to_c2w(poses.usable(matrices)[0], convention)
        except BadMember:
            continue


def measure(found, records, settings, checked):
    """The frame that fits the objects, half its side in units of the world, or None: all is taken.

    Fills found.fill and found.cut. Some objects larger than those looked at would be cut off: the
    frame shows 19 of 20 of these whole.
    """
    objects = Objects(records, Records(), as_records([settings]), torch.zeros(1).long())
    reaches, sizes = [], []
    for i in spread(len(objects), checked):
        try:
            rendered = objects.read(i)
            for k in spread(len(rendered.views), FILL_VIEWS):
                reach = reach_of(picture_of(rendered, k, 64))
                reaches.append(reach)
                sizes.append(reach * half_width(rendered, k))
        except BadMember:
            # Whoever uses the objects meets them again, and reports them.
            continue
    if not reaches:
        return None
    found.fill = float(np.median(reaches))
    found.cut = found.fill < LEAST_FILL
    return float(np.quantile(sizes, 0.95)) if found.cut else None


# ---- captions --------------------------------------------------------------------------------

def gather_captions(searches, given):
    """Of all objects of all searches in turn, the wordings; None where a tar has to be opened.

    Tables that were given go before an object's own files, and these before tables that lie
    nearby. Counts what is found, and leaves out what has no caption. Raises UserError.
    """
    paths = []
    for search in searches:
        above = search.above.resolve().parts[-2:]
        paths.append(["/".join((*above, name)) for name in search.names])
    # Tables that are near the same paths are read once for all of these.
    near, groups = {}, {}
    for number, search in enumerate(searches):
        if [] in search.own:
            tables = tables_near(search.above) + search.tables
            places = {(os.path.realpath(table.file), table.offset): table for table in tables}
            for table in places.values():
                near.setdefault(table, []).append(number)
    for table, numbers in near.items():
        groups.setdefault(tuple(numbers), []).append(table)

    texts = [list(search.own) for search in searches]
    for numbers, tables in groups.items():
        problems = []
        for number, i, wordings in from_tables(tables, numbers, paths, problems):
            texts[number][i] = texts[number][i] or wordings
        for problem in problems:
            searches[numbers[0]].found.leave_out("", problem, 0)
    tables = [Table(str(file), str(file)) for file in given]
    for number, i, wordings in from_tables(tables, range(len(searches)), paths):
        texts[number][i] = wordings
    for search, own in zip(searches, texts):
        count_captions(search, own)
    return [wordings for own in texts for wordings in own]


def from_tables(tables, numbers, paths, problems=None):
    """(search, object in it, wordings) of what tables say of the objects of these searches."""
    places = [(number, i) for number in numbers for i in range(len(paths[number]))]
    found = captions_from(tables, [paths[number][i] for number, i in places], problems)
    for place, wordings in found.items():
        yield *places[place], wordings


def count_captions(search, texts):
    """Leave out the objects without a caption, and count the others. texts: of all objects."""
    found = search.found
    for name, wordings in zip(search.names, texts):
        if wordings == []:
            found.leave_out(name, search.reasons.get(name, NO_CAPTION), found.views)
        else:
            found.items += 1
    found.pictures = round(found.items * found.views)
