"""Captions of objects: own files, tables of all kinds, keys, and what cannot be read."""
import json

import pytest
from rendered import layout_files, write, write_tar

from mvd.data.captions import (
    Table, captions_from, cell_texts, own_captions, trimmed, wordings)
from mvd.data.objects import find_objects
from mvd.tools.errors import BadMember, UserError

NAMES = ["data/0/10010", "data/0/10011", "data/1/10010"]


def table(folder, name, content):
    """A Table of a file that is written here."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Table(str(path), str(path))


def read_table(folder, name, content, names=NAMES):
    return captions_from([table(folder, name, content)], names)


# ---- own files -------------------------------------------------------------------------------

def test_own_files_give_one_wording_per_line():
    files = {
        "caption.txt": "\ufeffa red  ball\r\n\n  a ball, red\n".encode(),
        "caption_2.txt": b"a red ball\nround",
        "captions.json": json.dumps(["ball", " "]).encode(),
        "notes.txt": b"not a caption",
    }
    found = own_captions(files, files.get)
    assert found == ["a red ball", "a ball, red", "round", "ball"]
    assert own_captions({"captions.json": 0}, lambda _: b'"one text"') == ["one text"]
    assert own_captions({"captions.json": 0}, lambda _: b'{"captions": ["a", "b"]}') == ["a", "b"]
    for table in (b'{"0": "a"}', b'[{"uid": "0", "caption": "a"}]'):
        assert own_captions({"captions.json": 0}, lambda _: table) == []
    assert own_captions({"000.png": 0}, lambda _: b"") == []
    # A separator of lines that only Unicode knows parts no wordings.
    assert own_captions({"caption.txt": 0}, lambda _: "a\u2028b".encode()) == ["a b"]


@pytest.mark.parametrize("name, content, reason", [
    ("caption.txt", b"caf\xe9", "not UTF-8"),
    ("caption.txt", "ball".encode("utf-16"), "not UTF-8"),
    ("captions.json", b'["a"', "no valid JSON"),
    ("captions.json", b"[" * 100_000, "no valid JSON"),
    ("captions.json", b"[1, 2]", "neither a text nor a list"),
])
def test_own_files_that_cannot_be_read_are_bad_members(name, content, reason):
    with pytest.raises(BadMember, match=reason):
        own_captions({name: 0}, lambda _: content)


def test_wordings_are_not_blank_and_not_repeated():
    assert wordings(["a", " a ", "", "\n", "b"]) == ["a", "b"]
    with pytest.raises(BadMember):
        wordings({"a": 1})


# ---- tables ----------------------------------------------------------------------------------

def test_cap3d_has_two_columns_without_a_header(tmp_path):
    content = '10011,"a ball, red"\nother,a cube\n10010,a "5 inch" pipe\n'
    found = read_table(tmp_path, "Cap3D.csv", content)
    assert found == {1: ["a ball, red"], 0: ['a "5 inch" pipe'], 2: ['a "5 inch" pipe']}


def test_a_comma_that_nobody_quoted_stays_in_the_caption(tmp_path):
    assert read_table(tmp_path, "a.csv", "x,y\n10011,a ball, red\n") == {1: ["a ball, red"]}
    content = "10011,a ball, red, round\n0/10010,a cube\n"
    assert read_table(tmp_path, "b.csv", content) == {1: ["a ball, red, round"], 0: ["a cube"]}


def test_trellis_has_a_header_and_a_json_list_in_a_cell(tmp_path):
    cell = '"[""a ball"", ""ball, red""]"'
    content = f"sha256,aesthetic_score,captions\nabc,5.5,{cell}\nabd,4,\nabe,4,\"[\"\"cut\"\n"
    names = ["renders/abc", "renders/abd", "renders/abe"]
    assert read_table(tmp_path, "metadata.csv", content, names) == {0: ["a ball", "ball, red"]}


@pytest.mark.parametrize("cell, texts", [
    ("[]", []),
    ('[ "x", "y"]', ["x", "y"]),
    ("['x', \"a dog's\"]", ["x", "a dog's"]),
    ("[photo] a ball", ["[photo] a ball"]),
    ("[1, 2]", ["[1, 2]"]),
    ('["cut', []),
    ("[" * 100_000, ["[" * 100_000]),
    (" a  ball", ["a ball"]),
])
def test_a_cell_may_hold_a_list_as_json_or_python_writes_it(cell, texts):
    assert cell_texts(cell) == texts
    assert cell_texts(cell, "z") == [*texts, "z"]


@pytest.mark.parametrize("content", [
    "uid\tcaption\n10011\ta ball, red\n",
    "10011\ta ball, red\n",
    "caption,uid\n\"a ball, red\",10011\n",
    "\ufeffuid,text\r\n10011,\"a ball, red\"\r\n",
])
def test_tabs_headers_and_byte_order_marks(content, tmp_path):
    assert read_table(tmp_path, "t.tsv" if "\t" in content else "t.csv", content) == {
        1: ["a ball, red"]}


def test_json_tables_hold_texts_or_lists(tmp_path):
    content = json.dumps({"0/10010": "a", "1/10010": ["b", "c"], "0/10011": 5, "settings": {}})
    assert read_table(tmp_path, "t.json", content) == {0: ["a"], 2: ["b", "c"]}
    assert read_table(tmp_path, "list.json", '["a"]') == {}
    content = '{"10011": {"caption": "a", "score": 1}, "1/10010": {"captions": ["b", "c"]}}'
    assert read_table(tmp_path, "objects.json", content) == {1: ["a"], 2: ["b", "c"]}


def test_objects_with_a_key_and_a_caption_may_be_listed(tmp_path):
    rows = [{"uid": "10011", "caption": "a"}, {"path": "1/10010.glb", "text": ["b", "c"]},
            {"uid": "0/10010"}, {"uid": 5, "caption": "d"}]
    lines = [json.dumps(row) for row in rows]
    expected = {1: ["a"], 2: ["b", "c"]}
    assert read_table(tmp_path, "t.json", f"[{','.join(lines)}]") == expected
    assert read_table(tmp_path, "t.jsonl", "\r\n".join(lines) + "\n\n") == expected
    for name, content in (("t.json", '[{"caption": "a"}]'), ("t.jsonl", '{"caption": "a"}\n')):
        with pytest.raises(UserError, match=f"{name}: its captions do not say of what"):
            read_table(tmp_path, name, content)
    assert read_table(tmp_path, "t.json", '[{"size": 5}, 7]') == {}, "it is another kind of file"
    with pytest.raises(UserError, match="t.jsonl: line 2 is no valid JSON"):
        read_table(tmp_path, "t.jsonl", lines[0] + "\n{\n")


def test_a_file_that_is_no_table_of_captions_gives_nothing(tmp_path):
    assert read_table(tmp_path, "a.csv", "x,y,z\n10010,2,3\n") == {}
    assert read_table(tmp_path, "b.csv", "") == {}


def test_the_longest_key_decides_and_tables_add_up(tmp_path):
    tables = [
        table(tmp_path, "a.json", '{"10010": "short", "0/10010": "long"}'),
        table(tmp_path, "b.json", '{"./0/10010.glb": "again", "010": "no part of a path"}'),
    ]
    names = [*NAMES, "data/10/10010x", "data/x0/10010"]
    assert captions_from(tables, names) == {0: ["long", "again"], 2: ["short"], 4: ["short"]}
    assert trimmed("0\\10010.tar") == "0/10010"


def test_a_tail_that_all_objects_share_does_not_matter(tmp_path):
    names = [f"g/0/{uid}/campos_512_v4" for uid in ("1", "2")]
    content = '{"0/1": "one", "2": "two", "campos_512_v4": "all", "": "nothing"}'
    found = read_table(tmp_path, "t.json", content, names)
    assert found[0][0] == "one" and found[1] != []
    assert read_table(tmp_path, "t.json", '{"0/1": "one"}', names[:1]) == {0: ["one"]}


def test_a_large_cell_is_read(tmp_path):
    text = "ball " * 50_000
    found = read_table(tmp_path, "t.csv", f"uid,caption\n10011,{text}\n")
    assert found == {1: [text.strip()]}


@pytest.mark.parametrize("name, content, reason", [
    ("t.csv", b"10010,caf\xe9\n", "not UTF-8"),
    ("t.csv", "10010,ball\n".encode("utf-16"), "not UTF-8"),
    ("t.csv", b'10010,"a ball\n10011,a cube\n', "damaged"),
    ("t.csv", b'10010,"a" ball\n', "damaged"),
    ("t.json", b'{"10010": "a ball"', "no valid JSON"),
    ("t.json", b'{"10010": "caf\xe9"}', "not UTF-8"),
])
def test_tables_that_cannot_be_read_are_named(name, content, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as error:
        read_table(tmp_path, name, content)
    assert name in str(error.value) and "\n" not in str(error.value)
    problems = []
    assert 1 not in captions_from([table(tmp_path, name, content)], NAMES, problems)
    assert len(problems) == 1 and name in problems[0]


def test_a_table_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.csv"):
        captions_from([Table("none.csv", str(tmp_path / "none.csv"))], NAMES)


# ---- with objects ----------------------------------------------------------------------------

def test_given_tables_go_before_own_files_and_these_before_tables_nearby(tmp_path):
    root = tmp_path / "data"
    write(tmp_path, {"captions.jsonl": b'{"uid": "ab/2", "caption": "nearby"}\n'})
    for seed, own in enumerate((["own"], ["own"], [], [])):
        write(root / f"ab/{seed}", layout_files("zero123", seed, captions=own))
    (tmp_path / "near.csv").write_text("0,near\n2,near\n")
    (root / "ab/captions.json").write_text('[{"id": "ab/2", "caption": "nearer"}]')
    given = tmp_path / "given.json"
    given.write_text('{"ab/1": "given"}')
    objects, (found,) = find_objects([root], captions=[given])
    assert objects.captions(0) == ["own"]
    assert objects.captions(1) == ["given"]
    assert sorted(objects.captions(2)) == ["nearby", "nearer"], "the longest key counts"
    with pytest.raises(BadMember, match="no caption"):
        objects.captions(3)
    assert [entry[:2] for entry in found.left_out] == [(f"{root}/ab/3", "no caption")]
    assert found.items == 3
    # The object is still readable.
    assert len(objects.read(3).names) == 8


def test_the_captions_of_the_folder_above_hold_for_an_object(tmp_path):
    write(tmp_path / "a", layout_files("g-objaverse", 0))
    write(tmp_path / "a/campos_512_v4", {"caption.txt": b"\n \n"})
    objects, _ = find_objects([tmp_path])
    assert objects.captions(0) == ["a ball"]


def test_a_table_inside_a_tar_counts(tmp_path):
    files = {"sets/captions.json": b'{"0": ["a", "b"], "1": "c"}'}
    for seed in range(2):
        inside = layout_files("trellis", seed, captions=())
        files |= {f"sets/{seed}/{name}": content for name, content in inside.items()}
    write_tar(tmp_path / "sets.tar", files)
    objects, (found,) = find_objects([tmp_path / "sets.tar"])
    assert [objects.captions(i) for i in range(2)] == [["a", "b"], ["c"]]
    assert found.left_out == []


def test_what_cannot_be_read_is_left_out_by_name(tmp_path):
    write(tmp_path / "a", layout_files("zero123", 0))
    write(tmp_path / "b", {**layout_files("zero123", 1), "caption.txt": b"caf\xe9"})
    (tmp_path / "broken.csv").write_bytes(b"b,caf\xe9\n")
    _, (found,) = find_objects([tmp_path])
    reasons = {name: reason for name, reason, _ in found.left_out}
    assert "caption.txt is not UTF-8" in reasons[f"{tmp_path}/b"]
    assert "broken.csv is not UTF-8" in reasons[str(tmp_path)]
