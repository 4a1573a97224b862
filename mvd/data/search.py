"""Lists the rendered objects in folders and tars, without reading their cameras or pictures.

Folders are walked through in natural order of their names. A folder that is an object is not
entered. Tars may hold one object each, as G-Objaverse's 260,000 do, or many; where there are many
tars of one object each, only a few are opened.
"""
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..tools.errors import BadMember
from ..tools.photos import SUFFIXES
from .captions import Table, own_captions, tables_among
from .found import Found, full_name
from .layouts import INTRINSICS, Place, layout_of, listing, numbers, read_place, stems, tree
from .shards import is_tar, natural, tar_members

# Of a folder with more tars than this only so many are opened; if each of these holds one object,
# the others are taken to be alike.
FEW_TARS = 8


class Bare(NamedTuple):
    """A folder or a tar with pictures, but no cameras that can be read."""
    name: str
    pictures: int    # how many
    captioned: bool


@dataclass
class Search:
    """What a walk through one path has come across so far."""
    found: Found
    above: Path                                   # the folder that names are relative to
    lines: list = field(default_factory=list)     # JSON bytes, one an object: what `node_of` takes
    names: list = field(default_factory=list)     # of the objects
    own: list = field(default_factory=list)       # lists of captions; None: in a tar not yet opened
    layouts: dict = field(default_factory=dict)   # in words; used as an ordered set
    reasons: dict = field(default_factory=dict)   # name: why its own captions cannot be read
    refused: list = field(default_factory=list)   # what lies there, but is not supported
    tables: list = field(default_factory=list)    # captions.Table
    bare: list = field(default_factory=list)      # Bare
    tars: list = field(default_factory=list)      # (name, path) still to be looked into

    def add(self, name, place, captions):
        self.lines.append(json.dumps({"name": name, **place}).encode())
        self.names.append(name)
        self.own.append(captions)


def search_places(places, found):
    """A Search of the objects in `places`: a folder or a tar, or several, which a pattern named.

    Raises UserError for an old data folder of this project.
    """
    absolute = [place.absolute() for place in places]
    above = Path(os.path.commonpath([place.parent for place in absolute]))
    one_folder = len(places) == 1 and not is_tar(places[0])
    search = Search(found, absolute[0] if one_folder else above)
    for place, whole in zip(places, absolute):
        name = "" if one_folder else whole.relative_to(above).as_posix()
        if is_tar(place):
            search.tars.append((os.path.splitext(name)[0], str(place)))
            continue
        for inner, node, captions in walk(str(place), name, [], search):
            if not inner:
                # The folder that was named is the object.
                inner, search.above = whole.name, whole.parent
            search.add(inner, {"at": node}, captions)
    search_tars(search)
    if search.names:
        leave_out_bare(search)
    return search


def leave_out_bare(search):
    """Report what has pictures, but no cameras. What lies beside objects should have been one."""
    beside = {name.rpartition("/")[0] for name in search.names}
    for name, pictures, captioned in search.bare:
        if captioned:
            search.found.leave_out(name, "captioned images: name it with --images", 0)
        else:
            bad = pictures if name and name.rpartition("/")[0] in beside else 0
            reason = "it has pictures, but no cameras that can be read"
            search.found.leave_out(name, reason, bad)


# ---- folders ---------------------------------------------------------------------------------

def walk(node, name, captions, search):
    """Yield (name, node, its own captions) of the objects at and below a folder.

    captions: those of the folders above it. What cannot be read goes to search.found.left_out.
    """
    try:
        files, folders = listing(node)
        layout = layout_of(files, folders)
    except BadMember as problem:
        search.found.leave_out(name, str(problem))
        return
    try:
        captions = own_captions(files, lambda file: read_place(files[file])) or captions
    except BadMember as problem:
        search.reasons[name] = str(problem)
    if layout:
        search.layouts[layout] = True
        yield name, node, captions
        return
    search.refused += unsupported(full_name(search.found.path, name), files)
    pictures = stems(files, SUFFIXES)
    if pictures:
        search.bare.append(Bare(name, len(pictures), is_captioned(files, pictures)))
    tables = tables_among(files)
    search.tables += [Table(joined(search.found.path, name, file), *files[file]) for file in tables]
    if isinstance(node, str):
        tars = sorted(filter(is_tar, files), key=natural)
        search.tars += [(joined(name, os.path.splitext(t)[0]), files[t].file) for t in tars]
    for folder in sorted(folders, key=natural):
        below = folders[folder]
        if isinstance(below, dict):
            # A part of a tar does not know what lies above it.
            below.update({f"../{file}": files[file] for file in INTRINSICS if file in files})
        yield from walk(below, joined(name, folder), captions, search)


