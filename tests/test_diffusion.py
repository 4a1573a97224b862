"""The diffusion process against the released schedule, float64 formulas, and a Gaussian world.

In that world everything is known.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agree import agree
from mvd.diffusion import (
    alphas_cumprod,
    betas,
    denoising_loss,
    ddim_step,
    ddpm_step,
    dpm_solver_step,
    guide,
    predict_noise,
    predict_x0,
    q_sample,
    rescale,
    sampling_steps,
    solve_x0,
    squared_errors,
    timesteps,
)
from mvd.tools.errors import UserError

def sample_latents(eps_fn, shape, steps, sampler="ddim", *eta, **more):
    """The result of `sampling_steps`: its last x."""
    for x, _ in sampling_steps(eps_fn, shape, steps, sampler, *eta, **more):
        pass
    return x


REFERENCE = load_file(Path(__file__).parent / "data" / "schedule.safetensors")
# the schedule once more, in numpy and float64
BETA = np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2
ABAR = np.array([np.prod(1 - BETA[: t + 1]) for t in range(1000)])


def test_schedule():
    agree(betas(), BETA, "β", "It is sqrt(β) that is linear.", rtol=1e-12, atol=0)
    agree(alphas_cumprod(), ABAR, "ᾱ", "Is it Π (1 - β)?", rtol=2e-7, atol=0)
    released = REFERENCE["alphas_cumprod"]
    agree(alphas_cumprod(), released, "ᾱ, to the bit of the released one", atol=0)
    assert alphas_cumprod().dtype == torch.float32, "ᾱ is not float32"


def test_fifty_steps_are_the_released_ones():
    times = timesteps(50)
    agree(times.flip(0), REFERENCE["ddim50_timesteps"], "the time steps", "Is 1 added?", atol=0)
    abar = alphas_cumprod()
    agree(abar[times].flip(0), REFERENCE["ddim50_alphas"], "ᾱ at the time steps", atol=0)
    landings = torch.cat([times[1:], torch.tensor([0])])  # the last one lands on abar_0
    agree(abar[landings].flip(0), REFERENCE["ddim50_alphas_prev"], "ᾱ where steps land", atol=0)


def test_every_number_of_steps_is_taken_exactly():
    for steps, sampler in itertools.product(range(1, 1001), ("ddim", "dpm++")):
        times = timesteps(steps, sampler)
        assert len(times) == steps, f"{len(times)} steps in place of {steps}"
        assert times[0] <= 999 and times[-1] >= 0, f"of {steps} steps one is outside 0..999"
        gaps = times[:-1] - times[1:]
        even = steps == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
        assert even, f"{steps} steps do not descend evenly"
        if sampler == "dpm++":
            assert times[0] == 999, "the solver does not start where there is only noise"
        elif 1000 % steps == 0 and steps < 1000:  # the released rule, where it is defined
            released = range(1, 1001, 1000 // steps)
            agree(times.flip(0), released, f"the released rule for {steps} steps", atol=0)


@pytest.mark.parametrize("steps", [0, -5, 1001])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(UserError, match="1 to 1000"):
        timesteps(steps)
    with pytest.raises(UserError):
        sample_latents(lambda x, t: x, (1, 4, 4, 2, 2), steps)


def test_unknown_sampler():
    with pytest.raises(UserError, match=r"choose one of dpm\+\+, ddim, ddpm"):
        sample_latents(lambda x, t: x, (1, 4, 4, 2, 2), 5, sampler="euler")


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_eta_without_ddim(sampler):
    with pytest.raises(UserError, match="eta is a setting of ddim"):
        sample_latents(lambda x, t: x, (1, 4, 4, 2, 2), 5, sampler=sampler, eta=0.5)


def double_case():
    """x0, noise [3, 4, 2, 5, 5] float64 and t [3]: the first, a middle and the last time step."""
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 5, 5))
    return x0, noise, np.array([0, 437, 999])


def single(*arrays):
    """Arrays as float32 tensors."""
    return [torch.tensor(array).float() for array in arrays]


@pytest.mark.exercise(1)
def test_noising():
    x0, noise, t = double_case()
    abar = ABAR[t].reshape(3, 1, 1, 1, 1)
    clean, gaussian = single(x0, noise)
    agree(
        q_sample(clean, torch.tensor(t), gaussian),
        np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise,
        "x_t (DDPM eq. 4)",
        "Are the factors sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), of each set's own t?",
    )


@pytest.mark.exercise(2)
def test_x0_of_a_noise():
    x_t, noise, t = double_case()
    abar = ABAR[t].reshape(3, 1, 1, 1, 1)
    expected = (x_t - np.sqrt(1 - abar) * noise) / np.sqrt(abar)
    hint = "Is the noise's share, sqrt(1 - ᾱ) ε, taken away, and the rest divided by sqrt(ᾱ)?"
    words = "x̂_0 (DDPM eq. 4, solved)"
    close = dict(rtol=1e-4, atol=1e-5)
    agree(solve_x0(*single(x_t, noise, abar)), expected, words, hint, **close)
    known = predict_x0(*single(x_t), torch.tensor(t), *single(noise))
    agree(known, expected, f"{words} in predict_x0", hint, **close)
    one = solve_x0(*single(x_t, noise), float(ABAR[437]))
    agree(one[1], expected[1], f"{words} for one ᾱ, a number", hint, **close)


@pytest.mark.exercise(5)
def test_guidance():
    cond, uncond = torch.randn(2, 4, 4, 3, 3), torch.randn(2, 4, 4, 3, 3)
    for scale, expected in (
        (1.0, cond), (0.0, uncond), (7.5, 7.5 * cond - 6.5 * uncond), (-2.0, 3 * uncond - 2 * cond)
    ):
        agree(
            guide(cond, uncond, scale), expected, f"guidance of scale {scale}",
            "It goes from the unconditional prediction, scale times the way to the conditional.",
        )


@pytest.mark.exercise(5)
def test_rescale_matches_the_contrast_of_each_set():
    guided, conditional = 5 * torch.randn(2, 4, 3, 6, 6) + 1, torch.randn(2, 4, 3, 6, 6)
    guided[1] *= 9  # sets are rescaled each on its own...
    guided[:, 2] *= 4  # ...and the views of one set all alike
    hint = "Is the deviation that of a set, all its views together, and of ε_cond over ε_guided?"
    for phi in (1.0, 0.5, 0.0):
        found = rescale(guided, conditional, phi)
        for b in range(2):
            inside = guided[b].numpy().astype(np.float64)
            ratio = np.std(conditional[b].numpy().astype(np.float64)) / np.std(inside)
            expected = inside * (phi * ratio + 1 - phi)
            words = f"set {b} rescaled with φ = {phi} (Lin et al. eq. 15 and 16)"
            agree(found[b], expected, words, hint, rtol=1e-5)


@pytest.mark.exercise(3)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_step_is_the_formula(eta):
    """Its three terms one by one, by inputs for which the others are 0, then together."""
    x_t, eps, noise = np.random.default_rng(1).normal(size=(3, 2, 4, 4, 3, 3))
    a, a_prev = ABAR[601], ABAR[547]
    sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
    zero = 0 * x_t
    # Where x_t = sqrt(1 - ᾱ) ε, x̂_0 is 0.
    only_noise = np.sqrt(1 - a) * eps
    direction = np.sqrt(1 - a_prev - sigma**2) * eps
    of_x0 = np.sqrt(a_prev) * (x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)
    for words, hint, given, expected in (
        ("the x̂_0 term of DDIM eq. 12", "Is it sqrt(ᾱ_prev) x̂_0?", (x_t, zero, zero),
         np.sqrt(a_prev / a) * x_t),
        ("the direction term of DDIM eq. 12", "Is σ² subtracted: sqrt(1 - ᾱ_prev - σ²) ε?",
         (only_noise, eps, zero), direction),
        ("the noise term of DDIM eq. 12", "Is it σ noise, with σ as in eq. 16 and eta in it?",
         (zero, zero, noise), sigma * noise),
        ("DDIM eq. 12", "", (x_t, eps, noise), of_x0 + direction + sigma * noise),
    ):
        x, e, n = single(*given)
        agree(ddim_step(x, e, a, a_prev, eta, n), expected, f"{words}, eta {eta}", hint)


@pytest.mark.exercise(4)
def test_ddpm_step_samples_the_posterior():
    """Bayes: q(x_prev | x_t, x_0) is a product of two Gaussians, up to its norm.

    N(sqrt(a_prev) x_0, 1 - a_prev) and N(x_t; sqrt(alpha) x_prev, 1 - alpha).
    """
    a, a_prev = ABAR[300], ABAR[280]
    alpha = a / a_prev
    precision = 1 / (1 - a_prev) + alpha / (1 - alpha)

    def step(x0, x_t, noise):
        eps = (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)
        x, e, n = torch.tensor([[x_t], [eps], [noise]])
        return ddpm_step(x, e, a, a_prev, n).item()

    from_x0 = math.sqrt(a_prev) / (1 - a_prev) / precision
    from_x_t = math.sqrt(alpha) / (1 - alpha) / precision
    for words, hint, given, expected in (
        ("x̂_0's factor in the mean (DDPM eq. 7)", "sqrt(ᾱ_prev) (1 - α) / (1 - ᾱ_t)?",
         (1.0, 0.0, 0.0), from_x0),
        ("x_t's factor in the mean (DDPM eq. 7)", "sqrt(α) (1 - ᾱ_prev) / (1 - ᾱ_t)?",
         (0.0, 1.0, 0.0), from_x_t),
        ("the deviation of the posterior (DDPM eq. 7)",
         "Is it the square root of (1 - ᾱ_prev) / (1 - ᾱ_t) · (1 - α)?",
         (0.0, 0.0, 1.0), precision**-0.5),
        ("the step", "", (0.8, -0.3, 1.0), 0.8 * from_x0 - 0.3 * from_x_t + precision**-0.5),
    ):
        agree(step(*given), expected, words, f"α is ᾱ_t / ᾱ_prev. {hint}")


@pytest.mark.exercise(4)
def test_ddim_with_eta_one_is_ddpm():
    x_t, eps, noise = torch.randn(3, 2, 4, 4, 3, 3)
    ddim = ddim_step(x_t, eps, 0.3, 0.4, 1.0, noise)
    agree(ddpm_step(x_t, eps, 0.3, 0.4, noise), ddim, "DDPM's step, and DDIM's with eta 1")


def test_dpm_solver_step_is_algorithm_2():
    """In numpy and float64, with α, σ, λ, h and r as the paper has them."""
    rng = np.random.default_rng(2)
    x, now, before = rng.normal(size=(3, 2, 4, 4, 3, 3))
    abar = ABAR[[801, 640, 333]]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    lam = np.log(alpha / sigma)
    h_before, h = np.diff(lam)
    r = h_before / h
    D = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
    expected = sigma[2] / sigma[1] * x - alpha[2] * (np.exp(-h) - 1) * D
    x, now, before = (torch.tensor(v).float() for v in (x, now, before))
    step = dpm_solver_step(x, now, abar[1], abar[2], (before, abar[0]))
    assert np.allclose(step, expected, atol=1e-5), "not algorithm 2 of DPM-Solver++"


def test_a_first_step_of_the_solver_is_ddim():
    x, eps = torch.randn(2, 2, 4, 4, 3, 3)
    for t, t_prev in ((999, 0), (501, 480), (1, 0), (0, 0)):
        x0 = (x - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t])
        step = dpm_solver_step(x, x0, ABAR[t], ABAR[t_prev])
        torch.testing.assert_close(step, ddim_step(x, eps, ABAR[t], ABAR[t_prev]))


def test_a_step_of_the_solver_that_leaves_no_noise_is_the_prediction():
    """There λ is infinite, and so would the weights of algorithm 2 be."""
    x, x0, before = torch.randn(3, 2, 4, 4, 3, 3)
    for earlier in (None, (before, 0.3)):
        assert torch.equal(dpm_solver_step(x, x0, 0.5, 1.0, earlier), x0)


def test_a_step_of_the_solver_to_where_it_is_changes_nothing():
    x, x0, before = torch.randn(3, 2, 4, 4, 3, 3)
    assert torch.equal(dpm_solver_step(x, x0, 0.9991, 0.9991, (before, 0.9)), x)


# ---- a world in which the perfect network is known -------------------------------------------
# x_0 ~ N(MEAN, STD^2), so E[noise | x_t] is linear in x_t.

MEAN, STD = 0.7, 0.4


def perfect_eps(x, t):
    abar = torch.tensor(ABAR)[t].view(-1, 1, 1, 1, 1)
    return (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)


def moments_of_x0(abar):
    return math.sqrt(abar) * MEAN, math.sqrt(abar * STD**2 + 1 - abar)


def test_ddim_follows_the_flow_of_a_gaussian():
    """The exact flow keeps (x_t - mean_t) / std_t constant; more steps come nearer to it."""

    def end(steps):
        return sample_latents(
            perfect_eps,
            (1, 1, 1, 40, 50),
            steps,
            generator=torch.Generator().manual_seed(0),
        )

    noise = torch.randn(1, 1, 1, 40, 50, generator=torch.Generator().manual_seed(0))

    def exact(steps):
        mean_start, std_start = moments_of_x0(ABAR[timesteps(steps)[0]])
        mean_end, std_end = moments_of_x0(ABAR[0])
        return mean_end + std_end * (noise - mean_start) / std_start

    errors = [
        (end(steps) - exact(steps)).abs().max().item() for steps in (10, 47, 250, 999)
    ]
    assert errors == sorted(errors, reverse=True), f"more steps are not nearer: {errors}"
    assert errors[-1] < 0.01, f"999 steps end {errors[-1]:.3g} from the exact flow"


def test_the_solver_is_of_second_order_and_ddim_of_first():
    """Twice the steps, evenly in λ: a quarter of the error, and half of DDIM's."""
    start, end = (0.5 * math.log(a / (1 - a)) for a in (ABAR[999], ABAR[0]))
    noise = torch.linspace(-2, 2, 9)
    moments = [moments_of_x0(a) for a in (ABAR[999], ABAR[0])]
    exact = moments[1][0] + moments[1][1] * (noise - moments[0][0]) / moments[0][1]

    def error(steps, second_order):
        lambdas = np.linspace(start, end, steps + 1)
        abars = 1 / (1 + np.exp(-2 * lambdas))
        x, before = noise, None
        for abar, abar_prev in zip(abars, abars[1:]):
            mean, std = moments_of_x0(abar)
            x0 = MEAN + math.sqrt(abar) * STD**2 / std**2 * (x - mean)  # E[x_0 | x_t]
            x = dpm_solver_step(x, x0, abar, abar_prev, before)
            before = (x0, abar) if second_order else None
        return (x - exact).abs().max().item()

    for second_order, factor in ((True, 4), (False, 2)):
        falls = error(30, second_order) / error(60, second_order)
        assert falls == pytest.approx(factor, rel=0.1), f"the error falls by {falls:.2f}"


