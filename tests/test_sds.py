"""Score distillation: the loss against its formula, the draws against their ranges, and a step."""
import contextlib
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agree import agree
from mvd import MVDream, diffusion, nerf, render, sds
from mvd.hashgrid import HashGrid, HashGridConfig
from mvd.tools.device import GraphedStep, side_stream
from mvd.unet import MultiViewUNet, UNetConfig
from scripts import saved_model
from test_model import small_config

TIME = 400
GUIDANCE = 7.0

# ---- the loss --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    """A small UNet in which no weight is zero."""
    torch.manual_seed(0)
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        head_dim=16,
        context_dim=8,
    )
    unet = MultiViewUNet(config)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return unet.requires_grad_(False)


@pytest.fixture
def case():
    """Two sets of four views, and what the UNet is asked about them."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "x0": normal(2, 4, 4, 8, 8),
        "noise": normal(2, 4, 4, 8, 8),
        "t": torch.tensor([TIME, TIME]),
        "context": normal(4, 5, 8),
        "camera": normal(2, 4, 16),
    }


def distil(unet, case, **options):
    """What the loss says: (its gradient by the rendered latents, the predicted clean latents)."""
    x0 = case["x0"].clone().requires_grad_()
    loss, x0_hat = sds.distillation_loss(
        unet,
        x0,
        case["t"],
        case["context"],
        case["camera"],
        guidance=GUIDANCE,
        noise=case["noise"],
        **options,
    )
    gradient, = torch.autograd.grad(loss, x0)
    return gradient, x0_hat


def guided_noise(unet, case):
    """(x_t, conditional ε̂, guided ε̂): both sets at once, one call per half of guidance."""
    alpha = diffusion.alphas_cumprod()[TIME].double()
    signal = alpha.sqrt() * case["x0"].double()
    noise = (1 - alpha).sqrt() * case["noise"].double()
    x_t = (signal + noise).float()
    prompts, negatives = case["context"].split(2)
    conditional = unet(x_t, case["t"], prompts, case["camera"])
    unconditional = unet(x_t, case["t"], negatives, case["camera"])
    guided = unconditional + GUIDANCE * (conditional - unconditional)
    return x_t, conditional, guided


@pytest.mark.exercise(12)
def test_gradients_do_not_run_through_the_network(unet, case):
    """Neither of its input nor of its weights: without that a step would take twice the memory."""
    seen = []

    def watched(x_t, t, context, camera):
        seen.append(x_t.requires_grad or torch.is_grad_enabled())
        return unet(x_t, t, context, camera)

    distil(watched, case)
    assert not any(seen), "the UNet is asked with gradients on: is torch.no_grad() missing?"


@pytest.mark.exercise(12)
@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_x0_loss_without_rescale_is_sds_with_weight_sigma_over_alpha(unet, case, mode):
    if mode == "2d":
        case["camera"] = None
    alpha = diffusion.alphas_cumprod()[TIME]
    _, _, eps = guided_noise(unet, case)
    weight = (1 - alpha).sqrt() / alpha.sqrt()
    expected = weight * (eps - case["noise"]) / 8
    gradient, _ = distil(unet, case, rescale=0.0)
    words = "the gradient of ½‖x_0 - sg(x̂_0)‖² / (B·V), which is sqrt((1-ᾱ)/ᾱ) (ε̂ - ε) / 8"
    hint = "Is x̂_0 a constant? Is the sum over all, halved, divided by all views, not by numbers?"
    agree(gradient, expected, words, hint, rtol=1e-4)


@pytest.mark.exercise(12)
def test_classic_gradient_against_its_formula(unet, case):
    _, _, eps = guided_noise(unet, case)
    weight = 1 - diffusion.alphas_cumprod()[TIME]
    expected = weight * (eps - case["noise"]) / 8
    gradient, _ = distil(unet, case, kind="sds")
    hint = "With the aim x_0 - w (ε̂ - ε), a constant, the gradient of ½‖x_0 - aim‖² is that."
    agree(gradient, expected, "the SDS gradient (1 - ᾱ)(ε̂ - ε) / (B·V)", hint, rtol=1e-4)


@pytest.mark.exercise(12)
def test_the_loss_is_half_the_square(unet, case):
    """The value, the prediction that is returned with it, and that it is of one number format."""
    loss, x0_hat = sds.distillation_loss(
        unet, case["x0"].double(), case["t"], case["context"], case["camera"],
        guidance=GUIDANCE, noise=case["noise"],
    )
    expected = 0.5 * ((case["x0"] - x0_hat) ** 2).sum() / 8
    agree(loss, expected, "the loss, ½‖x_0 - x̂_0‖² / (B·V)", rtol=1e-5)
    for name, result in (("loss", loss), ("x̂_0", x0_hat)):
        assert result.dtype == torch.float32, (
            f"the {name} of float64 latents is {result.dtype}, not float32")
    assert not x0_hat.requires_grad, "x̂_0 holds a graph: the UNet is not to be differentiated"


@pytest.mark.exercise(12)
def test_rescale_against_its_formula(unet, case):
    alpha = diffusion.alphas_cumprod()[TIME].double()
    x_t, conditional, guided = guided_noise(unet, case)

    def clean(eps):
        return (x_t.double() - (1 - alpha).sqrt() * eps.double()) / alpha.sqrt()

    x0_guided, x0_text = clean(guided), clean(conditional)
    for b in range(2):
        ratio = x0_text[b].std() / x0_guided[b].std()
        x0_guided[b] = 0.5 * x0_guided[b] + 0.5 * x0_guided[b] * ratio
    expected = (case["x0"].double() - x0_guided) / 8
    gradient, x0_hat = distil(unet, case, rescale=0.5)
    hint = "Is x̂_0 rescaled over a whole set (Lin et al. §3.4), and the loss taken with that?"
    agree(x0_hat, x0_guided, "the rescaled x̂_0", hint, rtol=1e-3, atol=1e-3)
    agree(gradient, expected, "the gradient with rescale 0.5", hint, rtol=1e-3, atol=1e-4)


def test_a_network_that_predicts_v_has_the_same_target(unet, case, monkeypatch):
    """Only `diffusion.predict_noise` knows what the network predicts; its docstring says how."""
    x_t, _, _ = guided_noise(unet, case)
    question = x_t, case["t"], case["context"], case["camera"]
    options = dict(guidance=GUIDANCE, rescale=0.5)
    x0_expected, eps_expected = sds.predict_sets(unet, *question, **options)

    def velocity(x_t, t, context, camera):
        eps = unet(x_t, t, context, camera)
        abar = diffusion.alphas_cumprod()[t].view(-1, 1, 1, 1, 1)
        x0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0

    def predict_noise(network, x_t, t, context, camera=None):
        v = network(x_t, t, context, camera).float()
        abar = diffusion.alpha_bar(t, x_t)
        return abar.sqrt() * v + (1 - abar).sqrt() * x_t

    monkeypatch.setattr(diffusion, "predict_noise", predict_noise)
    x0, eps = sds.predict_sets(velocity, *question, **options)
    words = "of a network that predicts v, and of the same that predicts ε"
    agree(x0, x0_expected, f"x̂_0 {words}", rtol=1e-4, atol=1e-4)
    agree(eps, eps_expected, f"ε̂ {words}", rtol=1e-4, atol=1e-4)


def test_the_sets_of_a_batch_do_not_see_each_other(unet, case):
    x0, t, camera = case["x0"], case["t"], case["camera"]
    options = dict(guidance=GUIDANCE, rescale=0.5)
    with torch.no_grad():
        together = sds.predict_sets(unet, x0, t, case["context"], camera, **options)
        for i in range(2):
            one = slice(i, i + 1)
            context = case["context"][i::2]
            alone = sds.predict_sets(unet, x0[one], t[one], context, camera[one], **options)
            for found, expected in zip(alone, together):
                agree(found[0], expected[i], f"the target of set {i} alone, and in a batch")


@pytest.mark.exercise(12)
def test_noise_does_not_depend_on_the_layout_in_memory(unet, case):
    plain = case["x0"]
    channels_last = plain.movedim(2, -1).contiguous().movedim(-1, 2)
    losses = []
    for x0 in (plain, channels_last):
        torch.manual_seed(1)
        loss, _ = sds.distillation_loss(
            unet, x0, case["t"], case["context"], case["camera"], guidance=GUIDANCE
        )
        losses.append(loss)
    hint = "Is the noise drawn like a contiguous x_0?"
    agree(losses[1], losses[0], "the loss of latents that lie channels last", hint, rtol=1e-5)


# ---- random draws ----------------------------------------------------------------------------

def test_time_range_is_annealed():
    for progress, ends in ((0.0, (0.98, 0.98)), (0.4, (0.5, 0.74)), (0.8, (0.02, 0.5))):
        words = f"the range of t when {progress:.0%} are done, of an anneal of 80%"
        agree(sds.time_range(progress), ends, words)
    assert sds.time_range(1.0) == sds.time_range(0.8), "the range moves on after `anneal`"


def test_time_is_one_integer_for_all_sets():
    torch.manual_seed(0)
    draws = [sds.draw_time(0.2, 0.4, 3, "cpu") for _ in range(500)]
    draws = torch.stack(draws)
    assert (draws == draws[:, :1]).all(), "the sets of a batch differ in their time"
    assert draws.dtype == torch.int64, f"a time step is {draws.dtype}, not int64"
    agree(draws.min(), 202, "the least of 500 times from 200 on", atol=2)
    agree(draws.max(), 397, "the greatest of 500 times below 400", atol=2)
    last = sds.draw_time(1.0, 1.0, 1, "cpu")
    agree(last, 999, "the last time step", atol=0)


@pytest.mark.exercise(13)
@pytest.mark.parametrize("views", [4, 6])
def test_cameras_are_where_the_paper_puts_them(views):
    torch.manual_seed(0)
    c2w, fov = sds.draw_cameras(4000, views, "cpu")
    position = c2w[..., :3, 3]
    distance = position.norm(dim=-1)
    elevation = torch.rad2deg(torch.asin(position[..., 2] / distance))
    azimuth = torch.rad2deg(torch.atan2(position[..., 1], position[..., 0]))
    turns = azimuth.diff(dim=1) % 360
    even = torch.full((4000, views - 1), 360 / views)
    agree(turns, even, "the degrees from view to view", "They are 360 / views.", atol=0.01)
    hint = "The first azimuth is drawn too, and the views turn with it."
    first = azimuth[:, 0] % 360
    agree(first.mean(), 180 / views, "the mean azimuth of the first view", hint, atol=6 / views)
    assert first.max() > 0.95 * 360 / views, "the first view does not reach the second's place"
    of_set = elevation[:, :1].expand_as(elevation)
    agree(elevation, of_set, "the elevation of a set's views, and of its first", atol=0.01)
    agree(distance, distance[:, :1].expand_as(distance), "the distance of a set's views")
    assert elevation.min() > -0.01, "a camera looks from below"
    assert elevation.max() < 30.01, "a camera stands higher than 30 degrees"
    hint = "The distance is U[0.8, 1] / tan(fov / 2)."
    share = distance[:, 0] * torch.tan(torch.deg2rad(fov) / 2)
    middle = torch.full_like(share, 0.9)
    agree(share, middle, "distance · tan(fov / 2), 0.8 to 1", hint, atol=0.1001)
    agree(share.mean(), 0.9, "the mean of distance · tan(fov / 2)", hint, atol=0.005)
    agree(fov, torch.full_like(fov, 37.5), "the fields of view, 15 to 60", atol=22.501)
    agree(fov.mean(), 37.5, "the mean field of view", "Is it uniform in degrees?", atol=1)
    # The mean of half U[0, 30] and half asin(U[0, 1/3]); that of the latter is its integral,
    # ∫ asin(u) du = u asin(u) + sqrt(1 - u²).
    u = 1 / 3
    integral = u * math.asin(u) + math.sqrt(1 - u * u) - 1
    on_sphere = math.degrees(integral / u)
    hint = "Half of the sets: U[0, 30] degrees; half: asin(U[0, 1/3])."
    agree(elevation[:, 0].mean(), (15 + on_sphere) / 2, "the mean elevation", hint, atol=0.4)
    # Above the highest of the second kind, 19.47 degrees, is a third of the first.
    high = (elevation[:, 0] > math.degrees(math.asin(u))).float().mean()
    agree(high, 0.5 * (1 - math.degrees(math.asin(u)) / 30), "the share above 19.5 degrees", hint,
          atol=0.025)


# ---- one step --------------------------------------------------------------------------------

SETTINGS = dict(
    levels=2,
    log2_entries=10,
    coarsest=4,
    finest=16,
    hidden=8,
    step_size=0.1,
    negative="asset",
    occupancy_cells=32,
)
STAGE = sds.Stage(size=8, sets=1, budget=1024)
# Everything that the defaults leave out.
UNUSUAL = {"shading": True, "mode": "2d", "grey_background": True, "loss": "sds"}
PARTS = ("encoding", "to_density", "to_albedo", "to_background")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A model of random weights that draws 32 pixels."""
    config = small_config()
    config.size = 32
    return saved_model(tmp_path_factory.mktemp("model"), config)


