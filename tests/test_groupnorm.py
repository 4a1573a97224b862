"""Both forms of the group norm against the definition in float64."""
import pytest
import torch

from mvd.groupnorm import GroupNorm


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = GroupNorm(4, 12, eps=1e-3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def pictures():
    """[N, C, h, w] with a mean far from 0 and a spread that differs from picture to picture, in both memory layouts."""
    x = torch.randn(3, 12, 5, 7, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.3, 1.0, 4.0])[:, None, None, None] + 1
    return [x, x.contiguous(memory_format=torch.channels_last)]


def test_a_large_mean_does_not_swallow_a_small_variance(layer):
    """Where E[x²] − E[x]² would be off by a twentieth; what is left is the rounding of x itself."""
    layer.silu = False
    x = torch.randn(3, 12, 8, 8, generator=torch.Generator().manual_seed(2)) + 1000
    assert (layer.written_out(x).double() - defined(layer, x, False)).abs().max() < 1e-3


def defined(layer, x, silu):
    """Wu & He 2018, eq. 1-3, group by group."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for n in range(len(x)):
        for group in range(layer.num_groups):
            channels = range(3 * group, 3 * group + 3)
            values = x[n, list(channels)].double()
            normal = (values - values.mean()) / (values.var(correction=0) + layer.eps).sqrt()
            for i, c in enumerate(channels):
                out[n, c] = layer.weight[c].double() * normal[i] + layer.bias[c].double()
    return out * torch.sigmoid(out) if silu else out


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_both_forms_are_the_definition(layer, silu, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    layer.silu = silu
    for x in pictures():
        assert torch.allclose(layer(x).double(), defined(layer, x, silu), atol=2e-5)


def test_both_forms_have_the_same_gradients(layer, monkeypatch):
    gradients = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        x = pictures()[0].requires_grad_()
        gradients.append(torch.autograd.grad(layer(x).square().sum(), [x, layer.weight, layer.bias]))
    for written, own in zip(*gradients):
        assert torch.allclose(written, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiling", [False, True])
def test_float32_in_and_the_weights_format_out(layer, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = pictures()[0]
    exact = layer(x)
    rounded = layer.bfloat16()(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.01 * exact.norm()
