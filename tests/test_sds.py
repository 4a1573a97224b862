"""The distillation loss against its formula, the random draws against their ranges, and the step itself."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvd import MVDream, diffusion, render, sds
from mvd.tools.device import GraphedStep, side_stream
from mvd.unet import MultiViewUNet, UNetConfig
from scripts import saved_model
from test_model import small_config


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    unet = MultiViewUNet(UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                                    head_dim=16, context_dim=8))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return unet.requires_grad_(False)


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    return dict(x0=torch.randn(2, 4, 4, 8, 8, generator=g), noise=torch.randn(2, 4, 4, 8, 8, generator=g),
                t=torch.tensor([400, 400]), context=torch.randn(4, 5, 8, generator=g), camera=torch.randn(2, 4, 16, generator=g))


def gradient(unet, case, camera=True, **options):
    x0 = case["x0"].clone().requires_grad_()
    value = sds.loss(unet, x0, case["t"], case["context"], case["camera"] if camera else None, 7.0, noise=case["noise"], **options)
    return torch.autograd.grad(value, x0)[0]


def guided_eps(unet, case, camera=True):
    """The prediction, one call a half, guidance written out."""
    alpha = diffusion.alphas_cumprod()[400].double()
    x_t = (alpha.sqrt() * case["x0"].double() + (1 - alpha).sqrt() * case["noise"].double()).float()
    halves = [unet(x_t, case["t"], context, case["camera"] if camera else None) for context in case["context"].split(2)]
    return x_t, halves[0], halves[1] + 7.0 * (halves[0] - halves[1])


@pytest.mark.parametrize("camera", [True, False])
def test_x0_loss_without_rescale_is_sds_with_weight_sigma_over_alpha(unet, case, camera):
    alpha = diffusion.alphas_cumprod()[400]
    _, _, eps = guided_eps(unet, case, camera)
    expected = (1 - alpha).sqrt() / alpha.sqrt() * (eps - case["noise"]) / 8
    torch.testing.assert_close(gradient(unet, case, camera, rescale=0.0), expected, rtol=1e-4, atol=1e-5)


def test_classic_gradient_against_its_formula(unet, case):
    _, _, eps = guided_eps(unet, case)
    expected = (1 - diffusion.alphas_cumprod()[400]) * (eps - case["noise"]) / 8
    torch.testing.assert_close(gradient(unet, case, kind="sds"), expected, rtol=1e-4, atol=1e-5)


def test_rescale_against_its_formula(unet, case):
    x_t, conditional, eps = guided_eps(unet, case)
    alpha = diffusion.alphas_cumprod()[400].double()
    x0_guided, x0_text = ((x_t.double() - (1 - alpha).sqrt() * e.double()) / alpha.sqrt() for e in (eps, conditional))
    for b in range(2):
        x0_guided[b] = 0.5 * x0_guided[b] + 0.5 * x0_guided[b] * x0_text[b].std() / x0_guided[b].std()
    expected = ((case["x0"].double() - x0_guided) / 8).float()
    torch.testing.assert_close(gradient(unet, case, rescale=0.5), expected, rtol=1e-3, atol=1e-4)


def test_time_range_is_annealed():
    assert sds.time_range(0.0) == (0.98, 0.98)
    assert sds.time_range(0.4) == pytest.approx((0.5, 0.74))
    assert sds.time_range(0.8) == sds.time_range(1.0) == pytest.approx((0.02, 0.5))


def test_time_is_one_integer_for_all_sets():
    torch.manual_seed(0)
    draws = torch.stack([sds.draw_time(0.2, 0.4, 3, "cpu") for _ in range(500)])
    assert (draws == draws[:, :1]).all() and draws.dtype == torch.int64
    assert draws.min() >= 200 and draws.max() < 400 and draws.min() < 205 and draws.max() > 394


def test_cameras_are_where_the_paper_puts_them():
    torch.manual_seed(0)
    c2w, fov = sds.draw_cameras(4000, 4, "cpu")
    position = c2w[..., :3, 3]
    distance = position.norm(dim=-1)
    elevation = torch.rad2deg(torch.asin(position[..., 2] / distance))
    azimuth = torch.rad2deg(torch.atan2(position[..., 1], position[..., 0]))
    assert ((azimuth.diff(dim=1) % 360) - 90).abs().max() < 1e-2                          # a quarter turn from view to view
    assert (elevation - elevation[:, :1]).abs().max() < 1e-2                              # one elevation a set
    assert elevation.min() > -0.01 and elevation.max() < 30.01
    share = (distance[:, 0] * torch.tan(torch.deg2rad(fov) / 2))
    assert share.min() > 0.799 and share.max() < 1.001 and 15 <= fov.min() and fov.max() <= 60
    # the mean of half U[0, 30] and half asin(U[0, 1/3]), the latter by its integral: ∫ asin(u) du = u asin(u) + sqrt(1 - u²)
    u = 1 / 3
    mean = math.degrees((u * math.asin(u) + math.sqrt(1 - u * u) - 1) / u)
    assert abs(elevation[:, 0].mean() - (15 + mean) / 2) < 0.4

# ---------------------------------------------------------------------------------------------------- the step


SETTINGS = dict(levels=2, log2_entries=10, coarsest=4, finest=16, hidden=8, step_size=0.1, negative="asset", compile=False,
                occupancy_cells=32)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A model of a few thousand random weights, 32 pixels."""
    config = small_config()
    config.size = 32
    return saved_model(tmp_path_factory.mktemp("model"), config)