def make_distillation(model_file, device="cpu", *, stage=STAGE, compiled=False, **settings):
    """A Distillation in the middle of a run, with the same field on every device."""
    s = sds.DistillSettings("a red bulldog", **{**SETTINGS, **settings})
    model = MVDream.load(model_file)
    context = model.embed([s.prompt, s.negative])
    torch.manual_seed(s.seed)
    distillation = sds.Distillation(s, model, context)
    # Its own U(±1e-4) would hide what depends on it.
    torch.nn.init.normal_(distillation.nerf.encoding.table, std=0.5)
    distillation.occupancy.update(distillation.nerf.density, s.step_size, everywhere=True)
    if device != "cpu":
        distillation = moved(distillation, device)
    distillation.t_low.fill_(0.4)
    distillation.t_high.fill_(0.6)
    distillation.lit.fill_(1.0)
    distillation.orientation.fill_(1000.0)
    if compiled:
        model.compile_networks()
    distillation.begin(stage, compiled)
    return distillation


def moved(distillation, device):
    """The same on another device. On "meta", tensors have no values."""
    model = distillation.model.to(device)
    other = sds.Distillation(distillation.s, model, distillation.context.to(device))
    if device == "meta":
        # AdamW would read its count of steps.
        other.optimizer = torch.optim.SGD(other.nerf.parameters(), lr=1e-3)
        return other
    other.nerf.load_state_dict(distillation.nerf.state_dict())
    other.occupancy.load_state_dict(distillation.occupancy.state_dict())
    return other


