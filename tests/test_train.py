"""train.py: killed runs against whole ones, what learns, its losses, and where settings stand."""
import copy
import json
import math
import re
import shutil
from dataclasses import asdict

import pytest
import torch

import layouts
import toy_data
import train
from mvd import MVDream, data, diffusion, fit
from mvd.model import PRESETS
from mvd.tools import cli, parallel, run
from mvd.tools.errors import UserError
from mvd.tools.vocabulary import IDENTIFIERS
from mvd.vae import VAE, Encoder, VAEConfig
from scripts import Killed, killed_after, saved_model, status
from test_model import random_model, small_config

# 4 steps of the autoencoder and 6 of the UNet, with pictures at 3, 4; 7, 10.
SHORT = """--preset nano --device cpu --vae-steps 4 --steps 6 --batch 1 --vae-batch 4 --copies 1
    --sample-every 3 --save-every 2""".split()


def blank(self, prompts, views=4, **_):
    """In place of MVDream.sample: white pictures."""
    count = 1 if isinstance(prompts, str) else len(prompts)
    return torch.ones(count, views, 3, 64, 64)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(out, *flags) trains a nano model on two balls and returns the file of the result."""
    toy_data.write(tmp_path / "data", size=64, views=8)
    monkeypatch.setattr(fit, "LOG_EVERY", 1)
    monkeypatch.setattr(MVDream, "sample", blank)

    def start(out, *flags):
        places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / out)]
        train.main([*places, *SHORT, *flags])
        return (tmp_path / out / "model.safetensors").read_bytes()

    return start


@pytest.fixture
def first(tmp_path):
    """The file of a model that knows the words of the two balls."""
    config = small_config()
    config.text.words = tuple(sorted({*config.text.words, "ball", "blue"}))
    return saved_model(tmp_path, config)


def moved(before, after):
    """The names of the tensors that changed. after: a model from a file in half precision."""
    old = before.state_dict()
    names = []
    for name, tensor in after.state_dict().items():
        if not torch.equal(tensor, old[name].half().float()):
            names.append(name)
    return names


def one_line(main, capsys):
    """What a script prints that ends with status 2 and one line."""
    capsys.readouterr()
    assert status(main) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("reading:")]
    assert len(lines) == 1, f"not one line: {error}"
    assert lines[0].startswith("error:")
    return lines[0]


# ---- a run -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(start, monkeypatch, tmp_path):
    """Killed before any checkpoint, and in either phase."""
    def logged(out):
        return [row["step"] for row in run.read_log(tmp_path / out / "log.jsonl")]

    whole = start("whole")
    for killed_at in (1, 9):
        out = f"killed at {killed_at}"
        with killed_after(monkeypatch, lambda row: row["step"] == killed_at):
            start(out)
        if killed_at == 9:
            page = (tmp_path / out / "index.html").read_text()
            assert "7 of 10 steps" in page, "the page is not of the last pictures"
            assert "refresh" in page, "the page does not wait for more"
        assert start(out, "--resume") == whole, f"{out}, the resumed run made something else"
        assert logged(out) == logged("whole")


def test_the_result_is_a_model_that_knows_its_words(start, tmp_path):
    start("run")
    model = MVDream.load(tmp_path / "run" / "model.safetensors")
    known = set(model.config.text.words)
    assert {"red", "blue", "ball", "3d", "asset", "sks"} <= known
    z = model.encode(torch.rand(8, 1, 3, 64, 64) * 2 - 1)
    assert torch.isfinite(z).all()
    assert model.config.vae.scale_factor != 1.0
    page = (tmp_path / "run" / "index.html").read_text()
    assert "10 of 10 steps" in page
    assert page.count("<img") == 2, "the page wants samples and the autoencoder's pictures"
    assert page.count("<polyline") == 2, "the page wants a curve per loss"
    assert "refresh" not in page, "the page waits for more, though the run has ended"


def test_the_autoencoder_is_kept_when_its_phase_ends(start, monkeypatch, tmp_path):
    """Killed in the second phase before its first checkpoint: the first is not done again."""
    with killed_after(monkeypatch, lambda row: row.get("phase") == "unet"):
        start("killed", "--save-every", "3")
    state = run.load_checkpoint(tmp_path / "killed" / run.CHECKPOINT)
    assert (state["phase"], state["step"]) == ("vae", 4)


@pytest.mark.slow
def test_six_views_by_the_flag_alone(start, tmp_path, monkeypatch):
    """The batches, their cameras and the pictures follow. The sets have 30 views."""
    toy_data.write(tmp_path / "thirty", size=64, views=30)
    batches, cameras, samples = set(), [], []
    squared_errors = diffusion.squared_errors

    def errors(unet, x0, context, camera, t, noise):
        if camera is not None:
            cameras.append(camera.unflatten(2, (4, 4)))
        mode = "2d" if camera is None else "3d"
        batches.add((mode, *x0.shape[:2]))
        return squared_errors(unet, x0, context, camera, t, noise)

    def sample(self, prompts, views=4, **settings):
        samples.append((settings.get("mode", "3d"), views))
        return blank(self, prompts, views)

    monkeypatch.setattr(diffusion, "squared_errors", errors)
    monkeypatch.setattr(MVDream, "sample", sample)
    start("run", "--data", str(tmp_path / "thirty"), "--views", "6")
    assert batches == {("3d", 1, 6), ("2d", 6, 1)}
    for camera in cameras:
        x, y = camera[..., 0, 3], camera[..., 1, 3]
        azimuth = torch.rad2deg(torch.atan2(y, x))
        apart = azimuth.diff(dim=1) % 360
        torch.testing.assert_close(apart, torch.full((1, 5), 60.0), rtol=0, atol=0.01)
    assert samples == [("3d", 6), ("2d", 1)] * 2
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["views"] == 6


def test_objects_without_a_set_near_enough(start, tmp_path, capsys):
    """Of 8 views, 5 stand up to 18 degrees off; a wider bound lets them serve."""
    error = one_line(lambda: start("run", "--views", "5", "--bound", "10"), capsys)
    assert "no object has 5 views within 10 degrees" in error and "--bound" in error
    assert not (tmp_path / "run").exists()
    start("run", "--views", "5", "--bound", "20")


# ---- failed starts ---------------------------------------------------------------------------

@pytest.mark.parametrize("phase, error", [
    ("vae_loss", KeyboardInterrupt()), ("unet_loss", torch.cuda.OutOfMemoryError())])
def test_a_start_that_fails_is_not_in_the_way_of_the_next(
    start, first, tmp_path, monkeypatch, phase, error
):
    def fails(*_):
        raise error

    flags = ["--init", str(first), "--vae-steps", "2" if phase == "vae_loss" else "0"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, phase, fails)
        with pytest.raises(type(error)):
            start("run", *flags)
    assert not (tmp_path / "run").exists()
    start("run", *flags, "--steps", "1")


def test_torchruns_restart_goes_on_with_no_run_but_its_own(start, tmp_path, monkeypatch):
    store = torch.distributed.HashStore()

    def begin(life):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", life)
        monkeypatch.setattr(parallel, "_store", lambda: (store, 0, 1))
        return start("run")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for life in "01":
        with pytest.raises(UserError, match="already holds a run"):
            begin(life)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]

    shutil.rmtree(tmp_path / "run")
    store = torch.distributed.HashStore()
    with killed_after(monkeypatch, lambda row: row["step"] == 3):
        begin("0")
    begin("1")
    steps = [row["step"] for row in run.read_log(tmp_path / "run" / "log.jsonl") if "lr" in row]
    assert steps == list(range(1, 11)), "it did not go on"


@pytest.mark.parametrize("flag, rank_of, expected", [
    ("bfloat16", 0, torch.bfloat16), ("bfloat16", 1, torch.float16),
])
def test_both_phases_learn_in_the_number_format_of_all_processes(
    start, monkeypatch, flag, rank_of, expected
):
    """--dtype; float16 if the card of another process (rank_of 1) has no bfloat16."""
    formats = []
    monkeypatch.setattr(fit, "fit", lambda phase, *_: formats.append(phase.dtype))
    if rank_of:
        monkeypatch.setattr(parallel, "worst", lambda code: code or (code is False))
    start("run", "--dtype", flag)
    assert formats == [expected, expected]


# ---- starting from a model -------------------------------------------------------------------

def test_from_stable_diffusion_only_the_unet_learns(start, tmp_path, monkeypatch):
    """The VAE and the text tower stay; tests/test_checkpoint.py has what the start is."""
    released = {}
    for name, tensor in layouts.released_tensors().items():
        if "camera_embed" not in name:
            released[name] = tensor
    torch.save(released, tmp_path / "sd.ckpt")
    init = ["--init", str(tmp_path / "sd.ckpt"), "--vae-steps", "0", "--size", "64"]
    with pytest.warns(UserWarning, match="knows no cameras"):
        before = MVDream.load(tmp_path / "sd.ckpt")
        whole = start("run", *init)

    model = MVDream.load(tmp_path / "run" / "model.safetensors")
    assert model.config.size == 64
    assert model.config.vae.scale_factor == 0.18215
    assert not model.config.text.words
    assert moved(before.vae, model.vae) == moved(before.text, model.text) == []
    parts = {name.split(".")[0] for name in moved(before.unet, model.unet)}
    assert parts >= {"camera_mlp", "encoder", "decoder"}
    assert model.unet.camera_mlp[2].weight.abs().max() > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vae_steps"], config["lr"], config["batch"]) == (0, 1e-5, 1)
    rows = run.read_log(tmp_path / "run" / "log.jsonl")
    assert {row["phase"] for row in rows} == {"unet"}

    with pytest.warns(UserWarning, match="cameras"):
        with killed_after(monkeypatch, lambda row: row["step"] == 3):
            start("killed", *init)
    with pytest.warns(UserWarning, match="cameras"):
        assert start("killed", *init, "--resume") == whole


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 6])
def test_the_decoder_can_learn_without_the_encoder(start, first, tmp_path, monkeypatch, steps):
    """--init and --vae-steps: what makes the latents stays to the bit, and so does the text tower.

    With --steps 0 the UNet stays, too. A killed run goes on.
    """
    init = ["--init", str(first), "--vae-steps", "4", "--steps", str(steps), "--vae-lr", "0.01"]
    whole = start("run", *init)
    before, after = MVDream.load(first), MVDream.load(tmp_path / "run")
    assert bool(moved(before.unet, after.unet)) == bool(steps)
    assert moved(before.text, after.text) == []
    parts = {name.split(".")[0] for name in moved(before.vae, after.vae)}
    assert parts == {"decoder", "post_quant_conv"}
    killed_at = 9 if steps else 3
    with killed_after(monkeypatch, lambda row: row["step"] == killed_at):
        start("killed", *init)
    assert start("killed", *init, "--resume") == whole


@pytest.mark.parametrize("flags", [[], ["--init", "tiny", "--vae-steps", "0"]])
def test_a_training_of_nothing_is_refused(start, tmp_path, flags):
    with pytest.raises(UserError, match="--init.*--vae-steps"):
        start("none", "--steps", "0", *flags)
    assert not (tmp_path / "none").exists()


def test_a_decoder_alone_does_not_change_the_size_of_pictures(start, first, tmp_path):
    toy_data.write(tmp_path / "large", size=128)
    places = ["--data", str(tmp_path / "large"), "--init", str(first)]
    start("run", *places, "--vae-steps", "1", "--steps", "0", "--sample-every", "9")
    assert MVDream.load(tmp_path / "run").config.size == 64


def test_pictures_of_another_size_are_scaled(start, tmp_path):
    toy_data.write(tmp_path / "odd", size=40, views=8)
    start("run", "--data", str(tmp_path / "odd"))
    assert MVDream.load(tmp_path / "run").config.size == 64


def test_a_size_that_the_networks_cannot_halve(start, tmp_path):
    with pytest.raises(UserError, match="size is 40 pixels"):
        start("run", "--size", "40")
    assert not (tmp_path / "run").exists()


def test_a_new_model_knows_the_words_of_its_captions():
    """And those of the suffix, and the identifiers; sorted, in lower case, without the comma."""
    captions = ["A red ball", "ball, red", "a 4-door car", "a ball, blue"]
    model = train.new_model(train.TrainSettings(preset="nano", size=64), captions)
    words = {"a", "red", "ball", "4", "door", "car", "blue", "3d", "asset", *IDENTIFIERS}
    assert model.config.text.words == tuple(sorted(words))
    assert model.text.config.words == model.config.text.words
    assert PRESETS["nano"].model.text.words == (), "the preset itself has learned words"


# ---- settings --------------------------------------------------------------------------------

def printed_defaults(text):
    """{setting: its default, as --help prints it, "" if it prints none}."""
    defaults = {}
    for block in re.split(r"\n(?=  -)", text):
        flag = re.match(r"  --([\w-]+)", block)
        if flag:
            default = re.search(r"\(default: (.*?)\)", " ".join(block.split()))
            name = flag[1].replace("-", "_")
            defaults[name] = default[1] if default else ""
    return defaults


def printed(value):
    """A value as --help prints it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, ()):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def config_words(first, start_from):
    """The words of the model that a training on the two balls makes, or begins with."""
    if start_from == "--init":
        return MVDream.load(first).config.text.words
    return {"3d", "a", "asset", "ball", "blue", "red", *IDENTIFIERS}


