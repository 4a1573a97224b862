"""Devices, random states, memory that runs out, and steps captured as CUDA graphs."""
import contextlib
import dataclasses
import re
import runpy
import sys

import pytest
import torch

import distill
import dreambooth
import sample
import train
from mvd.tools import cli, device
from mvd.tools.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "cpu:x", "gpu", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match="there is: .*cpu"):
        device.choose_device(name)


def test_choices():
    assert device.choose_device("cpu") == CPU
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert device.choose_device("auto").type == best
    assert device.choose_dtype("auto", CPU) == torch.float32
    assert device.choose_dtype("auto", torch.device("mps")) == torch.float32
    assert device.choose_dtype("float16", CPU) == torch.float16


@pytest.mark.parametrize("card, capability, dtype", [
    ("GTX 1080", (6, 1), torch.float16),
    ("V100", (7, 0), torch.float16),
    ("T4", (7, 5), torch.float16),
    ("A100", (8, 0), torch.bfloat16),
    ("RTX 4060", (8, 9), torch.bfloat16),
    ("H100", (9, 0), torch.bfloat16),
    ("RTX 5090", (12, 0), torch.bfloat16),
])
def test_cards_without_bfloat16_compute_in_float16(monkeypatch, card, capability, dtype):
    second = torch.device("cuda:1")
    of = {second: capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", of.get)
    assert device.choose_dtype("auto", second) == dtype, f"the wrong number format on a {card}"
    assert device.choose_dtype("bfloat16", second) == torch.bfloat16, "a flag is not obeyed"


def test_a_mac_computes_on_its_cpu_unless_it_is_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose_device("auto") == CPU
    assert device.choose_device("mps") == torch.device("mps")
    with pytest.raises(UserError, match="there is: cpu, mps"):
        device.choose_device("cuda")


def test_a_name_without_a_number_is_the_first(monkeypatch):
    made_current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    chosen = [device.choose_device(name) for name in ("auto", "cuda", "cuda:1")]
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert chosen == [first, first, second]
    assert made_current == chosen, "the chosen device was not made the current one"
    words = "no device 'cuda:2' here; there is: cuda:0, cuda:1"
    with pytest.raises(UserError, match=words):
        device.choose_device("cuda:2")


def test_cudnn_searches_again_after_a_context_without():
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with device.without_cudnn_search():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before


# ---- memory ----------------------------------------------------------------------------------

GPU, COMPUTER = "the GPU", "the computer"


@pytest.mark.parametrize("error, expected", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), GPU),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), GPU),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), GPU),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), GPU),
    (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), GPU),
    (RuntimeError("Triton Error [CUDA]: out of memory"), GPU),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"), GPU),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."), COMPUTER),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to ..."), COMPUTER),
    (MemoryError(), COMPUTER),
    (RuntimeError("a bug"), None),
    (RuntimeError("DataLoader worker is killed. Its workers are out of shared memory."), None),
    (ValueError("out of memory"), None),
])
def test_errors_of_memory_are_told_from_others(error, expected):
    assert device.without_memory(error) == expected
    try:
        try:
            raise error
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")
    except RuntimeError as later:
        assert device.without_memory(later) == expected, "what led to an error is not asked"


def test_memory_that_really_runs_out_is_the_computers():
    with pytest.raises(RuntimeError) as end:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.without_memory(end.value) == COMPUTER


SCRIPTS = {
    "sample": (sample, sample.SampleSettings, ["a bulldog"]),
    "distill": (distill, distill.DistillSettings, ["a bulldog"]),
    "dreambooth": (dreambooth, dreambooth.DreamBoothSettings, ["photos", "--prompt", "a [v] dog"]),
    "train": (train, train.TrainSettings, ["--init", "tiny"]),
}


@pytest.mark.parametrize("error, words", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"), "the GPU has no memory left"),
    (RuntimeError("can't allocate memory"), "the computer has no memory left"),
])
@pytest.mark.parametrize("name", SCRIPTS)
def test_without_memory_a_script_names_its_own_flags(monkeypatch, capsys, name, error, words):
    """Run as a program, which finds no memory. What it says to try is there to be tried."""
    script, settings, flags = SCRIPTS[name]

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(sys, "argv", [name, *flags])
    monkeypatch.setattr(cli, "parse", fails)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    output = capsys.readouterr().err
    assert end.value.code == 2 and output.count("\n") == 1, f"not one line: {output}"
    assert output.startswith(f"error: {words}; close other programs that use it, or try ")
    assert output.strip().endswith("--device cpu") == ("GPU" in words)
    named = set(re.findall(r"--([a-z-]+)", output)) - {"device"}
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(settings)}
    assert named and named <= {*fields, "no-compile"}, f"no flags of {name}: {named - fields}"


def test_random_state_goes_on_where_it_was():
    torch.manual_seed(3)
    state = device.random_state()
    first = torch.rand(4)
    device.set_random_state(state)
    assert torch.equal(torch.rand(4), first)


def test_a_mac_keeps_its_generator_and_other_computers_leave_it_alone(monkeypatch):
    there, kept = [True], []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[0])
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.arange(3))
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    state = device.random_state()
    device.set_random_state(state)
    there[0] = False
    device.set_random_state(state)
    assert len(kept) == 1 and kept[0].tolist() == [0, 1, 2]
    assert "mps" not in device.random_state()


def test_a_step_off_cuda_is_just_the_step():
    calls = []

    def count():
        calls.append(1)
        return len(calls)

    step = device.GraphedStep(count, CPU)
    assert [step() for _ in range(6)] == [1, 2, 3, 4, 5, 6]