def largest_gradients(field):
    """{part of the field: its largest gradient}."""
    largest = dict.fromkeys(PARTS, 0.0)
    for name, weight in field.named_parameters():
        part = name.split(".")[0]
        largest[part] = max(largest[part], weight.grad.abs().max().item())
    return largest


def rendered_anew(distillation):
    """What `render_images` makes of new random draws."""
    draws = distillation.draw()
    return distillation.render_images(draws, distillation.find_samples(draws))


@pytest.fixture
def rendered(monkeypatch):
    """A list to which each rendering of a step adds (its background [R, 3], its Rendering)."""
    rendered, shade_samples = [], render.shade_samples

    def recording(field, samples, origins, directions, background, **more):
        seen = shade_samples(field, samples, origins, directions, background, **more)
        rendered.append((background.detach(), seen))
        return seen

    monkeypatch.setattr(render, "shade_samples", recording)
    return rendered


def test_what_changes_in_the_course_of_a_run(model_file):
    """The noise falls until 0.8 of this run; the light goes on at 0.4."""
    schedule = dict(t_start=0.9, t_min=0.1, t_max=0.5, anneal=0.8, shading_from=0.4)
    run = make_distillation(model_file, **schedule)
    for progress, *expected in (
        (0.0, 0.9, 0.9, 0.0, 10.0),
        (0.2, 0.7, 0.8, 0.0, 505.0),
        (0.4, 0.5, 0.7, 1.0, 1000.0),
        (0.8, 0.1, 0.5, 1.0, 1000.0),
        (1.0, 0.1, 0.5, 1.0, 1000.0),
    ):
        run.anneal(progress)
        found = [x.item() for x in (run.t_low, run.t_high, run.lit, run.orientation)]
        assert found == pytest.approx(expected, rel=1e-5), (
            f"t_low, t_high, lit and the weight of the orientation loss after {progress} of a run"
        )


