"""AdamW over float32 weights in one vector, its rates, half precision, and exchanged vectors."""
import io
import random

import pytest
import torch
from torch import nn
from torch.nn import Conv2d, Linear, Sequential, Tanh

from mvd.tools import optimizer as optimizers
from mvd.tools.device import load_optimizer
from mvd.tools.optimizer import Rounded, Vector, adamw, exchanged, learning_rate, set_rates

BETAS = (0.9, 0.99)


def network():
    torch.manual_seed(0)
    return Sequential(Linear(5, 7), Tanh(), Linear(7, 3))


def loss_of(net, step):
    """A loss whose batch depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 5, generator=generator).to(net[0].weight)
    return net(x).square().mean()


def learn(net, optimizer, steps):
    for step in steps:
        set_rates(optimizer, 0.01 / (1 + step), 0.02 / (1 + step))
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def copies(net):
    return [p.detach().clone() for p in net.parameters()]


def two_groups(net):
    """The first layer with a weight decay of 0.1, the last one with none."""
    first = (net[0].parameters(), 0.01, 0.1)
    last = (net[2].parameters(), 0.02, 0.0)
    return adamw([first, last], BETAS)


# ---- AdamW -----------------------------------------------------------------------------------

def test_each_group_has_its_rate_and_decay():
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    net = network()
    learn(net, two_groups(net), range(5))

    plain = network().double()
    weights = list(plain.parameters())
    m = [torch.zeros_like(w) for w in weights]
    v = [torch.zeros_like(w) for w in weights]
    rates = [0.01, 0.01, 0.02, 0.02]
    decays = [0.1, 0.1, 0.0, 0.0]
    for step in range(5):
        gradients = torch.autograd.grad(loss_of(plain, step), weights)
        for i, (w, g) in enumerate(zip(weights, gradients)):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.99 * v[i] + 0.01 * g**2
            m_hat = m[i] / (1 - 0.9 ** (step + 1))
            v_hat = v[i] / (1 - 0.99 ** (step + 1))
            change = m_hat / (v_hat.sqrt() + 1e-8) + decays[i] * w.detach()
            w.data -= rates[i] / (1 + step) * change
    for found, expected in zip(copies(net), weights):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_rates_are_written_where_a_captured_step_reads_them():
    optimizer = two_groups(network())
    before = [group["lr"] for group in optimizer.param_groups]
    assert [rate.shape for rate in before] == [(), ()], "a rate is not a tensor []"
    assert [rate.item() for rate in before] == pytest.approx([0.01, 0.02])
    set_rates(optimizer, 0.5, 0.25)
    after = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in after] == [0.5, 0.25]
    for old, new in zip(before, after):
        assert old is new, "the rate is another tensor now, of which a CUDA graph does not know"


def test_a_weight_without_a_gradient_stays():
    """Not even its decay moves it."""
    net = network()
    optimizer = adamw([(net.parameters(), 0.1, 0.1)], BETAS)
    first, last = net[0].weight, net[2].weight
    before = last.detach().clone()
    net[0](torch.ones(1, 5)).sum().backward()
    assert last.grad is None and first.grad.dtype == torch.float32
    optimizer.step()
    assert torch.equal(last, before)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", [0, 3])
def test_a_skipped_step_changes_nothing_at_all(device, before):
    """Also with gradients that are not finite; the steps after it are as if it had never been."""
    def trained(bad_steps):
        """Six steps on a vector; before those of bad_steps come others, which are skipped."""
        vector = Vector(network().to(device))
        skip = torch.zeros((), device=device)
        optimizer = adamw([([vector.theta], 0.01, 0.1)], BETAS, skip)
        torch.manual_seed(1)
        for step in range(6):
            gradient = torch.randn(len(vector.theta)).to(device)
            if step in bad_steps:
                skip.fill_(1)
                for value in (torch.nan, torch.inf, 1.0):
                    vector.theta.grad.fill_(value)
                    state = [vector.theta, *optimizer.state[vector.theta].values()]
                    kept = [tensor.clone() for tensor in state]
                    optimizer.step()
                    same = map(torch.equal, kept, state)
                    assert all(same), f"a gradient of {value} has changed something"
                skip.fill_(0)
            vector.theta.grad.copy_(gradient)
            theta = vector.theta.clone()
            optimizer.step()
            assert not torch.equal(theta, vector.theta), "a step that is wanted does nothing"
        return vector.theta.detach()

    assert torch.equal(trained({before}), trained(set())), "the steps after it are others"


@pytest.mark.parametrize("device", DEVICES)
def test_small_steps_are_not_lost(device):
    """Three hundred steps of 1e-6 on weights of about 0.3, whose bfloat16 neighbours are 2e-3 off.

    The gradient is always the same, so each step moves each weight by the whole rate.
    """
    device = torch.device(device)
    net = Linear(5, 7).to(device)
    for w in net.parameters():
        w.data = torch.linspace(0.28, 0.32, w.numel(), device=device).view_as(w)
    before = copies(net)
    x = torch.ones(4, 5, device=device)
    optimizer = adamw([(net.parameters(), 1e-6, 0.0)], betas=(0.9, 0.999))
    rounded = Rounded(net, torch.bfloat16)
    for _ in range(300):
        optimizer.zero_grad()
        with rounded:
            y = net(x.to(net.weight.dtype))
            y.float().sum().backward()
        optimizer.step()
    assert y.dtype == torch.bfloat16, f"the network computed in {y.dtype}"
    for w, w0 in zip(copies(net), before):
        assert w.dtype == torch.float32
        torch.testing.assert_close(w, w0 - 3e-4, rtol=0, atol=2e-5)
        short = w0.bfloat16()
        lost = torch.equal(short - 1e-6, short)
        assert lost, "a bfloat16 weight would move, so that this test shows nothing"


@pytest.mark.parametrize("saved_at", [0, 3])
def test_a_resumed_optimizer_goes_on_bit_for_bit(saved_at):
    """Through torch.save; its rates are those that it is given then."""
    net = network()
    optimizer = two_groups(net)
    learn(net, optimizer, range(saved_at))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    learn(net, optimizer, range(saved_at, 6))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = network()
    again.load_state_dict(weights)
    resumed = two_groups(again)
    load_optimizer(resumed, state)
    learn(again, resumed, range(saved_at, 6))
    for a, b in zip(copies(net), copies(again)):
        assert torch.equal(a, b), "the resumed run computed something else"


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2.0 / 20)
    assert max(rates) <= 2.0
    assert rates[-1] < 1e-4
    assert rates[500] == pytest.approx(1.0, abs=0.01)


# ---- all weights as one vector ---------------------------------------------------------------

def mixed_network():
    """Weights of many shapes; one does not learn, and one lies in memory channels last."""
    torch.manual_seed(0)
    net = Sequential(
        Conv2d(3, 6, 3), nn.GroupNorm(2, 6), Tanh(), nn.Flatten(), Linear(96, 70), Linear(70, 2))
    net[0].to(memory_format=torch.channels_last)
    net[1].bias.requires_grad_(False)
    return net


def mixed_loss(net, step=0):
    torch.manual_seed(step)
    return net(torch.randn(2, 3, 6, 6)).square().mean()


def learning(net):
    return [w for w in net.parameters() if w.requires_grad]


def test_weights_and_gradients_are_views_of_the_vector():
    net, before = mixed_network(), mixed_network()
    parameters, buffers = list(net.parameters()), [id(w) for w in net.parameters()]
    vector = Vector(net, spare=5)
    assert [id(w) for w in net.parameters()] == buffers, "the weights are other objects"
    for w, old in zip(parameters, before.parameters()):
        assert torch.equal(w, old), "a weight has changed"
        assert w.stride() == old.stride(), "a weight lies in another order"
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)

    storage, gradients = vector.theta.data_ptr(), vector.theta.grad.data_ptr()
    taken = torch.zeros_like(vector.theta)
    for w in learning(net):
        assert w.grad.stride() == w.stride()
        begin = (w.data_ptr() - storage) // 4
        assert (w.grad.data_ptr() - gradients) // 4 == begin, "a gradient lies elsewhere"
        assert begin % 64 == 0, "a weight does not begin at a multiple of 64 numbers"
        taken[begin : begin + w.numel()] += 1
    assert taken.max() == 1, "two weights overlap"
    assert taken.sum() == sum(w.numel() for w in learning(net))
    assert (vector.theta[taken == 0] == 0).all()
    assert net[1].bias.grad is None

    with torch.no_grad():
        vector.theta.fill_(3.0)
    vector.theta.grad.fill_(4.0)
    for w in learning(net):
        assert (w == 3).all() and (w.grad == 4).all(), "a weight is no view"
    assert torch.equal(net[1].bias, before[1].bias), "what does not learn has changed"


def test_the_average_begins_as_the_weights_and_is_no_view_of_them():
    vector = Vector(network())
    assert torch.equal(vector.average, vector.theta) and not vector.average.requires_grad
    with torch.no_grad():
        vector.theta.zero_()
    assert vector.average.any(), "the average follows the weights at once"


def test_backward_fills_the_gradient_of_the_vector():
    """Two calls add up, and what is spare stays."""
    net, plain = mixed_network(), mixed_network()
    vector = Vector(net, spare=5)
    assert len(vector.spare) == 5 and len(vector.gradient) == len(vector.theta) + 5
    vector.spare.fill_(7.0)
    for step in (0, 1):
        mixed_loss(net, step).backward()
        mixed_loss(plain, step).backward()
    assert vector.theta.grad.any()
    for w, other in zip(learning(net), learning(plain)):
        torch.testing.assert_close(w.grad, other.grad)
    flat = torch.cat([w.grad.flatten() for w in learning(plain)])
    torch.testing.assert_close(vector.theta.grad.norm(), flat.norm())
    assert (vector.spare == 7).all() and (vector.gradient[-5:] == 7).all()
    vector.gradient.zero_()
    assert not any(w.grad.any() for w in learning(net)) and not vector.spare.any()


def test_a_vector_learns_what_its_weights_would():
    """As PyTorch's AdamW does weight by weight, unfused, in float64."""
    net, plain = mixed_network(), mixed_network().double()
    vector = Vector(net)
    one = adamw([([vector.theta], 0.01, 0.1)], BETAS, skip=torch.zeros(()))
    many = torch.optim.AdamW(
        learning(plain), lr=0.01, betas=BETAS, weight_decay=0.1, fused=False, foreach=False)
    for step in range(6):
        vector.gradient.zero_()
        many.zero_grad()
        torch.manual_seed(step)
        x = torch.randn(2, 3, 6, 6)
        net(x).square().mean().backward()
        plain(x.double()).square().mean().backward()
        one.step()
        many.step()
    for w, expected in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(w.double(), expected, rtol=1e-3, atol=1e-5)
    assert learning(net)[0].data_ptr() == vector.theta.data_ptr(), "the weights are no views now"
    total = sum(w.numel() for w in learning(net))
    assert vector.theta.count_nonzero() == total, "the gaps between the weights have learned"


