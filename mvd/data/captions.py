"""The captions of rendered objects: files in an object's folder, and tables of many objects.

    caption.txt, caption_2.txt   in the object's folder: every line is a wording
    captions.json                in the object's folder: a text, a list of texts, {"caption": …}
    captions.json, any .json     above the objects: {"0/10010": text or list of texts}, or
                                 {"0/10010": {"caption": …}}, or [{"uid": …, "caption": …}, …]
    captions.jsonl               above the objects: {"uid": …, "caption": …} on each line
    any .csv, .tsv               above the objects: Cap3D's two columns without a header, or columns
                                 with names, such as TRELLIS's sha256 and captions

The wordings of an object all mean the same; one is drawn whenever the object is. A table's keys are
ends of the objects' paths: 10010 and 0/10010 both mean data/0/10010. What lies below the name and
is the same for all objects (data/0/10010/campos_512_v4) does not matter. Tables of all of
Objaverse are 131 MB: they are read row by row, and only rows of objects that are there are kept.
"""
import ast
import csv
import io
import json
import os
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..tools.errors import BadMember, UserError
from .shards import composed, read_range

# Columns of a table with a header that may name the object, and that hold its wordings.
KEY_COLUMNS = ("sha256", "uid", "id", "key", "name", "object", "path", "file", "file_name",
               "file_identifier", "filename", "filepath", "folder")
TEXT_COLUMNS = ("captions", "caption", "text", "texts", "prompt", "title", "description")
# Endings of files that stand for objects in a table's keys.
OBJECT_SUFFIXES = (".tar", ".zip", ".glb", ".gltf", ".obj", ".fbx")
# As many folders below an object's name may be the same for all objects.
MOST_TAILS = 2
# Of JSON files that are not named as tables so many in a folder are looked into.
MOST_JSON = 20

# A list of wordings in one cell can be long. Windows takes no larger limit.
csv.field_size_limit(2**31 - 1)


# ---- texts -----------------------------------------------------------------------------------

def text_of(content, name):
    """The text of a file's bytes, without a byte order mark. BadMember if they are not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadMember(f"{name} is not UTF-8 text; save it as UTF-8") from None


def json_of(content, name):
    """What a JSON file holds. Raises BadMember if it is damaged."""
    try:
        return json.loads(text_of(content, name))
    # Brackets in brackets by the thousand are a RecursionError.
    except (ValueError, RecursionError) as error:
        raise BadMember(f"{name} is no valid JSON ({error})") from None


def wordings(value):
    """A text or a list of texts as a list without blank ones. Raises BadMember for other things."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise BadMember("its caption is neither a text nor a list of texts")
    texts = [" ".join(text.split()) for text in values]
    return [text for text in dict.fromkeys(texts) if text]


def wordings_in(value):
    """The wordings in a JSON value: a text, a list of texts, or an object with a caption."""
    if isinstance(value, dict):
        value = next((value[name] for name in TEXT_COLUMNS if name in value), None)
    return wordings(value)


def is_table(value):
    """Whether a JSON value speaks of several objects."""
    if isinstance(value, list):
        return any(isinstance(row, dict) for row in value)
    return isinstance(value, dict) and not any(name in value for name in TEXT_COLUMNS[:3])


def own_captions(names, read):
    """The wordings in an object's own folder, [] if there is no such file.

    names: of the files in it. read(name) -> bytes. Raises BadMember if a file cannot be used.
    """
    texts = []
    for name in sorted(names):
        lower = name.lower()
        if fnmatch(lower, "caption*.txt"):
            texts += text_of(read(name), name).split("\n")
        elif lower in ("caption.json", "captions.json"):
            value = json_of(read(name), name)
            # Else it is a table of several objects, and their folder is one of them.
            if not is_table(value):
                texts += wordings_in(value)
    return wordings(texts)


# ---- tables ----------------------------------------------------------------------------------

class Table(NamedTuple):
    """Where a table lies: a file, or a part of a tar."""
    name: str
    file: str
    offset: int = 0
    size: int = -1


def tables_among(names):
    """Those names of files in one folder that may be tables of captions, a list.

    Where there are many JSON files, they are something else: one for each picture, say.
    """
    others = [name for name in names if name.lower().endswith(".json")]
    few = others if len(others) <= MOST_JSON else []
    return [name for name in sorted(names) if name in few or named_as_table(name)]


def named_as_table(name):
    name = name.lower()
    return name.endswith((".csv", ".tsv")) or name.endswith((".json", ".jsonl")) and (
        "caption" in name)


def tables_near(folder):
    """The Tables in a folder and in the one above it, by their names."""
    found = []
    for place in (Path(folder).resolve(), Path(folder).resolve().parent):
        try:
            names = sorted(os.listdir(place))
        except OSError:
            continue
        for name in names:
            there = named_as_table(name) and not name.startswith(".")
            if there and (place / name).is_file():
                found.append(Table(str(place / name), str(place / name)))
    return found


