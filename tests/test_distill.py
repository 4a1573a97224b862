"""distill.py: what a run leaves behind, killed and resumed runs, settings, and bad input."""
import base64
import contextlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import distill
import toy_data
from mvd import MVDream, ahead, cameras, presets, render, sds
from mvd.data import find_objects
from mvd.hashgrid import HashGridConfig
from mvd.model import lay_out
from mvd.nerf import NeRF, NeRFConfig
from mvd.tools import cli, run
from mvd.tools.files import read_safetensors, write_safetensors
from scripts import Killed, assert_same_state, killed_after, saved_model, status
from test_model import small_config

SCRIPT = Path(distill.__file__)
PROMPT = "a red bulldog"
NANO = presets.PRESETS["nano"]
NANO_SETTINGS = NANO.distill
# A run of a second. They take the place of NANO's.
SETTINGS = dict(
    steps=6,
    coarse_size=8,
    fine_size=16,
    coarse_sets=1,
    fine_sets=1,
    coarse_budget=1024,
    fine_budget=1024,
    levels=2,
    log2_entries=10,
    coarsest=4,
    finest=16,
    hidden=8,
    save_every=2,
    show_every=1,
    occupancy_every=2,
    step_size=0.1,
    negative="asset",
    density_threshold=5.0,
    occupancy_cells=32,
    mesh_size=24,
)


def model_config():
    """The preset "nano", with five words, at 32 pixels."""
    config = small_config()
    config.size = 32
    return config


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A model of random weights."""
    return saved_model(tmp_path_factory.mktemp("model"), model_config())


@pytest.fixture
def start(model_file, tmp_path, monkeypatch):
    """start(out, *flags) is the command, in this process; it returns the exit status.

    It runs with SETTINGS. Paths are below tmp_path.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(NANO, "distill", SETTINGS)
    monkeypatch.setattr(distill, "LOG_EVERY", 1)
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    handler = signal.getsignal(signal.SIGINT)

    def start(out, *flags, prompt=PROMPT, model=model_file):
        usual = ["--model", str(model), "--device", "cpu", "--out", str(out)]
        return status(partial(distill.main, [prompt, *usual, *flags]))

    yield start
    signal.signal(signal.SIGINT, handler)


WHOLE = {}


@pytest.fixture
def whole(start, tmp_path):
    """whole(*flags) is the folder of a run that nothing disturbed; each is made once."""
    def whole(*flags):
        key = (*flags, torch.get_num_threads(), distill.LOG_EVERY)
        if key not in WHOLE:
            assert start(tmp_path / "whole", *flags) == 0
            WHOLE[key] = tmp_path / "whole"
        return WHOLE[key]

    return whole


@pytest.fixture
def steps(monkeypatch):
    """A list to which each step of a run adds (its Distillation, its Step)."""
    steps, step = [], sds.Distillation.step

    def recording(distillation):
        result = step(distillation)
        steps.append((distillation, result))
        return result

    monkeypatch.setattr(sds.Distillation, "step", recording)
    return steps


@pytest.fixture
def asked(monkeypatch):
    """A list to which each step of a run adds what it asks of the model."""
    asked, loss = [], sds.distillation_loss

    def recording(unet, latents, t, context, camera, **options):
        asked.append((tuple(latents.shape), context, camera))
        return loss(unet, latents, t, context, camera, **options)

    monkeypatch.setattr(sds, "distillation_loss", recording)
    return asked


