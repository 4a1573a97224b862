"""Where data lies: paths and patterns, tar files read at random, long lists in little memory.

A tar file is never unpacked. Its headers say where each member lies; that is read once, and kept
beside the tar or in the user's cache folder. From then on any member is one seek and one read.

A Python list of a million names costs each worker process its own copy, as counting references
writes to every object. `Records` keeps such a list in two tensors, which processes share.
"""
import array
import functools
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import torch

from ..tools.errors import BadMember, UserError
from ..tools.files import write_atomic


class Records:
    """A list of JSON values, kept as lines of text in tensors: small, and shared by processes.

    lines: an iterable of bytes, one JSON value each. An open binary file is one.
    """

    def __init__(self, lines=()):
        text, bounds = bytearray(), array.array("q", [0])
        for line in lines:
            text += line
            bounds.append(len(text))
        self.text = torch.from_numpy(np.frombuffer(text, np.uint8))        # uint8 [bytes]
        self.bounds = torch.from_numpy(np.frombuffer(bounds, np.int64))    # int64 [lines + 1]

    @classmethod
    def join(cls, parts):
        """One list of the lists in `parts`."""
        joined, bounds, size = cls(), [torch.zeros(1, dtype=torch.int64)], 0
        for part in parts:
            bounds.append(part.bounds[1:] + size)
            size += len(part.text)
        joined.text = torch.cat([joined.text, *(part.text for part in parts)])
        joined.bounds = torch.cat(bounds)
        return joined

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        # Arrays of the same memory are quicker than tensors for so little.
        begin, end = self.bounds.numpy()[i:i + 2].tolist()
        return json.loads(self.text.numpy()[begin:end].tobytes())


# ---- paths -----------------------------------------------------------------------------------

NUMBERS = re.compile("([0-9]+)")
# How files begin that gzip, bzip2, xz and Zstandard have compressed.
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
PACKED = "is compressed: no member can be read by itself; uncompress it first, as gunzip does"


def natural(name):
    """A key that sorts names as people count: view_2 before view_10."""
    name = str(name)
    parts = NUMBERS.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def composed(name):
    """A name as most programs write it: a Mac may write é as an e and an accent (Unicode's NFC)."""
    return unicodedata.normalize("NFC", name)


def printable(name):
    """A name of a file without the bytes that cannot be printed."""
    return str(name).encode(errors="replace").decode()


def is_tar(path):
    return Path(path).suffix.lower() == ".tar"


def is_packed(path):
    """Whether a file's name is that of a compressed tar."""
    return re.search(r"\.(tgz|tar\.(gz|bz2|xz|zst))$", str(path), re.IGNORECASE) is not None


def expand(paths):
    """The folders and .tar files that paths and patterns (* ? [) name: Paths, without duplicates.

    They are in the order given, what matches a pattern in natural order. Other files that match a
    pattern are passed over. Raises UserError for what names nothing, or a file of another kind.
    """
    found = {}
    for path in map(str, paths):
        place = Path(path).expanduser()
        if place.exists():
            if not place.is_dir() and not is_tar(place):
                problem = "is neither a folder nor a .tar file; name one of these"
                raise UserError(f"{path} {PACKED if is_packed(place) else problem}")
            matches = [place]
        elif glob.has_magic(path):
            names = sorted(glob.glob(str(place), recursive=True), key=natural)
            matches = [Path(name) for name in names if os.path.isdir(name) or is_tar(name)]
        else:
            raise UserError(f"{path} does not exist; name a folder, a .tar file or a pattern")
        if not matches:
            raise UserError(f"no folder and no .tar file matches the pattern {path}")
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values())


# ---- tar files -------------------------------------------------------------------------------

