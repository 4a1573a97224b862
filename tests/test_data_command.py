"""python -m mvd.data: what it prints about objects and images, for people and as JSON."""
import errno
import json
import sys

import numpy as np
import pytest
from rendered import (
    LAYOUTS, cameras, convention, encoded, layout_files, npy, pictures, write, write_tar)

from mvd.data import __main__ as command
from mvd.tools.errors import UserError


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (stdout, the UserError or None)."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mvd.data", "--size", "24", *map(str, arguments)])
        error = None
        try:
            command.main()
        except UserError as problem:
            error = problem
        return capsys.readouterr().out, error
    return call


def reports(out):
    """The JSON objects on the lines of a text."""
    return [json.loads(line) for line in out.splitlines()]


def sixteen(c2w):
    """What the UNet is given (method: row by row, the position divided by its length)."""
    c2w = c2w.copy()
    c2w[:, :3, 3] /= np.linalg.norm(c2w[:, :3, 3], axis=1, keepdims=True)
    return c2w.reshape(-1, 16)


def test_all_layouts_give_the_same_camera_numbers(run, tmp_path):
    for layout in LAYOUTS:
        write(tmp_path / layout, layout_files(layout, 3))
    write_tar(tmp_path / "t.tar", layout_files("zero123", 3))
    places = [tmp_path / layout for layout in LAYOUTS] + [tmp_path / "t.tar"]
    out, error = run(*places, "--json")
    found = reports(out)
    assert error is None and len(found) == len(LAYOUTS) + 1
    for place, report in zip(places, found):
        assert report["path"] == str(place) and report["kind"] == "objects"
        assert np.abs(np.array(report["camera"]) - sixteen(cameras(3))).max() < 1e-5
        assert report["objects"] == report["usable_objects"] == 1
        assert report["views"] == [8, 8] and report["left_out"] == []
        assert report["captions"] == {"items": 1, "wordings": 1, "example": "a ball"}
    assert found[0]["convention"] == {"matrix": "camera-to-world", "axes": "opengl"}
    assert found[-1]["convention"] == {"matrix": "world-to-camera", "axes": "opengl"}
    assert np.allclose(found[0]["fov"], 40) and not found[0]["fov_assumed"]
    assert found[-1]["fov_assumed"]


def test_what_mvd_toyworld_writes_is_one_report_with_both(run, tmp_path):
    write(tmp_path / "sets/000000", layout_files("trellis", 0, captions=()))
    (tmp_path / "sets/captions.json").write_text('{"000000": ["a ball", "ball"]}')
    write(tmp_path / "images", {
        "000000.png": encoded(pictures(0)[0]), "000001.png": b"no picture",
        "metadata.jsonl": b'{"file_name": "000000.png", "captions": ["one", "two"]}\n'
                          b'{"file_name": "000001.png", "captions": ["three"]}\n'})
    objects, = reports(run(tmp_path, "--json")[0])
    images = objects["of_images"]
    assert objects["path"] == str(tmp_path) and objects["usable_objects"] == 1
    assert objects["images"] == 2 and len(objects["camera"]) > 1
    assert objects["captions"]["wordings"] == 2
    assert images["path"].endswith("images") and images["kind"] == "images"
    assert images["images"] == 2 and images["pictures"] == 1
    assert images["camera"] is None
    assert "000001.png" in images["left_out"][0]["name"]


def test_what_is_left_out_is_named_and_counted(run, tmp_path):
    whole = layout_files("zero123", 0)
    write(tmp_path / "0", {**whole, "001.png": whole["001.png"][:300], "003.npy": npy(np.ones(5))})
    write(tmp_path / "1", layout_files("zero123", 1, captions=()))
    write(tmp_path / "2", layout_files("zero123", 2))
    report, = reports(run(tmp_path, "--json")[0])
    assert report["objects"] == 3 and report["usable_objects"] == 2
    assert report["views"] == [6, 8] and report["pictures"] == 22
    reasons = {entry["name"]: entry["reason"] for entry in report["left_out"]}
    assert reasons.keys() == {"0/001", "0/003", "1"}
    assert reasons["1"] == "no caption" and "5 numbers" in reasons["0/003"]
    out, _ = run(tmp_path)
    assert "left out       3" in out and "no caption: 1\n" in out


