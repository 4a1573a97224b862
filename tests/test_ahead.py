"""ahead.py: what is compiled beside a run is what the run needs."""
import copy
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvd import MVDream, ahead, sds
from mvd.model import Uninitialised, compile_network
from mvd.tools.device import side_stream, tune_cuda
from scripts import saved_model
from test_model import small_config

SETTINGS = dict(
    coarse_size=8, fine_size=16, coarse_sets=2, fine_sets=1, coarse_budget=1024, fine_budget=1024,
    levels=2, log2_entries=10, coarsest=4, finest=16, hidden=8, step_size=0.1, occupancy_cells=32,
    smooth_points=64, negative="asset",
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    config = small_config()
    config.size = 32
    return saved_model(tmp_path_factory.mktemp("model"), config)


def settings(**changes):
    return sds.DistillSettings("a red bulldog", **{**SETTINGS, **changes})


def empty_distillation(s, config, context):
    """As `ahead.compile_stages` makes it."""
    with torch.device("meta"), Uninitialised():
        model = MVDream(config).to(context.dtype).requires_grad_(False).eval()
    compile_network(model.vae.to_empty(device=context.device).encoder)
    compile_network(model.unet.to_empty(device=context.device))
    return sds.Distillation(s, model, context)


def describe(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(dtype="bfloat16"),
        dict(shading=True),
        dict(mode="2d"),
        dict(loss="sds", smoothness=0.0),
    ],
)
def test_the_shares_of_a_step_are_what_the_step_compiles(model_file, changes, monkeypatch):
    """The compiler is asked for the same graphs, with inputs of the same layout, at each stage."""
    compile_, seen = torch.compile, []

    def note(graph, inputs, **options):
        tensors = [describe(x) for x in inputs if isinstance(x, torch.Tensor)]
        seen.append((graph.code, tensors))
        return graph.forward

    def compile_with_note(function, *, dynamic, options=None):
        return compile_(function, dynamic=dynamic, backend=note)

    monkeypatch.setattr(torch, "compile", compile_with_note)
    s = settings(**changes)
    model = MVDream.load(model_file, dtype=getattr(torch, changes.get("dtype", "float32")))
    context = model.embed([s.prompt, s.negative])
    # As distill.main lays the weights, and as `ahead` does.
    model.to(memory_format=torch.channels_last)
    for stage in sds.stages(s):
        torch.compiler.reset()
        distillation = sds.Distillation(s, model, context)
        model.compile_networks()
        distillation.begin(stage, compiled=True)
        distillation.step()
        wanted, seen[:] = list(seen), []
        assert len(wanted) >= 8, "of rendering, encoder and UNet something is not compiled"

        for processes in (7, 3):
            made = []
            for share in ahead.shares(processes):
                torch.compiler.reset()
                seen[:] = []
                empty = empty_distillation(s, model.config, context)
                empty.begin(stage, compiled=True)
                ahead.compile_share(empty, *share)
                assert seen, f"{share} has nothing to do"
                made += seen
            for graph in wanted:
                assert graph in made, f"at {stage} nobody compiles this:\n{graph[0]}\n{graph[1]}"
            for graph in made:
                assert graph in wanted, f"at {stage} no step needs this:\n{graph[0]}\n{graph[1]}"

        # In the run itself, once it has taken over everything, nothing is left to compile.
        torch.compiler.reset()
        distillation.begin(stage)
        before = copy.deepcopy(distillation.state_dict())
        for share in ahead.shares(7):
            ahead.take_over(distillation, share)
        assert distillation.stage == stage
        assert distillation.rendering == distillation.render_images, "the step itself is changed"
        assert all(p.grad is None for p in distillation.nerf.parameters()), "a gradient is left"
        for part, tensors in before["nerf"].items():
            assert torch.equal(tensors, distillation.state_dict()["nerf"][part]), f"{part} learned"
        seen[:] = []
        distillation.begin(stage, compiled=True)
        distillation.step()
        assert not seen, f"at {stage} the step compiles this once more:\n{seen[0][0]}"


