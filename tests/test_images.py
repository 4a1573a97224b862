"""Captioned images in every layout, written here; bad ones are named, their neighbours kept."""
import csv
import gzip
import io
import json
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from mvd.data import images
from mvd.data.images import find_images
from mvd.tools.errors import BadMember, UserError


def colour_of(i):
    return (20 * i % 256, 90, 255 - 20 * i % 256)


def picture(i=0, kind="PNG"):
    """The bytes of a small picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (12, 9), colour_of(i)).save(file, kind)
    return file.getvalue()


def write(folder, files):
    """Write {name: bytes or text}, with the folders that they need."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path, files):
    """A tar of [(name, bytes or text)] or {name: bytes or text}."""
    with tarfile.open(path, "w", encoding="utf-8") as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def below(path, name):
    """A name without the path, which has to come before it once."""
    assert name.startswith(f"{path}/") and name.count(str(path)) == 1, name
    return name.removeprefix(f"{path}/")


def all_of(*paths):
    """{name below its path: captions} of what is found, and {name: reason} of what is left out.

    What turns out to be bad only when it is read is among what is left out, too.
    """
    found_images, founds = find_images(paths)
    assert sum(found.items for found in founds) == len(found_images)
    left_out = {below(found.path, name): reason
                for found in founds for name, reason, _ in found.left_out}
    assert len(left_out) == sum(len(found.left_out) for found in founds), "a name comes twice"
    kept = {}
    for i in range(len(found_images)):
        name = found_images.name(i)
        path = next(found.path for found in founds if name.startswith(found.path))
        name = below(path, name)
        try:
            planes = found_images.picture(i, 8)
            assert planes.shape == (4, 8, 8) and planes.dtype == np.uint8
            kept[name] = found_images.captions(i)
        except BadMember as problem:
            left_out[name] = str(problem)
    return kept, left_out


def check_reasons(left_out, expected):
    """Check that just these names are left out, each with its words in the reason."""
    assert left_out.keys() == expected.keys()
    for name, words in expected.items():
        assert words in left_out[name], f"{name}: {left_out[name]}"


# ---- folders of pictures and texts -----------------------------------------------------------

def test_pictures_with_texts_are_found_at_any_depth(tmp_path):
    write(tmp_path, {
        "x10.jpg": picture(1, "JPEG"), "x10.txt": "ten",
        "x2.JPEG": picture(2, "JPEG"),
        "x2.TXT": "\ufefftwo words \r\n\r\n another wording\u2028on\n",
        "deep/er/v1.2.png": picture(3), "deep/er/v1.2.txt": "dots",
        "00000/000000007.webp": picture(4, "WEBP"), "00000/000000007.txt": "of img2dataset",
        "00000/000000007.json": '{"caption": "not this one", "url": "http://…"}',
        "00000/000000008.gif": picture(5, "GIF"),
        "00000/000000008.json": '{"caption": "only json"}',
        "00000.parquet": b"PAR1", "00000_stats.json": "{}", "README.txt": "not a caption",
        ".hidden.png": picture(), ".hidden/y.png": picture(), "__MACOSX/._x2.png": b"junk",
    })
    kept, left_out = all_of(tmp_path)
    assert left_out == {}
    assert list(kept.items()) == [
        ("x2.JPEG", ["two words", "another wording on"]),
        ("x10.jpg", ["ten"]),
        ("00000/000000007.webp", ["of img2dataset"]),
        ("00000/000000008.gif", ["only json"]),
        ("deep/er/v1.2.png", ["dots"]),
    ]
    found_images, (found,) = find_images([tmp_path])
    assert found.kind == "images" and found.items == found.pictures == 5
    assert found.layout == "folder of pictures with text files"
    for item, i in enumerate((2, 1, 4, 5, 3)):
        colour = found_images.picture(item, 4)[:3, 0, 0].astype(int)
        assert np.abs(colour - colour_of(i)).max() < 8, f"item {item} shows another picture"


