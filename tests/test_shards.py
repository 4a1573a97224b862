"""Lists in shared memory, patterns of paths, and tar files read at random, also damaged ones."""
import bz2
import gzip
import io
import json
import lzma
import multiprocessing.reduction
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest

from mvd.data import shards
from mvd.data.shards import Records, expand, kept_index, natural, read_range, tar_members
from mvd.tools.errors import BadMember, UserError


def write_tar(path, files, kind=tarfile.PAX_FORMAT):
    """A tar of {name: bytes}, or of [(name, bytes)]."""
    with tarfile.open(path, "w", format=kind, encoding="utf-8") as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# ---- lists -----------------------------------------------------------------------------------

VALUES = [["a", 1], {"é\u2028\n": None}, "", 3.5, [], "x" * 1000]


def lines_of(values):
    return [json.dumps(value).encode() for value in values]


def test_records_are_the_values_of_their_lines():
    records = Records(lines_of(VALUES))
    assert len(records) == len(VALUES)
    assert [records[i] for i in range(len(records))] == VALUES
    assert list(records) == VALUES, "a loop over it does not end where it should"
    for i in (-1, len(VALUES)):
        with pytest.raises(IndexError):
            records[i]
    file = io.BytesIO(b"".join(line + b"\n" for line in lines_of(VALUES)))
    assert list(Records(file)) == VALUES, "lines of a file"
    assert list(Records()) == []


def test_lists_of_records_are_joined():
    parts = [Records(lines_of(VALUES[a:b])) for a, b in ((0, 2), (2, 2), (2, 6))]
    assert list(Records.join(parts)) == VALUES
    assert list(Records.join([])) == [] == list(Records.join([Records()]))


def test_another_process_is_given_the_memory_and_not_a_copy():
    """What is sent to a spawned process is small, and the tensors are then in shared memory."""
    records = Records(lines_of(range(100_000)))
    sent = multiprocessing.reduction.ForkingPickler.dumps(records)
    assert len(sent) < 2000, "the list itself was sent"
    assert records.text.is_shared() and records.bounds.is_shared()
    assert pickle.loads(sent)[99_999] == 99_999


# ---- paths -----------------------------------------------------------------------------------

def test_names_are_sorted_as_people_count():
    names = ["r_0", "r_2", "r_2a", "r_10", "s1b2", "s1b10", "s02"]
    mixed = names[:]
    random.Random(0).shuffle(mixed)
    assert sorted(mixed, key=natural) == names
    odd = ["", "1", "a", "٣", "²", "1.5", "-1"]
    assert len(sorted(odd, key=natural)) == 7, "not every name can be compared"


def test_paths_and_patterns_name_folders_and_tars(tmp_path, monkeypatch):
    for name in ("a2.tar", "a10.tar", "a1.tar.index", "a3.parquet", "b.TAR"):
        (tmp_path / name).write_bytes(b"")
    for name in ("a4", "data [v2]", "deep/er"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "deep/er/c.tar").write_bytes(b"")

    def names(*paths):
        return [path.relative_to(tmp_path).as_posix() for path in expand(paths)]

    assert names(f"{tmp_path}/a*") == ["a2.tar", "a4", "a10.tar"]
    assert names(tmp_path / "b.TAR", f"{tmp_path}/a[24]*") == ["b.TAR", "a2.tar", "a4"]
    assert names(f"{tmp_path}/data [v2]") == ["data [v2]"], "a name that looks like a pattern"
    assert names(f"{tmp_path}/**/*.tar") == ["a2.tar", "a10.tar", "deep/er/c.tar"]
    twice = names(f"{tmp_path}/a4", f"{tmp_path}/deep/../a4/", f"{tmp_path}/a?")
    assert twice == ["a4"], "a path that is named twice"
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in expand(["a4", "a2.*"])] == ["a4", "a2.tar"]


