"""Captioned images, as they lie on people's disks.

    x.jpg + x.txt               in folders of any depth; or x.json with "caption", as img2dataset
                                writes it. Each line of a .txt is a wording
    metadata.jsonl or .csv      a Hugging Face image folder: rows with file_name and a caption
    00000.tar                   shards as img2dataset writes them: x.jpg, x.txt, x.json side by side

Which it is is found out by looking. Only names are read at first (of shards, the headers); texts
and pictures are read when they are asked for, by whichever process asks. What cannot be used is
left out with a reason: at once where the names show it, else when it is read, as BadMember.
"""
import csv
import json
import os
import posixpath
from pathlib import Path, PureWindowsPath

import torch
from tqdm import tqdm

from ..tools.errors import BadMember, UserError
from ..tools.photos import SUFFIXES, UNREADABLE, begins_as_picture
from .captions import cell_texts, json_of, text_of, wordings
from .decode import decode_image
from .found import Found, full_name
from .layouts import Place, check_old
from .search import search_places
from .shards import (
    PACKED, Records, composed, expand, is_packed, is_tar, kept_index, natural, printable,
    read_range, tar_members)

# Tables of a Hugging Face image folder; the first that is there counts.
TABLES = ("metadata.jsonl", "metadata.csv")
# Columns with captions; the first that a row has counts.
COLUMNS = ("captions", "caption", "text", "prompt")
# Why a picture is left out, where several layouts agree.
NO_CAPTION, EMPTY = "no caption", "empty caption"


def is_picture(name):
    return os.path.splitext(name)[1].lower() in SUFFIXES


def line_of(name, where, kind, text):
    """The record of an image, as a line of JSON.

    name: of the picture, below the folder or in the shard. where: (offset, size) in the shard; None
    for a file. kind, text: "texts" and a list of wordings; or "txt" or "json" and where the file
    with the caption is: (offset, size) in the shard, or its name.
    """
    return json.dumps([name, where, kind, text], separators=(",", ":")).encode() + b"\n"


class Images:
    """The captioned images of all paths.

    It holds no list of Python objects: handed to another process, it costs no memory of its own.
    """

    def __init__(self, roots, parts):
        """roots: N folders and shards (str). parts: the Records of each."""
        self.roots = Records(json.dumps(root).encode() for root in roots)
        counts = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        self.ends = counts.cumsum(0)
        self.records = Records.join(parts)

    def __len__(self):
        return len(self.records)

    def record(self, i):
        """(the folder or shard, name, where, kind, text) of image i: see `line_of`."""
        root = int(self.ends.numpy().searchsorted(i, "right"))
        return self.roots[root], *self.records[i]

    def name(self, i):
        """Where image i lies, in words."""
        root, name, *_ = self.record(i)
        return full_name(root, name)

    def captions(self, i):
        """The wordings of image i, at least one. Raises BadMember."""
        root, _, _, kind, text = self.record(i)
        if kind == "texts":
            return text
        content = read(root, text)
        if kind == "txt":
            text = text_of(content, "its .txt")
            check_no_matrix(text)
            texts = wordings(text.split("\n"))
        else:
            texts = json_captions(content)
        if not texts:
            raise BadMember(EMPTY)
        return texts

    def picture(self, i, size):
        """Image i as uint8 [4, size, size]: its middle square. Raises BadMember."""
        root, name, where, _, _ = self.record(i)
        return decode_image(read(root, where or name), size)


def read(root, place):
    """The bytes at (offset, size) in a shard, or of a file of that name in a folder. BadMember."""
    if isinstance(place, str):
        return read_range(os.path.join(root, place), 0, -1)
    return read_range(root, *place)


def check_no_matrix(text):
    """Raise BadMember if a text is a matrix of 3 or 4 rows: pictures of objects have these."""
    numbers = text.replace(",", " ").split()
    if len(numbers) not in (12, 16):
        return
    try:
        [float(number) for number in numbers]
    except ValueError:
        return
    raise BadMember("its .txt is a camera, not a caption: name the folder with --objects")


def json_captions(content):
    """The wordings in a JSON file of img2dataset. Raises BadMember."""
    fields = json_of(content, "its .json")
    if not isinstance(fields, dict) or fields.get("caption") is None:
        raise BadMember(NO_CAPTION)
    return wordings(fields["caption"])