def test_what_a_folder_holds_that_cannot_be_used_is_named(tmp_path):
    whole = picture(kind="JPEG")
    write(tmp_path, {
        "good.jpg": whole, "good.txt": "good",
        "lonely.png": picture(),
        "blank.png": picture(), "blank.txt": " \n\t\n",
        "empty.png": picture(), "empty.txt": "",
        "half.jpg": whole[:len(whole) // 2], "half.txt": "half",
        "page.jpg": "<html></html>", "page.txt": "page",
        "zero.jpg": b"", "zero.txt": "zero",
        "latin.png": picture(), "latin.txt": "caf\xe9".encode("latin-1"),
        "two.jpg": whole, "two.png": picture(), "two.txt": "two",
        "phone.heic": b"\0\0\0\x18ftypheic", "phone.txt": "phone",
        "broken.png": picture(), "broken.json": '{"caption": ',
        "null.png": picture(), "null.json": '{"caption": null}',
        "number.png": picture(), "number.json": '{"caption": 7}',
        "list.png": picture(), "list.json": "[]",
        "camera.png": picture(), "camera.txt": "1, 0 0 0\n0 1.0 0 0\n0 0 1e0 -2.5\n",
        "dozen.png": picture(), "dozen.txt": "1 2 3 4 5 6 7 8 9 10 11 eggs",
        "good.npz": b"made by another program",
        # Without an ending the content decides.
        "plain": picture(), "plain.txt": "no ending", "bare": picture(),
        "iphone": b"\0\0\0\x18ftypheic" + bytes(40), "iphone.txt": "an iPhone's",
        "README": "about them", "README.txt": "about them",
        # What cannot be read is named, unless another file shows it.
        "raw.NEF": b"raw", "both.heic": b"\0\0\0\x18ftypheic", "both.jpg": whole,
        "both.txt": "both", "clip.mp4": b"no picture, no caption",
    })
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    (tmp_path / "link.txt").write_text("link")
    os.mkfifo(tmp_path / "pipe.png")
    kept, left_out = all_of(tmp_path)
    at_once = [name for name, _, _ in find_images([tmp_path])[1][0].left_out]
    assert f"{tmp_path}/empty.png" in at_once, "an empty file is not seen before it is read"
    assert kept == {"good.jpg": ["good"], "two.jpg": ["two"], "plain": ["no ending"],
                    "both.jpg": ["both"],
                    "dozen.png": ["1 2 3 4 5 6 7 8 9 10 11 eggs"]}
    check_reasons(left_out, {
        "lonely.png": "no caption", "blank.png": "empty caption", "empty.png": "empty caption",
        "half.jpg": "cannot be decoded", "page.jpg": "begins with", "zero.jpg": "empty",
        "latin.png": "not UTF-8", "two.png": "same name as two.jpg",
        "phone.heic": "no kind of picture", "broken.png": "no valid JSON",
        "null.png": "no caption", "number.png": "neither a text nor a list",
        "list.png": "no caption", "camera.png": "a camera, not a caption",
        "link.png": "broken link", "pipe.png": "no file",
        "bare": "no caption", "iphone": "HEIC", "raw.NEF": "no kind of picture",
        "README": "no kind of picture",
    })


def test_a_file_that_has_gone_or_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": picture(), "a.txt": "a", "b.png": picture(), "b.txt": "b",
                     "locked/c.png": picture()})
    scandir = os.scandir

    def refuse(folder):
        if "locked" in str(folder):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(images.os, "scandir", refuse)
    found_images, (found,) = find_images([tmp_path])
    assert found.left_out == [(f"{tmp_path}/locked/", "cannot be listed: Permission denied", 1)]
    for path in tmp_path.glob("b.*"):
        path.unlink()
    assert found_images.captions(0) == ["a"]
    with pytest.raises(BadMember, match="No such file"):
        found_images.captions(1)
    with pytest.raises(BadMember, match="No such file"):
        found_images.picture(1, 8)


