"""train.py: its losses against their formulas, and a run that is killed and resumed against one that is not."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

import layouts
import toy_data
import train
from mvd import MVDream, diffusion
from mvd.tools import run
from mvd.tools.errors import UserError
from mvd.tools.masters import learning_rate
from mvd.model import PRESETS
from scripts import killed_after, saved_model
from test_model import small_config


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(out, flags) trains a model of a few thousand weights on two balls."""
    toy_data.write(tmp_path / "data", size=64)
    monkeypatch.setitem(PRESETS, "tiny", small_config())
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(MVDream, "sample", lambda self, prompts, views=4, **_: torch.zeros(len(prompts), views, 3, 64, 64))

    def start(out, *flags):
        train.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / out), "--device", "cpu", "--vae-steps", "4",
                    "--steps", "6", "--batch", "1", "--vae-batch", "4", "--copies", "1", "--sample-every", "3", "--save-every", "2",
                    *flags])
        return (tmp_path / out / "model.safetensors").read_bytes()
    return start


def test_a_killed_run_resumes_bit_for_bit(start, monkeypatch, tmp_path):
    """Killed before any checkpoint, and in either phase."""
    def steps(out):
        return [row["step"] for row in run.read_log(tmp_path / out / "log.jsonl")]
    whole = start("whole")
    for killed_at in (1, 3, 7, 9):
        out = f"killed at {killed_at}"
        with killed_after(monkeypatch, lambda row: row["step"] == killed_at):
            start(out)
        if killed_at == 9:                                                       # the page is of the last pictures, and waits for more
            page = (tmp_path / out / "index.html").read_text()
            assert "7 of 10 steps" in page and "refresh" in page
        assert start(out, "--resume") == whole and steps(out) == steps("whole")


def test_the_result_is_a_model_that_knows_its_words(start, tmp_path):
    start("run")
    model = MVDream.load(tmp_path / "run" / "model.safetensors")
    assert {"red", "blue", "ball", "3d", "asset", "sks"} <= set(model.config.text.words)
    z = model.encode(torch.rand(8, 1, 3, 64, 64) * 2 - 1)
    assert torch.isfinite(z).all() and model.config.vae.scale_factor != 1.0
    page = (tmp_path / "run" / "index.html").read_text()
    assert "10 of 10 steps" in page and page.count("<img") == 3 and "refresh" not in page       # samples, loss, autoencoder


def test_from_stable_diffusion_only_the_unet_learns(start, tmp_path, monkeypatch):
    """At step 0 it is Stable Diffusion (tests/test_checkpoint.py); afterwards the VAE and the text tower still are."""
    released = {name: t for name, t in layouts.released_tensors().items() if "camera_embed" not in name}
    torch.save(released, tmp_path / "sd.ckpt")
    with pytest.warns(UserWarning, match="knows no cameras"):
        before = MVDream.load(tmp_path / "sd.ckpt")
        whole = start("run", "--init", str(tmp_path / "sd.ckpt"), "--vae-steps", "0")
    model = MVDream.load(tmp_path / "run" / "model.safetensors")
    assert model.config.size == 64 and model.config.vae.scale_factor == 0.18215 and not model.config.text.words
    for part in ("vae", "text"):
        old = getattr(before, part).state_dict()
        assert all(torch.equal(t, old[name].half().float()) for name, t in getattr(model, part).state_dict().items())
    moved = {name.split(".")[0] for name, t in model.unet.state_dict().items()
             if not torch.equal(t, before.unet.state_dict()[name].half().float())}
    assert moved >= {"camera_mlp", "encoder", "decoder"} and model.unet.camera_mlp[2].weight.abs().max() > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vae_steps"], config["lr"], config["batch"]) == (0, 1e-5, 1)
    assert {row["phase"] for row in run.read_log(tmp_path / "run" / "log.jsonl")} == {"unet"}

    with pytest.warns(UserWarning, match="cameras"), killed_after(monkeypatch, lambda row: row["step"] == 3):
        start("killed", "--init", str(tmp_path / "sd.ckpt"), "--vae-steps", "0")
    with pytest.warns(UserWarning, match="cameras"):
        assert start("killed", "--init", str(tmp_path / "sd.ckpt"), "--vae-steps", "0", "--resume") == whole


@pytest.fixture
def first(tmp_path):
    """A model that knows the words of the two balls."""
    config = small_config()
    config.text.words = tuple(sorted({*config.text.words, "ball", "blue"}))
    return saved_model(tmp_path, config)


