"""The benchmark on a small model: what it prints, and that it counts right."""
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from mvd import MVDream, bench, cameras, diffusion, presets, render, sds
from mvd.tools import cli
from scripts import saved_model, status
from test_model import random_model, small_config

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
    "sample, 3 steps, 4 views, decoded",
    "sample, 2 steps of dpm++, 4 views, decoded",
    "start: import torch",
    "start: sample.py --help",
    "start: sample.py up to its first step",
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
    monkeypatch.setattr(bench, "SAMPLES", ((3, "ddim"), (2, "dpm++")))
    monkeypatch.setattr(bench.subprocess, "run", lambda *command, **settings: None)

    def start(*flags):
        command = ["bench", "--model", str(model_file), "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", command)
        return status(bench.main)

    return start


def test_the_rows_as_json_beside_those_of_before(start, tmp_path, capsys):
    """A part that the earlier file does not hold is compared with nothing."""
    before, after = tmp_path / "before", tmp_path / "new" / "after"
    earlier = [json.dumps({"part": part, "ms": 2.0 + i}) for i, part in enumerate(ROWS[1:])]
    before.write_text("\n".join([*earlier, '{"note": "an old machine"}']), "utf-8")
    assert start("--json", "--out", str(after), "--against", str(before)) == 0
    printed = capsys.readouterr().out
    assert printed == after.read_text("utf-8"), "--out is not what --json prints"
    lines = [json.loads(line) for line in printed.splitlines()]
    rows = [line for line in lines if "part" in line]
    notes = [line["note"] for line in lines if "note" in line]
    assert [row["part"] for row in rows] == ROWS and len(rows) + len(notes) == len(lines)
    assert "of_before" not in rows[0]
    for i, row in enumerate(rows[1:]):
        assert row["of_before"] == pytest.approx(row["ms"] / (2.0 + i))
    for row in rows:
        assert 0 < row["floor_ms"] and 0 < row["ms"]
        assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row.get("peak_gib") is None
    operations = {row["part"]: row["tflops"] * row["ms"] for row in rows if "tflops" in row}
    unet, decoding = operations[ROWS[6]], operations[ROWS[8]]
    three, two = rows[9]["floor_ms"], rows[10]["floor_ms"]
    expected = (3 * unet + decoding) / (2 * unet + decoding)
    assert three / two == pytest.approx(expected), "a sample's floor is not that of its parts"
    assert any("nothing is compiled" in note for note in notes)
    assert any("cpu" in note for note in notes)

def test_the_table_and_the_plot_of_every_size(start, tmp_path, capsys):
    flags = ["--no-compile", "--out", str(tmp_path / "x"), "--plot", str(tmp_path / "x.png")]
    assert start(*flags) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ROWS) and "nothing is compiled" not in table
    lines = [json.loads(line) for line in (tmp_path / "x").read_text("utf-8").splitlines()]
    rows = [row for row in lines if "line" in row]
    sizes = {line: [row["size"] for row in rows if row["line"] == line] for line in bench.LINES}
    assert sizes == {
        "step: views": [4, 8, 16],
        "field: samples": [128, 256, 512, 1024, 2048, 4096, 8192],
        "field: rays": [64, 256, 1024, 4096],
    }
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    for colour in bench.LINES.values():
        drawn = (picture == ImageColor.getrgb(colour)).all(-1).sum()
        assert drawn > 200, f"no line in {colour}"
    few = [row for row in rows if row["used"] < 1]
    notes = [line["note"] for line in lines if "of the slots hold a sample" in line.get("note", "")]
    assert len(notes) == len(few) > 0, "sizes that the rays do not fill are not named"