def settings_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def contents(folder, without=("config.json",)):
    """{path: content} of all files in a folder and below."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name not in without:
            found[path.relative_to(folder)] = path.read_bytes()
    return found


def assert_same_run(a, b):
    """Field, checkpoint, log, pictures and mesh are equal, bit for bit."""
    a, b = Path(a), Path(b)
    fields = [read_safetensors(folder / "field.safetensors") for folder in (a, b)]
    assert_same_state(*fields, "the field")
    checkpoints = [run.load_checkpoint(folder / run.CHECKPOINT) for folder in (a, b)]
    assert_same_state(*checkpoints, "the checkpoint")
    # The page shows the settings, --out among them.
    without = ("config.json", "index.html", *run.CHECKPOINTS)
    ours, theirs = contents(a, without), contents(b, without)
    assert ours.keys() == theirs.keys(), "the runs left different files"
    differ = [str(path) for path in ours if ours[path] != theirs[path]]
    assert differ == [], "files differ"


def test_a_start_that_fails_is_not_in_the_way_of_the_next(start, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(sds.Distillation, "step", fails)
        assert start("run") == 2
    assert not (tmp_path / "run").exists()
    assert start("run", "--steps", "1") == 0


# ---- a whole run -----------------------------------------------------------------------------

RESULTS = {
    "config.json",
    "log.jsonl",
    "progress",
    "views.png",
    "views4.png",
    "depth.png",
    "normals.png",
    "turntable.webp",
    "views.safetensors",
    "views",
    "field.safetensors",
    run.CHECKPOINT,
    "checkpoint-before.pt",
    "mesh.glb",
    "mesh.obj",
    "index.html",
}
# Columns and rows of views.
SHEETS = {"views4.png": (4, 1), "views.png": (4, 2), "depth.png": (4, 2), "normals.png": (4, 2)}


def sheet_size(pixels, columns, rows):
    """The size of a sheet of pictures, two pixels apart."""
    return (pixels + 2) * columns - 2, (pixels + 2) * rows - 2


def test_a_run_leaves_everything_behind(start, tmp_path, capsys):
    assert start("run", "--hidden", "4", "--save-every", "4") == 0
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == RESULTS
    printed = capsys.readouterr().out
    assert "6 steps and all results" in printed
    line, = re.findall(r"mesh\.glb: (.*) faces, volume (.*) of the box's 8, (.*)", printed)
    assert int(line[0].replace(",", "")) == (out / "mesh.obj").read_text().count("\nf ")
    assert 0 < float(line[1]) < 8
    assert line[2] == "watertight"

    config = settings_of(out)
    assert config["hidden"] == 4, "a flag counts less than the preset"
    assert config["steps"] == 6, "the preset counts less than the script's own default"
    assert config["guidance"] == 50, "the script's own default is another"
    assert config["prompt"] == PROMPT, "the prompt is not as it was given"

    names = [path.name for path in sorted((out / "progress").iterdir())]
    assert names == [f"{step:06d}.png" for step in range(1, 7)]
    for name in names:
        size = Image.open(out / "progress" / name).size
        assert size == sheet_size(16, 4, 4), f"progress/{name} has not four rows of four"
    for name, (columns, rows) in SHEETS.items():
        assert Image.open(out / name).size == sheet_size(32, columns, rows)
    assert Image.open(out / "turntable.webp").is_animated

    views, _ = read_safetensors(out / "views.safetensors")
    assert views["rgb"].shape == (8, 3, 32, 32)
    assert views["opacity"].shape == (8, 1, 32, 32)
    assert views["normal"].shape == (8, 3, 32, 32)
    assert 0 < views["opacity"].mean() < 1
    assert torch.equal(views["azimuth"], torch.arange(8) * 45.0)
    # The tangent of 20 degrees.
    assert views["distance"].item() == pytest.approx(0.9 / 0.36397, rel=1e-4)

    state = run.load_checkpoint(out / run.CHECKPOINT)
    assert state["step"] == 6, "the last step is saved whatever --save-every says"
    field, _ = read_safetensors(out / "field.safetensors")
    grid = HashGridConfig(levels=2, log2_entries=10, coarsest=4, finest=16)
    nerf = NeRF(NeRFConfig(grid=grid, hidden=4))
    nerf.load_state_dict(field)
    assert nerf.density(torch.zeros(1, 3)).item() > 5


def test_the_views_for_other_tools_are_those_of_the_sheet(whole):
    """Over the grey they look the same, and the cameras are those that took them."""
    sheet = toy_data.read_png(whole() / "views.png")
    scene = json.loads((whole() / "views" / "transforms.json").read_text())
    assert math.degrees(scene["camera_angle_x"]) == pytest.approx(40)
    files = [frame["file_path"] for frame in scene["frames"]]
    assert files == [f"{k:03d}.png" for k in range(8)]
    found = torch.tensor([frame["transform_matrix"] for frame in scene["frames"]])
    # The tangent of 20 degrees.
    expected = cameras.orbit(15.0, torch.arange(8) * 45.0, 0.9 / 0.36397)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # And so training would read them.
    objects, _ = find_objects([whole() / "views"])
    views = objects.read(0)
    torch.testing.assert_close(views.c2w, expected, rtol=0, atol=1e-4)
    assert views.fov == pytest.approx([40] * 8)

    seen = []
    for k, file in enumerate(files):
        picture = Image.open(whole() / "views" / file)
        assert picture.mode == "RGBA"
        rgba = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        colour, alpha = rgba[:3], rgba[3:]
        y, x = 34 * (k // 4), 34 * (k % 4)
        error = colour * alpha + 0.8 * (1 - alpha) - sheet[:, y : y + 32, x : x + 32]
        assert error.abs().max() < 1.6 / 255, f"{file} shows something else"
        seen.append(alpha)
    assert torch.stack(seen).std() > 0.05, "the case shows nothing"


def test_the_page_turns_colours_and_normals_together(whole):
    """A frame of the sheet is what views.png and normals.png show from the same side."""
    page = (whole() / "index.html").read_text()
    canvas = re.search('width="64" height="32".* data-columns="6" data-sheet="([^"]*)"', page, re.S)
    content = base64.b64decode(canvas[1].split(",")[1])
    with Image.open(io.BytesIO(content)) as image:
        sheet = np.array(image.convert("RGB")) / 255
    # Frames 0, 8, 16, 24 are a quarter of a turn apart; so are every second of the eight views.
    for name, left in (("views.png", 0), ("normals.png", 32)):
        views = toy_data.read_png(whole() / name).permute(1, 2, 0).numpy()
        for quarter in range(4):
            view = 2 * quarter
            y, x = 34 * (view // 4), 34 * (view % 4)
            expected = views[y : y + 32, x : x + 32]
            frame = 8 * quarter
            y, x = 34 * (frame // 6), 66 * (frame % 6) + left
            found = sheet[y : y + 32, x : x + 32]
            # WebP is not exact.
            assert np.abs(found - expected).mean() < 0.03, f"{name}, frame {frame}"


def test_a_finished_run_gives_a_finer_mesh(start, tmp_path):
    assert start("run") == 0
    faces = (tmp_path / "run" / "mesh.obj").read_text().count("\nf ")
    assert start("run", "--resume", "--mesh-size", "48") == 0
    finer = (tmp_path / "run" / "mesh.obj").read_text().count("\nf ")
    assert 3 < finer / faces < 5, "twice the cells along a side are four times the faces"


def test_the_page_of_a_run_that_is_over(whole):
    page = (whole() / "index.html").read_text()
    assert "6 of 6 steps" in page
    assert 'data-count="32"' in page, "the turntable has not 32 frames"
    assert page.count("<img") == 6 + 3, "a picture is missing: progress, views, normals, depth"
    assert page.count('class="chart"') == 3
    for heading in ("Loss", "Gradient", "Opacity"):
        assert f"<h2>{heading}</h2>" in page
    assert "refresh" not in page, "the page loads itself again for ever"


def test_the_log_has_the_annealed_times(whole):
    rows = run.read_log(whole() / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for i, row in enumerate(rows):
        share = min(i / 6 / 0.8, 1)
        assert row["t_low"] == pytest.approx(0.98 - 0.96 * share, abs=1e-6)
        assert row["t_high"] == pytest.approx(0.98 - 0.48 * share, abs=1e-6)


def test_the_log_has_what_one_watches(start, monkeypatch, tmp_path):
    """The norm of the field's gradient, and the mean opacity of a step's own pictures."""
    step, shade_samples = sds.Distillation.step, render.shade_samples
    gradients, opacities = [], []

    def recording_step(distillation):
        result = step(distillation)
        everything = [weight.grad.flatten() for weight in distillation.nerf.parameters()]
        gradients.append(torch.cat(everything).double().norm().item())
        return result

    def recording_render(nerf, samples, origins, *rest, **more):
        seen = shade_samples(nerf, samples, origins, *rest, **more)
        # The opacity of a ray is the sum of its samples' weights.
        opacities.append(seen.weights.double().sum().item() / len(origins))
        return seen

    monkeypatch.setattr(sds.Distillation, "step", recording_step)
    monkeypatch.setattr(render, "shade_samples", recording_render)
    assert start("run", "--shading", "--shading-from", "0.5") == 0
    opacities = opacities[:6]  # the others are of the results
    rows = run.read_log(tmp_path / "run" / "log.jsonl")
    assert [row["gradient"] for row in rows] == pytest.approx(gradients, rel=1e-4)
    assert [row["opacity"] for row in rows] == pytest.approx(opacities, rel=1e-4)
    assert len(set(gradients)) == len(set(opacities)) == 6, "the case shows no change"


def test_progress_shows_the_render_its_noise_the_belief_and_the_difference(
    start, model_file, steps, tmp_path
):
    # A plain colour behind the field, so that something is to be seen.
    assert start("run", "--steps", "1", "--random-background", "1") == 0
    (_, result), = steps
    model = MVDream.load(model_file)
    render = result.images[0]
    noisy, believed = model.decode(torch.cat([result.x_t[:1], result.x0_hat[:1]]))
    columns = (render, noisy, believed, believed - render)
    names = ("render", "x_t", "x̂_0", "difference")
    sheet = toy_data.read_png(tmp_path / "run" / "progress" / "000001.png")
    # Of 32 pixels, each of 16 is the mean of 2².
    assert sheet.shape[1:] == (4 * 18 - 2, 4 * 18 - 2), "not four columns of four views"
    for column, (name, pictures) in enumerate(zip(names, columns)):
        expected = F.avg_pool2d((pictures / 2 + 0.5).clamp(0, 1), 2)
        assert expected.std() > 0.01, f"the case shows no {name}"
        for view in range(4):
            y, x = 18 * view, 18 * column
            error = (sheet[:, y : y + 16, x : x + 16] - expected[view]).abs().max()
            assert error < 1 / 255, f"view {view}: column {column} is not the {name}"


def test_a_loss_that_is_not_a_number_ends_the_run_and_spares_the_checkpoint(
    start, steps, tmp_path, monkeypatch, capsys
):
    loss = sds.distillation_loss

    def spoilt(*arguments, **options):
        value, x0_hat = loss(*arguments, **options)
        return (value * math.nan if len(steps) == 4 else value), x0_hat

    monkeypatch.setattr(sds, "distillation_loss", spoilt)
    assert start("run", "--save-every", "2") == 2, "a run of NaN goes on"
    assert len(steps) == 5, "it did not stop at once"
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search("stops at step 5, whose loss is nan; the last good state is in run", line)
    state = run.load_checkpoint(tmp_path / "run" / run.CHECKPOINT)
    assert state["step"] == 4
    assert all(weight.isfinite().all() for weight in state["nerf"].values())
    monkeypatch.setattr(sds, "distillation_loss", loss)
    assert start("run", "--save-every", "2", "--resume") == 0, "it cannot be resumed"


def test_a_short_run_draws_no_picture_that_nobody_asked_for(start, tmp_path):
    assert start("run", "--steps", "10", "--show-every", "0") == 0
    assert list((tmp_path / "run" / "progress").iterdir()) == []
    assert start("asked", "--steps", "10", "--show-every", "5") == 0
    names = {path.name for path in (tmp_path / "asked" / "progress").iterdir()}
    assert names == {"000005.png", "000010.png"}


def test_without_a_surface_there_is_a_line_and_no_mesh(start, tmp_path, capsys):
    assert start("run", "--steps", "1", "--density-threshold", "1000") == 0
    assert re.search("no mesh: .* stays below 1000", capsys.readouterr().out)
    assert not list((tmp_path / "run").glob("mesh.*"))
    assert (tmp_path / "run" / "turntable.webp").exists()


def test_resolution_light_and_orientation_follow_the_schedule(start, monkeypatch):
    step, seen = sds.Distillation.step, []

    def recording(distillation):
        size, sets, _ = distillation.stage
        lit, orientation = distillation.lit.item(), distillation.orientation.item()
        seen.append((size, sets, lit, orientation))
        return step(distillation)

    monkeypatch.setattr(sds.Distillation, "step", recording)
    flags = ["--shading", "--coarse-sets", "2", "--fine-from", "0.3", "--steps", "4"]
    assert start("run", *flags) == 0
    assert seen == [(8, 2, 0, 10), (8, 2, 0, 505), (16, 1, 1, 1000), (16, 1, 1, 1000)]


@pytest.mark.slow
def test_the_compiler_takes_over_after_the_first_picture(start, monkeypatch, tmp_path):
    """Dynamo traces as it would on a GPU, and its eager backend gives the numbers.

    Killed and resumed across the switch, and across the change of size, a run is bit for bit the
    one that was not.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(distill, "can_compile", lambda device: True)
    monkeypatch.setattr(distill, "FIRST_LOOK", 2)
    monkeypatch.setattr(distill, "COMPILE_FROM", 1)
    monkeypatch.setattr(ahead, "room", lambda device: 0)
    step, seen = sds.Distillation.step, []

    def recording(distillation):
        compiled = distillation.rendering != distillation.render_images
        seen.append((compiled, distillation.stage.size))
        return step(distillation)

    monkeypatch.setattr(sds.Distillation, "step", recording)
    assert start("whole", "--coarse-sets", "2", "--show-every", "6") == 0
    assert seen == 2 * [(False, 8)] + [(True, 8)] + 3 * [(True, 16)]
    flags = ["--coarse-sets", "2", "--save-every", "1", "--show-every", "6"]
    for last in (1, 4):
        folder = f"killed{last}"
        with killed_after(monkeypatch, lambda row: row["step"] == last):
            start(folder, *flags)
        assert start(folder, *flags, "--resume") == 0
        assert_same_run(tmp_path / "whole", tmp_path / folder)