@pytest.mark.parametrize("start_from", ["nano", "tiny", "--init"])
def test_the_defaults_are_those_that_help_prints(first, tmp_path, monkeypatch, capsys, start_from):
    """All of them, and config.json holds them; the run says which are not train.py's own."""
    given = {"data": str(tmp_path / "data"), "out": str(tmp_path / "run"), "device": "cpu"}
    if start_from == "--init":
        given["init"] = str(first)
        size, changes = 64, {**train.FROM_INIT, "size": 64}
    else:
        given["preset"] = start_from
        preset = PRESETS[start_from]
        size = preset.model.size
        changes = {"size": size, **preset.train}
    toy_data.write(tmp_path / "data", size=size, views=8)
    flags = []
    for name, value in given.items():
        flags += [f"--{name}", value]
    expected = {**asdict(train.TrainSettings()), **changes}

    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--help"])
    assert end.value.code == 0
    defaults = printed_defaults(capsys.readouterr().out)
    assert defaults == {name: printed(value) for name, value in expected.items()}

    def stop(*_):
        raise Killed

    monkeypatch.setattr(fit, "fit", stop)
    with pytest.raises(Killed):
        train.main(flags)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    own = {
        "step_batch": expected["batch"], "step_vae_batch": expected["vae_batch"],
        "in_memory": True, "items": [2, 2], "words": len(config_words(first, start_from)),
        "light_widths": [] if "preset" not in given else list(preset.model.vae.light),
    }
    wanted = {**expected, **given, **own}
    assert config == json.loads(json.dumps(wanted))
    said = capsys.readouterr().out
    for name, value in changes.items():
        if value != getattr(train.TrainSettings(), name):
            assert cli.as_flag(name, value) in said, f"the run hides {name}"