# ---- half precision --------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]


def test_in_float32_nothing_is_rounded_or_scaled():
    net = network()
    weights = list(net.parameters())
    rounded = Rounded(net, torch.float32)
    with rounded:
        inside = zip(net.parameters(), weights, strict=True)
        assert all(p is w and p.dtype == torch.float32 for p, w in inside)
    rounded.adapt(torch.ones(()))
    assert rounded.scale == 1 and rounded.state_dict() == {}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("device", DEVICES)
def test_rounded_weights_give_their_gradient_to_the_weights_themselves(device, dtype):
    """Only what learns is rounded, and only within the context. Gradients of two calls add up."""
    torch.manual_seed(0)
    net = Sequential(Linear(5, 7), Linear(7, 3)).to(device)
    net[1].requires_grad_(False)
    weights = list(net.parameters())
    rounded = Rounded(net, dtype)
    expected = torch.zeros(7, 5, device=device, dtype=torch.float64)
    for step in range(2):
        x = torch.randn(4, 5, device=device)
        with rounded:
            assert net[0].weight.dtype == dtype and net[1].weight.dtype == torch.float32
            assert torch.equal(net[0].weight, weights[0].to(dtype)), "an old copy of the weights"
            net[1](net[0](x.to(dtype)).float()).sum().backward()
        assert all(p is w for p, w in zip(net.parameters(), weights)), "the weights are not back"
        expected += net[1].weight.double().sum(0)[:, None] * x.to(dtype).double().sum(0)
        found = net[0].weight.grad
        assert found.dtype == torch.float32 and net[1].weight.grad is None
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.04)
        with torch.no_grad():
            net[0].weight += 0.5
    assert all(copy.grad is None for copy in rounded.copies), "a copy keeps its gradient"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("device", DEVICES)