def test_what_is_unfilled_has_the_layout_of_what_would_be_computed():
    x, weight = torch.rand(2, 3, 5), torch.rand(4, 3, requires_grad=True)

    def function(x):
        y = (weight @ x).transpose(1, 2)
        return y.bfloat16(), [y, x > 0.5], "a name"

    computed, made = function(x), ahead.unfilled(function, x)
    assert made[2] == "a name"
    for one, other in zip([computed[0], *computed[1]], [made[0], *made[1]]):
        assert describe(one) == describe(other) and one.device == other.device
    assert made[0].is_leaf, "memory that nobody has filled in has no way back"


class Network:
    """x -> x² -> x²/2 -> x⁴/4 -> x⁴/8, in four pieces."""
    PIECES = ("square", "halve")

    def square(self, x):
        return x * x

    def halve(self, x):
        return x / 2

    def forward(self, x):
        return self.halve(self.square(self.halve(self.square(x))))


def test_only_a_share_of_the_pieces_is_run():
    """What stands for the compiled programs notes their calls and their ways back."""
    network, calls, ways_back = Network(), [], []

    def program(name, x):
        calls.append(name)
        result = getattr(Network, name)(network, x)
        if result.requires_grad:
            result.register_hook(lambda gradient: ways_back.append(name))
        return result

    network.square = square = partial(program, "square")
    network.halve = partial(program, "halve")
    shares = {0: ["square", "halve"], 1: ["halve"], 2: ["square"]}
    for number, share in shares.items():
        calls.clear()
        ways_back.clear()
        with ahead.only(network, number, 3):
            network.forward(torch.ones(2, requires_grad=True))
        assert calls == ways_back == share, f"share {number} of 3"
        with ahead.only(network, number, 3), torch.no_grad():
            network.forward(torch.ones(2))
        assert calls == 2 * share and ways_back == share
    assert network.square is square, "the network is not put back"


def test_seven_processes_share_out_what_three_do():
    for processes in (0, 2):
        assert ahead.shares(processes) == []
    three, seven = ahead.shares(3), ahead.shares(7)
    assert ahead.shares(6) == three and ahead.shares(40) == seven
    assert len(three) == 3 and len(seven) == 7
    for shares in (three, seven):
        assert {part for part, _, _ in shares} == {"field", "encoder", "unet"}
        for part, _, count in shares:
            numbers = [number for name, number, _ in shares if name == part]
            assert numbers == list(range(count)), f"a share of {part} is missing, or there twice"


# What workers do in the tests below, in place of `ahead.compile_share`.

def compile_share(distillation, part, number, count):
    globals()[part](distillation)


def note_stage(distillation):
    weights = next(distillation.model.parameters())
    compiled = distillation.rendering != distillation.render_images
    shape = tuple(distillation.context.shape)
    with open(os.environ["NOTES"], "a") as file:
        print(distillation.stage.size, weights.device, weights.dtype, shape, compiled, file=file)


def fail_at_the_second_stage(distillation):
    note_stage(distillation)
    print("this goes nowhere")
    if distillation.stage.size == 16:
        raise RuntimeError("out of memory")


def work_on(distillation):
    """Does not end, at the second stage, and has a helper that does not, either."""
    if distillation.stage.size == 16:
        helper = subprocess.Popen(["sleep", "600"])
        Path(os.environ["NOTES"]).write_text(str(helper.pid))
        helper.wait()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # nothing for a dead process
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def start(model_file, monkeypatch):
    """A function that starts workers on the CPU, a process for each of these functions."""
    monkeypatch.setattr(ahead, "room", lambda device: 8)
    monkeypatch.setattr(ahead, "spare_memory", lambda device: 64 << 30)
    s = settings(model=str(model_file))
    code = "import test_ahead; from mvd import ahead; ahead.compile_share = test_ahead.compile_share"
    monkeypatch.setattr(ahead, "COMMAND", [sys.executable, "-c", code + "; ahead.main()"])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def start(*functions):
        shares = [(function.__name__, 0, 1) for function in functions]
        monkeypatch.setattr(ahead, "shares", lambda processes: shares)
        return ahead.workers(True, s, torch.bfloat16, torch.device("cpu"))

    return start