@pytest.mark.parametrize("loss", ["x0", "sds"])
@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_a_step_reaches_every_part_of_the_field(model_file, loss, mode):
    distillation = make_distillation(model_file, loss=loss, mode=mode, random_background=0.0)
    field = distillation.nerf
    before = {name: weight.detach().clone() for name, weight in field.named_parameters()}
    assert torch.isfinite(distillation.step().loss), "the loss is not finite"
    for part, gradient in largest_gradients(field).items():
        assert gradient > 0, f"{part} gets no gradient"
    for name, weight in field.named_parameters():
        assert not torch.equal(weight, before[name]), f"{name} has not moved"


def test_renders_are_encoded_by_the_light_encoder_if_there_is_one(tmp_path):
    config = small_config()
    config.size, config.vae.light = 32, (32, 32)
    model_file = saved_model(tmp_path, config)
    images = 2 * torch.rand(2, 4, 3, 32, 32) - 1
    for light in (True, False):
        distillation = make_distillation(model_file, light_encoder=light)
        vae = distillation.model.vae
        vae.quant_conv.bias[8:] = -30  # a posterior without noise
        mean, _ = vae.encode(images.flatten(0, 1), vae.light if light else vae.encoder)
        agree(
            distillation.encode(images),
            vae.config.scale_factor * mean.unflatten(0, (2, 4)),
            f"the latents of renders, with light = {light}",
            atol=1e-5,
        )