def test_other_data_is_refused_on_resume(start, tmp_path):
    """Another image, or another word: the sequence of batches would be another one."""
    start("run")
    toy_data.write(tmp_path / "more", size=64, views=8, items=3)
    with pytest.raises(UserError, match="was run with data"):
        start("run", "--data", str(tmp_path / "more"), "--resume")
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "more").rename(tmp_path / "data")
    with pytest.raises(UserError, match=r"was run with items = \[2, 2\], now it is \[3, 3\]"):
        start("run", "--resume")


def test_an_unknown_preset_is_one_line(start, tmp_path, capsys):
    error = one_line(lambda: start("run", "--preset", "huge"), capsys)
    assert "--preset" in error and "nano" in error
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_presets_is_one_line(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS["nano"].train, "stepz", 7)
    error = one_line(lambda: start("run"), capsys)
    assert "stepz" in error
    assert '"nano"' in error and "presets.py" in error, "the line does not say where it stands"
    assert not (tmp_path / "run").exists()


# ---- the losses ------------------------------------------------------------------------------

def test_diffusion_errors_are_those_of_the_noise_set_by_set():
    """With the dice's time steps and noise; a tenth of the texts is left out."""
    torch.manual_seed(0)
    model = MVDream(small_config())
    model.config.vae.scale_factor = 0.5
    z = torch.randn(24, 4, 8, 8, 8)
    camera = torch.randn(24, 4, 16)
    tokens = model.text.tokenize(["a red bulldog"] * 24)
    none = model.text.tokenize([""])
    dice = data.Dice(3, torch.tensor(5), torch.arange(24))
    errors, t = train.diffusion_errors(model, z, tokens, camera, none, dice)

    drop = dice.uniform("drop", (1,)) < 0.1
    assert drop.any() and not drop.all()
    noise = dice.normal("noise", z.shape[1:])
    assert torch.equal(t, dice.below("t", 1000))
    abar = diffusion.alphas_cumprod()[t].view(24, 1, 1, 1, 1)
    x_t = abar.sqrt() * 0.5 * z + (1 - abar).sqrt() * noise
    eps = model.unet(x_t, t, model.text(torch.where(drop, none, tokens)), camera)
    expected = [((eps[i] - noise[i]) ** 2).mean() for i in range(24)]
    torch.testing.assert_close(errors, torch.stack(expected))