def test_with_more_steps_the_solver_nears_the_flow_faster_than_ddim():
    """Where a sampler stops, against where the exact flow from its first time step leads."""

    def error(steps, sampler):
        noise = torch.randn(1, 1, 1, 40, 50, generator=torch.Generator().manual_seed(0))
        mean_start, std_start = moments_of_x0(ABAR[timesteps(steps, sampler)[0]])
        mean_end, std_end = moments_of_x0(ABAR[0])
        exact = mean_end + std_end * (noise - mean_start) / std_start
        same = torch.Generator().manual_seed(0)
        drawn = sample_latents(perfect_eps, noise.shape, steps, sampler, generator=same)
        return (drawn - exact).abs().max().item()

    found = {sampler: [error(n, sampler) for n in (100, 400)] for sampler in ("ddim", "dpm++")}
    falls = {sampler: few / many for sampler, (few, many) in found.items()}
    assert falls["ddim"] == pytest.approx(4, rel=0.2), "the error of DDIM is not of first order"
    assert falls["dpm++"] > 8, f"the error falls by {falls['dpm++']:.1f}, no better than DDIM's"
    assert found["dpm++"][1] < found["ddim"][1] / 3


def test_ddim_in_numpy():
    x = (
        torch.randn(1, 1, 1, 4, 4, generator=torch.Generator().manual_seed(3))
        .double()
        .numpy()
    )
    times = [t + 1 for t in range(0, 1000, 20)][::-1]
    for t, t_prev in zip(times, times[1:] + [0]):
        eps = perfect_eps(torch.tensor(x), torch.tensor([t])).numpy()
        x0 = (x - np.sqrt(1 - ABAR[t]) * eps) / np.sqrt(ABAR[t])
        x = np.sqrt(ABAR[t_prev]) * x0 + np.sqrt(1 - ABAR[t_prev]) * eps
    ours = sample_latents(
        perfect_eps, (1, 1, 1, 4, 4), 50, generator=torch.Generator().manual_seed(3)
    )
    agree(ours, x, "fifty DDIM steps", "Does the last step land on ᾱ_0?", atol=1e-4)