class OtherGrid(HashGrid):
    """A second encoding. It differs in its name alone."""


class OtherConfig(HashGridConfig):
    """Its configuration."""


def test_the_encoding_and_the_learning_rates_are_settings(model_file, monkeypatch):
    monkeypatch.setitem(nerf.ENCODINGS, "other", (OtherGrid, OtherConfig))
    distillation = make_distillation(model_file, encoding="other", lr_grid=0.03, lr=0.002)
    encoding = distillation.nerf.encoding
    assert type(encoding) is OtherGrid, "the encoding that --encoding names is not used"
    assert encoding.config == OtherConfig(2, 10, 4, 16, 0.03), "its settings did not reach it"
    of_grid, of_networks = distillation.optimizer.param_groups
    rates = of_grid["lr"], of_networks["lr"]
    agree(rates, (0.03, 0.002), "the learning rates of grid and networks", atol=0)
    assert of_grid["params"][0] is encoding.table, "the first group is not the grid's"
    assert torch.isfinite(distillation.step().loss), "the loss is not finite"


@pytest.mark.parametrize("settings", [{}, {"shading": True}, {"views": 3}])
def test_a_step_says_how_large_the_gradient_is_and_how_opaque_the_field(
    model_file, rendered, settings
):
    stage = sds.Stage(size=8, sets=2, budget=1024)
    distillation = make_distillation(model_file, stage=stage, **settings)
    result = distillation.step()
    squares = 0.0
    for weight in distillation.nerf.parameters():
        squares += weight.grad.double().square().sum().item()
    agree(result.gradient, math.sqrt(squares), "the gradient's norm", rtol=1e-5, atol=0)
    # The opacity of a ray is the sum of its samples' weights.
    (_, seen), = rendered
    views = distillation.s.views
    mean = seen.weights.double().sum().item() / (2 * views * 8 * 8)
    assert 0 < mean < 1, "the case shows nothing, or nothing else than the object"
    agree(result.opacity, mean, "the mean opacity", "It is of all rays.", rtol=1e-5, atol=0)
    assert result.images.shape == (2, views, 3, 32, 32), "the images have another shape"
    latents = 2, views, 8, 4, 4
    assert result.x_t.shape == result.x0_hat.shape == latents, "latents have another shape"
    for name, number in result._asdict().items():
        assert not number.requires_grad, f"{name} of a step holds a graph"
        assert torch.isfinite(number).all(), f"{name} of a step is not finite"


def test_the_losses_differ_and_so_do_their_gradients(model_file):
    tables = []
    for loss in ("x0", "sds"):
        distillation = make_distillation(model_file, loss=loss)
        distillation.step()
        tables.append(distillation.nerf.encoding.table.grad)
    assert not torch.allclose(*tables), "--loss changes nothing"


@pytest.mark.parametrize(
    "share, steps, least, most", [(0.0, 4, 4, 4), (0.5, 16, 4, 12), (1.0, 4, 0, 0)]
)
def test_random_background_replaces_the_environment_in_that_share_of_the_steps(
    model_file, share, steps, least, most
):
    distillation = make_distillation(model_file, random_background=share)
    environment = 0
    for _ in range(steps):
        distillation.step()
        environment += largest_gradients(distillation.nerf)["to_background"] > 0
    assert least <= environment <= most, (
        f"{environment} of {steps} steps show the environment, not {least} to {most}"
    )


@pytest.mark.parametrize("grey", [False, True])
def test_backgrounds_are_one_colour_or_one_grey(model_file, rendered, grey):
    settings = dict(random_background=1.0, grey_background=grey)
    make_distillation(model_file, **settings).step()
    (background, _), = rendered
    assert (background == background[0]).all(), "the background is not plain"
    red, green, blue = background[0]
    assert (red == green == blue) == grey, "a colour is grey, or a grey is coloured"