# ---- all paths -------------------------------------------------------------------------------

def find_images(paths):
    """The captioned images under folders, shards and patterns: (Images, [Found], one per path).

    Raises UserError for a path that does not exist or under which nothing can be used.
    """
    roots, parts, founds, seen = [], [], [], set()
    for path in map(str, paths):
        matches = [place for place in expand([path]) if place.resolve() not in seen]
        seen.update(place.resolve() for place in matches)
        alone = []
        for place in matches:
            found = Found(str(place), "images")
            for root, records in read_path(place, found):
                if len(records):
                    roots.append(str(root))
                    parts.append(records)
                    found.items += len(records)
            found.pictures = found.items
            alone.append(found)
        founds.append((path, alone))
    for found in (found for _, alone in founds for found in alone):
        # One bad shard among good ones is a member that is left out.
        if not found.items and (not parts or not is_tar(found.path)):
            raise UserError(nothing_usable(found))
    return Images(roots, parts), [together(path, alone) for path, alone in founds if alone]


def together(path, founds):
    """What was found under a path, as one Found: of all that a pattern matches, one each."""
    if len(founds) == 1:
        return founds[0]
    items = sum(found.items for found in founds)
    layout = " and ".join(dict.fromkeys(found.layout for found in founds))
    if all(is_tar(found.path) for found in founds):
        layout = f"{len(founds)} tar shards"
    left_out = [entry for found in founds for entry in found.left_out]
    return Found(path, "images", layout, items=items, pictures=items, left_out=left_out)


def nothing_usable(found):
    """The text of an error: what was looked for, and the first things that were left out."""
    if search_places([Path(found.path)], Found(found.path, "objects")).names:
        return f"{found.path} holds rendered objects: name it with --objects, not with --images"
    text = (f"{found.path} holds no captioned image that can be used; looked for x.jpg + x.txt (or "
            "x.json), metadata.jsonl or metadata.csv with file_name, and .tar shards")
    if found.left_out:
        first = "; ".join(f"{name}: {reason}" for name, reason, _ in found.left_out[:3])
        text += f"; left out {len(found.left_out)}, such as {first}"
    return text


def read_path(path, found):
    """What lies under one path: (folder or shard, Records) pairs; `found` is filled in."""
    shards = [path]
    if path.is_dir():
        index = path / "index.jsonl"
        if index.is_file():
            check_old({index.name: Place(str(index))})
        shards = shards_in(path, found)
    if not shards:
        yield path, Records(folder_lines(path, found))
        return
    found.layout = f"{len(shards)} tar shard{'s' * (len(shards) > 1)}"
    for shard in tqdm(shards, desc="listing shards", unit="shard", leave=False, disable=None):
        name = "" if shard == path else shard.name
        try:
            records, notes = kept_index(shard, index_shard)
        except BadMember as problem:
            found.leave_out(name, str(problem))
            continue
        for problem in notes["problems"]:
            found.leave_out(name, problem)
        for member, reason in notes["left_out"]:
            found.leave_out(full_name(name, member), reason)
        yield shard, records


def shards_in(folder, found):
    """The .tar files directly in a folder, in natural order. Raises UserError.

    Those that are compressed are left out.
    """
    try:
        files = sorted((file for file in folder.iterdir() if file.is_file()), key=natural)
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    files = [file for file in files if not file.name.startswith(".")]
    for file in files:
        if is_packed(file):
            found.leave_out(file.name, PACKED)
    return [file for file in files if is_tar(file)]


# ---- folders ---------------------------------------------------------------------------------

def walk(root, found, prefix="", above=()):
    """(prefix, [names of its files]) of a folder and of all below it, in natural order.

    prefix: "" or "a/b/", below the root. Hidden files are passed over; a folder that cannot be
    listed is left out.
    """
    folder = os.path.join(root, prefix)
    files, folders = [], []
    try:
        state = os.stat(folder)
        identity = (state.st_dev, state.st_ino)
        # A link may lead back to a folder above.
        if identity in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                # A link is followed; one that leads nowhere raises nothing here.
                path = entry.path if entry.is_symlink() else None
                if os.path.isdir(path) if path else entry.is_dir():
                    folders.append(entry.name)
                elif os.path.isfile(path) if path else entry.is_file():
                    files.append(entry.name)
                elif is_picture(entry.name):
                    found.leave_out(prefix + entry.name, "is no file (a broken link?)")
    except OSError as error:
        found.leave_out(prefix, f"cannot be listed: {error.strerror}")
        return
    yield prefix, files
    for name in sorted(folders, key=natural):
        yield from walk(root, found, f"{prefix}{name}/", (*above, identity))