def test_a_path_that_names_nothing_is_an_error(tmp_path):
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b""))
    for path, words in [("none", "does not exist"), ("n*", "matches"), ("*.csv", "matches"),
                        ("x.csv", "neither a folder nor a .tar"), ("x.tar.gz", "is compressed")]:
        with pytest.raises(UserError, match=words) as problem:
            expand([tmp_path / path])
        assert str(tmp_path / path) in str(problem.value)


# ---- tar files -------------------------------------------------------------------------------

FILES = {
    "0.jpg": b"picture" * 300,
    "0.txt": b"",
    "a/" + "long" * 60 + ".jpg": b"1" * 512,
    "b/ünïcode.txt": b"text",
    "c" * 99 + ".json": b"{}" * 5000,
}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_and_read_where_they_lie(kind, tmp_path):
    files = {name: FILES[name] for name in FILES if kind != tarfile.USTAR_FORMAT or len(name) < 99}
    path = write_tar(tmp_path / "x.tar", files, kind)
    members = tar_members(path)
    assert [name for name, _, _ in members] == list(files)
    for name, offset, size in members:
        assert read_range(path, offset, size) == files[name]
    # As tarfile itself sees it.
    with tarfile.open(path, encoding="utf-8") as archive:
        assert [(m.name, m.offset_data, m.size) for m in archive] == members


def test_only_regular_files_are_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"of type {kind}")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("empty.txt"))
    assert [(name, size) for name, _, size in tar_members(tmp_path / "x.tar")] == [("empty.txt", 0)]


def test_the_members_before_a_cut_are_kept_and_the_cut_is_noted(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(5)})
    whole = path.read_bytes()
    # A member takes 512 bytes of header and 1024 of content.
    cuts = {
        3 * 1536 + 512 + 300: 3,    # within a content
        3 * 1536 + 100: 3,          # within a header
        3 * 1536: 3,                # between two members
        3 * 1536 + 512: 3,          # between header and content
        5 * 1536: 5,                # only the end mark is missing
    }
    for size, count in cuts.items():
        path.write_bytes(whole[:size])
        problems = []
        members = tar_members(path, problems)
        assert [name for name, _, _ in members] == [f"{i}.jpg" for i in range(count)], size
        assert len(problems) == 1 and "cut short" in problems[0], f"{size}: {problems}"
        for i, (_, offset, size) in enumerate(members):
            assert read_range(path, offset, size) == bytes([i]) * 700
        with pytest.raises(BadMember, match="cut short"):
            tar_members(path)
    path.write_bytes(whole)
    assert len(tar_members(path)) == 5


def test_a_damaged_tar_is_bad_and_nothing_worse(tmp_path):
    path = write_tar(tmp_path / "x.tar", FILES)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        third = archive.getmembers()[3].offset
    path.write_bytes(whole[:third] + b"\xff" * 512 + whole[third + 512:])
    problems = []
    assert len(tar_members(path, problems)) == 3
    assert len(problems) == 1 and "damaged" in problems[0], problems
    for content, words in [(b"", "empty"), (b"<html>" * 999, "no tar file"),
                           (gzip.compress(whole), "is compressed"),
                           (lzma.compress(whole), "is compressed"),
                           (bz2.compress(whole), "is compressed"), (b"\x1f", "no tar file")]:
        path.write_bytes(content)
        problems = []
        assert tar_members(path, problems) == [] and words in problems[0]
    with pytest.raises(BadMember, match="No such file"):
        tar_members(tmp_path / "none.tar", [])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z"])
def test_a_header_that_leads_back_to_itself_ends_the_tar(kind, tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"1"})
    header = bytearray(tarfile.TarInfo("back.jpg").tobuf())
    # Its size is -512, in base 256.
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(path.read_bytes()[:1024] + header + bytes(2048))
    problems = []
    assert [name for name, _, _ in tar_members(path, problems)] == ["a.jpg"]
    assert len(problems) == 1 and "damaged in its member back.jpg" in problems[0]


def test_random_damage_raises_nothing_else(tmp_path):
    path = write_tar(tmp_path / "x.tar", FILES)
    whole, dice = path.read_bytes(), random.Random(0)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(20):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content[:dice.randrange(len(content))])
        for name, offset, size in tar_members(path, []):
            assert len(read_range(path, offset, size)) == size