def test_operations_and_bytes_are_counted_right(model_file):
    s = replace(sds.DistillSettings("a red bulldog"), **SETTINGS, compile=False, smoothness=0)
    for name, function, traffic in bench.parts(MVDream.load(model_file), s):
        if name.startswith("field, 1024"):
            break
    # Both networks: 2 levels of 2 features, 8 hidden, 1 density, 3 colours.
    weights = 4 * 8 + 8 * 1 + 4 * 8 + 8 * 3
    forward_and_two_backward = 3 * 2 * 1024 * weights
    # And for each ray: its direction is turned, 3 x 3, to find samples and to show them, and the
    # background has a network from 16 numbers to 3. Directions have no gradient.
    rays = s.coarse_sets * s.views * s.coarse_size**2
    of_a_ray = 2 * (2 * 3 * 3 + 3 * (16 * 16 + 16 * 16 + 16 * 3) - 16 * 16)
    assert bench.operations(function) == forward_and_two_backward + rays * of_a_ray
    # Read, and for the gradient read and written: 2 levels, 8 corners, 2 float32.
    assert traffic == 3 * 1024 * 2 * 8 * 2 * 4


@pytest.mark.parametrize("widths, name", [((), "VAE, encoding"), ((32, 32), "light encoder,")])
def test_the_encoder_that_is_timed_is_that_of_a_step(widths, name):
    config = small_config()
    config.vae.light = widths
    model = random_model(config)
    s = replace(sds.DistillSettings("a red bulldog"), **SETTINGS)
    distillation = sds.Distillation(s, model, model.embed(["", ""]))
    images = torch.rand(1, 4, 3, config.size, config.size, requires_grad=True)

    def as_a_step():
        torch.autograd.grad(distillation.encode(images).sum(), images)

    rows = list(bench.network_parts(model, 4))
    timed, = [function for part, function, _ in rows if part.startswith(name)]
    assert len(rows) == 3
    assert bench.operations(timed) == bench.operations(as_a_step), "another encoder is timed"


@pytest.mark.parametrize("mask", [False, True])
def test_the_operations_of_fused_attention_are_counted(mask):
    """q kᵀ and its product with v: 2 N M d each, per head, whatever kernel computes them."""
    q, k, v = torch.rand(2, 3, 16, 8), torch.rand(2, 3, 24, 8), torch.rand(2, 3, 24, 8)
    options = dict(attn_mask=torch.zeros(16, 24)) if mask else {}

    def attention():
        torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    assert bench.operations(attention) == 2 * 3 * 2 * (2 * 16 * 24 * 8)


@pytest.mark.parametrize("content", [None, b"part ms", b"[1]", b'{"part": "step"}', b"\xff"])
def test_what_is_no_output_is_told(start, content, tmp_path, capsys):
    path = tmp_path / "x"
    if content:
        path.write_bytes(content)
    assert start("--against", str(path)) == 2
    assert "was not written by bench --out" in capsys.readouterr().err


def test_the_share_of_used_slots(model_file):
    """Against the samples themselves: those that are not used have no width."""
    s = replace(sds.DistillSettings("a red bulldog"), **SETTINGS, compile=False)
    distillation = bench.new_field(MVDream.load(model_file), s)
    for budget in (64, 4096):
        stage = sds.stages(s)[0]._replace(budget=budget)
        torch.manual_seed(1)
        found = bench.used_share(s, distillation, stage)
        torch.manual_seed(1)
        draws = distillation.draw()
        rays = cameras.rays(draws.c2w, draws.fov[:, None].expand(-1, s.views), stage.size)
        origins, directions = (ray.reshape(-1, 3) for ray in rays)
        samples = render.sample_rays(
            distillation.occupancy, origins, directions, step=s.step_size, budget=budget,
            jitter=draws.jitter, phase=draws.phase,
        )
        assert found == pytest.approx((samples.width > 0).float().mean().item())
    assert 0 < found < 1


def test_a_start_ends_before_the_first_step(model_file, monkeypatch):
    """What a new process runs, run here."""
    monkeypatch.setattr(sys, "argv", ["-c", str(model_file), "a red bulldog"])
    monkeypatch.setattr(diffusion, "predict_noise", None)
    with pytest.raises(SystemExit) as end:
        exec(bench.FIRST_STEP, {})
    assert not end.value.code
