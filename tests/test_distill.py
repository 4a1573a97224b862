"""distill.py: what a run leaves behind, killed and interrupted runs against whole ones, bad input, and the step itself."""
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
from mvd.tools import cli, run
from mvd import mesh, sds
from mvd.tools.files import read_safetensors, write_safetensors
from mvd.nerf import NeRF, NeRFConfig
from scripts import Killed, killed_after, saved_model, status
from test_model import small_config

SCRIPT = Path(distill.__file__)
SETTINGS = dict(steps=6, coarse_size=8, fine_size=16, coarse_sets=1, fine_sets=1, coarse_budget=1024, fine_budget=1024, levels=2,
                log2_entries=10, coarsest=4, finest=16, hidden=8, save_every=2, occupancy_every=2, step_size=0.1, negative="asset",
                density_threshold=5.0, occupancy_cells=32)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A model of a few thousand random weights, 32 pixels, whose header asks for a tiny run."""
    config = small_config()
    config.size, config.distill = 32, SETTINGS
    return saved_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture
def start(model_file, tmp_path, monkeypatch):
    """start(out, *flags) is the command in this process; returns its exit status. Paths are below tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "LOG_EVERY", 1)
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    monkeypatch.setattr(mesh, "extract", functools.partial(mesh.extract, resolution=24))
    handler = signal.getsignal(signal.SIGINT)

    def start(out, *flags, prompt="a red bulldog", model=model_file):
        monkeypatch.setattr(sys, "argv", ["distill.py", prompt, "--model", str(model), "--device", "cpu", "--out", str(out), *flags])
        return status(distill.main)
    yield start
    signal.signal(signal.SIGINT, handler)


def contents(folder, without=("config.json",)):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name not in without}


def assert_same_run(a, b):
    """Field, checkpoint, log, pictures and mesh, bit for bit."""
    for file in ("field.safetensors", "checkpoint.safetensors"):                 # the order of a header's entries is not fixed
        (ours, header), (theirs, other_header) = (read_safetensors(Path(folder) / file) for folder in (a, b))
        assert ours.keys() == theirs.keys() and header == other_header
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    without = ("config.json", "index.html", "checkpoint.safetensors")            # the page shows the settings, --out among them
    everything = [{path.relative_to(folder): content for path, content in contents(folder, without).items()} for folder in (a, b)]
    assert everything[0].keys() == everything[1].keys()
    assert [name for name in everything[0] if everything[0][name] != everything[1][name]] == []

# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_everything_behind(start, tmp_path, capsys):
    assert start("run", "--hidden", "4", "--save-every", "4") == 0
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.jsonl", "loss.png", "progress", "views.png", "views4.png", "depth.png", "normals.png", "turntable.webp",
        "views.safetensors", "field.safetensors", "checkpoint.safetensors", "mesh.glb", "mesh.obj", "index.html"}
    page = (out / "index.html").read_text()
    assert "6 of 6 steps" in page and 'data-count="36"' in page and page.count("<img") == 6 + 4 and "refresh" not in page
    printed = capsys.readouterr().out
    assert "6 steps and all results" in printed and "no mesh" not in printed
    config = json.loads((out / "config.json").read_text())
    assert config["hidden"] == 4 and config["steps"] == 6                        # a flag; the model's header
    assert config["guidance"] == 50 and config["prompt"] == "a red bulldog"      # distill.py's own; as it was given
    rows = run.read_log(out / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for i, row in enumerate(rows):                                               # the annealed times, written out
        share = min(i / 6 / 0.8, 1)
        assert row["t_low"] == pytest.approx(0.98 - 0.96 * share, abs=1e-6)
        assert row["t_high"] == pytest.approx(0.98 - 0.48 * share, abs=1e-6)
    assert [path.name for path in sorted((out / "progress").iterdir())] == [f"{i:06d}.png" for i in range(1, 7)]
    for name, width, height in (("views4.png", 4, 1), ("views.png", 4, 2), ("depth.png", 4, 2), ("normals.png", 4, 2)):
        assert Image.open(out / name).size == (34 * width - 2, 34 * height - 2)
    assert Image.open(out / "turntable.webp").is_animated
    views, _ = read_safetensors(out / "views.safetensors")
    assert views["rgb"].shape == (8, 3, 32, 32) and views["opacity"].shape == (8, 1, 32, 32)
    assert torch.equal(views["azimuth"], torch.arange(8) * 45.0) and 0 < views["opacity"].mean() < 1
    assert views["distance"].item() == pytest.approx(0.9 / 0.36397, rel=1e-4)    # tan(20 degrees)
    assert run.load_checkpoint(out / "checkpoint.safetensors")["step"] == 6   # the last, whatever --save-every
    field, _ = read_safetensors(out / "field.safetensors")
    nerf = NeRF(NeRFConfig(levels=2, log2_entries=10, coarsest=4, finest=16, hidden=4))
    nerf.load_state_dict(field)
    assert nerf.density(torch.zeros(1, 3)).item() > 5


def test_without_a_surface_there_is_a_line_and_no_mesh(start, tmp_path, capsys):
    assert start("run", "--steps", "1", "--density-threshold", "1000") == 0
    assert re.search("no mesh: .* stays below 1000", capsys.readouterr().out)
    assert not list((tmp_path / "run").glob("mesh.*")) and (tmp_path / "run" / "turntable.webp").exists()


def test_resolution_light_and_orientation_follow_the_schedule(start, monkeypatch):
    make_step, calls = sds.make_step, []

    def recording(*given):
        *_, schedule, stage = given
        step = make_step(*given)

        def recorded():
            calls.append((stage.size, stage.sets, schedule.light.item(), schedule.orientation.item()))
            return step()
        return recorded
    monkeypatch.setattr(sds, "make_step", recording)
    assert start("run", "--shading", "--coarse-sets", "2", "--fine-from", "0.3", "--steps", "4") == 0
    assert calls == [(8, 2, 0, 10), (8, 2, 0, 505), (16, 1, 1, 1000), (16, 1, 1, 1000)]


def test_the_compiler_takes_over_after_the_first_picture(start, monkeypatch, tmp_path):
    """Killed and resumed across the switch, and across the change of size, a run is bit for bit the one that was not; Dynamo traces
    as it would on a GPU, and its eager backend gives the numbers."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend="eager"))
    monkeypatch.setattr(distill, "can_compile", lambda device: True)
    monkeypatch.setattr(distill, "FIRST_LOOK", 2)
    monkeypatch.setattr(distill, "COMPILE_FROM", 1)
    made, make_step = [], sds.make_step
    monkeypatch.setattr(sds, "make_step", lambda s, *rest: made.append((s.compile, rest[-1].size)) or make_step(s, *rest))
    assert start("whole", "--coarse-sets", "2") == 0
    assert made == [(False, 8), (True, 8), (True, 16)]
    for killed_at in (1, 4):
        with killed_after(monkeypatch, lambda row: row["step"] == killed_at):
            start(f"killed{killed_at}", "--coarse-sets", "2", "--save-every", "1")
        assert start(f"killed{killed_at}", "--coarse-sets", "2", "--save-every", "1", "--resume") == 0
        assert_same_run(tmp_path / "whole", tmp_path / f"killed{killed_at}")


def test_the_model_is_asked_with_cameras_or_without(start, monkeypatch):
    loss, asked = sds.loss, []

    def recording(unet, latents, t, context, camera, *rest):
        asked.append((tuple(latents.shape), context, camera))
        return loss(unet, latents, t, context, camera, *rest)
    monkeypatch.setattr(sds, "loss", recording)
    for mode in ("3d", "2d"):
        assert start(mode, "--mode", mode, "--steps", "1", "--suffix", ", 3d asset") == 0
    (shape, context, camera), (flat_shape, flat_context, none) = asked
    assert shape == flat_shape == (1, 4, 8, 4, 4)
    assert camera.shape == (1, 4, 16) and none is None
    assert not torch.equal(context[0], flat_context[0]) and torch.equal(context[1], flat_context[1])       # suffix; negative

# ---------------------------------------------------------------------------------------------------- kills and interrupts


WHOLE = {}


@pytest.fixture
def whole(start, tmp_path):
    """whole(*flags) -> folder of a run with these settings that nothing disturbed; made once."""
    def whole(*flags):
        key = (*flags, torch.get_num_threads(), distill.LOG_EVERY)
        if key not in WHOLE:
            assert start(tmp_path / "whole", *flags) == 0
            WHOLE[key] = tmp_path / "whole"
        return WHOLE[key]
    return whole


def die_after(patch, moment, step):
    """Kill the run after it logged a step, after it saved one, or before it writes the first result."""
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
    owner, name, function = {"log": (run, "log", log_then_die), "save": (run, "save_checkpoint", save_then_die),
                             "results": (distill, "write_results", die)}[moment]
    patch.setattr(owner, name, function)


@pytest.mark.parametrize("flags, threads, moment, step", [
    ([], 1, "log", 1),                                                           # before the first checkpoint
    ([], 1, "save", 2),                                                          # right after one
    ([], 1, "log", 5),                                                           # between two: a row is ahead of its checkpoint
    ([], 1, "results", 6),                                                       # all steps done, nothing shown
    (["--mode", "2d"], 1, "log", 3),
    (["--shading", "--shading-from", "0.4"], 1, "log", 3),
    # A million look-ups in the grid, so many that threads would add them up in another order each time, were they allowed to.
    (["--shading", "--loss", "sds", "--steps", "2", "--save-every", "1", "--coarse-size", "32", "--coarse-budget", "65536"], 2, "save", 1),
], ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_a_killed_run_resumes_bit_for_bit(start, monkeypatch, whole, flags, threads, moment, step, tmp_path):
    torch.set_num_threads(threads)
    try:
        undisturbed = whole(*flags)
        with monkeypatch.context() as patch:
            die_after(patch, moment, step)
            with pytest.raises(Killed):
                start("killed", *flags)
        assert (tmp_path / "killed" / "checkpoint.safetensors").exists() == ((moment, step) != ("log", 1))
        assert not (tmp_path / "killed" / "views.png").exists()
        torch.rand(7)                                                            # another process has other random numbers
        assert start("killed", "--resume", *flags) == 0
    finally:
        torch.set_num_threads(1)
    assert_same_run(undisturbed, tmp_path / "killed")


def test_the_page_follows_the_run(start, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        die_after(patch, "log", 4)
        with pytest.raises(Killed):
            start("killed")
    page = (tmp_path / "killed" / "index.html").read_text()
    assert "3 of 6 steps" in page and page.count("<img") == 3 and "refresh" in page and "<canvas" not in page


def test_a_run_of_another_device_can_be_resumed(start, whole, tmp_path, monkeypatch):
    """On CUDA the optimizer's groups are capturable, which AdamW refuses on a CPU, and --device may change."""
    with monkeypatch.context() as patch:
        die_after(patch, "save", 4)
        with pytest.raises(Killed):
            start("moved")
    path = tmp_path / "moved" / "checkpoint.safetensors"
    state = run.load_checkpoint(path)
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    run.save_checkpoint(path, state)
    assert start("moved", "--resume") == 0
    assert contents(tmp_path / "moved")[tmp_path / "moved" / "field.safetensors"] == (whole() / "field.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 3, 6])
def test_an_interrupt_saves_and_says_how_to_resume(start, whole, monkeypatch, step, tmp_path, capsys):
    log, event = run.log, threading.Event()

    def log_then_interrupt(path, **row):
        log(path, **row)
        if row["step"] == step:
            event.set()
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", log_then_interrupt)
        patch.setattr(cli, "interrupt_flag", lambda: contextlib.nullcontext(event))
        capsys.readouterr()
        assert start("halted") == (130 if step < 6 else 0)                       # at the last step nothing is lost
    printed = capsys.readouterr().out
    assert (tmp_path / "halted" / "mesh.glb").exists() and (tmp_path / "halted" / "loss.png").exists()
    page = (tmp_path / "halted" / "index.html").read_text()
    assert f"{step} of 6 steps" in page and "<canvas" in page and "refresh" not in page
    assert run.load_checkpoint(tmp_path / "halted" / "checkpoint.safetensors")["step"] == step
    if step < 6:
        assert f"interrupted after {step} of 6 steps" in printed and "--resume" in printed and "halted" in printed
        assert start("halted", "--resume") == 0
    assert_same_run(whole(), tmp_path / "halted")


def test_ctrl_c_from_the_keyboard(start, whole, model_file, tmp_path, monkeypatch):
    """A real process, its default folder, and a real signal."""
    flags = ["--model", str(model_file), "--device", "cpu", "--steps", "20"]
    process = subprocess.Popen([sys.executable, SCRIPT, "a red bulldog", *flags], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = tmp_path / "runs" / "a-red-bulldog"
    deadline = time.time() + 120
    while not (folder / "progress" / "000002.png").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert re.search(r"^interrupted after \d+ of 20 steps.*--resume", out, re.MULTILINE) and "Traceback" not in err
    assert (folder / "turntable.webp").exists()
    monkeypatch.setattr(distill, "LOG_EVERY", 10)                                # as in the process
    assert start(folder, "--resume", "--steps", "20") == 0
    assert_same_run(whole("--steps", "20"), folder)

# ---------------------------------------------------------------------------------------------------- bad input


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize("flags, prompt, words", [
    ([], "", "prompt is empty"),
    ([], "  ", "prompt is empty"),
    ([], "zebra, unicorn", "knows nothing in 'zebra, unicorn'; it knows: 3d a asset bulldog red"),
    (["--suffix", ", 3d asset"], "zebra", "knows nothing in 'zebra'"),
    (["--coarsest", "9", "--finest", "8"], "a red bulldog", "--coarsest 9 is above --finest 8"),
    (["--negative", "ugly"], "a red bulldog", "knows nothing in 'ugly'"),
    (["--stepz", "3"], "a red bulldog", "--stepz"),
    (["bulldog"], "a red", "quotes"),
    (["--seed", "99999999999999999999"], "a red bulldog", "--seed"),
    (["--steps", "0"], "a red bulldog", "--steps"),
    (["--mode", "4d"], "a red bulldog", "--mode"),
    (["--model", "tinny"], "a red bulldog", "no model 'tinny'"),
    (["--model", "damaged"], "a red bulldog", "damaged"),
    (["--model", "other"], "a red bulldog", "no tensor of an MVDream"),
    (["--device", "cuda"], "a red bulldog", "no device 'cuda'"),
    (["--device", "gpu"], "a red bulldog", "no device 'gpu'"),
    (["--out", "file/run"], "a red bulldog", "cannot make the folder file/run"),
    (["--out", "file"], "a red bulldog", "cannot make the folder file"),
    (["--resume"], "a red bulldog", "no run to resume in new"),
])
def test_bad_input_is_one_line_and_makes_nothing(start, flags, prompt, words, tmp_path, model_file, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("file").write_text("mine")
    Path("damaged").write_bytes(model_file.read_bytes())
    damage(Path("damaged"))
    write_safetensors("other", {"weight": torch.zeros(2)})
    before = contents(tmp_path, ())
    assert start("new", *flags, prompt=prompt) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and out == ""
    assert contents(tmp_path, ()) == before and not Path("new").exists()


@pytest.fixture(scope="session")
def a_run(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "run"


def checkpoint_of_train(path):
    run.save_checkpoint(path, {"phase": "vae", "step": 2, "module": {"weight": torch.zeros(2)}, "average": [], "random": {}})


def checkpoint_of_another_field(path):
    state = run.load_checkpoint(path)
    state["nerf"]["grid.table"] = torch.zeros(5, 2)
    run.save_checkpoint(path, state)


@pytest.mark.parametrize("flags, change, words", [
    ([], None, "already holds a run; continue it with --resume or choose another --out"),
    (["--resume", "--seed", "1"], None, "was run with seed = 0, now it is 1"),
    (["--resume", "--mode", "2d"], None, "was run with mode"),
    (["--resume"], damage, "damaged"),
    (["--resume"], lambda path: path.write_bytes(b""), "damaged"),
    (["--resume"], lambda path: write_safetensors(path, {"weight": torch.zeros(2)}), "not a checkpoint of a run"),
    (["--resume"], checkpoint_of_train, "not of this run"),
    (["--resume"], checkpoint_of_another_field, "not of this run"),
])
def test_bad_resume_is_one_line_and_changes_nothing(start, a_run, flags, change, words, capsys):
    if not a_run.exists():
        assert start(a_run, "--steps", "2") == 0
    checkpoint = a_run / "checkpoint.safetensors"
    kept = checkpoint.read_bytes()
    if change:
        change(checkpoint)
    before = contents(a_run)
    config = json.loads((a_run / "config.json").read_text())
    capsys.readouterr()
    status = start(a_run, "--steps", "2", *flags)
    after = contents(a_run)
    checkpoint.write_bytes(kept)
    out, err = capsys.readouterr()
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err and out == ""
    assert after == before
    now = json.loads((a_run / "config.json").read_text())
    assert {**now, "resume": None} == {**config, "resume": None}


def test_unknown_words_are_named_once_in_one_clean_line(start, capsys):
    assert start("run", "--steps", "1", "--suffix", ", asset", prompt="a red wombat and bulldog") == 0
    err = capsys.readouterr().err
    warnings = [line for line in err.replace("\r", "\n").splitlines() if line and "%|" not in line]        # not the progress bar's
    assert warnings == ["warning: the model does not know wombat, and: left out; it knows: 3d a asset bulldog red"]