@pytest.mark.parametrize("steps, killed_at", [(0, 3), (6, 9)])
def test_the_decoder_can_learn_without_the_encoder(start, first, tmp_path, monkeypatch, steps, killed_at):
    """--init and --vae-steps: what makes the latents stays to the bit, with --steps 0 the UNet, too; and a killed run goes on."""
    init = ["--init", str(first), "--vae-steps", "4", "--steps", str(steps), "--vae-lr", "0.01"]
    whole = start("run", *init)
    before, after = MVDream.load(first).state_dict(), MVDream.load(tmp_path / "run").state_dict()
    moved = {name.split(".")[0] if "unet" in name else ".".join(name.split(".")[:2]) for name in before
             if not torch.equal(before[name].half(), after[name].half())}
    assert moved == {"vae.decoder", "vae.post_quant_conv"} | ({"unet"} if steps else set())
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
    start("run", "--data", str(tmp_path / "large"), "--init", str(first), "--vae-steps", "1", "--steps", "0", "--sample-every", "9")
    assert MVDream.load(tmp_path / "run").config.size == 64


def test_pictures_of_another_size_than_the_model_draws(start, tmp_path):
    toy_data.write(tmp_path / "odd", size=40)
    with pytest.raises(UserError, match="pictures of 40 pixels, but this model needs 64"):
        train.main(["--data", str(tmp_path / "odd"), "--out", str(tmp_path / "x"), "--device", "cpu"])
    assert not (tmp_path / "x").exists()


def test_fit_is_adamw_with_an_average_of_the_weights(tmp_path, monkeypatch):
    """Five steps of linear regression, written out in double precision (Loshchilov and Hutter 2019, algorithm 2)."""
    torch.manual_seed(0)
    layer, x, y = torch.nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
    s = SimpleNamespace(seed=0, ema=0.5, sample_every=100, save_every=100)
    w = torch.cat([p.detach().double().flatten() for p in layer.parameters()])
    m, v, average = torch.zeros(4).double(), torch.zeros(4).double(), w.clone()
    inputs = torch.cat([x, torch.ones(8, 1)], 1).double()
    for step in range(5):
        gradient = 2 * inputs.T @ (inputs @ w - y[:, 0].double()) / 8
        gradient *= min(1.0, 1.0 / (gradient.norm().item() + 1e-6))
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient ** 2
        rate = learning_rate(step, 5, 0.1)
        w = (1 - rate * 0.01) * w - rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        average += max(0.5, 9 / (10 + step)) * (w - average)
    shown = []
    model = SimpleNamespace(device=torch.device("cpu"), vae=layer)
    train.fit("vae", model, layer, {"loss": lambda: ((layer(x) - y) ** 2).mean()}, [1.0], 0, 5, 0.1, s, tmp_path, None, shown.append)
    found = torch.cat([p.detach().flatten() for p in layer.parameters()])
    torch.testing.assert_close(found.double(), average, atol=1e-5, rtol=1e-5)
    assert shown == [5] and not torch.allclose(average, w)


def test_the_autoencoder_is_kept_when_its_phase_ends(start, monkeypatch, tmp_path):
    """Killed in the second phase before its first checkpoint: the first phase is not done again."""
    with killed_after(monkeypatch, lambda row: row["phase"] == "unet"):
        start("killed", "--save-every", "3")
    state = run.load_checkpoint(tmp_path / "killed" / "checkpoint.safetensors")
    assert (state["phase"], state["step"]) == ("vae", 4)


def test_diffusion_loss_is_the_mean_squared_error_of_the_noise():
    torch.manual_seed(0)
    model = MVDream(small_config())
    z, tokens, none = torch.randn(2, 4, 8, 8, 8), model.text.tokenize(["a red bulldog"] * 2), model.text.tokenize([""])
    camera = torch.randn(2, 4, 16)
    model.config.vae.scale_factor = 0.5
    torch.manual_seed(7)
    loss = train.diffusion_loss(model, z, tokens, camera, none)
    torch.manual_seed(7)                                                         # the same draws, in the same order
    tokens = torch.where(torch.rand(2, 1) < 0.1, none, tokens)
    t, noise = torch.randint(1000, (2,)), torch.randn_like(z)
    abar = diffusion.alphas_cumprod()[t].view(2, 1, 1, 1, 1)
    eps = model.unet(abar.sqrt() * 0.5 * z + (1 - abar).sqrt() * noise, t, model.text(tokens), camera)
    torch.testing.assert_close(loss, ((eps - noise) ** 2).mean())


def test_vae_loss_of_a_perfect_autoencoder_is_its_kl():
    class Perfect:
        def encode(self, x):
            return torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), math.log(4.0))

        def decode(self, z):
            return images
    images = torch.rand(2, 3, 8, 8)
    kl = 0.5 * (4 - 1 - math.log(4))                                             # of N(0, 4) from N(0, 1)
    assert train.vae_loss(Perfect(), images).item() == pytest.approx(train.KL_WEIGHT * kl, rel=1e-4)