def test_vae_errors_of_a_perfect_autoencoder_are_its_kl():
    """The latents are N(0, 4), and the pictures come back as they were."""
    images = torch.rand(2, 3, 8, 8)

    class Perfect:
        def encode(self, x):
            return torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), math.log(4.0))

        def decode(self, z):
            return images

    kl = 0.5 * (4 - 1 - math.log(4))  # of N(0, 4) from N(0, 1)
    dice = data.Dice(0, torch.tensor(0), torch.arange(2))
    errors = train.vae_errors(Perfect(), images, dice)
    torch.testing.assert_close(errors, torch.full((2,), train.KL_WEIGHT * kl))


def test_light_errors_are_those_of_the_posterior_and_only_the_light_encoder_learns():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=32, channel_mult=(1, 1, 1), z_channels=3, groups=8, light=(32, 64)))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    wanted = torch.cat(vae.encode(images), 1)
    found = torch.cat(vae.encode(images, vae.light), 1)
    errors = train.light_errors(vae, images)
    torch.testing.assert_close(errors, ((found - wanted) ** 2).mean((1, 2, 3)))
    errors.sum().backward()
    learning = {name.split(".")[0] for name, w in vae.named_parameters() if w.grad is not None}
    assert learning == {"light"}, f"these learn to please the light encoder: {learning}"