def is_captioned(files, pictures):
    """Whether pictures {stem: [Place]} lie with captions, as images.py reads them."""
    if "metadata.jsonl" in files or "metadata.csv" in files:
        return True
    for suffix in (".txt", ".json"):
        texts = stems(files, (suffix,))
        both = sorted(pictures.keys() & texts.keys(), key=natural)
        try:
            content = read_place(texts[both[0]][0]) if both else b""
            if suffix == ".txt":
                numbers(content)    # a camera, or part of one
            elif b'"caption' in content:
                return True
        except BadMember:
            return True
    return False


def joined(*parts):
    """Parts of a name with "/" between them, without empty ones."""
    return "/".join(part for part in parts if part)


def unsupported(name, files):
    """What lies in a folder that looks like an object, but is of no use: [text] or []."""
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    pictures = suffixes.intersection(SUFFIXES)
    if "meta.pkl" in files:
        return [f"{name} is SyncDreamer's layout, whose cameras lie in meta.pkl: pickle files can "
                "run code and are not read; write transforms.json or a .npy for each picture"]
    if pictures and any(file.endswith("_RT.txt") for file in files):
        return [f"{name} is Wonder3D's layout, rendered with orthographic cameras, which this "
                "model does not know; render with perspective ones"]
    if suffixes & {".glb", ".gltf", ".obj", ".fbx", ".blend", ".ply"} and not pictures:
        return [f"{name} holds meshes; render them first"]
    if ".zip" in suffixes:
        return [f"{name} holds .zip files; unpack them or make tars of them"]
    return []


# ---- tars ------------------------------------------------------------------------------------

def open_tar(path, problems=None):
    """What a tar holds, as a node. A damaged tar raises BadMember, but see `tar_members`."""
    members = tar_members(path, problems)
    return tree([(name, Place(str(path), offset, size)) for name, offset, size in members])


def members_of(node, name=""):
    """All files of a node inside a tar: [[name, offset, size]], as `node_of` takes them."""
    members = []
    for part, inside in node.items():
        path = joined(name, part)
        if isinstance(inside, dict):
            members += members_of(inside, path)
        else:
            members.append([path, *inside[1:]] if inside.file else [path, -1, -1])
    return members


def search_tar(path, name, captions, search):
    """List the objects in a tar. Returns how many there are, None if it is damaged."""
    problems, count = [], 0
    try:
        root = open_tar(path, problems)
    except BadMember as problem:
        problems.append(str(problem))
        root = {}
    for problem in problems:
        search.found.leave_out(name, problem)
    if problems and not root:
        return None
    # As 0/10010.tar with nothing but 10010/ in it: the object's name is 0/10010.
    stem, inside = os.path.splitext(os.path.basename(path))[0], list(root.values())
    if list(root) == [stem] and isinstance(inside[0], dict):
        root, = inside
    for inner, node, texts in walk(root, name, captions, search):
        search.add(inner, {"tar": str(path), "files": members_of(node)}, texts)
        count += 1
    return count


def search_tars(search):
    """List the objects in all of search.tars."""
    tars = search.tars
    if len(tars) > FEW_TARS:
        trial = Search(Found(search.found.path, "objects"), search.above)
        some = [tars[i * len(tars) // FEW_TARS] for i in range(FEW_TARS)]
        counts = {search_tar(path, name, [], trial) for name, path in some} - {None}
        if counts <= {0, 1} and len(counts) < 2:
            search.layouts |= trial.layouts
            search.refused += trial.refused
            search.bare += trial.bare
            captions = None if any(trial.own) else []
            for name, path in tars if counts == {1} else ():
                search.add(name, {"tar": path}, captions)
            return
    for name, path in tars:
        search_tar(path, name, [], search)


def node_of(record):
    """The node of an object that a Search has listed. Raises BadMember."""
    if "at" in record:
        return record["at"]
    tar = record["tar"]
    if "files" in record:
        members = []
        for name, offset, size in record["files"]:
            members.append((name, Place(tar, offset, size) if offset >= 0 else Place("")))
        return tree(members)
    trial = Search(Found(tar, "objects"), Path(tar))
    nodes = [node for _, node, _ in walk(open_tar(tar), "", [], trial)]
    if len(nodes) != 1:
        raise BadMember(f"the tar holds {len(nodes)} objects, not one as the others there")
    return nodes[0]