def folder_lines(root, found):
    """The records (lines) of the images in a folder and below it; `found` is filled in.

    A table governs its folder and all folders below; in others captions are files.
    """
    root = str(root)
    tables, governed, layouts = [], [], {}
    for prefix, names in walk(root, found):
        for table in table_in(root, prefix, names):
            tables.append((prefix, table))
            layouts[f"image folder with {table}"] = True
        if any(prefix.startswith(place) for place, _ in tables):
            governed += [prefix + name for name in names]
            continue
        for line in pair_lines(root, prefix, names, found):
            layouts["folder of pictures with text files"] = True
            yield line
    yield from table_lines(root, tables, governed, found)
    found.layout = " and ".join(layouts)


def pair_lines(root, prefix, names, found):
    """The records of one folder's pictures with captions in files of the same name."""
    texts = {"txt": {}, "json": {}}    # {stem: name}, the first that is there counts
    pictures, others = [], []
    for name in names:
        stem, suffix = os.path.splitext(name)
        kind = suffix.lower()[1:]
        if kind in texts:
            texts[kind][stem] = name
        elif is_picture(name) or not suffix and begins_as_picture(os.path.join(root, prefix, name)):
            pictures.append(name)
        else:
            others.append(name)
    first = {}    # {stem: name}
    for name in sorted(pictures, key=natural):
        stem = os.path.splitext(name)[0]
        kind = next((kind for kind in texts if stem in texts[kind]), None)
        text = kind and prefix + texts[kind][stem]
        if first.setdefault(stem, name) != name:
            reason = f"has the same name as {printable(first[stem])}"
        elif not kind:
            reason = NO_CAPTION
        elif kind == "txt" and is_empty(os.path.join(root, text)):
            reason = EMPTY
        else:
            yield line_of(prefix + name, None, kind, text)
            continue
        found.leave_out(prefix + name, reason)
    # Files that are no pictures may lie there, too, but not with a caption.
    for name in sorted(others, key=natural):
        stem, suffix = os.path.splitext(name)
        if stem not in first and (stem in texts["txt"] or suffix.lower() in UNREADABLE):
            found.leave_out(prefix + name, "no kind of picture that can be read")


def is_empty(path):
    """Whether a file is known to hold nothing."""
    try:
        return os.stat(path).st_size == 0
    except OSError:
        return False


# ---- tables of a Hugging Face image folder ---------------------------------------------------

def table_in(root, prefix, names):
    """The table among a folder's files: [its name] or []. A .csv needs a column file_name."""
    for name in TABLES:
        if name not in names:
            continue
        if name.endswith(".jsonl"):
            return [name]
        try:
            with open(os.path.join(root, prefix, name), encoding="utf-8-sig", newline="") as lines:
                header = next(csv.reader(lines), [])
        # Whoever reads it will say what is wrong.
        except (OSError, ValueError, csv.Error):
            header = ["file_name"]
        return [name] if "file_name" in header else []
    return []


def table_lines(root, tables, files, found):
    """The records of the rows of tables [(prefix, name)]. files: the names of all files there."""
    there, named = {composed(name): name for name in files}, set()
    there.update((name, name) for name in files)
    for prefix, table in tables:
        for place, row in rows(root, prefix + table, found):
            # The picture of a row that names none will be left out as one that is not named.
            pictures = 1 if row.get("file_name") else 0
            try:
                name = place = file_of(row, prefix, there)
                if name in named:
                    raise BadMember("is named a second time")
                named.add(name)
                if name not in there:
                    raise BadMember("there is no such file")
                yield line_of(name, None, "texts", captions_of(row, table))
            except BadMember as problem:
                found.leave_out(place, str(problem), pictures)
    for name in sorted(files, key=natural):
        if is_picture(name) and name not in named:
            found.leave_out(name, "is not named in the metadata")