@pytest.fixture
def light_nano(monkeypatch):
    """The nano preset has a light encoder."""
    preset = copy.deepcopy(PRESETS["nano"])
    preset.model.vae.light = (32, 32)
    monkeypatch.setitem(PRESETS, "nano", preset)


def test_a_new_model_has_the_light_encoder_of_its_preset(start, light_nano, tmp_path):
    start("run", "--vae-steps", "40", "--sample-every", "20", "--save-every", "99")
    vae = MVDream.load(tmp_path / "run").vae
    assert vae.config.light == (32, 32)
    learned = train.light_errors(vae, some_pictures()).mean()
    vae.light = Encoder(vae.config, (32, 32))
    assert learned < 0.5 * train.light_errors(vae, some_pictures()).mean(), "it does not learn"
    rows = run.read_log(tmp_path / "run" / "log.jsonl")
    assert any(row.get("light_error", 0) > 0 for row in rows), "the log does not say how near it is"


def test_a_model_whose_preset_has_no_light_encoder_gets_none(start, first, tmp_path):
    start("run", "--init", str(first), "--vae-steps", "1", "--steps", "0")
    assert MVDream.load(tmp_path / "run").vae.light is None


@pytest.mark.parametrize("widths", [(32, 36), (8, 32), (32,) * 5])
def test_a_light_encoder_that_does_not_fit_is_left_out(light_nano, widths):
    """Widths that the groups do not divide, or fill one by one; more levels than there are."""
    config = small_config()
    config.vae.light = ()
    model = random_model(config)
    PRESETS["nano"].model.vae.light = widths
    train.add_light(model)
    assert model.vae.light is None and model.config.vae.light == ()