def exact_moments(steps, eta):
    """Mean and deviation of a sampler's result, exactly.

    With a linear network a step is x <- A x + b + sigma noise.
    """
    times, mean, variance = timesteps(steps).tolist(), 0.0, 1.0
    for t, t_prev in zip(times, times[1:] + [0]):
        a, a_prev = ABAR[t], ABAR[t_prev]
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        slope = math.sqrt(1 - a) / (a * STD**2 + 1 - a)  # eps = slope (x - sqrt(a) MEAN)
        direction = math.sqrt(1 - a_prev - sigma**2)
        A = math.sqrt(a_prev / a) * (1 - math.sqrt(1 - a) * slope) + direction * slope
        b = (math.sqrt(a_prev * (1 - a)) - direction * math.sqrt(a)) * slope * MEAN
        mean, variance = A * mean + b, A**2 * variance + sigma**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(
    "sampler, eta, steps",
    [("ddpm", 1.0, 30), ("ddpm", 1.0, 300), ("ddim", 1.0, 30), ("ddim", 0.5, 30)],
)
def test_random_samplers_draw_from_the_right_distribution(sampler, eta, steps):
    x = sample_latents(
        perfect_eps,
        (2, 4, 4, 60, 60),
        steps,
        sampler,
        eta if sampler == "ddim" else 0.0,
        generator=torch.Generator().manual_seed(1),
    )
    mean, std = exact_moments(steps, eta)  # DDPM is DDIM with eta 1
    # 3 standard errors of 115,200 draws.
    agree(x.mean(), mean, "the mean of the samples", atol=0.004)
    hint = "Is the noise of a step new, and as large as σ?"
    agree(x.std(), std, "the deviation of the samples", hint, rtol=0.007, atol=0)
    if steps == 300:  # and that distribution is nearly x_0's own
        agree((mean, std), moments_of_x0(ABAR[0]), "x_0's own moments", rtol=0.04, atol=0)