@pytest.mark.parametrize(
    "ready_from, switches",
    [
        # Uncompiled, it does not wait for the fine stage, which here is not ready at once;
        (3, [(False, 8), (False, 8), (False, 8), (False, 16), (False, 16), (True, 16)]),
        # compiled it does.
        (2, [(False, 8), (False, 8), (True, 8), (True, 16), (True, 16), (True, 16)]),
        (9, [(False, 8), (False, 8), (False, 8), (False, 16), (False, 16), (False, 16)]),
    ],
)
def test_the_run_goes_on_until_its_steps_are_compiled(start, ready_from, switches, monkeypatch):
    """Nothing is compiled here: only when that would be is noted."""
    helper = ahead.Helper(None, ["a task"], set())
    asked, seen, drawn, left = [], [], [], []
    waits = iter([False, False])  # what is said of the fine stage at first

    @contextlib.contextmanager
    def there_is_a_helper(wanted):
        assert wanted
        yield helper
        left.append(True)

    def start_workers(given, s, dtype, device):
        assert given is helper and not asked
        asked.append(s.model)

    @contextlib.contextmanager
    def take_overs(distillation, given):
        assert given is helper and distillation.s.model == asked[0]

        def is_compiled(stage, patience):
            assert len(seen) >= 2, "nobody has seen a picture yet"
            assert patience == ahead.REST, "it takes too many uncompiled steps, or too few"
            torch.manual_seed(7)  # as PyTorch does where it compiles
            return len(seen) >= ready_from and (stage.size == 8 or next(waits, True))

        yield is_compiled

    def begin(distillation, stage, compiled=False):
        distillation.noted = compiled, stage.size
        real_begin(distillation, stage)

    def step(distillation):
        seen.append(distillation.noted)
        drawn.append(torch.rand(()).item())
        return real_step(distillation)

    real_begin, real_step = sds.Distillation.begin, sds.Distillation.step
    monkeypatch.setattr(sds.Distillation, "begin", begin)
    monkeypatch.setattr(sds.Distillation, "step", step)
    monkeypatch.setattr(distill, "can_compile", lambda device: True)
    monkeypatch.setattr(distill, "FIRST_LOOK", 2)
    monkeypatch.setattr(distill, "COMPILE_FROM", 1)
    monkeypatch.setattr(distill, "show_progress", lambda *rest: None)
    monkeypatch.setattr(ahead, "fork_server", there_is_a_helper)
    monkeypatch.setattr(ahead, "start_workers", start_workers)
    monkeypatch.setattr(ahead, "take_overs", take_overs)
    assert start("run") == 0
    assert seen == switches
    assert len(set(drawn)) == 6, "steps have the same random numbers"
    assert left, "the fork server is left behind"


