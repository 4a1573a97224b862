"""Devices, random states, and steps captured as CUDA graphs."""
import pytest
import torch

from mvd.tools import device
from mvd.tools.errors import UserError


@pytest.mark.parametrize("name", ["cuda:99", "cpu:x", "gpu", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match="there is: .*cpu"):
        device.choose_device(name)


def test_choices():
    assert device.choose_device("cpu") == torch.device("cpu")
    assert device.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert device.choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert device.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert device.choose_dtype("float16", torch.device("cpu")) == torch.float16


def test_a_name_without_a_number_is_the_first(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert [device.choose_device(name) for name in ("auto", "cuda", "cuda:1")] == [first, first, second] == set_to
    with pytest.raises(UserError, match="no device 'cuda:2' here; there is: cuda:0, cuda:1"):
        device.choose_device("cuda:2")


def test_random_state_goes_on_where_it_was():
    torch.manual_seed(3)
    state = device.random_state()
    first = torch.rand(4)
    device.set_random_state(state)
    assert torch.equal(torch.rand(4), first)


def test_a_step_off_cuda_is_just_the_step():
    calls = []
    step = device.GraphedStep(lambda: calls.append(1) or len(calls), torch.device("cpu"))
    assert [step() for _ in range(6)] == [1, 2, 3, 4, 5, 6]


def test_a_step_off_cuda_takes_its_arguments_and_may_return_nothing():
    seen = []
    step = device.GraphedStep(lambda a, b: seen.append(a + b), torch.device("cpu"))
    assert [step(i, 10) for i in range(5)] == [None] * 5 and seen == [10, 11, 12, 13, 14]


@pytest.mark.gpu
def test_there_is_one_stream_however_often_and_deep_it_is_entered():
    cuda, seen = torch.device("cuda"), []
    for _ in range(2):
        with device.side_stream(cuda), device.side_stream(cuda):
            seen.append(torch.cuda.current_stream())
            total = torch.ones(1000, device=cuda).sum()
        assert total.item() == 1000 and torch.cuda.current_stream() == torch.cuda.default_stream()
    assert seen[0] == seen[1] != torch.cuda.default_stream()


@pytest.mark.gpu
def test_a_captured_step_reads_its_new_arguments():
    cuda = torch.device("cuda")
    step = device.GraphedStep(lambda a, b: a * b.float(), cuda)
    with device.side_stream(cuda):
        results = [step(torch.full((3,), float(i), device=cuda), torch.full((3,), 10, device=cuda)).tolist() for i in range(8)]
    assert results == [[10.0 * i] * 3 for i in range(8)] and step.graph is not None


@pytest.mark.gpu
def test_a_captured_step_trains_as_the_step_itself():
    def train(graphed):
        torch.manual_seed(0)
        cuda = torch.device("cuda")
        layer, x = torch.nn.Linear(8, 8, device=cuda), torch.randn(16, 8, device=cuda)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, capturable=True)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = (layer(x) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()
        stepper = device.GraphedStep(step, cuda) if graphed else step
        with device.side_stream(cuda):
            return [stepper().item() for _ in range(10)]
    assert train(True) == pytest.approx(train(False), rel=1e-5)