def test_links_are_followed_but_not_round_and_round(tmp_path):
    write(tmp_path, {"data/a.png": picture(), "data/a.txt": "a"})
    (tmp_path / "data/lost.png").symlink_to("nowhere.png")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/itself").symlink_to("itself")
    write(tmp_path, {"other/b.png": picture(), "other/b.txt": "b"})
    (tmp_path / "data/elsewhere").symlink_to(tmp_path / "other")
    kept, left_out = all_of(tmp_path / "data")
    assert kept == {"a.png": ["a"], "elsewhere/b.png": ["b"]}
    check_reasons(left_out, {"lost.png": "broken link"})


def test_names_that_are_no_text_can_be_read_and_printed(tmp_path):
    folder = os.fsencode(tmp_path)
    for name, content in [(b"caf\xe9.png", picture()), (b"caf\xe9.txt", b"caf\xc3\xa9"),
                          (b"alone\xff.png", picture())]:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    kept, left_out = all_of(tmp_path)
    assert kept == {"caf?.png": ["café"]} and left_out == {"alone?.png": "no caption"}


# ---- Hugging Face image folders --------------------------------------------------------------

def test_a_jsonl_table_gives_the_captions(tmp_path):
    rows = [
        {"file_name": "b.png", "text": "a text", "id": 3},
        {"file_name": "./sub/a.png", "caption": ["one", " ", "two"], "text": "not this"},
        {"file_name": "sub\\c.png", "prompt": "from\u2028Windows", "captions": None},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    names = ["b.png", "sub/a.png", "sub/c.png"]
    write(tmp_path, {"metadata.jsonl": text, **{name: picture() for name in names}})
    kept, left_out = all_of(tmp_path)
    assert left_out == {}
    assert list(kept.items()) == [("b.png", ["a text"]), ("sub/a.png", ["one", "two"]),
                                  ("sub/c.png", ["from Windows"])]
    assert find_images([tmp_path])[1][0].layout == "image folder with metadata.jsonl"


def test_a_csv_table_gives_the_captions(tmp_path):
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerows([
        ["file_name", "captions", "text"],
        ["a.png", '["one, with a comma", "two"]', "not this"],
        ["b.png", "plain\nin two lines", ""],
    ])
    write(tmp_path, {"train/metadata.csv": "\ufeff" + file.getvalue(), "train/a.png": picture(),
                     "train/b.png": picture()})
    kept, left_out = all_of(tmp_path)
    assert left_out == {}
    assert kept == {"train/a.png": ["one, with a comma", "two"],
                    "train/b.png": ["plain in two lines"]}


def test_a_table_names_files_that_a_mac_has_taken_apart(tmp_path):
    """é is one letter here, an e with an accent there; where both are there, each is its own."""
    write(tmp_path, {
        "a/metadata.jsonl": '{"file_name": "café.png", "text": "composed"}\n'
                            '{"file_name": "e\u0301.png", "text": "apart"}\n'
                            '{"file_name": "é.png", "text": "at one"}\n',
        "a/cafe\u0301.png": picture(), "a/e\u0301.png": picture(), "a/é.png": picture(),
    })
    kept, left_out = all_of(tmp_path)
    assert left_out == {}
    assert kept == {"a/cafe\u0301.png": ["composed"], "a/e\u0301.png": ["apart"],
                    "a/é.png": ["at one"]}


def test_bad_rows_of_a_table_are_named(tmp_path):
    lines = [
        b'{"file_name": "good.png", "text": "good"}',
        b'{"file_name": "good.png", "text": "again"}',
        b'{"file_name": "gone.png", "text": "gone"}',
        b'{"file_name": "bro',
        b'["good.png", "text"]',
        b'{"text": "no name"}',
        b'{"file_name": "mute.png"}',
        b'{"file_name": "blank.png", "text": " "}',
        b'{"file_name": "number.png", "text": 5}',
        b'{"file_name": "../outside.png", "text": "x"}',
        b'{"file_name": "/etc/passwd", "text": "x"}',
        b'{"file_name": "C:\\\\x.png", "text": "x"}',
        b'{"file_name": "caf\xe9.png", "text": "x"}',
        b"[" * 100_000,
        b'{"file_name": "last.png", "text": "last"}',
    ]
    names = ["good", "mute", "blank", "number", "unnamed", "last"]
    write(tmp_path, {
        "data/metadata.jsonl": b"\n".join(lines), "outside.png": picture(),
        **{f"data/{name}.png": picture() for name in names},
        # Beside a table, a text is no caption.
        "data/unnamed.txt": "unnamed",
    })
    folder = tmp_path / "data"
    found_images, (found,) = find_images([folder])
    assert [found_images.captions(i) for i in range(len(found_images))] == [["good"], ["last"]]
    expected = [
        ("good.png", "named a second time"), ("gone.png", "no such file"),
        ("metadata.jsonl, line 4", "no valid JSON"), ("metadata.jsonl, line 5", "no JSON object"),
        ("metadata.jsonl, line 6", "no file_name"), ("mute.png", "no caption"),
        ("blank.png", "empty caption"), ("number.png", "neither a text nor a list"),
        ("metadata.jsonl, line 10", "leads out"), ("metadata.jsonl, line 11", "leads out"),
        ("metadata.jsonl, line 12", "leads out"), ("metadata.jsonl, line 13", "not UTF-8"),
        ("metadata.jsonl, line 14", "no valid JSON"), ("unnamed.png", "not named in the metadata"),
    ]
    names = [below(folder, name) for name, _, _ in found.left_out]
    assert names == [name for name, _ in expected]
    for (name, reason, _), (_, words) in zip(found.left_out, expected):
        assert words in reason, f"{name}: {reason}"


def test_a_picture_whose_line_is_damaged_counts_once(tmp_path):
    lines = ['{"file_name": "a.png", "text": "a"}', '{"file_name": "b.p', '{"text": "of c"}']
    write(tmp_path, {"metadata.jsonl": "\n".join(lines),
                     **{f"{name}.png": picture() for name in "abc"}})
    left_out = find_images([tmp_path])[1][0].left_out
    assert len(left_out) == 4 and sum(count for _, _, count in left_out) == 2


def test_a_row_with_more_cells_than_columns_is_bad(tmp_path):
    write(tmp_path, {"metadata.csv": 'file_name,text\na.png,x,y,z\nb.png,"x,y,z"\n',
                     "a.png": picture(), "b.png": picture()})
    kept, left_out = all_of(tmp_path)
    assert kept == {"b.png": ["x,y,z"]}
    check_reasons(left_out, {"a.png": "more cells than columns"})


def test_a_csv_that_is_damaged_or_of_another_kind(tmp_path):
    pictures = {"a.png": picture(), "a.txt": "beside it", "b.png": picture()}
    # TRELLIS's table of objects has no file_name: captions are files.
    write(tmp_path, {"1/metadata.csv": "sha256,captions\n00,x\n", **{
        f"1/{name}": content for name, content in pictures.items()}})
    kept, left_out = all_of(tmp_path / "1")
    assert kept == {"a.png": ["beside it"]} and left_out == {"b.png": "no caption"}
    write(tmp_path, {"2/metadata.csv": "file_name,text\na.png,x\nb.png\n".encode(), **{
        f"2/{name}": content for name, content in pictures.items()}})
    kept, left_out = all_of(tmp_path / "2")
    assert kept == {"a.png": ["x"]}
    check_reasons(left_out, {"b.png": "no caption"})
    write(tmp_path, {"3/metadata.csv": "file_name,text\na.png,caf\xe9\n".encode("utf-16"), **{
        f"3/{name}": content for name, content in pictures.items()}})
    with pytest.raises(UserError, match="metadata.csv: is not UTF-8"):
        find_images([tmp_path / "3"])


def test_tables_in_several_folders_and_pictures_beside_them(tmp_path):
    row = '{"file_name": "a.png", "text": "%s"}'
    write(tmp_path, {
        "train/metadata.jsonl": row % "train", "train/a.png": picture(),
        "test/metadata.jsonl": row % "test", "test/a.png": picture(), "test/b.png": picture(),
        "plain/a.png": picture(), "plain/a.txt": "plain",
    })
    kept, left_out = all_of(tmp_path)
    assert kept == {"train/a.png": ["train"], "test/a.png": ["test"], "plain/a.png": ["plain"]}
    check_reasons(left_out, {"test/b.png": "not named"})


# ---- shards ----------------------------------------------------------------------------------

def sample(key, i=0, text="text", **fields):
    """The members of a sample as img2dataset writes them."""
    fields = {"caption": text, "key": key, "status": "success", **fields}
    return [(f"{key}.jpg", picture(i, "JPEG")), (f"{key}.txt", text),
            (f"{key}.json", json.dumps(fields))]


def test_a_shard_of_img2dataset_is_read_where_it_lies(tmp_path):
    members = sample("000000003", 3, "three") + sample("000000001", 1, "one\nuno")
    members += [("000000009.PNG", picture(9)), ("000000009.json", '{"caption": ["nine", "9"]}')]
    members += [("a/b.c/v1.seg.png", b"a mask"), ("a/b.c/v1.png", picture(4)),
                ("a/b.c/v1.txt", "of v1")]
    members += [("__index__.json", "{}"), ("._000000009.PNG", b"junk"), ("Makefile", "none")]
    path = write_tar(tmp_path / "00000.tar", members)
    kept, left_out = all_of(path)
    assert left_out == {}
    assert list(kept.items()) == [
        ("000000003.jpg", ["three"]), ("000000001.jpg", ["one", "uno"]),
        ("000000009.PNG", ["nine", "9"]), ("a/b.c/v1.png", ["of v1"]),
    ]
    found_images, (found,) = find_images([path])
    assert found.layout == "1 tar shard" and found.items == found.pictures == 4
    for item, i in enumerate((3, 1, 9, 4)):
        colour = found_images.picture(item, 4)[:3, 0, 0].astype(int)
        assert np.abs(colour - colour_of(i)).max() < 8, "another picture was read"
    assert path.with_name("00000.tar.index").is_file()


def test_bad_samples_of_a_shard_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jpg = picture(kind="JPEG")
    members = sample("good") + [
        ("alone.jpg", jpg),
        ("mute.txt", "no picture"),
        ("heic.heic", b"ftypheic"), ("heic.txt", "x"),
        ("none.jpg", jpg), ("none.txt", ""), ("none.json", '{"caption": null}'),
        ("blank.jpg", jpg), ("blank.txt", " \n"),
        ("twice.jpg", jpg), ("twice.txt", "one"), ("twice.TXT", "two"),
        ("both.jpg", jpg), ("both.png", picture()), ("both.txt", "x"),
        ("cut.jpg", jpg[:-20]), ("cut.txt", "x"),
        ("again.jpg", jpg), ("again.txt", "once"), ("again.jpg", jpg), ("again.txt", "twice"),
        ("null.jpg", jpg), ("null.json", '{"caption": null}'),
    ] + sample("last")
    write_tar(tmp_path / "0.tar", members)
    # A key is one of its shard: in another, it is another picture.
    write_tar(tmp_path / "1.tar", sample("good", text="of shard 1"))
    expected = {
        "alone.jpg": "no caption", "mute.txt": "no picture", "heic.heic": "no picture",
        "none.jpg": "empty caption", "blank.jpg": "empty caption",
        "twice.jpg": "two members of one name", "both.jpg": "two pictures",
        "cut.jpg": "cannot be decoded", "again.jpg": "two members of one name",
        "null.jpg": "no caption",
    }
    for _ in ("found", "found again, from the index"):
        found_images, (found,) = find_images([tmp_path])
        assert found.layout == "2 tar shards" and found.items == 6
        kept, bad = [], {below(tmp_path, name): reason for name, reason, _ in found.left_out}
        for i in range(len(found_images)):
            try:
                found_images.picture(i, 8)
                kept.append(found_images.captions(i))
            except BadMember as problem:
                bad[below(tmp_path, found_images.name(i))] = str(problem)
        assert kept == [["text"], ["text"], ["of shard 1"]]
        check_reasons(bad, {f"0.tar/{name}": words for name, words in expected.items()})


def test_the_members_of_a_sample_may_lie_apart(tmp_path):
    """tar takes files as the folder has them: in any order."""
    members = [member for i in range(9) for member in sample(f"{i}", i, f"text {i}")]
    random.Random(0).shuffle(members)
    kept, left_out = all_of(write_tar(tmp_path / "0.tar", members))
    assert left_out == {} and kept == {f"{i}.jpg": [f"text {i}"] for i in range(9)}


def test_compressed_shards_are_left_out_by_name(tmp_path):
    whole = write_tar(tmp_path / "0.tar", sample("a")).read_bytes()
    write(tmp_path, {"1.tar.gz": gzip.compress(whole), "2.TGZ": gzip.compress(whole),
                     "3.tar.zst": b"(\xb5/\xfd", "4.tar": gzip.compress(whole),
                     "notes.gz": b"something else"})
    kept, left_out = all_of(tmp_path)
    assert kept == {"0.tar/a.jpg": ["text"]}
    check_reasons(left_out, dict.fromkeys(
        ("1.tar.gz", "2.TGZ", "3.tar.zst", "4.tar"), "compressed"))


def test_a_damaged_shard_is_left_out_and_the_others_are_kept(tmp_path):
    write_tar(tmp_path / "0.tar", sample("a"))
    whole = write_tar(tmp_path / "1.tar", sample("b") + sample("c")).read_bytes()
    with tarfile.open(tmp_path / "1.tar") as archive:
        place = archive.getmember("c.txt").offset
    (tmp_path / "1.tar").write_bytes(whole[:place + 300])
    (tmp_path / "2.tar").write_bytes(b"<html>" * 500)
    for paths in ([tmp_path], [f"{tmp_path}/*.tar"]):
        found_images, founds = find_images(paths)
        captions = [found_images.name(i) for i in range(len(found_images))]
        assert captions == [f"{tmp_path}/0.tar/a.jpg", f"{tmp_path}/1.tar/b.jpg"]
        left_out = {below(tmp_path, name): why
                    for found in founds for name, why, _ in found.left_out}
        assert [name.split("/")[-1] for name in left_out] == ["1.tar", "c.jpg", "2.tar"]
        assert "cut short" in left_out["1.tar"] and "no tar file" in left_out["2.tar"]
    with pytest.raises(UserError, match="2.tar holds no captioned image.*no tar file"):
        find_images([tmp_path / "2.tar"])


# ---- several paths, and what stops a run -----------------------------------------------------

def test_several_paths_are_one_list(tmp_path):
    write(tmp_path, {"plain/a.png": picture(1), "plain/a.txt": "plain",
                     "table/metadata.jsonl": '{"file_name": "b.png", "text": "table"}',
                     "table/b.png": picture(2)})
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", sample("x", 3 + i, f"shard {i}"))
    found_images, founds = find_images(
        [tmp_path / "table", f"{tmp_path}/[02].tar", tmp_path / "plain", tmp_path / "1.tar"])
    lines = [found.line().removeprefix(f"{tmp_path}/") for found in founds]
    assert lines == [
        "table: 1 images, image folder with metadata.jsonl", "[02].tar: 2 images, 2 tar shards",
        "plain: 1 images, folder of pictures with text files", "1.tar: 1 images, 1 tar shard"]
    assert find_images([f"{tmp_path}/plain/"])[1][0].path == f"{tmp_path}/plain"
    assert len(find_images([tmp_path / "1.tar", f"{tmp_path}/?.tar", tmp_path / "1.tar"])[0]) == 3
    texts = [found_images.captions(i)[0] for i in range(len(found_images))]
    assert texts == ["table", "shard 0", "shard 2", "plain", "shard 1"]
    for item, i in enumerate((2, 3, 5, 1, 4)):
        colour = found_images.picture(item, 4)[:3, 0, 0].astype(int)
        assert np.abs(colour - colour_of(i)).max() < 8, f"item {item} shows another picture"


def test_where_nothing_can_be_used_it_says_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"mute/a.png": picture(), "good/a.png": picture(), "good/a.txt": "a"})
    with pytest.raises(UserError, match=r"empty holds no.*x\.jpg \+ x\.txt.*metadata.*\.tar"):
        find_images([tmp_path / "good", tmp_path / "empty"])
    with pytest.raises(UserError, match="left out 1, such as .*mute/a.png: no caption"):
        find_images([tmp_path / "mute"])
    with pytest.raises(UserError, match="does not exist"):
        find_images([tmp_path / "none"])


