"""The loop: AdamW with an average, batches in parts, losses that are not finite, float16."""
import re
from types import SimpleNamespace

import pytest
import torch

import toy_data
import train
from mvd import MVDream, diffusion, fit
from mvd.data import Plan
from mvd.tools import optimizer, run
from mvd.tools.device import side_stream
from mvd.tools.errors import UserError
from mvd.tools.optimizer import learning_rate
from test_model import random_model, small_config

CPU = torch.device("cpu")
NAMES = {"objects": "multiview", "images": "single"}
NAN = float("nan")
HALF = torch.float16

# ---- linear regression -----------------------------------------------------------------------


def numbers(step):
    """The eight examples of a step: x [8, 3], y [8, 1]."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 4, generator=generator).split([3, 1], 1)
    return x, y


class Line:
    """A linear layer, the same at every start, that is fitted to the numbers."""

    def __init__(
        self, steps=5, size=8, accumulate=1, times=None, faults=(), fault=NAN, dtype=torch.float32
    ):
        """times [n]: the time steps of all examples; faults: steps that are off by `fault`."""
        torch.manual_seed(0)
        self.layer, self.times = torch.nn.Linear(3, 1), times
        self.faults, self.fault = faults, fault
        self.shown = {}
        self.plan = Plan(0, {"objects": 1.0}, {"objects": size}, steps, {"objects": 4}, accumulate)
        self.phase = fit.Phase(
            name="vae", module=self.layer, loss=self.loss, plan=self.plan, stream=self.stream,
            peak_lr=0.1, first=0, show=self.show, names=NAMES, dtype=dtype,
        )

    def stream(self, start):
        for step, part in self.plan.parts(start):
            x, y = numbers(step)
            chosen = self.plan.examples("objects", part) % 8
            fault = torch.tensor(self.fault if step in self.faults else 0.0)
            yield x[chosen], y[chosen], fault

    def loss(self, kind, dice, x, y, fault):
        found = self.layer(x.to(self.layer.weight.dtype)).float()
        errors = ((found - y - fault) ** 2)[:, 0]
        return errors, None if self.times is None else self.times[: len(x)]

    def show(self, step):
        self.shown[step] = flat(self.layer)

    def settings(self, **more):
        more = {"ema": 0.5, "sample_every": 100, "save_every": 100, **more}
        return train.TrainSettings(accumulate=self.plan.accumulate, **more)

    def fit(self, folder, state=None, **more):
        folder.mkdir(exist_ok=True)
        model = SimpleNamespace(device=CPU)
        fit.fit(self.phase, model, self.settings(**more), folder, state)
        return self

    def take_steps(self, count):
        """The first steps without the loop around them: (Steps, [what each one measured])."""
        steps = fit.Steps(self.phase, self.settings(), CPU)
        stream, measured = self.stream(0), []
        for step in range(count):
            parts, code = fit.next_parts(self.plan, step, stream, 0)
            assert code == 0
            steps.set(step)
            measured.append(steps.take("objects", parts))
        return steps, measured


def flat(layer):
    """The parameters in one tensor, float64."""
    return torch.cat([p.detach().double().flatten() for p in layer.parameters()])


def test_fit_is_adamw_with_an_average_of_the_weights(tmp_path):
    """Written out in double precision (Loshchilov and Hutter 2019, algorithm 2)."""
    line = Line()
    w = flat(line.layer)
    line.fit(tmp_path, sample_every=4)
    m, v = torch.zeros(2, 4).double()
    average = w.clone()
    for step in range(5):
        x, y = numbers(step)
        inputs = torch.cat([x, torch.ones(8, 1)], 1).double()
        gradient = 2 * inputs.T @ (inputs @ w - y[:, 0].double()) / 8
        gradient = gradient * min(1.0, 1.0 / gradient.norm().item())
        m = 0.9 * m + 0.1 * gradient
        v = 0.99 * v + 0.01 * gradient**2
        m_hat = m / (1 - 0.9 ** (step + 1))
        v_hat = v / (1 - 0.99 ** (step + 1))
        rate = learning_rate(step, 5, 0.1)
        w = (1 - rate * 0.01) * w - rate * m_hat / (v_hat.sqrt() + 1e-8)
        average = average + max(0.5, 9 / (10 + step)) * (w - average)
    torch.testing.assert_close(flat(line.layer), average, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(average, w), "the average is not told from the weights"
    assert list(line.shown) == [4, 5]
    assert torch.equal(line.shown[5], flat(line.layer)), "pictures are not drawn with the average"
    state = run.last_checkpoint(tmp_path)
    assert (state["phase"], state["step"]) == ("vae", 5)
    torch.testing.assert_close(state["theta"][:3].double(), w[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sample_every, expected", [(2, [2, 4, 5]), (5, [5]), (6, [])])
def test_a_run_shorter_than_sample_every_draws_nothing(tmp_path, sample_every, expected):
    """A longer one draws at its end, too."""
    line = Line().fit(tmp_path, sample_every=sample_every)
    assert list(line.shown) == expected


def test_drawing_changes_nothing(tmp_path):
    often = Line().fit(tmp_path / "often", sample_every=1)
    never = Line().fit(tmp_path / "never")
    assert torch.equal(flat(often.layer), flat(never.layer))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_a_batch_in_parts_makes_the_same_step(tmp_path, accumulate):
    whole = Line().fit(tmp_path / "whole")
    parts = Line(size=8 // accumulate, accumulate=accumulate).fit(tmp_path)
    torch.testing.assert_close(flat(parts.layer), flat(whole.layer), atol=1e-6, rtol=1e-6)
    rows = [run.read_log(place / "log.jsonl")[-1] for place in (tmp_path, tmp_path / "whole")]
    for name in ("multiview", "gradient_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), f"the log's {name}"


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, monkeypatch, dtype):
    """With the loss scale, which falls in step 2 and rises with step 5."""
    monkeypatch.setattr(optimizer, "GROW_AFTER", 3)
    line = dict(steps=7, faults={1}, fault=1e6, dtype=dtype)
    whole = Line(**line).fit(tmp_path / "whole")
    first = Line(**line)

    def stop(step):
        raise KeyboardInterrupt

    first.phase.show = stop
    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path, save_every=3, sample_every=4)
    state = run.last_checkpoint(tmp_path)
    assert state["step"] == 3
    again = Line(**line).fit(tmp_path, state)
    assert torch.equal(flat(again.layer), flat(whole.layer)), "the run that went on is another"
    ends = [run.last_checkpoint(place)["rounding"] for place in (tmp_path, tmp_path / "whole")]
    assert ends[0] == ends[1], "the loss scale is another"
    assert ends[0] == ({"scale": 2.0**14, "good_steps": 2.0} if dtype == HALF else {})


def test_only_the_chosen_rows_of_a_table_learn(tmp_path):
    """The others stay to the bit, also in the average; weight decay does not move them either."""
    line = Line()
    weight = line.layer.weight
    learn = torch.tensor([[False, True, False]])
    line.phase.rows = weight, learn
    before = weight.detach().clone()
    line.fit(tmp_path)
    moved = weight != before
    assert torch.equal(moved, learn), "other numbers of the table have learned"


# ---- what a step measures --------------------------------------------------------------------

def test_a_step_measures_losses_by_quarter_and_the_norm_before_clipping():
    """Two parts of four examples each; the time steps 249 and 250 lie in different quarters."""
    line = Line(size=4, accumulate=2, times=torch.tensor([0, 249, 250, 999]))
    w = flat(line.layer)
    _, (measured,) = line.take_steps(1)
    x, y = numbers(0)
    inputs = torch.cat([x, torch.ones(8, 1)], 1).double()
    off = inputs @ w - y[:, 0].double()
    errors = (off**2).view(2, 4).sum(0)
    expected = [
        errors[0] + errors[1], errors[2], 0, errors[3], 4, 2, 0, 2,
        (2 * inputs.T @ off / 8).norm(), 0,
    ]
    assert expected[8] > 1, "nothing is clipped, so that this test shows less"
    torch.testing.assert_close(measured, torch.tensor(expected).float(), rtol=1e-5, atol=0)


def test_sums_begin_anew_at_every_step():
    _, measured = Line().take_steps(3)
    assert [m[4].item() for m in measured] == [8, 8, 8], "a step counts another's examples"


# ---- losses that are not finite --------------------------------------------------------------

def state_of(steps):
    """Copies of the weights, the average and Adam's state."""
    vector = steps.vector
    tensors = [vector.theta, vector.average, *steps.optimizer.state[vector.theta].values()]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(accumulate):
    parts = dict(size=8 // accumulate, accumulate=accumulate)
    steps, _ = Line(**parts).take_steps(3)
    faulty, measured = Line(faults={3}, **parts).take_steps(4)
    for kept, found in zip(state_of(steps), state_of(faulty), strict=True):
        assert torch.equal(kept, found), "the step has changed something"
    assert not faulty.vector.gradient.any(), "the next step begins with what was left"
    assert measured[3].tolist() == [0.0] * 9 + [1.0], "it is not counted as skipped, or as more"
    assert faulty.failures == 1
    faulty, measured = Line(faults={3}, **parts).take_steps(5)
    assert faulty.failures == 0, "the steps in a row are not counted from the last good one"
    assert measured[4][-1] == 0 and faulty.vector.theta.isfinite().all()
    assert not torch.equal(faulty.vector.theta, steps.vector.theta), "no step is made any more"


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    line = Line()
    steps = fit.Steps(line.phase, line.settings(), CPU)
    before = steps.vector.theta.detach().clone()
    steps.set(0)
    steps.vector.theta.grad.fill_(torch.inf)
    measured = steps.plain_update()
    assert torch.equal(steps.vector.theta, before) and measured.tolist() == [0.0] * 9 + [1.0]


def test_nine_failures_in_a_row_are_logged_and_do_not_stop_a_run(tmp_path):
    """Nor do twenty of thirty."""
    faults = {*range(1, 10), *range(11, 20), 25, 26}
    line = Line(steps=30, faults=faults).fit(tmp_path)
    assert flat(line.layer).isfinite().all()
    row = run.read_log(tmp_path / "log.jsonl")[-1]
    assert row["skipped"] == 20 and row["multiview"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_ten_failures_in_a_row_stop_a_run_that_has_no_checkpoint(tmp_path, dtype):
    """In float16, too: no loss scale helps a loss that is not a number."""
    line = Line(steps=30, faults=set(range(30)), dtype=dtype)
    with pytest.raises(UserError, match="not finite in 10 steps .* there is no checkpoint yet"):
        line.fit(tmp_path)
    assert run.last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("steps", [1, 4])
def test_a_short_run_whose_steps_all_fail_does_not_end_well(tmp_path, steps):
    with pytest.raises(UserError, match=f"not finite in {steps} steps in a row"):
        Line(steps=steps, faults=set(range(steps))).fit(tmp_path)


def test_a_lost_run_names_the_last_good_checkpoint_and_goes_on_from_it(tmp_path, monkeypatch):
    """train.py on balls: from step 10 on all is NaN."""
    toy_data.write(tmp_path / "data", size=64, views=8)
    out = tmp_path / "run"
    flags = """--preset nano --device cpu --vae-steps 0 --steps 20 --batch 1 --copies 1
        --views 2 --save-every 8""".split()
    flags += ["--data", str(tmp_path / "data"), "--out", str(out)]
    errors = train.diffusion_errors
    calls = []

    def faulty(*given):
        value, t = errors(*given)
        calls.append(t)
        return value * float("nan") if len(calls) > 10 else value, t

    with monkeypatch.context() as patch:
        patch.setattr(train, "diffusion_errors", faulty)
        with pytest.raises(UserError) as end:
            train.main(flags)
    words = str(end.value)
    assert "\n" not in words
    assert "phase unet" in words and "not finite in 10 steps in a row" in words
    step = re.search(re.escape(str(out / run.CHECKPOINT)) + r", of step (\d+)", words)
    assert step, f"the checkpoint and its step are not named: {words}"
    assert not (out / "model.safetensors").exists()

    state = run.last_checkpoint(out)
    assert state["step"] == int(step[1]) == 8, "a checkpoint was written among failures"
    for name in ("theta", "average"):
        assert state[name].isfinite().all(), f"the checkpoint's {name} is not good"
    train.main([*flags, "--resume"])
    assert MVDream.load(out / "model.safetensors").config.vae.scale_factor > 0
    row = run.read_log(out / "log.jsonl")[-1]
    assert row["step"] == 20 and "skipped" not in row


# ---- float16 ---------------------------------------------------------------------------------

def test_a_gradient_too_large_for_float16_halves_the_scale_and_changes_nothing_else():
    """Before it and after it, steps are as if it had not been: it is no failure."""
    steps, _ = Line(dtype=HALF).take_steps(3)
    faulty, measured = Line(faults={3}, fault=1e6, dtype=HALF).take_steps(4)
    for kept, found in zip(state_of(steps), state_of(faulty), strict=True):
        assert torch.equal(kept, found), "the step has changed something"
    assert (steps.rounded.scale, faulty.rounded.scale) == (2**14, 2**13)
    assert measured[3].tolist() == [0.0] * 9 + [1.0] and faulty.failures == 0
    exact, (*_, expected) = Line(faults={3}, fault=1e6).take_steps(4)
    assert exact.skip == 0 and expected.isfinite().all(), "in float32 it is too large, too"
    after, measured = Line(faults={3}, fault=1e6, dtype=HALF).take_steps(5)
    assert measured[4][-1] == 0
    assert not torch.equal(after.vector.theta, faulty.vector.theta), "no step is made any more"


def test_a_scale_that_must_fall_far_does_not_stop_a_run(tmp_path):
    """More than ten steps in a row are left out, then it learns."""
    before = flat(Line().layer)
    line = Line(steps=30, faults=set(range(30)), fault=5e3, dtype=HALF).fit(tmp_path)
    row = run.read_log(tmp_path / "log.jsonl")[-1]
    assert 10 < row["skipped"] <= 14
    assert not torch.equal(flat(line.layer), before)
    assert run.last_checkpoint(tmp_path)["rounding"]["scale"] == 2.0 ** (14 - row["skipped"])


def test_a_gradient_too_large_at_any_scale_stops_a_run(tmp_path):
    line = Line(steps=60, faults=set(range(60)), fault=1e9, dtype=HALF)
    with pytest.raises(UserError, match="not finite in 1[0-9] steps in a row"):
        line.fit(tmp_path)
    assert run.last_checkpoint(tmp_path) is None


def learn(device, dtype, steps):
    """A small UNet learns one set of two views: (how its weights move [n], losses, norms)."""
    unet = random_model(small_config()).unet.requires_grad_(True).to(device)
    config = unet.config
    torch.manual_seed(1)
    z = torch.randn(1, 2, config.in_channels, 4, 4).to(device)
    context = torch.randn(1, 6, config.context_dim).to(device)
    camera = torch.randn(1, 2, config.camera_dim).to(device)

    def loss(kind, dice, z):
        t = dice.below("t", diffusion.NUM_TIMESTEPS)
        noise = dice.normal("noise", z.shape[1:])
        errors = diffusion.squared_errors(unet, z, context, camera, t, noise)
        return errors.flatten(1).mean(1), t

    plan = Plan(0, {"objects": 1.0}, {"objects": 1}, steps, {"objects": 2})
    phase = fit.Phase(
        name="unet", module=unet, loss=loss, plan=plan, stream=None, peak_lr=1e-4, first=0,
        show=None, names=NAMES, dtype=dtype,
    )
    taken = fit.Steps(phase, train.TrainSettings(), device)
    start, measured = taken.vector.theta.detach().clone(), []
    with side_stream(device):
        for step in range(steps):
            taken.set(step)
            part = plan.examples("objects", 0), z
            measured.append(taken.take("objects", [part]).clone())
    assert taken.most_failures == 0 and taken.skip == 0
    measured = torch.stack(measured)
    return taken.vector.theta.detach() - start, measured[:, :4].sum(1), measured[:, 8]


@pytest.mark.parametrize("device, steps", [
    ("cpu", 3), pytest.param("cuda", 12, marks=pytest.mark.gpu)])
def test_float16_learns_what_float32_does(monkeypatch, device, steps):
    """On a GPU eagerly, then captured. bfloat16, which keeps fewer bits, is further off.

    Without a loss scale a quarter of the way is missed.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device(device)
    moves, losses, norms = learn(device, torch.float32, steps)
    off = {}
    for dtype in (HALF, torch.bfloat16):
        found, *measured = learn(device, dtype, steps)
        off[dtype] = ((found - moves).norm() / moves.norm()).item()
        if dtype == HALF:
            torch.testing.assert_close(measured[0], losses, rtol=1e-3, atol=0)
            torch.testing.assert_close(measured[1], norms, rtol=1e-2, atol=0)
    assert off[HALF] < 0.02 and off[HALF] < off[torch.bfloat16], f"weights move elsewhere: {off}"


def test_the_bar_shows_numbers_and_losses_by_quarter():
    by_noise = [0.5, None, 2.0, 1 / 3]
    row = {"step": 3, "multiview": 0.12345, "multiview_by_noise": by_noise, "lr": 1e-5}
    shown = {"multiview": "0.123", "lr": "1e-05", "multiview_by_noise": "0.5/-/2/0.333"}
    assert fit.on_bar(row) == shown