def test_ddpm_with_all_steps():
    seen = []

    def eps_fn(x, t):
        seen.append(t.tolist())
        return perfect_eps(x, t)

    x = sample_latents(
        eps_fn, (2, 4, 4, 20, 20), 1000, "ddpm", generator=torch.Generator().manual_seed(1)
    )
    assert seen == [[t, t] for t in range(999, -1, -1)], "not each t once, from 999 down to 0"
    mean, std = moments_of_x0(ABAR[0])
    agree(x.mean(), mean, "the mean of the samples", atol=0.02)
    agree(x.std(), std, "the deviation of the samples", rtol=0.03, atol=0)


def test_one_seed_one_result():
    def draw(seed):
        return sample_latents(
            perfect_eps,
            (1, 4, 4, 3, 3),
            7,
            "ddpm",
            generator=torch.Generator().manual_seed(seed),
        )

    agree(draw(5), draw(5), "a second sample of the same seed", atol=0)
    assert not torch.equal(draw(5), draw(6)), "another seed gives the same sample"


def float32_cases():
    """(function, arguments) of bfloat16 and float32 latents."""
    x, noise = torch.randn(1, 4, 4, 3, 3).bfloat16(), torch.randn(1, 4, 4, 3, 3).bfloat16()
    t = torch.tensor([500])
    of = pytest.param
    return [
        of(q_sample, (x, t, noise), id="q_sample", marks=pytest.mark.exercise(1)),
        of(solve_x0, (x, noise, 0.3), id="solve_x0", marks=pytest.mark.exercise(2)),
        of(predict_x0, (x, t, noise), id="predict_x0"),
        of(ddim_step, (x, noise, 0.3, 0.4), id="ddim_step", marks=pytest.mark.exercise(3)),
        of(ddpm_step, (x, noise, 0.3, 0.4, noise), id="ddpm_step", marks=pytest.mark.exercise(4)),
        of(dpm_solver_step, (x, noise, 0.3, 0.4, (noise, 0.2)), id="dpm_solver_step"),
        of(rescale, (noise, noise, 0.5), id="rescale", marks=pytest.mark.exercise(5)),
        of(sample_latents, (lambda x, t: x.bfloat16(), (1, 4, 4, 3, 3), 2), id="sampler"),
    ]