def test_a_worker_takes_the_stages_in_turn(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    coarse, fine = sds.stages(settings())
    with start(fail_at_the_second_stage) as workers:
        (worker,) = workers
        assert ahead.collect(workers, coarse) == [], "it has just begun"
        assert worker.left == [coarse, fine]
        worker.process.wait(120)
        assert ahead.collect(workers, coarse) == [worker.share]
        assert ahead.collect(workers, coarse) == [], "told twice"
        assert worker.left == [fine]
        assert ahead.collect(workers, fine) == [worker.share], "it gave this one up"
        assert worker.left == []
    assert worker.process.returncode == 1
    notes = (tmp_path / "notes").read_text().splitlines()
    assert [line.split()[0] for line in notes] == ["8", "16"]
    assert all("meta torch.bfloat16 (2, " in line and line.endswith("True") for line in notes)
    assert capfd.readouterr() == ("", ""), "a worker writes into the run's own output"


@pytest.fixture
def piped():
    """piped(name) is a Worker without a process, and a function that says what one would say."""
    ends = []

    def piped(name):
        read, write = os.pipe()
        ends.extend([os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)])
        process = SimpleNamespace(stdout=ends[-2])
        worker = ahead.Worker(process, (name, 0, 1), sds.stages(settings()))
        return worker, ends[-1].write

    yield piped
    for end in ends:
        end.close()


def test_the_run_catches_up_with_its_workers(piped, monkeypatch):
    coarse, fine = sds.stages(settings())
    took = []
    monkeypatch.setattr(ahead, "take_over", lambda d, share: took.append((d.stage, share[0])))
    (a, say_a), (b, say_b) = piped("a"), piped("b")
    run = SimpleNamespace(stage=coarse)
    assert not ahead.catch_up(run, [a, b]) and not took
    say_a(b"..")
    assert not ahead.catch_up(run, [a, b]) and took == [(coarse, "a")]
    say_b(b".")
    assert ahead.catch_up(run, [a, b]) and took == [(coarse, "a"), (coarse, "b")]
    assert ahead.catch_up(run, [a, b]) and len(took) == 2, "taken over twice"
    run.stage = fine
    assert not ahead.catch_up(run, [a, b]) and took[2:] == [(fine, "a")]
    assert ahead.catch_up(run, []), "nobody is waited for"


def test_a_stage_that_is_over_is_not_taken_over(piped, monkeypatch):
    """What is said of it is passed over."""
    _, fine = sds.stages(settings())
    took = []
    monkeypatch.setattr(ahead, "take_over", lambda d, share: took.append((d.stage, share[0])))
    a, say = piped("a")
    say(b"..")
    assert ahead.catch_up(SimpleNamespace(stage=fine), [a]) and took == [(fine, "a")]


def test_a_worker_and_its_helpers_end_with_its_run(start, tmp_path, monkeypatch):
    """When the context is left, and also when the run was killed: then its pipe is closed."""
    notes = tmp_path / "notes"
    monkeypatch.setenv("NOTES", str(notes))
    with start(work_on) as (worker,):
        process = worker.process
        assert os.getsid(process.pid) != os.getsid(0), "Ctrl-C would reach it"
        assert process.stdout.read(1) == b".", "it has failed"
        assert wait_until(lambda: notes.exists() and notes.read_text())
        helper = int(notes.read_text())
        assert is_running(helper)
        process.stdin.close()
        assert process.wait(120) == -signal.SIGKILL, "it goes on without its run"
        assert wait_until(lambda: not is_running(helper)), "its helper goes on"
    with pytest.raises(KeyError):
        with start(work_on) as (worker,):
            raise KeyError
    assert worker.process.returncode == -signal.SIGKILL