def test_ctrl_c_ends_a_run_that_waits_at_half_time(start, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def take_overs(distillation, helper):
        def is_compiled(stage, patience):
            if stage.size == 16:
                signal.raise_signal(signal.SIGINT)
            return stage.size == 8

        yield is_compiled

    begin = sds.Distillation.begin
    monkeypatch.setattr(
        sds.Distillation, "begin", lambda self, stage, compiled=False: begin(self, stage)
    )
    monkeypatch.setattr(distill, "can_compile", lambda device: True)
    monkeypatch.setattr(distill, "FIRST_LOOK", 1)
    monkeypatch.setattr(distill, "COMPILE_FROM", 1)
    monkeypatch.setattr(ahead, "take_overs", take_overs)
    assert start("run", "--save-every", "6") == 130
    assert run.last_checkpoint(tmp_path / "run")["step"] == 3, "the three steps are lost"


def test_the_weights_lie_from_the_first_step_on_where_compiled_steps_read_them(start, monkeypatch):
    """The graph of an uncompiled step reads where they lay."""
    places = []

    def step(distillation):
        model = distillation.model
        before = [weight.data_ptr() for weight in model.parameters()]
        lay_out(model.unet)
        lay_out(model.vae.encoder)
        places.append(before == [weight.data_ptr() for weight in model.parameters()])
        return real_step(distillation)

    real_step = sds.Distillation.step
    monkeypatch.setattr(sds.Distillation, "step", step)
    assert start("run", "--steps", "1") == 0
    assert places == [True], "compiling moves weights"


def test_who_has_no_use_for_workers_asks_for_none(start, monkeypatch):
    """What was compiled for a run that is resumed is on disk, as a rule."""
    asked = []

    @contextlib.contextmanager
    def helper(wanted):
        asked.append(wanted)
        yield None

    monkeypatch.setattr(ahead, "fork_server", helper)
    monkeypatch.setattr(distill, "COMPILE_FROM", 2)
    assert start("run", "--steps", "2") == 0
    assert start("run", "--steps", "2", "--resume") == 0
    assert start("uncompiled", "--steps", "2", "--no-compile") == 0
    assert start("short", "--steps", "1") == 0
    assert asked == [True, False, False, False]
    monkeypatch.setattr(distill, "can_compile", lambda device: True)
    s = sds.DistillSettings("a red bulldog")
    assert distill.worth_compiling(s, 2, torch.device("cpu"))
    assert not distill.worth_compiling(s, 1, torch.device("cpu")), "too few steps are left"


def test_the_model_is_asked_with_cameras_or_without(start, asked):
    for mode in ("3d", "2d"):
        assert start(mode, "--mode", mode, "--steps", "1", "--suffix", ", 3d asset") == 0
    (shape, context, camera), (flat_shape, flat_context, no_camera) = asked
    assert shape == flat_shape == (1, 4, 8, 4, 4)
    assert camera.shape == (1, 4, 16)
    assert no_camera is None
    assert not torch.equal(context[0], flat_context[0]), "the 2d mode has the suffix, too"
    assert torch.equal(context[1], flat_context[1]), "the suffix went to the negative prompt"


def test_the_number_of_views_is_a_flag(start, asked, tmp_path):
    assert start("run", "--views", "6", "--steps", "1") == 0
    (shape, _, camera), = asked
    assert shape == (1, 6, 8, 4, 4)
    assert camera.shape == (1, 6, 16)
    # The position is the last column of a matrix that is given row by row.
    x, y, z = camera[0].view(6, 4, 4)[:, :3, 3].unbind(1)
    turns = torch.rad2deg(torch.atan2(y, x)).diff() % 360
    torch.testing.assert_close(turns, torch.full((5,), 60.0), rtol=0, atol=1e-2)
    assert z.std() < 1e-4, "the views differ in elevation"
    sheet = Image.open(tmp_path / "run" / "progress" / "000001.png")
    assert sheet.size == sheet_size(16, 4, 6)


# ---- settings --------------------------------------------------------------------------------

def defaults_of_help(capsys, *flags):
    """{setting: its default as --help prints it, "" where it prints none}."""
    with pytest.raises(SystemExit) as end:
        distill.main([*flags, "--help"])
    assert end.value.code == 0
    _, options = capsys.readouterr().out.split("\noptions:\n")
    printed = {}
    for entry in re.split(r"^  (?=-)", options, flags=re.MULTILINE):
        flag = re.match(r"--([a-z0-9-]+)", entry)
        if flag:
            text = " ".join(entry.split())
            default = re.search(r"\(default: (.*)\)$", text)
            printed[flag[1].replace("-", "_")] = default[1] if default else ""
    return printed


def as_printed(value):
    """How --help shall show a value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def settings_that_run(monkeypatch, *arguments):
    """The settings of a run that dies before its first step, in its default folder."""
    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(distill, "distill", die)
        with pytest.raises(Killed):
            distill.main([PROMPT, *arguments])
    return settings_of("runs/a-red-bulldog")


@pytest.mark.parametrize("preset", ["tiny", "nano"])
def test_help_prints_the_settings_that_run(preset, model_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Wide enough for every line.
    monkeypatch.setenv("COLUMNS", "1000")
    flags = [] if preset == "tiny" else ["--model", str(model_file)]
    running = settings_that_run(monkeypatch, *flags)
    capsys.readouterr()
    printed = defaults_of_help(capsys, *flags)
    assert printed.keys() | {"prompt"} == running.keys(), "--help does not list every setting"
    # These are given, or follow from what is given.
    assert running.pop("prompt") == PROMPT
    assert running.pop("model") == (flags[1] if flags else "tiny")
    assert running.pop("out") is None
    assert printed.pop("model") == "tiny"
    assert printed.pop("out") == "runs/<prompt>"
    differ = {}
    for name, value in running.items():
        if as_printed(value) != printed[name]:
            differ[name] = f"--help prints {printed[name]}, {value} runs"
    assert differ == {}
    # They are the preset's.
    for name, value in presets.PRESETS[preset].distill.items():
        assert running[name] == value, f"the preset sets {name}, but that does not run"


def test_a_model_whose_header_names_no_preset_has_the_settings_of_the_nearest(
    start, model_file, tmp_path
):
    """Older files hold the settings themselves; they are ignored."""
    tensors, _ = read_safetensors(model_file)
    header = asdict(model_config())
    del header["preset"]
    header["distill"] = {"levels": 3, "steps": 2, "guidance": 3.0}
    header["dreambooth"] = {}
    old = tmp_path / "old.safetensors"
    write_safetensors(old, tensors, {"mvd": json.dumps(header)})
    assert start("run", model=old) == 0
    config = settings_of("run")
    for name, value in SETTINGS.items():
        assert config[name] == value, f"{name} is not that of the preset"
    assert config["guidance"] == 50
    field, _ = read_safetensors("run/field.safetensors")
    as_usual = HashGridConfig(levels=2, log2_entries=10, coarsest=4, finest=16)
    NeRF(NeRFConfig(grid=as_usual, hidden=8)).load_state_dict(field)


def printed_settings(text):
    """{place: [what one would type, ...]} of the lines that a run prints about its settings."""
    lines = re.findall(r"^settings from (.*?): (--.*)$", text, re.MULTILINE)
    return {place: shlex.split(flags) for place, flags in lines}


def test_a_run_prints_each_setting_that_is_not_the_default_and_its_place(start, capsys):
    given = shlex.split("--steps 1 --mode 2d --suffix ', 3d asset' --no-compile --hidden 64")
    assert start("run", *given) == 0
    printed = printed_settings(capsys.readouterr().out)
    from_preset = printed.pop('the preset "nano" (mvd/presets.py)')
    from_flags = printed.pop("the command line")
    assert printed == {}, "settings come from a third place"
    # Typed, they make the same run of a model that changes nothing.
    again = cli.parse(sds.DistillSettings, [PROMPT, *from_preset, *from_flags])
    assert asdict(again) == settings_of("run"), "the printed settings are not those that run"
    # --hidden 64 is the script's own default, but not the preset's.
    flags = {text for text in from_flags if text.startswith("--")}
    usual = {"--model", "--device", "--out"}
    assert flags == usual | {"--steps", "--mode", "--suffix", "--no-compile", "--hidden"}
    expected = set()
    for field in fields(sds.DistillSettings):
        changed = field.name in SETTINGS and SETTINGS[field.name] != field.default
        if changed and field.name not in ("steps", "hidden"):
            expected.add(cli.flag_of(field.name))
    assert {text for text in from_preset if text.startswith("--")} == expected


# ---- kills and interrupts --------------------------------------------------------------------

def die_after(patch, moment, step):
    """Kill the run when it has logged or saved a step, or before it writes the first result.

    moment: "log", "save" or "results".
    """
    log, save = run.log, run.save_checkpoint

    def log_then_die(path, **row):
        log(path, **row)
        if row["step"] == step:
            raise Killed

    def save_then_die(path, state):
        save(path, state)
        if state["step"] == step:
            raise Killed

    def die(*_):
        raise Killed

    if moment == "log":
        patch.setattr(run, "log", log_then_die)
    elif moment == "save":
        patch.setattr(run, "save_checkpoint", save_then_die)
    else:
        patch.setattr(distill, "write_results", die)


@pytest.fixture
def start_and_kill(start, monkeypatch):
    """Like start, but the run dies as `die_after` says."""
    def start_and_kill(out, *flags, moment, step):
        with monkeypatch.context() as patch:
            die_after(patch, moment, step)
            with pytest.raises(Killed):
                start(out, *flags)

    return start_and_kill


@contextlib.contextmanager
def threads(count):
    """PyTorch has so many threads within this context, then one."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("flags, moment, step", [
    pytest.param("", "log", 1, id="before the first checkpoint"),
    pytest.param("", "save", 2, id="right after one"),
    # A row of the log is ahead of its checkpoint.
    pytest.param("", "log", 5, id="between two"),
    pytest.param("", "results", 6, id="all steps done, nothing shown"),
    pytest.param("--mode 2d", "log", 3, id="2d"),
    pytest.param("--shading --shading-from 0.4", "log", 3, id="shading"),
])
def test_a_killed_run_resumes_bit_for_bit(start, start_and_kill, whole, *, flags, moment, step):
    flags = flags.split()
    undisturbed = whole(*flags)
    start_and_kill("killed", *flags, moment=moment, step=step)
    saved = Path("killed", run.CHECKPOINT).exists()
    assert saved == ((moment, step) != ("log", 1))
    assert not Path("killed", "views.png").exists()
    # Another process has other random numbers.
    torch.rand(7)
    assert start("killed", "--resume", *flags) == 0
    assert_same_run(undisturbed, "killed")


