"""train.py: its losses against their formulas, and a run that is killed and resumed against one that is not."""
import math

import pytest
import torch

import toy_data
import train
from mvd import MVDream, diffusion, run
from mvd.model import PRESETS
from test_model import small_config


class Killed(BaseException):
    """As abrupt as a kill can be inside one process: nothing catches it."""


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


@pytest.mark.parametrize("killed_at", [1, 3, 7, 9])                              # before any checkpoint, and in either phase
def test_a_killed_run_resumes_bit_for_bit(start, monkeypatch, killed_at, tmp_path):
    whole = start("whole")
    log = run.log

    def log_then_die(path, **row):
        log(path, **row)
        if row["step"] == killed_at:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", log_then_die)
        with pytest.raises(Killed):
            start("killed")
    assert start("killed", "--resume") == whole
    steps = [[row["step"] for row in run.read_log(tmp_path / out / "log.jsonl")] for out in ("whole", "killed")]
    assert steps[0] == steps[1]


def test_the_result_is_a_model_that_knows_its_words(start, tmp_path):
    start("run")
    model = MVDream.load(tmp_path / "run" / "model.safetensors")
    assert {"red", "blue", "ball", "3d", "asset", "sks"} <= set(model.config.text.words)
    z = model.encode(torch.rand(8, 1, 3, 64, 64) * 2 - 1)
    assert torch.isfinite(z).all() and model.config.vae.scale_factor != 1.0


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [train.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2.0 / 20) and max(rates) <= 2.0 and rates[-1] < 1e-4
    assert rates[500] == pytest.approx(1.0, abs=0.01)


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