def rows(table):
    """The rows of a Table: (keys, function that returns the wordings or raises BadMember).

    (Most rows are of objects that are not there: their wordings are not made.) Nothing if it is
    no table of captions. Raises UserError, naming the table, if it cannot be read.
    """
    try:
        content = open(table.file, "rb")
        if table.size >= 0:
            content.close()
            content = io.BytesIO(read_range(*table[1:]))
        with content:
            if table.name.lower().endswith(".json"):
                yield from json_rows(json_of(content.read(), "the table"))
            elif table.name.lower().endswith(".jsonl"):
                lines = enumerate(content, 1)
                yield from object_rows(
                    json_of(line, f"line {n}") for n, line in lines if line.strip())
            else:
                yield from csv_rows(content)
    except BadMember as problem:
        raise UserError(f"{table.name}: {problem}") from None
    except UnicodeDecodeError:
        raise UserError(f"{table.name} is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(
            f"{table.name} is damaged ({error}); mend it, or make it again") from None
    except OSError as error:
        raise UserError(f"cannot read {table.name}: {error.strerror}") from None


def json_rows(table):
    """Rows of {key: what `wordings_in` takes}, or of a list for `object_rows`."""
    if isinstance(table, dict):
        for key, value in table.items():
            yield [key], partial(wordings_in, value)
    elif is_table(table):
        yield from object_rows(table)


def object_rows(objects):
    """Rows of JSON objects with a key and a caption; other values are passed over.

    Raises BadMember at the end if there are captions, but no key.
    """
    named = captioned = False
    for row in objects:
        if isinstance(row, dict):
            keys = [row[name] for name in KEY_COLUMNS if isinstance(row.get(name), str)]
            named = named or bool(keys)
            captioned = captioned or any(name in row for name in TEXT_COLUMNS)
            yield keys, partial(wordings_in, row)
    if captioned and not named:
        raise BadMember("its captions do not say of what they are (uid, id, key, name …)")


def csv_rows(file):
    """Rows of an open binary file with commas or tabs, with a header or without."""
    lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
    first = lines.readline()
    tabs = "\t" in first and "," not in first.partition("\t")[0]
    table = csv.reader(chain([first], lines), delimiter="\t" if tabs else ",", strict=True)
    header = next(table, [])
    columns = [cell.strip().lower() for cell in header]
    keys = [i for i, name in enumerate(columns) if name in KEY_COLUMNS]
    texts = [i for i, name in enumerate(columns) if name in TEXT_COLUMNS]
    if keys and texts:
        for row in table:
            cells = [row[i] for i in texts if i < len(row)]
            yield [row[i] for i in keys if i < len(row)], partial(cell_texts, *cells)
    elif len(header) > 1 and all(cell.startswith(" ") for cell in header[2:]):
        # No header. The comma of a sentence, which nobody quoted, is followed by a blank.
        for row in chain([header], table):
            yield row[:1], partial(cell_texts, ",".join(row[1:]))


def cell_texts(*cells):
    """The wordings in cells: each has one, or a list of several, as JSON or Python writes it."""
    return wordings([text for cell in cells for text in texts_in(cell.strip())])


def texts_in(cell):
    """The texts in one cell; [] if a list of texts in it is damaged."""
    if cell.startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                return wordings(read(cell))
            # Brackets in brackets by the thousand are a RecursionError or a MemoryError.
            except (ValueError, SyntaxError, RecursionError, MemoryError, BadMember):
                continue
    return [] if cell.startswith(('["', "['")) else [cell]


# ---- whose captions --------------------------------------------------------------------------

def captions_from(tables, names, problems=None):
    """{i: wordings} of those names [N] (paths of objects) that tables have captions for.

    The longest key that fits a name decides; equally long ones add up. A table that cannot be read
    raises UserError, or, if a list `problems` is given, its text is appended to that.
    """
    ends = by_end(names)
    found = {}  # i: (parts of the key, wordings)
    for table in tables:
        try:
            add_table(table, ends, found)
        except UserError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return {i: list(dict.fromkeys(texts)) for i, (_, texts) in found.items()}


def add_table(table, ends, found):
    """Add a table's rows to found {i: (parts of the key, wordings)}. Raises UserError."""
    for keys, make in rows(table):
        for key in keys:
            key = trimmed(key)
            parts = key.count("/") + 1
            for i in owners(key, ends):
                try:
                    texts = make()
                except BadMember:
                    # A setting, say. If it was to be a caption, its object is left without.
                    continue
                known, earlier = found.get(i, (0, []))
                if texts and parts >= known:
                    found[i] = parts, (earlier if parts == known else []) + texts


def owners(key, ends):
    """The objects whose paths end with a key."""
    same_end = ends.get(key[key.rfind("/") + 1:], ()) if key else ()
    return {i for i, path in same_end if f"/{path}".endswith(f"/{key}")} if same_end else ()


def by_end(names):
    """{last part of a path: [(i, path)]} of names [N], with and without tails that all share."""
    ends = {}
    paths = [composed(name) for name in names]
    for tail in range(MOST_TAILS + 1):
        for i, path in enumerate(paths):
            ends.setdefault(path.rpartition("/")[2], []).append((i, path))
        if len({path.rpartition("/")[2] for path in paths}) != 1:
            break
        paths = [path.rpartition("/")[0] for path in paths]
    return ends


def trimmed(key):
    """A table's key as the end of a path: "./0/10010.tar" -> "0/10010"."""
    key = composed(key).strip().replace("\\", "/").removeprefix("./").strip("/")
    return os.path.splitext(key)[0] if key.endswith(OBJECT_SUFFIXES) else key