def test_a_killed_run_of_two_threads_resumes_bit_for_bit(start, start_and_kill, whole):
    """It looks a million times into the grid.

    So threads would add them up in another order each time, were they allowed to.
    """
    flags = """--shading --loss sds --steps 2 --save-every 1
        --coarse-size 32 --coarse-budget 65536""".split()
    with threads(2):
        undisturbed = whole(*flags)
        start_and_kill("killed", *flags, moment="save", step=1)
        assert Path("killed", run.CHECKPOINT).exists()
        assert not Path("killed", "views.png").exists()
        torch.rand(7)
        assert start("killed", "--resume", *flags) == 0
    assert_same_run(undisturbed, "killed")


def test_the_page_follows_the_run(start_and_kill):
    start_and_kill("killed", moment="log", step=4)
    page = Path("killed", "index.html").read_text()
    assert "3 of 6 steps" in page
    assert page.count("<img") == 3
    assert "refresh" in page, "the page does not load itself again"
    assert "<canvas" not in page


def test_a_run_of_another_device_can_be_resumed(start, start_and_kill, whole):
    """On CUDA the optimizer's groups are capturable, which AdamW refuses on a CPU.

    And --device may change.
    """
    start_and_kill("moved", moment="save", step=4)
    path = Path("moved", run.CHECKPOINT)
    state = run.load_checkpoint(path)
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    run.save_checkpoint(path, state)
    assert start("moved", "--resume") == 0
    ours = Path("moved", "field.safetensors").read_bytes()
    assert ours == (whole() / "field.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 3, 6])
def test_an_interrupt_saves_and_says_how_to_resume(start, whole, monkeypatch, step, capsys):
    log, event = run.log, threading.Event()
    event.code = signal.SIGINT

    def log_then_interrupt(path, **row):
        log(path, **row)
        if row["step"] == step:
            event.set()

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", log_then_interrupt)
        patch.setattr(cli, "interrupt_flag", lambda: contextlib.nullcontext(event))
        # At the last step nothing is lost.
        assert start("halted") == (130 if step < 6 else 0)
    printed = capsys.readouterr().out
    halted = Path("halted")
    assert (halted / "mesh.glb").exists()
    page = (halted / "index.html").read_text()
    assert f"{step} of 6 steps" in page
    assert "<canvas" in page
    assert "refresh" not in page
    assert run.load_checkpoint(halted / run.CHECKPOINT)["step"] == step
    if step < 6:
        for words in (f"interrupted after {step} of 6 steps", "--resume", "halted"):
            assert words in printed
        assert start("halted", "--resume") == 0
    assert_same_run(whole(), halted)


def as_flags(settings):
    flags = []
    for name, value in settings.items():
        flags += [cli.flag_of(name), str(value)]
    return flags


def wait_for(path, process, seconds=120):
    """Until the file is there, or the process is not."""
    deadline = time.time() + seconds
    while not path.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_from_the_keyboard(start, whole, model_file, tmp_path, monkeypatch):
    """A real process, its default folder, and a real signal.

    The process has NANO's own settings, so SETTINGS are flags here.
    """
    monkeypatch.setattr(NANO, "distill", NANO_SETTINGS)
    flags = [*as_flags(SETTINGS), "--steps", "20"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, PROMPT, "--model", str(model_file), "--device", "cpu", *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    folder = tmp_path / "runs" / "a-red-bulldog"
    wait_for(folder / "progress" / "000002.png", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert re.search(r"^interrupted after \d+ of 20 steps.*--resume", out, re.MULTILINE)
    assert "Traceback" not in err
    assert (folder / "turntable.webp").exists()
    # As in the process.
    monkeypatch.setattr(distill, "LOG_EVERY", 10)
    assert start(folder, "--resume", *flags) == 0
    assert_same_run(whole(*flags), folder)


# ---- bad input -------------------------------------------------------------------------------

def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def assert_one_line(output, words):
    """The command has said what is wrong in one line, and nothing else."""
    out, err = output
    assert err.startswith("error: ") and err.count("\n") == 1, f"this is not one line:\n{err}"
    assert words in err
    assert out == ""


KNOWN = "it knows: 3d a asset bulldog red"


@pytest.mark.parametrize("flags, prompt, words", [
    ("", "", "prompt is empty"),
    ("", "  ", "prompt is empty"),
    ("", "zebra, unicorn", f"knows nothing in 'zebra, unicorn'; {KNOWN}"),
    ("--suffix asset", "zebra", "knows nothing in 'zebra'"),
    ("--coarsest 9 --finest 8", PROMPT, "--coarsest 9 is above --finest 8"),
    ("--negative ugly", PROMPT, "knows nothing in 'ugly'"),
    ("--stepz 3", PROMPT, "--stepz"),
    ("bulldog", "a red", "quotes"),
    ("--seed 99999999999999999999", PROMPT, "--seed"),
    ("--steps 0", PROMPT, "--steps"),
    ("--mode 4d", PROMPT, "--mode"),
    ("--views 0", PROMPT, "--views"),
    ("--show-every -1", PROMPT, "--show-every"),
    ("--encoding planes", PROMPT, "--encoding"),
    ("--model tinny", PROMPT, "no model 'tinny'"),
    ("--model damaged", PROMPT, "damaged"),
    ("--model other", PROMPT, "not a tensor of an MVDream"),
    ("--device cuda", PROMPT, "no device 'cuda'"),
    ("--device gpu", PROMPT, "no device 'gpu'"),
    ("--out file/run", PROMPT, "cannot make the folder file/run"),
    ("--out file", PROMPT, "cannot make the folder file"),
    ("--resume", PROMPT, "no run to resume in new"),
])
def test_bad_input_is_one_line_and_makes_nothing(
    start, model_file, tmp_path, capsys, monkeypatch, *, flags, prompt, words
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("file").write_text("mine")
    Path("damaged").write_bytes(model_file.read_bytes())
    damage(Path("damaged"))
    write_safetensors("other", {"weight": torch.zeros(2)})
    before = contents(tmp_path, ())
    assert start("new", *flags.split(), prompt=prompt) == 2
    assert_one_line(capsys.readouterr(), words)
    assert contents(tmp_path, ()) == before, "a run that cannot be has changed files"
    assert not Path("new").exists()


@pytest.fixture(scope="session")
def a_run(tmp_path_factory):
    """The folder of a run of two steps, once the first test has made it."""
    return tmp_path_factory.mktemp("run") / "run"


def empty(path):
    path.write_bytes(b"")


def safetensors_file(path):
    write_safetensors(path, {"weight": torch.zeros(2)})


def checkpoint_of_train(path):
    module = {"weight": torch.zeros(2)}
    state = {"phase": "vae", "step": 2, "module": module, "average": [], "random": {}}
    run.save_checkpoint(path, state)


def checkpoint_of_another_field(path):
    state = run.load_checkpoint(path)
    state["nerf"]["encoding.table"] = torch.zeros(5, 2)
    run.save_checkpoint(path, state)


HOW_TO_GO_ON = "already holds a run; continue it with --resume or choose another --out"


@pytest.mark.parametrize("flags, change, words", [
    ("", None, HOW_TO_GO_ON),
    ("--resume --seed 1", None, "was run with seed = 0, now it is 1"),
    ("--resume --mode 2d", None, "was run with mode"),
    ("--resume --views 6", None, "was run with views = 4, now it is 6"),
    ("--resume", damage, "damaged"),
    ("--resume", empty, "damaged"),
    ("--resume", safetensors_file, "not a checkpoint of a run"),
    ("--resume", checkpoint_of_train, "not of this run"),
    ("--resume", checkpoint_of_another_field, "not of this run"),
])
def test_bad_resume_is_one_line_and_changes_nothing(
    start, a_run, capsys, *, flags, change, words
):
    if not a_run.exists():
        assert start(a_run, "--steps", "2") == 0
    checkpoint = a_run / run.CHECKPOINT
    kept = checkpoint.read_bytes()
    if change:
        change(checkpoint)
    before, config = contents(a_run), settings_of(a_run)
    capsys.readouterr()
    exit_status = start(a_run, "--steps", "2", *flags.split())
    after = contents(a_run)
    checkpoint.write_bytes(kept)
    assert exit_status == 2
    assert_one_line(capsys.readouterr(), words)
    assert after == before, "a run that cannot go on has changed files"
    assert {**settings_of(a_run), "resume": None} == {**config, "resume": None}


@pytest.mark.parametrize("new, words", [
    ([], "was written by an older version of mvd"),
    (["views", "show_every", "encoding"], "was written by an older version of mvd"),
], ids=["same settings", "fewer settings"])
def test_a_run_of_an_earlier_version_is_not_resumed(start, tmp_path, capsys, new, words):
    """It has another checkpoint, and may lack settings that are new."""
    assert start("run", "--steps", "2") == 0
    old = tmp_path / "run"
    (old / run.CHECKPOINT).unlink()
    safetensors_file(old / "checkpoint.safetensors")
    config = settings_of(old)
    for name in new:
        del config[name]
    (old / "config.json").write_text(json.dumps(config))
    before = contents(old)
    capsys.readouterr()
    assert start("run", "--steps", "2", "--resume") == 2
    assert_one_line(capsys.readouterr(), words)
    assert contents(old) == before, "a run that cannot go on has changed files"


def test_unknown_words_are_named_once_in_one_clean_line(start, capsys):
    flags = ["--steps", "1", "--suffix", ", asset"]
    assert start("run", *flags, prompt="a red wombat and bulldog") == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    # The others are the progress bar's.
    warnings = [line for line in lines if line and "%|" not in line]
    assert warnings == [f"warning: the model does not know wombat, and: left out; {KNOWN}"]
