"""AdamW over float32 weights, the course of its rates, and weights that are swapped for a while."""
import io

import pytest
import torch
from torch.nn import Linear, Sequential, Tanh

from mvd.tools.device import load_optimizer
from mvd.tools.optimizer import Rounded, adamw, learning_rate, set_rates, swapped_in

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
    """Not even its decay moves it: the camera's MLP in a step of single images."""
    net = network()
    optimizer = adamw([(net.parameters(), 0.1, 0.1)], BETAS)
    first, last = net[0].weight, net[2].weight
    before = last.detach().clone()
    net[0](torch.ones(1, 5)).sum().backward()
    assert last.grad is None and first.grad.dtype == torch.float32
    optimizer.step()
    assert torch.equal(last, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_small_steps_are_not_lost(device):
    """A thousand steps of 1e-6 on weights of about 0.3, whose bfloat16 neighbours are 2e-3 apart.

    The gradient is always the same, so each step moves each weight by the whole rate.
    """
    device = torch.device(device)
    net = Linear(5, 7).to(device)
    for w in net.parameters():
        w.data = torch.linspace(0.28, 0.32, w.numel(), device=device).view_as(w)
    before = copies(net)
    x = torch.ones(4, 5, device=device)
    optimizer = adamw([(net.parameters(), 1e-6, 0.0)], betas=(0.9, 0.999))
    in_bfloat16 = Rounded(net)
    for _ in range(1000):
        optimizer.zero_grad()
        with in_bfloat16:
            y = net(x.to(net.weight.dtype))
            y.float().sum().backward()
        optimizer.step()
    expected = torch.bfloat16 if device.type == "cuda" else torch.float32
    assert y.dtype == expected, f"the network computed in {y.dtype}"
    for w, w0 in zip(copies(net), before):
        assert w.dtype == torch.float32
        torch.testing.assert_close(w, w0 - 1e-3, rtol=0, atol=5e-5)
        short = w0.bfloat16()
        lost = torch.equal(short - 1e-6, short)
        assert lost, "a bfloat16 weight would move, so that this test shows nothing"


@pytest.mark.gpu
def test_rounded_weights_give_their_gradient_to_the_weights_themselves():
    """Only what learns is rounded, and only within the context."""
    net = torch.nn.Sequential(Linear(5, 7), Linear(7, 3)).cuda()
    net[1].requires_grad_(False)
    weights = list(net.parameters())
    x = torch.randn(4, 5, device="cuda")
    with Rounded(net):
        assert net[0].weight.dtype == torch.bfloat16 and net[1].weight.dtype == torch.float32
        net[1](net[0](x.bfloat16()).float()).sum().backward()
    assert all(p is w for p, w in zip(net.parameters(), weights)), "the weights are back"
    expected = (net[1].weight.sum(0)[:, None] * x.bfloat16().float().sum(0)).bfloat16()
    found = net[0].weight.grad
    assert found.dtype == torch.float32 and net[1].weight.grad is None
    torch.testing.assert_close(found, expected.float(), rtol=0.02, atol=0.02)


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


# ---- swapping weights ------------------------------------------------------------------------

def assert_holds(parameters, tensors, when):
    for p, tensor in zip(parameters, tensors):
        assert torch.equal(p, tensor), f"{when} a parameter holds something else"


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_swapped_in_and_come_back(fails):
    """Also when what is done with them fails. They stay where a CUDA graph reads them."""
    net = network()
    own = copies(net)
    others = [torch.full_like(w, 2.0) for w in own]
    places = [p.data_ptr() for p in net.parameters()]

    def use():
        with swapped_in(net.parameters(), others):
            assert_holds(net.parameters(), others, "inside")
            assert [p.data_ptr() for p in net.parameters()] == places
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert_holds(net.parameters(), own, "afterwards")
    assert_holds(others, [torch.full_like(w, 2.0) for w in own], "afterwards")
    assert [p.data_ptr() for p in net.parameters()] == places