def tar_members(path, problems=None):
    """The regular files in a tar: [(name, offset, size)], by reading its headers only.

    A tar that is damaged or cut short raises BadMember; or, if a list `problems` is given, the
    reason is appended to it, and the members before the damage are returned.
    """
    members, problem = [], ""
    opened.cache_clear()    # Its name may stand for another file by now.
    try:
        whole = os.path.getsize(path)
        with tarfile.open(path, "r:", encoding="utf-8") as archive:
            last = -1
            while not problem and (member := archive.next()) is not None:
                # It would collect them: a kilobyte each.
                archive.members.clear()
                here = member.isreg() and not member.issparse()
                fits = not here or 0 <= member.size <= whole - member.offset_data
                # A header with a negative size would lead back, and round and round.
                if member.offset <= last or not fits:
                    problem = f"is cut short or damaged in its member {printable(member.name)}"
                elif here:
                    members.append((member.name, member.offset_data, member.size))
                last = member.offset
            problem = problem or what_ends(archive)
    except OSError as error:
        raise BadMember(f"cannot be read: {error.strerror or error}") from error
    except tarfile.ReadError as error:
        packed = read_range(path, 0, min(whole, 6)).startswith(MAGIC)
        problem = PACKED if packed else f"is no tar file, or damaged: {error}"
    # A damaged header can hold anything: ValueError, OverflowError, RecursionError …
    except Exception as error:
        problem = f"is damaged: {error!r}"
    if problem and problems is None:
        raise BadMember(problem)
    if problem:
        problems.append(problem)
    return members


def what_ends(archive):
    """What is wrong with the place at which an open tar ended, or "".

    tarfile takes a damaged header, and the end of the file, as the end of the archive; but a whole
    archive ends with a block of zeros.
    """
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return f"is cut short at byte {archive.offset:,}: its end mark is missing"
    return f"is damaged at byte {archive.offset:,}: no header is there" if any(block) else ""


# Not every system can read at a place without moving there, which processes would do in turn.
KEPT_OPEN = hasattr(os, "pread")


@functools.lru_cache(maxsize=64)
def opened(path):
    """The file, which stays open; on a network opening it takes longer than reading a picture."""
    return open(path, "rb", buffering=0)


def read_range(path, offset, size):
    """`size` bytes of a file from `offset` on; size -1: all that follow. Raises BadMember."""
    try:
        if KEPT_OPEN and 0 <= size < 2**30:    # More does not come at once.
            content = os.pread(opened(path).fileno(), size, offset)
        else:
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read(size)
    except OSError as error:
        raise BadMember(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) < size:
        raise BadMember(f"{path} is cut short: it ends before byte {offset + size:,}")
    return content


# ---- the kept index of a tar -----------------------------------------------------------------

# Indexes of another number were made by other rules.
RULES = 2


def kept_index(path, make):
    """What `make(path)` says about a tar, or has said about the very same file: (Records, dict).

    make: path -> (lines of JSON that end with a newline, a dict of what else is to be kept). The
    index is "<name>.tar.index" beside the tar, or lies in the user's cache folder if that cannot be
    written. A file of another size or time, and a damaged index, are read anew. Raises BadMember.
    """
    opened.cache_clear()    # Its name may stand for another file by now.
    try:
        state = os.stat(path)
    except OSError as error:
        raise BadMember(f"cannot be read: {error.strerror or error}") from error
    same = {"rules": RULES, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    places = index_places(path)
    for place in places:
        kept = read_index(place, same)
        if kept:
            return kept
    lines, notes = make(path)
    body = b"".join(lines)
    header = {**same, "crc": zlib.crc32(body), "notes": notes}
    content = json.dumps(header).encode() + b"\n" + body
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, content)
            break
        # A folder that cannot be written, a full disk: the next place, or it is not kept.
        except (UserError, OSError):
            continue
    return Records(io.BytesIO(body)), notes


def index_places(path):
    """Where the index of a tar may lie: beside it, or in the user's cache folder."""
    path = Path(path).resolve()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    name = path.name + ".index"
    return [path.with_name(name), Path(cache) / "mvd" / "shards" / f"{digest}-{name}"]


def read_index(place, same):
    """(Records, notes) of an index file; None if it is missing, damaged, or of another tar."""
    try:
        with open(place, "rb") as file:
            header = json.loads(file.readline())
            body = file.read()
        crc, notes = header.pop("crc"), header.pop("notes")
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    if header != same or crc != zlib.crc32(body):
        return None
    return Records(io.BytesIO(body)), notes