def test_objects_without_a_set_count_and_the_bound_that_helps_is_told(run, tmp_path):
    c2w = cameras(0)
    # All within 45 degrees: where an even set's third view stands is 135 degrees of azimuth away.
    write(tmp_path / "0", layout_files("zero123", 0, c2w=c2w[[0, 1] * 4]))
    write(tmp_path / "1", layout_files("zero123", 1))
    report, = reports(run(tmp_path, "--json")[0])
    assert report["objects"] == 2 and report["usable_objects"] == 1
    assert report["within_bound"] == 1 and len(report["camera"]) == 8
    (bound, more), = report["bounds"].items()
    assert more == 1 and 120 <= int(bound) <= 135
    report, = reports(run(tmp_path, "--json", "--bound", bound)[0])
    assert report["usable_objects"] == 2


def test_a_contradiction_is_said_after_all_paths_are_printed(run, tmp_path):
    for seed in range(4):
        matrices = cameras(seed)
        if seed % 2:
            matrices = convention(matrices, inverse=True)
        write(tmp_path / f"bad/{seed}", layout_files("trellis", seed, c2w=matrices))
    write(tmp_path / "good", layout_files("trellis", 0))
    out, error = run(tmp_path / "bad", tmp_path / "good", tmp_path / "none", "--json")
    bad, good, none = reports(out)
    assert "contradict" in bad["error"] and "world-to-camera" in bad["error"]
    assert good["usable_objects"] == 1 and "does not exist" in none["error"]
    assert str(error) == bad["error"]
    out, error = run(tmp_path / "bad", tmp_path / "good")
    assert "contradict" in out and "good: objects" in out and error


def test_a_path_with_neither_is_an_error(run, tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    out, error = run(tmp_path)
    assert error is not None and str(tmp_path) in str(error)
    (tmp_path / "model.glb").write_bytes(b"")
    assert "meshes" in str(run(tmp_path)[1])


def test_a_path_that_may_not_be_read_does_not_hide_the_others(tmp_path, monkeypatch, capsys):
    write(tmp_path / "good", layout_files("zero123", 1))
    report_on = command.report_on

    def report(path, settings):
        if "locked" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return report_on(path, settings)

    monkeypatch.setattr(command, "report_on", report)
    with pytest.raises(PermissionError):
        command.main([str(tmp_path / "locked"), str(tmp_path / "good"), "--json", "--size", "24"])
    locked, good = reports(capsys.readouterr().out)
    assert "Permission denied" in locked["error"] and good["objects"] == 1


def test_a_readable_summary(run, tmp_path):
    for seed in range(3):
        write(tmp_path / f"{seed}", layout_files("g-objaverse", seed, captions=("a ball", "b")))
    out, _ = run(tmp_path)
    for line in ("matrices       camera-to-world, OpenCV axes", "world          z is up",
                 "objects        3; 3 can be used", "views          8\n",
                 "field of view  39.6°, assumed", "3 objects have one, 6 wordings",
                 "for example 'a ball'", "3 of 3 objects have 4 views within 30°",
                 "fill           0.9", "left out       0"):
        assert line in out, f"{line!r} is not in\n{out}"


def test_of_very_many_pictures_some_are_looked_at(run, tmp_path, monkeypatch):
    for seed in range(6):
        write(tmp_path / f"{seed}", layout_files("zero123", seed))
    monkeypatch.setattr(command, "MOST_PICTURES", 24)
    report, = reports(run(tmp_path, "--json")[0])
    assert report["objects"] == 6 and report["looked_at"] == 3 and report["pictures"] == 24
    assert "3 of them were looked at" in run(tmp_path)[0]