def test_shading_draws_textureless_steps(model_file):
    distillation = make_distillation(model_file, shading=True)
    with_albedo = 0
    for _ in range(16):
        assert torch.isfinite(distillation.step().loss), "the loss is not finite"
        gradients = largest_gradients(distillation.nerf)
        assert gradients["encoding"] > 0, "the encoding gets no gradient"
        with_albedo += gradients["to_albedo"] > 0
    # 62.5% of the steps show the albedo.
    assert 7 <= with_albedo <= 13, f"{with_albedo} of 16 steps show the albedo, not about 10"


def test_smoothness_is_added_where_the_rays_see_something(model_file, monkeypatch):
    asked, smoothness_loss = [], render.smoothness_loss

    def recording(nerf, points, offsets):
        asked.append((points, offsets))
        return smoothness_loss(nerf, points, offsets)

    monkeypatch.setattr(render, "smoothness_loss", recording)
    losses, tables = [], []
    # Not 0, with which a step draws fewer random numbers.
    for weight in (1e-6, 100.0):
        distillation = make_distillation(model_file, smoothness=weight, smooth_points=64)
        losses.append(distillation.step().loss)
        tables.append(distillation.nerf.encoding.table.grad)
    assert torch.equal(*losses), "the loss that is reported includes the smoothness"
    assert not torch.allclose(*tables), "the smoothness moves nothing"
    points, offsets = asked[0]
    assert points.shape == offsets.shape == (64, 3), "not 64 points and offsets"
    agree(offsets.std(), sds.NEARBY, "the deviation of the offsets", rtol=0.3, atol=0)


def test_shading_adds_the_orientation_loss(model_file):
    losses, tables = [], []
    for weight in (0.0, 1000.0):
        # The draws are the same.
        distillation = make_distillation(model_file, shading=True)
        distillation.orientation.fill_(weight)
        losses.append(distillation.step().loss)
        tables.append(distillation.nerf.encoding.table.grad)
    assert torch.equal(*losses), "the loss that is reported includes the orientation loss"
    assert not torch.allclose(*tables), "the orientation loss moves nothing"


def test_a_step_makes_the_penalties_smaller(model_file, monkeypatch):
    """A step with no loss but a penalty, the sum of the table: its gradient is 1 everywhere."""
    distillation = make_distillation(model_file)
    monkeypatch.setattr(sds, "distillation_loss", lambda unet, x0, *a, **b: (0 * x0.sum(), x0))
    table = distillation.nerf.encoding.table
    distillation.penalty = lambda *_: table.sum()
    distillation.step()
    agree(table.grad, 1.0, "the gradient of a penalty that is the sum of the table",
          "Is the penalty added to the loss?", atol=1e-6)


@pytest.mark.parametrize("name, weight", [
    ("smoothness_loss", "smoothness"), ("orientation_loss", "orientation"),
])
def test_a_penalty_is_added_not_taken_away(model_file, monkeypatch, name, weight):
    """More weight changes the field's gradient by that of the penalty itself, with its sign."""
    asked, penalty = [], getattr(render, name)
    monkeypatch.setattr(render, name, lambda *inputs: asked.append(penalty(*inputs)) or asked[-1])
    gradients = []
    for size in (1.0, 1001.0):
        settings = dict(shading=True, smooth_points=64, smoothness=1.0)
        if weight == "smoothness":
            settings["smoothness"] = size
        distillation = make_distillation(model_file, **settings)
        if weight == "orientation":
            distillation.orientation.fill_(size)
        table = distillation.nerf.encoding.table
        draws = distillation.draw()
        samples = distillation.find_samples(draws)
        _, _, total = distillation.render_images(draws, samples)
        gradients.append(torch.autograd.grad(total, table, retain_graph=True)[0])
    own, = torch.autograd.grad(asked[-1], table)
    change = gradients[1] - gradients[0]
    largest = own.abs().max().item()
    assert largest > 0, "the case has no penalty"
    words = f"what 1000 more {weight} add to the gradient"
    agree(change, 1000 * own, words, "Is its sign right?", rtol=1e-3, atol=largest)