@pytest.mark.parametrize("function, arguments", float32_cases())
def test_float32_under_autocast_and_from_bfloat16(function, arguments):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = function(*arguments)
    assert result.dtype == torch.float32, (
        f"{function.__name__} of bfloat16 latents is {result.dtype}, not float32: bfloat16 keeps "
        "8 bits, and 1 - ᾱ_0 is 0.00085. Is .float() missing?")


@pytest.mark.parametrize("function, arguments", float32_cases()[:-1])
def test_bfloat16_latents_are_computed_with_in_float32(function, arguments):
    exact = [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    if isinstance(exact[-1], tuple):
        exact[-1] = (exact[-1][0].float(), exact[-1][1])
    agree(function(*arguments), function(*exact), f"{function.__name__} of bfloat16 latents",
          "Is .float() missing before the first product?", atol=1e-6, rtol=1e-6)


def test_schedule_is_a_constant_to_the_compiler():
    """Once it is on the device, a compiled step reads it: it is not made and copied again."""
    graphs = []

    def keep(graph, _):
        graphs.append({node.name for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(predict_x0, backend=keep, fullgraph=True)
    x, eps = torch.randn(2, 2, 4, 4, 3, 3)
    for t in (torch.tensor([1, 981]), torch.tensor([0, 999])):
        agree(compiled(x, t, eps), predict_x0(x, t, eps), "x̂_0 as a compiler has it", atol=0)
    made = graphs[0] & {"cumprod", "linspace", "to", "copy_"}
    assert len(graphs) == 1 and not made, "a compiled step makes the schedule anew"
    assert alphas_cumprod() is alphas_cumprod(torch.device("cpu"))


def test_the_steps_of_a_sampler_show_what_it_believes():
    """Each step yields x and the x̂_0 from which DDIM eq. 12 makes it; the last x is the sample."""
    shape = (1, 2, 1, 3, 3)

    def states():
        noise = torch.Generator().manual_seed(2)
        return list(sampling_steps(perfect_eps, shape, 5, "ddim", generator=noise))

    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    times = timesteps(5).tolist()
    landings = times[1:] + [0]
    for t, t_prev, (x_next, x0) in zip(times, landings, states()):
        eps = perfect_eps(x, torch.tensor([t]))
        expected_x0 = (x - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t])
        x = math.sqrt(ABAR[t_prev]) * expected_x0 + math.sqrt(1 - ABAR[t_prev]) * eps
        agree(x0, expected_x0, f"the x̂_0 that step {t} yields", rtol=1e-3, atol=1e-3)
        agree(x_next, x, f"the x that step {t} yields", rtol=1e-3, atol=1e-3)
    noise = torch.Generator().manual_seed(2)
    sample = sample_latents(perfect_eps, shape, 5, generator=noise)
    agree(states()[-1][0], sample, "the last x that is yielded", atol=0)


def test_the_network_is_asked_in_one_place():
    """The loss is of predict_noise's answer, float32 whatever the network returns."""
    asked = []

    def unet(x_t, t, context, camera):
        asked.append((x_t, t, context, camera))
        return torch.zeros_like(x_t).bfloat16()

    x0, context, camera = torch.randn(2, 4, 4, 3, 3), torch.randn(2, 5, 8), torch.randn(2, 4, 16)
    torch.manual_seed(3)
    loss = denoising_loss(unet, x0, context, camera)
    torch.manual_seed(3)
    t, noise = torch.randint(1000, (2,)), torch.randn_like(x0)
    hint = "Is it a mean? Are the time steps drawn before the noise?"
    agree(loss, (noise**2).mean(), "the loss of a network that says 0", hint)
    ((x_t, t_asked, context_asked, camera_asked),) = asked
    agree(x_t, q_sample(x0, t, noise), "the x_t that the network is shown")
    agree(t_asked, t, "the t that the network is told", atol=0)
    assert context_asked is context and camera_asked is camera, "text and camera go as they are"
    dtype = predict_noise(unet, x_t, t, context).dtype
    assert dtype == torch.float32, f"the predicted noise is {dtype}, not float32"


def test_squared_errors_are_the_formula_number_by_number():
    """In numpy and float64, for a network whose answer depends on all that it is given."""
    rng = np.random.default_rng(4)
    x0, noise = rng.normal(size=(2, 3, 4, 2, 5, 5))
    context, camera = rng.normal(size=(3, 7, 8)), rng.normal(size=(3, 4, 16))
    t = np.array([3, 500, 998])

    def unet(x_t, t, context, camera):
        shift = context.sum((1, 2)) / 10 + camera.sum((1, 2)) / 10 + t / 1000
        return 0.3 * x_t + shift.view(-1, 1, 1, 1, 1)

    arguments = [torch.tensor(a).float() for a in (x0, context, camera, noise)]
    arguments.insert(3, torch.tensor(t))
    found = squared_errors(unet, *arguments)

    abar = ABAR[t].reshape(3, 1, 1, 1, 1)
    x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
    shift = context.sum((1, 2)) / 10 + camera.sum((1, 2)) / 10 + t / 1000
    expected = (0.3 * x_t + shift.reshape(3, 1, 1, 1, 1) - noise) ** 2
    assert found.dtype == torch.float32, f"the errors are {found.dtype}, not float32"
    agree(found, expected, "(ε - ε_θ)²", "Number by number, not yet the mean.", atol=1e-4)
    short = squared_errors(lambda *given: unet(*given).bfloat16(), *arguments)
    assert short.dtype == torch.float32, "the errors are not float32 if the network is not"


def test_noise_is_moved_to_the_device():
    """It is drawn where the generator lives. PyTorch's device "meta" stands for a GPU here."""
    devices = []

    def eps_fn(x, t):
        devices.append((x.device.type, t.device.type))
        return x

    generator = torch.Generator().manual_seed(0)
    states = sampling_steps(
        eps_fn, (1, 1, 1, 2, 2), 2, "ddim", generator=generator, device=torch.device("meta"))
    assert all(x.device.type == "meta" for x, _ in states)
    assert devices == [("meta", "meta")] * 2


def test_a_sample_is_not_differentiated():
    weight = torch.ones((), requires_grad=True)
    for x, x0 in sampling_steps(lambda x, t: weight * x, (1, 1, 1, 2, 2), 2, "ddim"):
        assert not x.requires_grad and not x0.requires_grad, "a graph through all steps is kept"