def test_a_step_off_cuda_takes_its_arguments_and_may_return_nothing():
    seen = []

    def add(a, b):
        seen.append(a + b)

    step = device.GraphedStep(add, CPU)
    assert [step(i, 10) for i in range(5)] == [None] * 5
    assert seen == [10, 11, 12, 13, 14]


def test_nothing_is_captured_while_another_thread_draws(monkeypatch):
    captured = []
    step = device.GraphedStep(lambda: "run", CPU, eager=1)
    step.cuda = True
    monkeypatch.setattr(step, "capture", lambda arguments: captured.append(step.calls))
    assert step() == "run"
    with device.UNDISTURBED:
        assert step() == "run" and not captured, "the graph is captured while another one draws"
    step.graph, step.inputs, step.result = None, [], "replayed"
    monkeypatch.setattr(step, "capture", lambda arguments: setattr(step, "graph", Replay()))
    assert step() == "replayed"
    assert not device.UNDISTURBED.locked(), "the other thread waits for ever"


class Replay:
    def replay(self):
        pass


@pytest.mark.gpu
def test_there_is_one_stream_however_often_and_deep_it_is_entered():
    cuda = torch.device("cuda")
    default = torch.cuda.default_stream()
    seen = []
    for _ in range(2):
        with device.side_stream(cuda), device.side_stream(cuda):
            seen.append(torch.cuda.current_stream())
            total = torch.ones(1000, device=cuda).sum()
        assert total.item() == 1000
        assert torch.cuda.current_stream() == default
    assert seen[0] == seen[1] != default


@pytest.mark.gpu
def test_a_captured_step_reads_its_new_arguments():
    cuda = torch.device("cuda")

    def multiply(a, b):
        return a * b.float()

    step = device.GraphedStep(multiply, cuda)
    ten = torch.full((3,), 10, device=cuda)
    results = []
    with device.side_stream(cuda):
        for i in range(8):
            product = step(torch.full((3,), float(i), device=cuda), ten)
            results.append(product.tolist())
    assert results == [[10.0 * i] * 3 for i in range(8)]
    assert step.graph is not None, "the step was never captured"


def train_on_cuda(graphed):
    """Return the losses of ten steps."""
    torch.manual_seed(0)
    cuda = torch.device("cuda")
    layer = torch.nn.Linear(8, 8, device=cuda)
    x = torch.randn(16, 8, device=cuda)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = (layer(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run_step = device.GraphedStep(step, cuda) if graphed else step
    with device.side_stream(cuda):
        return [run_step().item() for _ in range(10)]


@pytest.mark.gpu
def test_a_captured_step_trains_as_the_step_itself():
    assert train_on_cuda(True) == pytest.approx(train_on_cuda(False), rel=1e-5)


class Stream:
    """Stands for a stream of CUDA: notes in `log` what waits for what."""

    def __init__(self, name, log):
        self.name = name
        self.log = log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Picture:
    """Stands for a tensor on a GPU: notes in `log` which stream uses its memory."""
    device = torch.device("cuda")

    def __init__(self, name, log):
        self.name = name
        self.log = log

    def record_stream(self, stream):
        self.log.append(f"{self.name} is used on {stream.name}")


def test_what_runs_side_by_side_waits_before_and_after(monkeypatch):
    """On stand-ins, since this needs no GPU: the order of launches, waits and uses of memory."""
    log = []
    here, streams = Stream("here", log), {}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: now(stream, log))
    monkeypatch.setattr(
        device, "stream_of", lambda _, n: streams.setdefault(n, Stream(f"stream {n}", log))
    )

    def encode(picture):
        log.append(f"encode {picture.name}")
        return Picture(picture.name.upper(), log)

    results = device.side_by_side(encode, [Picture(name, log) for name in "abc"])
    assert [picture.name for picture in results] == ["A", "B", "C"]
    assert log[:2] == ["stream 1 waits for here", "stream 2 waits for here"]
    assert log[-2:] == ["here waits for stream 1", "here waits for stream 2"]
    for name, stream in zip("abc", ["stream 1", "stream 2", "stream 1"]):
        launch = log.index(f"encode {name}")
        assert log[launch - 1 : launch + 2] == [f"{stream} on", f"encode {name}", f"{stream} off"]
        assert f"{name} is used on {stream}" in log, "its memory could be used anew too early"
        assert f"{name.upper()} is used on here" in log
    log.clear()
    device.side_by_side(encode, [Picture("a", log)])
    assert log == ["encode a"], "one call alone needs no stream"


@contextlib.contextmanager
def now(stream, log):
    log.append(f"{stream.name} on")
    yield
    log.append(f"{stream.name} off")


def test_without_a_gpu_calls_run_in_turn():
    x = torch.arange(6.0).view(3, 2)
    results = device.side_by_side(lambda row: 2 * row, x.split(1))
    assert torch.equal(torch.cat(results), 2 * x)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_calls_side_by_side_compute_what_calls_in_turn_do(captured):
    """To the bit, with their gradients, many times over."""
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    weight = torch.randn(512, 512, device=cuda) / 20

    def encode(x):
        for _ in range(20):
            x = torch.tanh(x @ weight)
        return x

    def with_gradient(x, calls):
        x = x.detach().clone().requires_grad_()
        result = torch.cat(calls(encode, x.split(1)))
        return result.detach(), torch.autograd.grad(result.square().sum(), x)[0]

    def step(x):
        return with_gradient(x, device.side_by_side)

    x = torch.randn(4, 512, 512, device=cuda)
    with device.side_stream(cuda):
        take_step = device.GraphedStep(step, cuda) if captured else step
        for turn in range(100):
            given = x * (turn + 1) / 100
            found = take_step(given)
            wanted = with_gradient(given, lambda f, inputs: [f(one) for one in inputs])
            for one, other in zip(found, wanted):
                assert torch.equal(one, other), f"turn {turn} differs"