def test_a_training_of_another_light_encoder_is_not_resumed(start, light_nano, tmp_path):
    start("run")
    PRESETS["nano"].model.vae.light = (64, 32)
    with pytest.raises(UserError, match="light_widths"):
        start("run", "--resume")


def some_pictures():
    """In one colour and in grains: [8, 3, 64, 64] in [-1, 1]."""
    torch.manual_seed(0)
    plain = torch.rand(4, 3, 1, 1).expand(4, 3, 64, 64)
    return 2 * torch.cat([plain, torch.rand(4, 3, 64, 64)]) - 1


def test_a_model_without_a_light_encoder_gets_one_that_learns(start, first, light_nano, tmp_path):
    """The encoder, and the UNet, stay as they are."""
    def error(name):
        model = MVDream.load(tmp_path / name)
        assert model.config.vae.light == (32, 32), f"{name} has no light encoder"
        return train.light_errors(model.vae, some_pictures()).mean().item()

    flags = ["--steps", "0", "--vae-lr", "0.005", "--sample-every", "99", "--save-every", "99"]
    start("begun", "--init", str(first), "--vae-steps", "1", *flags)
    start("run", "--init", str(first), "--vae-steps", "40", *flags)
    assert error("run") < 0.5 * error("begun"), "it does not learn the encoder's latents"
    before, after = MVDream.load(first), MVDream.load(tmp_path / "run")
    assert moved(before.vae.encoder, after.vae.encoder) == moved(before.unet, after.unet) == []

    start("again", "--init", str(tmp_path / "run"), "--vae-steps", "1", *flags, "--vae-lr", "1e-6")
    assert error("again") < 0.5 * error("begun"), "one that is there is not taken"
    start("unet", "--init", str(tmp_path / "run"), "--vae-steps", "0", "--steps", "1")
    again = MVDream.load(tmp_path / "unet")
    assert moved(after.vae, again.vae) == [], "without --vae-steps the light encoder is another"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_run_on_a_gpu_learns(start, tmp_path, dtype):
    """Both phases, eager and captured, with pictures between the steps."""
    flags = "--device cuda --vae-steps 60 --steps 12 --sample-every 20 --save-every 12".split()
    start("run", *flags, "--dtype", dtype)
    rows = run.read_log(tmp_path / "run" / "log.jsonl")
    losses = [row["multiview"] for row in rows if row["phase"] == "vae" and "multiview" in row]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.8 * first, f"the autoencoder does not learn: {first:.2f}, then {last:.2f}"
    model = MVDream.load(tmp_path / "run")
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all(), f"{name} is not finite"
    state = run.load_checkpoint(tmp_path / "run" / run.CHECKPOINT)
    assert state["theta"].dtype == torch.float32, "the weights that learn are float32"