def test_the_kinds_of_light(model_file):
    """A quarter shows the albedo alone, three eighths a lamp, three eighths a lamp on white."""
    distillation = make_distillation(model_file, shading=True)
    draws = distillation.draw()
    for lit_kind, lit, expected in (
        (0.1, 1.0, (0.0, 0.0)),
        (0.4, 1.0, (0.7, 0.0)),
        (0.9, 1.0, (0.7, 1.0)),
        (0.4, 0.0, (0.0, 0.0)),
        (0.9, 0.0, (0.0, 0.0)),
    ):
        distillation.lit.fill_(lit)
        kind, softness = torch.tensor(lit_kind), torch.tensor(0.7)
        shading = distillation.shading(draws._replace(lit_kind=kind, softness=softness))
        found = float(shading.softness), float(shading.textureless)
        case = f"the kind {lit_kind}, the light {'on' if lit else 'off'}"
        agree(found, expected, f"softness and textureless of {case}")
    pixels = distillation.stage.size ** 2
    lamps = shading.light.view(-1, pixels, 3)
    assert (lamps == draws.light.reshape(-1, 1, 3)).all(), "a ray has the lamp of another view"


def test_a_step_renders_what_its_samples_show(model_file, rendered):
    """Ray by ray in a loop (NeRF eq. 3): a wrong transmittance is a wrong picture."""
    distillation = make_distillation(model_file, random_background=0.0)
    images, opacity, _ = rendered_anew(distillation)
    (background, seen), = rendered
    with torch.no_grad():
        density, albedo = distillation.nerf(seen.samples.position)
    colours = background.double().clone()
    left = torch.ones(len(colours), dtype=torch.float64)
    width = seen.samples.width.double()
    for i, ray in enumerate(seen.samples.ray.tolist()):
        if i == 0 or ray != before:
            colour, light = 0, torch.tensor(1.0, dtype=torch.float64)
        alpha = 1 - torch.exp(-density[i].double() * width[i])
        colour = colour + light * alpha * albedo[i].double()
        light = light * (1 - alpha)
        colours[ray] = colour + light * background[ray].double()
        left[ray] = light
        before = ray
    assert left.min() < 0.5, "the field hides nothing: the test would see no mistake"
    wanted = colours.view(4, STAGE.size, STAGE.size, 3).movedim(-1, 1)
    wanted = torch.nn.functional.interpolate(wanted, images.shape[-2:], mode="bilinear")
    words = "the pictures of a step, and volume rendering of its samples in a loop"
    agree(images[0], 2 * wanted - 1, words, "Is the light multiplied in?", atol=1e-4)
    agree(opacity, 1 - left.mean(), "the mean opacity of a step", atol=1e-4)


def test_a_large_rendering_is_averaged_to_the_models_size(model_file, monkeypatch):
    """Of columns of which every fourth is white, a quarter of the light is left, everywhere."""
    stage = sds.Stage(size=128, sets=1, budget=1024)
    distillation = make_distillation(model_file, stage=stage, smoothness=0.0)
    columns = (torch.arange(128) % 4 == 0).float().view(1, 1, 128, 1)
    rgb = columns.expand(4, 128, 128, 3).reshape(-1, 3)
    field = distillation.nerf
    monkeypatch.setattr(render, "shade_samples", lambda *given, **named: render.Rendering(
        rgb, torch.ones(len(rgb)), None, None, None, None, None))
    monkeypatch.setattr(field, "background", lambda directions: directions.abs())
    images, _, _ = rendered_anew(distillation)
    assert images.shape[-1] == 32
    middle = images[..., 2:-2]
    assert (middle + 0.5).abs().max() < 0.02, "pixels were left out: is it antialiased?"


class WatchCopies(TorchDispatchMode):
    """Lists the operations that copy numbers to the device "meta".

    They have tensors of that device and of the CPU. A tensor that is made of Python numbers may
    show as lift_fresh.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, result))
        places = {leaf.is_meta for leaf in leaves if isinstance(leaf, torch.Tensor)}
        made = "lift_fresh" in str(function) and result.is_meta
        if made or len(places) > 1:
            self.found.append(str(function))
        return result


class WatchNumbers(TorchFunctionMode):
    """Lists the calls of the step's own code that make a tensor there of Python numbers."""

    makers = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in self.makers and result.is_meta:
            *_, data = args
            if not isinstance(data, torch.Tensor):
                self.found.append(f"{function.__name__}({data})")
        return result


