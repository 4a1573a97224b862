"""The distillation loss against its formula, and the random draws against their ranges."""
import math

import pytest
import torch

from mvd import diffusion, sds
from mvd.unet import MultiViewUNet, UNetConfig


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
