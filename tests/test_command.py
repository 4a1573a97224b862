"""python -m mvd.metrics, on samples and on runs."""
import io
import json
import math
import types

import pytest
import torch
from safetensors.torch import save_file

from mvd import toyworld
from mvd.metrics import command, consistency, things
from mvd.metrics.candidates import SAMPLED, real_views
from mvd.metrics.things import read_prompt
from mvd.tools.errors import UserError
from mvd.toyworld import Thing
from small_judge import THINGS, make_small, run_main, save_run


@pytest.fixture(autouse=True)
def small_judge(monkeypatch):
    make_small(monkeypatch)
    monkeypatch.setattr(things, "CAPTIONS", 4)


def test_distilled_runs(monkeypatch, capsys, tmp_path):
    first = str(tmp_path / "a")
    second = str(tmp_path / "b")
    lamp = Thing("lamp", "crown", "green")
    save_run(tmp_path / "a", Thing("bulldog", "crown"))
    save_run(tmp_path / "b", lamp, mode="2d", size=48, shown=Thing("bus", "cloud", "pink"))
    output = run_main(monkeypatch, capsys, first, second, "--json")
    lines = [json.loads(line) for line in output.splitlines()]
    by_mode = {line["mode"]: line for line in lines}
    assert by_mode["3d"] == {
        "split": "image",
        "mode": "3d",
        "n": 1,
        "r_precision": 1.0,
        "ceiling": 1.0,
        "view_accuracy": 1.0,
        "view_ceiling": 1.0,
        "janus_rate": 0.0,
        "janus_ceiling": 0.0,
    }
    flat = by_mode["2d"]
    assert flat["split"] == toyworld.split("lamp", "crown")
    assert flat["view_accuracy"] is None, "a lamp has no front"
    assert flat["r_precision"] == 0.0 and flat["ceiling"] == 1.0, "a bus is not a lamp"
    table = run_main(monkeypatch, capsys, first)
    assert "recognised" in table and "r_precision" in table and "1.000" in table


def test_samples_of_a_perfect_model(monkeypatch, capsys):
    def sample(prompts, elevation, seed, views):
        assert elevation == 15.0 and views == len(SAMPLED.azimuth)
        asked = [read_prompt(prompt) for prompt in prompts]
        return real_views(asked, SAMPLED, seed=seed + 50)

    def load(name, device, dtype):
        return types.SimpleNamespace(sample=sample)

    monkeypatch.setattr(command.MVDream, "load", load)
    flags = ("--samples", "1", "--variety", "1", "--json")
    output = run_main(monkeypatch, capsys, *flags)
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["split"] for line in lines] == ["3d", "image", "never"]
    for line in lines:
        assert line["n"] == line["r_precision"] == line["ceiling"] == 1
        assert 0.6 < line["variety"] < 1.6


@pytest.mark.slow
def test_the_consistency_of_a_perfect_model_is_the_ceiling(monkeypatch, capsys):
    """Its eight views are asked for beside the four that are judged."""
    def sample(prompts, elevation, seed, views):
        asked = [read_prompt(prompt) for prompt in prompts]
        cameras = {4: SAMPLED, 8: consistency.CAMERAS._replace(fov_deg=None)}[views]
        return real_views(asked, cameras, seed=seed)

    def load(name, device, dtype):
        return types.SimpleNamespace(sample=sample)

    monkeypatch.setattr(command.MVDream, "load", load)
    monkeypatch.setattr(consistency, "STEPS", 2)
    lines = run_main(monkeypatch, capsys, "--samples", "1", "--consistency", "--json").splitlines()
    for line in map(json.loads, lines):
        assert line["consistency"] == line["consistency_ceiling"], "the same pictures"
        assert 5 < line["consistency"] < 30, "in dB"
    table = run_main(monkeypatch, capsys, "--samples", "1", "--consistency")
    heading, *rows = table.splitlines()
    assert heading.endswith(" consistency  consistency_ceiling")
    assert len(rows) == 3 and {len(row) for row in rows} == {len(heading)}