def test_rounded_weights_give_their_gradient_to_the_vector(device, dtype):
    """Where it lies: a CUDA graph knows of no other place. The context may also fail."""
    net = network().to(device)
    vector = Vector(net)
    weights, places = list(net.parameters()), [w.grad.data_ptr() for w in net.parameters()]
    with pytest.raises(ZeroDivisionError), Rounded(net, dtype):
        for _ in range(2):
            net(torch.ones(4, 5, device=device, dtype=dtype)).sum().backward()
        raise ZeroDivisionError
    assert all(p is w for p, w in zip(net.parameters(), weights)), "the weights are not back"
    assert [w.grad.data_ptr() for w in weights] == places, "the gradients are new tensors"
    # The last layer's bias adds to four results, twice.
    assert torch.equal(net[2].bias.grad, torch.full_like(net[2].bias, 8.0))
    assert vector.theta.grad.count_nonzero() == sum(w.numel() for w in weights)


def test_a_gradient_too_small_for_float16_is_kept_by_the_scale():
    """1e-8 for each result: below half of the smallest number of float16, 6e-8."""
    x = torch.arange(20.0).view(4, 5).half()
    expected = 1e-8 * x.double().sum(0).expand(7, 5)
    gradients = []
    for scaled in (True, False):
        net = Linear(5, 7)
        rounded = Rounded(net, torch.float16)
        scale = rounded.scale if scaled else 1.0
        with rounded:
            (1e-8 * net(x).float().sum() * scale).backward()
        gradients.append(net.weight.grad.double() / scale)
    torch.testing.assert_close(gradients[0], expected, rtol=0.01, atol=0)
    assert not gradients[1].any(), "it is kept without a scale, so that this test shows nothing"


