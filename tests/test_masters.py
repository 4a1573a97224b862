"""Float32 masters: AdamW written out, what a bfloat16 weight would lose, and a state that goes on to the bit."""
import pytest
import torch

from mvd.tools.masters import MasterAdamW, learning_rate


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def loss_of(net, step):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(net[0].weight)
    return net(x).square().mean()


def test_it_is_adamw():
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    net, plain = network(), network().double()
    adam = MasterAdamW([(net, 0.01, 0.1)], (0.9, 0.99))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in plain.parameters()]
    for t in range(1, 6):
        adam.backward(loss_of(net, t))
        adam.step()
        gradients = torch.autograd.grad(loss_of(plain, t), list(plain.parameters()))
        with torch.no_grad():
            for p, g, (m, v) in zip(plain.parameters(), gradients, moments):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.99).add_(0.01 * g * g)
                p -= 0.01 * (m / (1 - 0.9 ** t) / ((v / (1 - 0.99 ** t)).sqrt() + 1e-8) + 0.1 * p)
    for p, w, q in zip(net.parameters(), adam.weights, plain.parameters()):
        torch.testing.assert_close(w.double(), q.detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(p, w) and w.grad is None


def test_small_steps_are_not_lost_in_bfloat16():
    """A thousand steps of 1e-6 on weights of about 0.3, whose bfloat16 neighbours are 1e-3 apart: the masters count them."""
    net = network()
    adam = MasterAdamW([(net, 1e-6, 0.0)], (0.9, 0.999))
    before = [w.clone() for w in adam.weights]
    adam.copies = [c.detach().bfloat16() for c in adam.copies]                   # as on a GPU
    for _ in range(1000):
        for w in adam.weights:
            w.grad = torch.ones_like(w)
        adam.step()
    for w, w0, copy in zip(adam.weights, before, adam.copies):
        torch.testing.assert_close(w, w0 - 1e-3, rtol=0, atol=5e-5)
        assert torch.equal(copy, w.bfloat16())
        rounded = w0.bfloat16()[w0.abs() > 0.01]
        assert torch.equal(rounded - 1e-6, rounded)                              # a bfloat16 weight would not have moved, each time


def test_at_the_end_the_network_holds_the_float32_weights_without_a_copy():
    net = network()
    adam = MasterAdamW([(net, 0.01, 0.0)], (0.9, 0.99))
    net.bfloat16()                                                               # as on a GPU
    adam.finish(adam.weights)
    for p, w in zip(net.parameters(), adam.weights):
        assert torch.equal(p, w) and p.data_ptr() == w.data_ptr()
    assert net(torch.ones(1, 5)).dtype == torch.float32 and not torch.equal(adam.weights[0], adam.weights[0].bfloat16().float())


def test_a_weight_that_the_loss_does_not_touch_stays():
    net = network()
    adam = MasterAdamW([(net, 0.1, 0.1)], (0.9, 0.99))
    before = adam.weights[2].clone()
    adam.backward(net[0](torch.ones(1, 5)).sum())
    assert adam.weights[2].grad is None and adam.weights[0].grad.dtype == torch.float32
    adam.step()
    assert torch.equal(adam.weights[2], before)


@pytest.mark.parametrize("saved_at", [0, 3])
def test_state_goes_on_bit_for_bit(saved_at):
    import copy
    net = network()
    adam = MasterAdamW([(net, 0.01, 0.1)], (0.9, 0.99))
    for step in range(6):
        if step == saved_at:
            state = copy.deepcopy(adam.state_dict())
        adam.lr[0].fill_(0.01 / (1 + step))
        adam.backward(loss_of(net, step))
        adam.step()
    again = network()
    resumed = MasterAdamW([(again, 0.01, 0.1)], (0.9, 0.99))
    resumed.load_state_dict(state)
    for step in range(saved_at, 6):
        resumed.lr[0].fill_(0.01 / (1 + step))
        resumed.backward(loss_of(again, step))
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(adam.weights, resumed.weights))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2.0 / 20) and max(rates) <= 2.0 and rates[-1] < 1e-4
    assert rates[500] == pytest.approx(1.0, abs=0.01)