@pytest.mark.parametrize(
    "flags", [(), ("--samples", "0"), ("--samples", "1", "runs/a"), ("nowhere",)])
def test_mistakes_of_the_user(monkeypatch, capsys, flags):
    monkeypatch.setattr(command.MVDream, "load", lambda name, device, dtype: None)
    with pytest.raises(UserError):
        run_main(monkeypatch, capsys, *flags)


def test_one_run_that_cannot_be_judged_does_not_spoil_the_others(monkeypatch, capsys, tmp_path):
    """A foreign prompt, a training, a damaged file; and a pattern that the shell left as it is."""
    for name in ("good", "taught", "training", "damaged"):
        save_run(tmp_path / name, THINGS[3])
    (tmp_path / "taught" / "config.json").write_text('{"prompt": "[v] bulldog"}')
    (tmp_path / "training" / "views.safetensors").unlink()
    (tmp_path / "damaged" / "views.safetensors").write_bytes(b"12345678901234567890")
    monkeypatch.setattr("sys.stderr", (errors := io.StringIO()))
    printed = run_main(monkeypatch, capsys, str(tmp_path / "*"), str(tmp_path / "good"))
    assert printed.count("good: recognised") == 1, "a folder that is named twice counts once"
    for name in ("taught", "training", "damaged"):
        assert f"left out: {tmp_path / name}" in errors.getvalue(), name


@pytest.mark.parametrize("name, value", [
    ("rgb", torch.full((4, 3, 8, 8), math.nan)),
    ("rgb", torch.full((4, 3, 8, 8), math.inf)),
    ("rgb", torch.zeros(4, 3, 8, 8, dtype=torch.uint8)),
    ("rgb", torch.rand(4, 3, 0, 0)),
    ("rgb", torch.rand(3, 8, 8)),
    ("rgb", torch.rand(4, 4, 8, 8)),
    ("rgb", torch.rand(5, 3, 8, 8)),
    ("azimuth", torch.tensor(0.0)),
    ("elevation", torch.zeros(4)),
    ("fov", torch.zeros(0)),
    ("prompt", 3),
    ("prompt", ["a red bulldog"]),
    ("mode", {}),
])
def test_a_run_whose_pictures_or_words_are_not_ours_is_refused(name, value, tmp_path):
    tensors = dict(
        rgb=torch.rand(4, 3, 8, 8), azimuth=torch.arange(4) * 90.0, elevation=torch.tensor(15.0),
        fov=torch.tensor(40.0))
    config = {"prompt": "a red bulldog", "mode": "3d"}
    for stage in ("good", "bad"):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "views.safetensors")
        if stage == "good":
            assert command.read_run(tmp_path).prompt == "a red bulldog"
            (config if name in config else tensors)[name] = value
    with pytest.raises(UserError, match="is not a finished run of distill.py"):
        command.read_run(tmp_path)


def test_samples_that_are_nan_are_not_judged():
    class Broken:
        def sample(self, prompts, views, **_):
            return torch.full((len(prompts), views, 3, 8, 8), math.nan)

    with pytest.raises(UserError, match="not numbers"):
        command.sample_all(Broken(), ["a red bulldog"], seed=0)


def test_a_run_that_is_not_of_the_toy_world(monkeypatch, capsys, tmp_path):
    run = tmp_path / "a"
    save_run(run, THINGS[3])
    (run / "config.json").write_text('{"prompt": "a corgi astronaut"}')
    with pytest.raises(UserError, match="no caption of the toy world"):
        run_main(monkeypatch, capsys, str(run))

    # Left out, as `runs/*` may name it.
    (tmp_path / "training").mkdir()
    with pytest.raises(UserError, match="no caption of the toy world"):
        run_main(monkeypatch, capsys, str(tmp_path / "training"), str(run))
    assert "left out" in capsys.readouterr().err

    (run / "views.safetensors").unlink()
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a finished run"):
        run_main(monkeypatch, capsys, str(run))