def simulated(faults, grow_after):
    """The scale after every step, in plain Python. faults: a bool per step."""
    scale, good, scales = 2.0**14, 0, []
    for fault in faults:
        if fault:
            scale, good = max(scale / 2, 1.0), 0
        else:
            good += 1
        if good == grow_after:
            scale, good = 2 * scale, 0
        scales.append(scale)
    return scales


def random_faults(share):
    return [random.Random(step).random() < share for step in range(300)]


@pytest.mark.parametrize("faults, grow_after", [
    (random_faults(0.5), 2),
    (random_faults(0.1), 5),
    ([True] * 20 + [False] * 7, 3),
    ([False] * 1999 + [True] + [False] * 2001, None),
], ids=["often", "seldom", "to the end", "as in a run"])
def test_the_scale_falls_at_once_and_rises_slowly(monkeypatch, faults, grow_after):
    """As a simulation says; it goes on from a state in the middle as if nothing had been."""
    if grow_after:
        monkeypatch.setattr(optimizers, "GROW_AFTER", grow_after)
    rounded, found = Rounded(Linear(1, 1), torch.float16), []
    tensor, middle = rounded.scale, len(faults) // 3
    for step, fault in enumerate(faults):
        if step == middle:
            state = {name: kept.clone() for name, kept in rounded.state_dict().items()}
            rounded = Rounded(Linear(1, 1), torch.float16)
            rounded.load_state_dict(state)
            tensor = rounded.scale
        rounded.adapt(torch.tensor(float(fault)))
        found.append(rounded.scale.item())
    assert found == simulated(faults, grow_after or 2000)
    assert len(set(found)) > 1 and min(found) >= 1
    assert tensor is rounded.scale, "it is another tensor now, of which a CUDA graph does not know"


# ---- exchanged vectors -----------------------------------------------------------------------

@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 100, 2**24])
def test_vectors_are_exchanged_and_come_back(fails, piece):
    """Also when what is done with them fails. They stay where a CUDA graph reads them."""
    vector = Vector(network())
    own, other = vector.theta.detach().clone(), torch.randn(len(vector.theta))
    vector.average.copy_(other)
    weight, places = vector.theta, [vector.theta.data_ptr(), vector.average.data_ptr()]

    def use():
        with exchanged(vector.theta, vector.average, piece):
            assert torch.equal(vector.theta, other), "inside θ is not the average"
            assert torch.equal(vector.average, own), "inside the average is not θ"
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert torch.equal(vector.theta, own) and torch.equal(vector.average, other)
    assert weight is vector.theta and weight.requires_grad
    assert [vector.theta.data_ptr(), vector.average.data_ptr()] == places