def test_a_tar_that_was_replaced_is_read_anew_once_it_is_listed_again(tmp_path):
    path = tmp_path / "a.tar"
    for content in b"first", b"second":
        write_tar(tmp_path / "new.tar", {"a.txt": content})
        os.replace(tmp_path / "new.tar", path)
        (_, offset, size), = tar_members(path)
        assert read_range(str(path), offset, size) == content, "read from the file that was there"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_only_a_few_files_stay_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(200):
        path = tmp_path / str(number)
        path.write_bytes(b"%03d" % number)
        assert read_range(str(path), 1, 2) == b"%02d" % (number % 100)
    more = len(os.listdir("/proc/self/fd")) - before
    assert more <= 64, f"{more} files are open"


def test_a_range_that_is_not_there_is_bad(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert read_range(path, 3, 4) == b"3456" and read_range(path, 8, -1) == b"89"
    assert read_range(path, 10, 0) == b""
    for offset, size in [(3, 8), (20, 1)]:
        with pytest.raises(BadMember, match="cut short"):
            read_range(path, offset, size)
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(BadMember, match="cannot be read"):
            read_range(place, 0, -1)


# ---- the kept index --------------------------------------------------------------------------

@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A tar, and index(): the index of it, with how often it was made anew so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data/x.tar", {"a.jpg": b"1", "b.jpg": b"22"})
    made = []

    def make(path):
        made.append(path)
        lines = [json.dumps(member).encode() + b"\n" for member in tar_members(path)]
        return lines, {"left_out": [["c", "why"]]}

    def index():
        records, notes = kept_index(path, make)
        assert notes == {"left_out": [["c", "why"]]}
        assert [tuple(record) for record in records] == tar_members(path)
        return len(made)
    return path, index


def test_an_index_is_made_once_and_kept_beside_the_tar(counted, tmp_path):
    path, index = counted
    assert index() == index() == 1, "it was made twice"
    assert {file.name for file in path.parent.iterdir()} == {"x.tar", "x.tar.index"}
    assert not (tmp_path / "cache").exists()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert index() == index() == 2, "the tar has another time"
    time = path.stat().st_mtime_ns
    write_tar(path, {"a.jpg": b"1" * 99_999})
    os.utime(path, ns=(0, time))
    assert index() == 3, "the tar has another size"


def test_a_damaged_index_is_made_anew(counted):
    path, index = counted
    assert index() == 1
    kept = path.with_name("x.tar.index")
    whole = kept.read_bytes()
    flipped = whole.replace(b'"a.jpg"', b'"z.jpg"')
    old = whole.replace(b'"rules": ', b'"rules": 9')
    damaged = [b"", whole[:-5], whole[:9], b"[]\n", b"\xff\xfe", flipped, old]
    for i, content in enumerate(damaged):
        assert content != whole
        kept.write_bytes(content)
        assert index() == index() == i + 2, f"damaged index {i}: {content[:50]}"


def test_the_index_lies_in_the_cache_folder_where_the_data_cannot_be_written(counted, tmp_path):
    path, index = counted
    # For root, no folder is read-only: a folder of the index's name has the same effect.
    path.with_name("x.tar.index").mkdir()
    assert index() == index() == 1
    kept = [file for file in (tmp_path / "cache/mvd/shards").iterdir()]
    assert len(kept) == 1 and kept[0].name.endswith("x.tar.index")
    # Nowhere: it is made each time, and nothing fails.
    kept[0].unlink()
    kept[0].mkdir()
    assert index() == 2 and index() == 3


def test_tars_of_one_name_do_not_share_an_index(counted, tmp_path):
    path, _ = counted
    (tmp_path / "other").mkdir()
    other = write_tar(tmp_path / "other/x.tar", {})
    places = [shards.index_places(tar)[1] for tar in (path, other)]
    assert places[0] != places[1]