def parts(model_file, device="cpu", stage=sds.Stage(8, 1, 1024), **settings):
    """(step, nerf, schedule) as distill.py makes them, in the middle of a run."""
    s = sds.Settings("a red bulldog", **{**SETTINGS, **settings})
    model = MVDream.load(model_file)
    context = model.embed([s.prompt, s.negative]).to(device)
    model = model.to(device)
    torch.manual_seed(s.seed)
    nerf, occupancy, optimizer = sds.make_field(s, "cpu")
    torch.nn.init.normal_(nerf.grid.table, std=0.5)                              # its own U(±1e-4) would hide what depends on it
    if device != "meta":
        occupancy.update(nerf.density, s.step_size, everywhere=True)
    if device != "cpu":
        kept = {**nerf.state_dict(), **occupancy.state_dict()}
        nerf, occupancy, optimizer = sds.make_field(s, device)
        if device == "meta":
            optimizer = torch.optim.SGD(nerf.parameters(), lr=1e-3)              # AdamW would read its count of steps
        else:
            nerf.load_state_dict({name: kept[name] for name in nerf.state_dict()})
            occupancy.load_state_dict({name: kept[name] for name in occupancy.state_dict()})
    schedule = sds.Schedule(device)
    for value, tensor in zip((0.4, 0.6, 1.0, 1000.0), (schedule.low, schedule.high, schedule.light, schedule.orientation)):
        tensor.fill_(value)
    if s.compile:
        model.compile_networks()
    return sds.make_step(s, model, nerf, occupancy, optimizer, context, schedule, stage), nerf, schedule


GROUPS = ("grid.", "to_density.", "to_albedo.", "to_background.")


def gradients(nerf):
    """The largest gradient in each part of the field."""
    return {g: max(p.grad.abs().max().item() for name, p in nerf.named_parameters() if name.startswith(g)) for g in GROUPS}


@pytest.mark.parametrize("loss", ["x0", "sds"])
@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_a_step_reaches_every_part_of_the_field(model_file, loss, mode):
    step, nerf, _ = parts(model_file, loss=loss, mode=mode, random_background=0.0)
    before = {name: p.detach().clone() for name, p in nerf.named_parameters()}
    assert torch.isfinite(step()) and min(gradients(nerf).values()) > 0
    assert all(not torch.equal(p, before[name]) for name, p in nerf.named_parameters())


def test_the_losses_differ_and_so_do_their_gradients(model_file):
    tables = []
    for loss in ("x0", "sds"):
        step, nerf, _ = parts(model_file, loss=loss)
        step()
        tables.append(nerf.grid.table.grad)
    assert not torch.allclose(*tables)


def test_random_background_replaces_the_environment_in_that_share_of_the_steps(model_file):
    for share, steps, least, most in ((0.0, 4, 4, 4), (0.5, 16, 4, 12), (1.0, 4, 0, 0)):
        step, nerf, _ = parts(model_file, random_background=share)
        environment = 0
        for _ in range(steps):
            step()
            environment += gradients(nerf)["to_background."] > 0
        assert least <= environment <= most


def test_backgrounds_are_one_colour_or_one_grey(model_file, monkeypatch):
    seen, draw = [], render.render

    def recording(nerf, occupancy, origins, directions, background, *rest, **more):
        seen.append(background.detach())
        return draw(nerf, occupancy, origins, directions, background, *rest, **more)
    monkeypatch.setattr(render, "render", recording)
    for grey in (False, True):
        parts(model_file, random_background=1.0, grey_background=grey)[0]()
        assert (seen[-1] == seen[-1][0]).all() and (seen[-1][0] == seen[-1][0, 0]).all() == grey