@pytest.mark.parametrize("settings", [{}, UNUSUAL], ids=["usual", "unusual"])
def test_a_step_has_static_shapes_and_copies_nothing_to_the_device(model_file, settings):
    """PyTorch's device "meta" has no data: what a shape depends on does not exist there.

    Reading a number raises.
    """
    distillation = make_distillation(model_file, "meta", **settings)
    # The noise schedule is copied once.
    try:
        distillation.step()
    except (NotImplementedError, RuntimeError) as error:
        # Of torch.nonzero, which a boolean index calls, and of `.item()`.
        pytest.fail(f"in a step a shape depends on data, or a number is read from it: {error}")
    with WatchCopies() as copies, WatchNumbers() as numbers:
        result = distillation.step()
    for name in ("loss", "gradient", "opacity"):
        assert getattr(result, name).shape == (), f"{name} is not one number"
    assert copies.found == [], "a step copies tensors to the device"
    assert numbers.found == [], "a step copies Python numbers to the device"


# ---- one step on a GPU -----------------------------------------------------------------------

CUDA = torch.device("cuda")


@contextlib.contextmanager
def waiting_forbidden():
    """Within this context CUDA raises an error where the host waits for it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses_and_gradients(distillation):
    """The losses of 20 steps [20], and the gradients of the first: {name: gradient}.

    The first runs eagerly, the others as a GraphedStep. A hundred more steps must not wait.
    """
    losses = [distillation.step().loss]
    gradients = {}
    for name, weight in distillation.nerf.named_parameters():
        gradients[name] = weight.grad.clone()
    with side_stream(CUDA):
        graphed = GraphedStep(distillation.step, CUDA)
        for _ in range(19):
            losses.append(graphed().loss.clone())
        with waiting_forbidden():
            for _ in range(100):
                graphed()
    return torch.stack(losses), gradients


@pytest.mark.parametrize("settings", [{}, UNUSUAL], ids=["usual", "unusual"])
def test_a_bfloat16_model_has_a_field_in_bfloat16(model_file, settings):
    """The pictures and their gradient are those in float32, but for the rounding."""
    distillation = make_distillation(model_file, **settings)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        distillation.context = distillation.context.to(dtype)
        torch.manual_seed(1)
        images, _, penalty = rendered_anew(distillation)
        assert images.dtype == penalty.dtype == torch.float32
        images.square().mean().backward()
        found.append((images.detach(), distillation.nerf.encoding.table.grad, penalty.detach()))
        distillation.optimizer.zero_grad(set_to_none=True)
    (exact, exact_gradient, exact_penalty), (rough, gradient, penalty) = found
    error = (rough - exact).abs().mean()
    assert 0 < error < 0.005, f"the pictures are {error:.4f} of 2 apart"
    assert (gradient - exact_gradient).norm() < 0.1 * exact_gradient.norm()
    assert torch.allclose(penalty, exact_penalty, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "stage, settings",
    [(sds.Stage(8, 2, 1024), {}), (sds.Stage(16, 1, 2048), UNUSUAL)],
    ids=["usual", "unusual"],
)
def test_a_compiled_step_is_the_step_and_never_waits(model_file, stage, settings, monkeypatch):
    # Float32 shall be float32; another test's training may have changed the second.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    settings = dict(settings, stage=stage, guidance=5.0)
    compiled = make_distillation(model_file, "cuda", compiled=True, **settings)
    losses, gradients = losses_and_gradients(compiled)
    eager = make_distillation(model_file, "cuda", **settings)
    eager_losses, eager_gradients = losses_and_gradients(eager)
    for name, expected in eager_gradients.items():
        error = (gradients[name] - expected).norm()
        assert error <= 1e-4 * expected.norm(), f"{name} has another gradient when compiled"
    agree(losses, eager_losses, "the losses of compiled steps, and of eager ones", rtol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [sds.Stage(8, 2, 1024), sds.Stage(16, 1, 2048)])
@pytest.mark.parametrize("settings", [{}, UNUSUAL], ids=["usual", "unusual"])
def test_a_step_on_cuda_never_waits(model_file, settings, stage):
    """Eager and as a CUDA graph: neither asks the host for anything, and both train."""
    distillation = make_distillation(model_file, "cuda", stage=stage, **settings)
    table = distillation.nerf.encoding.table
    graphed = GraphedStep(distillation.step, CUDA)

    def check_steps(count):
        before = table.detach().clone()
        with waiting_forbidden():
            for _ in range(count):
                result = graphed()
        assert torch.isfinite(result.loss), "the loss is not finite"
        assert not torch.equal(table, before), "the steps train nothing"

    with side_stream(CUDA):
        for _ in range(2):
            graphed()
        check_steps(1)
        assert graphed.graph is None, "the step is captured too early"
        for _ in range(4):
            graphed()
        check_steps(100)
        assert graphed.graph is not None, "the step is never captured"
