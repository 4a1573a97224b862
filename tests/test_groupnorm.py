"""Both forms of the group norm against the definition in float64."""
import pytest
import torch

from mvd.groupnorm import GroupNorm
from mvd.unet import Conv2d

GROUPS = 4
CHANNELS = 12


def make():
    torch.manual_seed(0)
    layer = GroupNorm(GROUPS, CHANNELS, eps=1e-3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures():
    """[N, C, h, w] in both memory layouts: a mean far from 0, a spread that differs by picture."""
    spread = torch.tensor([0.3, 1.0, 4.0])[:, None, None, None]
    x = draw(3, CHANNELS, 5, 7, seed=1) * spread + 1
    return [x, x.contiguous(memory_format=torch.channels_last)]


def defined(layer, x):
    """Wu & He 2018, eq. 1-3, group by group."""
    out = torch.empty(x.shape, dtype=torch.float64)
    width = CHANNELS // GROUPS
    for n in range(len(x)):
        for group in range(GROUPS):
            channels = list(range(width * group, width * group + width))
            values = x[n, channels].double()
            spread = (values.var(correction=0) + layer.eps).sqrt()
            normal = (values - values.mean()) / spread
            for i, c in enumerate(channels):
                out[n, c] = layer.weight[c].double() * normal[i] + layer.bias[c].double()
    return out


@pytest.mark.parametrize("compiling", [False, True])
def test_both_forms_are_the_definition(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    layer = make()
    for x in pictures():
        assert torch.allclose(layer(x).double(), defined(layer, x), atol=2e-5)


def test_a_large_mean_does_not_swallow_a_small_variance():
    """Where E[x²] - E[x]² would be off by a twentieth; what is left is the rounding of x itself."""
    layer = make()
    x = draw(3, CHANNELS, 8, 8, seed=2) + 1000
    assert (layer.written_out(x).double() - defined(layer, x)).abs().max() < 1e-3


@pytest.mark.parametrize("side", [8, 512])
def test_a_first_pixel_unlike_all_others_leaves_the_variance_right(side):
    """All others are alike, so that E[a²] and E[a]² are nearly the same."""
    layer = make()
    x = torch.zeros(1, CHANNELS, side, side)
    x[..., 0, 0] = 1000
    found, wanted = layer.written_out(x).double(), defined(layer, x)
    assert (found - wanted).norm() < 1e-2 * wanted.norm(), "the variance is lost in rounding"


def test_both_forms_have_the_same_gradients(monkeypatch):
    layer = make()
    gradients = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        x = pictures()[0].requires_grad_()
        loss = layer(x).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, layer.weight, layer.bias]))
    for name, own, written in zip(("x", "weight", "bias"), *gradients):
        assert torch.allclose(written, own, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("compiling", [False, True])
def test_float32_stays_float32_until_the_convolution(compiling, monkeypatch):
    """conv(silu(norm(x))) with bfloat16 weights rounds once, after the SiLU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    layer = make()
    x = pictures()[0]
    exact = layer(x)
    rounded = layer.bfloat16()(x)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.01 * exact.norm()
    conv = Conv2d(CHANNELS, 2, 1).bfloat16()
    assert conv(rounded).dtype == torch.bfloat16
    assert torch.equal(conv(rounded), conv(rounded.bfloat16()))


@pytest.mark.parametrize("compiling", [False, True])
def test_a_convolution_under_autocast_keeps_its_number_format(compiling, monkeypatch):
    """The bias, which is added apart where it is compiled, must not make float32 of the sum."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with torch.autocast("cpu", torch.bfloat16):
        assert Conv2d(CHANNELS, 2, 1)(pictures()[0]).dtype == torch.bfloat16