def test_shading_draws_textureless_steps_and_adds_the_orientation_loss(model_file):
    step, nerf, schedule = parts(model_file, shading=True)
    albedo = []
    for _ in range(16):
        assert torch.isfinite(step())
        albedo.append(gradients(nerf)["to_albedo."] > 0)
        assert gradients(nerf)["grid."] > 0
    assert 7 <= sum(albedo) <= 13                                                # 62.5% of the steps show the albedo
    losses, tables = [], []
    for weight in (0.0, 1000.0):                                                 # the same draws
        step, nerf, schedule = parts(model_file, shading=True)
        schedule.orientation.fill_(weight)
        losses.append(step())
        tables.append(nerf.grid.table.grad)
    assert torch.equal(*losses) and not torch.allclose(*tables)


@pytest.mark.parametrize("settings", [{}, {"shading": True, "mode": "2d", "grey_background": True, "loss": "sds"}])
def test_a_step_has_static_shapes_and_copies_nothing_to_the_device(model_file, settings):
    """On PyTorch's device without data, whatever a shape would depend on does not exist, and reading a number raises. A tensor that
    is made of Python numbers there shows as lift_fresh, one that is copied as an operation with a tensor of the CPU."""
    step, *_ = parts(model_file, "meta", **settings)
    step()                                                                       # the noise schedule is copied once
    copies = []

    class Watch(TorchDispatchMode):

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            if "lift_fresh" in str(function) and result.is_meta or len({t.is_meta for t in tensors}) > 1:
                copies.append(str(function))
            return result
    with Watch():
        assert step().shape == ()
    assert copies == []


def test_one_compiled_unet_serves_any_number_of_sets(unet, case):
    """`target` asks set by set, with tensors of one shape and layout: the compiler sees the network once."""
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(unet, backend=count, dynamic=False)
    with torch.no_grad():
        both = sds.target(compiled, case["x0"], case["t"], case["context"], case["camera"], 7.0, 0.5)
        for i in range(2):
            one = sds.target(compiled, case["x0"][i:i + 1], case["t"][:1], case["context"][i::2].clone(memory_format=torch.contiguous_format),
                             case["camera"][i:i + 1], 7.0, 0.5)
            assert all(torch.allclose(alone[0], together[i], atol=1e-5) for alone, together in zip(one, both))
    assert len(graphs) == 1


def test_noise_does_not_depend_on_the_layout_in_memory(unet, case):
    values = []
    for x0 in (case["x0"], case["x0"].movedim(2, -1).contiguous().movedim(-1, 2)):
        torch.manual_seed(1)
        values.append(sds.loss(unet, x0, case["t"], case["context"], case["camera"], 7.0))
    torch.testing.assert_close(*values)


@pytest.mark.gpu
@pytest.mark.parametrize("stage, settings", [(sds.Stage(8, 2, 1024), {}), (
    sds.Stage(16, 1, 2048), {"shading": True, "mode": "2d", "grey_background": True, "loss": "sds"})])
def test_a_compiled_step_is_the_step_and_never_waits(model_file, stage, settings, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)               # float32 shall be float32
    torch.set_float32_matmul_precision("highest")                                # which another test's training may have changed
    losses, gradient = [], []
    for compiled in (True, False):
        step, nerf, _ = parts(model_file, "cuda", stage=stage, compile=compiled, guidance=5.0, **settings)
        losses.append([step()])
        gradient.append({name: p.grad.clone() for name, p in nerf.named_parameters()})
        with side_stream(torch.device("cuda")):
            stepper = GraphedStep(step, torch.device("cuda"))
            losses[-1] += [stepper().clone() for _ in range(19)]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(100):
                    stepper()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for name, g in gradient[1].items():
        assert (gradient[0][name] - g).norm() <= 1e-4 * g.norm(), name
    assert torch.allclose(*(torch.stack(row) for row in losses), rtol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [sds.Stage(8, 2, 1024), sds.Stage(16, 1, 2048)])
@pytest.mark.parametrize("settings", [{}, {"shading": True, "mode": "2d", "grey_background": True, "loss": "sds"}])
def test_a_step_on_cuda_never_waits(model_file, settings, stage):
    """Eager and as a CUDA graph: neither asks the host for anything, and both train."""
    step, nerf, _ = parts(model_file, "cuda", stage=stage, **settings)
    stepper = GraphedStep(step, torch.device("cuda"))
    with side_stream(torch.device("cuda")):
        for calls in (2, 4):                                                     # eager, then captured
            for _ in range(calls):
                stepper()
            before = nerf.grid.table.detach().clone()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(1 if calls == 2 else 100):
                    loss = stepper()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.isfinite(loss) and not torch.equal(nerf.grid.table, before)
            assert (stepper.graph is not None) == (calls == 4)
