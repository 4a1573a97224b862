"""The benchmark on a small model: what it prints, and that it counts right."""
import json
import sys
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from mvd import MVDream, bench, presets, sds
from mvd.tools import cli
from scripts import saved_model, status
from test_model import small_config

ROWS = [
    "step, 4 views of 8²",
    "step, 8 views of 16²",
    "step, 4 views of 8², shaded",
    "step, 8 views of 16², shaded",
    "field, 1024 samples of 4 views of 8²",
    "field, 2048 samples of 8 views of 16²",
    "UNet, 8 views (4, both halves of guidance)",
    "VAE, encoding 4 views of 32² and its gradient",
    "VAE, decoding 4 views of 32²",
    "sample, 50 steps, 4 views, decoded",
]
SETTINGS = dict(
    coarse_size=8,
    fine_size=16,
    coarse_sets=1,
    fine_sets=2,
    coarse_budget=1024,
    fine_budget=2048,
    levels=2,
    log2_entries=10,
    coarsest=4,
    finest=16,
    hidden=8,
    step_size=0.1,
    negative="asset",
    occupancy_cells=32,
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    config = small_config()
    config.size = 32
    return saved_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture
def start(model_file, monkeypatch):
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    monkeypatch.setattr(presets.PRESETS["nano"], "distill", SETTINGS)
    measure = bench.measure

    def measure_briefly(function, device):
        return measure(function, device, seconds=0.0)

    monkeypatch.setattr(bench, "measure", measure_briefly)

    def start(*flags):
        command = ["bench", "--model", str(model_file), "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", command)
        return status(bench.main)

    return start


def test_the_rows_as_json_and_as_a_table(start, capsys):
    assert start("--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if "part" in line]
    notes = [line["note"] for line in lines if "note" in line]
    assert [row["part"] for row in rows] == ROWS and len(rows) + len(notes) == len(lines)
    for row in rows[:-1]:
        assert 0 < row["floor_ms"] and 0 < row["ms"]
        assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["peak_gib"] is None
    assert any("nothing is compiled" in note for note in notes)
    assert any("cpu" in note for note in notes)
    assert start("--no-compile") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ROWS) and "nothing is compiled" not in table


def test_operations_and_bytes_are_counted_right(model_file):
    s = replace(sds.DistillSettings("a red bulldog"), **SETTINGS, compile=False)
    for name, function, traffic in bench.parts(MVDream.load(model_file), s):
        if name.startswith("field, 1024"):
            break
    with FlopCounterMode(display=False) as counter:
        function()
    # Both networks: 2 levels of 2 features, 8 hidden, 1 density, 3 colours.
    weights = 4 * 8 + 8 * 1 + 4 * 8 + 8 * 3
    forward_and_two_backward = 3 * 2 * 1024 * weights
    assert counter.get_total_flops() == forward_and_two_backward
    # Read, and for the gradient read and written: 2 levels, 8 corners, 2 float32.
    assert traffic == 3 * 1024 * 2 * 8 * 2 * 4