def test_rendered_objects_are_not_taken_for_captioned_images(tmp_path):
    frames = [{"file_path": "0.png", "transform_matrix": np.eye(4).tolist()}]
    write(tmp_path, {"x/0.png": picture(), "x/caption.txt": "a thing",
                     "x/transforms.json": json.dumps({"camera_angle_x": 1, "frames": frames})})
    with pytest.raises(UserError, match="holds rendered objects: name it with --objects"):
        find_images([tmp_path])


def test_data_of_an_older_version_is_refused(tmp_path):
    line = {"file": "images/0.png", "kind": "image", "captions": ["x"]}
    write(tmp_path, {"index.jsonl": json.dumps(line) + "\n",
                     "images/0.png": picture(), "images/0.txt": "x"})
    with pytest.raises(UserError, match=r"index\.jsonl is of an older version.*mvd\.toyworld"):
        find_images([tmp_path])
    (tmp_path / "index.jsonl").write_text('{"of": "something else"}')
    assert len(find_images([tmp_path])[0]) == 1


# ---- other processes -------------------------------------------------------------------------

def read_all(found_images, results):
    """In a spawned process: its captions, and the sum of its pixels."""
    texts = [found_images.captions(i) for i in range(len(found_images))]
    pixels = [int(found_images.picture(i, 8).sum()) for i in range(len(found_images))]
    results.put((texts, pixels))


def test_what_is_found_is_sent_to_another_process_in_shared_memory(tmp_path):
    write(tmp_path, {f"{i:04d}.{kind}": b"x" for i in range(500) for kind in ("png", "txt")})
    found_images, _ = find_images([tmp_path])
    assert len(found_images) == 500
    sent = multiprocessing.reduction.ForkingPickler.dumps(found_images)
    assert len(sent) < 4000, f"{len(sent)} bytes: a list of names was sent"
    assert found_images.records.text.is_shared() and found_images.records.bounds.is_shared()
    assert pickle.loads(sent).name(499) == f"{tmp_path}/0499.png"


@pytest.mark.slow
def test_a_spawned_process_reads_the_same(tmp_path):
    write(tmp_path, {"a.png": picture(1), "a.txt": "a", "b.png": picture(2), "b.txt": "b"})
    found_images, _ = find_images([tmp_path])
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=read_all, args=(found_images, results))
    process.start()
    texts, pixels = results.get(timeout=60)
    process.join()
    assert texts == [["a"], ["b"]]
    assert pixels == [int(found_images.picture(i, 8).sum()) for i in range(2)]