def rows(root, table, found):
    """("metadata.jsonl, line 3", {column: value}) of each row; what is damaged is left out."""
    try:
        if table.endswith(".csv"):
            with open(os.path.join(root, table), encoding="utf-8-sig", newline="") as lines:
                reader = csv.DictReader(lines)
                for row in reader:
                    yield f"{table}, line {reader.line_num}", row
            return
        with open(os.path.join(root, table), "rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{table}, line {number}"
                row = json_line(line, place, found)
                if row is not None:
                    yield place, row
    except UnicodeDecodeError:
        found.leave_out(table, "is not UTF-8 text; save it as UTF-8", 0)
    except (OSError, csv.Error) as error:
        found.leave_out(table, f"cannot be read: {error}", 0)


def json_line(line, place, found):
    """The object in a line of bytes; None for a blank line, and for a bad one, left out.

    That one counts as no picture: its picture will be left out as one that is not named.
    """
    if not line.strip():
        return None
    try:
        row = json_of(line, "the line")
        if not isinstance(row, dict):
            raise BadMember("the line is no JSON object")
    except BadMember as problem:
        found.leave_out(place, str(problem), 0)
        return None
    return row


def file_of(row, prefix, there):
    """The name that a row gives, below the root. there: {name: the same on the disk}. BadMember."""
    file = row.get("file_name")
    if not isinstance(file, str) or not file.strip():
        raise BadMember("no file_name")
    # It knows the paths of all systems: /x, C:\x, a\..\..\x.
    path = PureWindowsPath(file)
    if path.anchor or ".." in path.parts:
        raise BadMember(f"its file_name {printable(file)!r} leads out of the folder")
    for name in (prefix + posixpath.normpath(file), prefix + path.as_posix()):
        for spelled in (name, composed(name)):
            if spelled in there:
                return there[spelled]
    return name


def captions_of(row, table):
    """The wordings of a row. Raises BadMember."""
    # Where csv puts the cells that have no column.
    if None in row:
        raise BadMember("more cells than columns: put captions with commas in quotes")
    value = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
    if value is None:
        raise BadMember(f"{NO_CAPTION} (no column {', '.join(COLUMNS)})")
    texts = cell_texts(value) if table.endswith(".csv") else wordings(value)
    if not texts:
        raise BadMember(EMPTY)
    return texts


# ---- shards ----------------------------------------------------------------------------------

def index_shard(path):
    """The records of a shard's images: (lines, {"problems": […], "left_out": [(name, reason)]}).

    A sample is the members that have one name up to its first dot. They need not lie side by side:
    tar itself takes files in whatever order a folder gives them.
    """
    lines, left_out, problems, samples = [], [], [], {}
    for member in tar_members(path, problems):
        if is_of_sample(member[0]):
            samples.setdefault(key_of(member[0])[0], []).append(member)
    for group in samples.values():
        try:
            lines.append(sample_line(group))
        except BadMember as problem:
            pictures = [name for name, _, _ in group if is_picture(name)]
            left_out.append(((pictures or [group[0][0]])[0], str(problem)))
    return lines, {"problems": problems, "left_out": left_out}


def key_of(name):
    """("a/012", "jpg") of a/012.JPG: the last part up to its first dot, and what follows."""
    folder, last = posixpath.split(name)
    stem, _, suffix = last.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def is_of_sample(name):
    """Whether a member belongs to a sample: neither hidden nor, as __meta__.json, about others."""
    key, suffix = key_of(name)
    stem = posixpath.basename(key)
    about = stem.startswith("__") and stem.endswith("__")
    return bool(stem and suffix) and not about and "__MACOSX" not in name


def sample_line(group):
    """The record of a sample: members [(name, offset, size)] of one key. Raises BadMember."""
    places, names = {}, {}
    for name, offset, size in group:
        suffix = key_of(name)[1]
        if suffix in places:
            raise BadMember(f"two members of one name: {printable(name)}")
        places[suffix], names[suffix] = (offset, size), name
    pictures = [suffix for suffix in places if "." + suffix in SUFFIXES]
    if not pictures:
        raise BadMember("no picture of a kind that can be read")
    if len(pictures) > 1:
        raise BadMember(f"two pictures of one name: {', '.join(pictures)}")
    kind = next((suffix for suffix in ("txt", "json") if suffix in places), None)
    if kind is None:
        raise BadMember(f"{NO_CAPTION} beside it")
    if places[kind][1] == 0:
        raise BadMember(EMPTY)
    return line_of(names[pictures[0]], places[pictures[0]], kind, places[kind])