def test_workers_are_started_only_where_there_is_room(model_file, monkeypatch):
    free, cores, jobs = 64 << 30, 16, []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    assert ahead.room("cuda") == 8
    free = ahead.MEMORY_OF_RUN + 3 * ahead.MEMORY_OF_WORKER
    assert ahead.room("cuda") == 3
    free, cores = 64 << 30, 6
    assert ahead.room("cuda") == 3
    free = 1 << 30
    assert ahead.room("cuda") == 0
    free, s = 64 << 30, settings(model=str(model_file))

    def count(wanted, processes):
        jobs.clear()
        monkeypatch.setattr(ahead, "room", lambda device: processes)
        with ahead.workers(wanted, s, torch.float32, "cuda:0") as workers:
            assert [job["share"] for job in jobs] == [worker.share for worker in workers]
        taken = sum(job["memory"] + ahead.CONTEXT for job in jobs)
        assert taken <= free - ahead.MEMORY_OF_RUN, "they may take what the run needs"
        return len(jobs)

    monkeypatch.setattr(ahead, "start", lambda job: jobs.append(job) or ended())
    assert [count(True, n) for n in (0, 2, 3, 6, 7, 30)] == [0, 0, 3, 3, 7, 7]
    assert count(False, 7) == 0


def test_a_run_goes_on_if_a_worker_cannot_be_started(model_file, monkeypatch):
    def start(job):
        if job["share"][0] == "unet":
            raise BlockingIOError("Resource temporarily unavailable")
        return ended()

    monkeypatch.setattr(ahead, "room", lambda device: 3)
    monkeypatch.setattr(ahead, "spare_memory", lambda device: 64 << 30)
    monkeypatch.setattr(ahead, "start", start)
    s = settings(model=str(model_file))
    with ahead.workers(True, s, torch.float32, "cuda:0") as workers:
        assert [worker.share[0] for worker in workers] == ["field", "encoder"]


def ended():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", ""], start_new_session=True, **pipes)


@pytest.fixture
def tuned():
    """A function that tunes PyTorch as `ahead.compile_stages` does; then all is put back."""
    search, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield tune_cuda
    torch.backends.cudnn.benchmark = search
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    "device, dtype, processes",
    [
        pytest.param("cpu", torch.float32, 3, marks=pytest.mark.slow),
        pytest.param("cuda:0", torch.bfloat16, 7, marks=pytest.mark.gpu),
    ],
)
def test_the_run_finds_everything_in_the_cache(
    model_file, device, dtype, processes, tuned, tmp_path, monkeypatch
):
    """With PyTorch's own compiler. On a CPU it takes minutes, and a compiler of C++."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here; code for a CPU depends on it
    monkeypatch.setattr(ahead, "room", lambda device: processes)
    monkeypatch.setattr(ahead, "spare_memory", lambda device: 32 << 30)
    tuned(tf32=dtype != torch.float32)  # the cache goes by it
    s = settings(model=str(model_file))
    model = MVDream.load(model_file, torch.device(device), dtype)
    with torch.no_grad():
        context = model.embed([s.prompt, s.negative])
    model.to(memory_format=torch.channels_last)
    with ahead.workers(True, s, dtype, model.device) as workers:
        for worker in workers:
            assert worker.process.wait(600) == 0, f"the worker of {worker.share} has failed"
    torch.compiler.reset()
    counters.clear()
    distillation = sds.Distillation(s, model, context)
    model.compile_networks()
    with side_stream(torch.device(device)):
        for stage in sds.stages(s):
            distillation.begin(stage, compiled=True)
            distillation.step()
    found = counters["inductor"]
    # At least: the field, two halves of the encoder and nine pieces of the UNet.
    assert found["fxgraph_cache_hit"] >= 12, "the cache was hardly used"
    missed = found["fxgraph_cache_miss"]
    assert not missed, f"{missed} programs are compiled anew, beside {found['fxgraph_cache_hit']}"
