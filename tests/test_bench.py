"""The benchmark on a small model: what it prints, and that it counts right."""
import json
import sys

import pytest
import torch

from mvd import bench, sds
from mvd.tools import cli
from scripts import saved_model, status
from test_model import small_config

ROWS = ["step, 4 views of 8²", "step, 8 views of 16²", "step, 4 views of 8², shaded", "step, 8 views of 16², shaded",
        "field, 1024 samples of 4 views of 8²", "field, 2048 samples of 8 views of 16²", "UNet, 8 views (4, both halves of guidance)",
        "VAE, encoding 4 views of 32² and its gradient", "VAE, decoding 4 views of 32²", "sample, 50 steps, 4 views, decoded"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    config = small_config()
    config.size = 32
    config.distill = dict(coarse_size=8, fine_size=16, coarse_sets=1, fine_sets=2, coarse_budget=1024, fine_budget=2048, levels=2,
                          log2_entries=10, coarsest=4, finest=16, hidden=8, step_size=0.1, negative="asset", occupancy_cells=32)
    return saved_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture
def start(model_file, monkeypatch):
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda function, device, seconds=0.0: measure(function, device, 0.0))

    def start(*flags):
        monkeypatch.setattr(sys, "argv", ["bench", "--model", str(model_file), "--device", "cpu", *flags])
        return status(bench.main)
    return start


def test_the_rows_as_json_and_as_a_table(start, capsys):
    assert start("--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows, notes = ([line for line in lines if key in line] for key in ("part", "note"))
    assert [row["part"] for row in rows] == ROWS and len(rows) + len(notes) == len(lines)
    for row in rows[:-1]:
        assert 0 < row["floor_ms"] and 0 < row["ms"] and row["share"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["peak_gib"] is None
    assert any("nothing is compiled" in note["note"] for note in notes) and any("cpu" in note["note"] for note in notes)
    assert start("--no-compile") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ROWS) and "nothing is compiled" not in table


def test_operations_and_bytes_are_counted_right(model_file):
    from torch.utils.flop_counter import FlopCounterMode

    from mvd import MVDream
    m = MVDream.load(model_file)
    s = sds.Settings(**{**vars(sds.Settings("a red bulldog")), **m.config.distill, "compile": False})
    function, traffic = next(rest for name, *rest in bench.parts(m, s, torch.device("cpu")) if name.startswith("field, 1024"))
    with FlopCounterMode(display=False) as counter:
        function()
    weights = 4 * 8 + 8 * 1 + 4 * 8 + 8 * 3                                       # of both networks: 2 levels of 2 features, 8 hidden
    assert counter.get_total_flops() == 3 * 2 * 1024 * weights                   # forward, and two products backward
    assert traffic == 3 * 1024 * 2 * 8 * 2 * 4                                   # read, and for the gradient read and written
