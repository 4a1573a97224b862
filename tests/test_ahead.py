"""ahead.py: what is compiled beside a run is what the run needs."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mvd import MVDream, ahead, sds
from mvd.model import Uninitialised
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
def test_the_halves_of_a_step_are_what_the_step_compiles(model_file, changes, monkeypatch):
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

        torch.compiler.reset()
        for half in (ahead.compile_encoding, ahead.compile_unet):
            empty = empty_distillation(s, model.config, context)
            empty.begin(stage, compiled=True)
            half(empty)
        made, seen[:] = list(seen), []
        assert len(wanted) >= 3, "rendering, encoder and UNet are not compiled"
        for graph in wanted:
            assert graph in made, f"at {stage} nobody compiles this ahead:\n{graph[0]}\n{graph[1]}"
        assert len(made) == len(wanted), f"at {stage} something is compiled that no step needs"


def note_stage(distillation):
    """Half of a step that only says for what it was asked."""
    weights = next(distillation.model.parameters())
    compiled = distillation.rendering != distillation.render_images
    with open(os.environ["NOTES"], "a") as file:
        print(distillation.stage.size, weights.device, weights.dtype, compiled, file=file)


def fail_at_the_second_stage(distillation):
    print("this goes nowhere")
    if distillation.stage.size == 16:
        raise RuntimeError("out of memory")


def work_on(distillation):
    """Half of a step that does not end, at the second stage."""
    if distillation.stage.size == 16:
        time.sleep(600)


@pytest.fixture
def start(model_file, monkeypatch):
    """A function that starts workers on the CPU, which run these halves in place of real ones."""
    monkeypatch.setattr(ahead, "has_room", lambda device: True)
    s, config = settings(), MVDream.load(model_file).config
    context = torch.zeros(2, config.text.context_length, config.text.width, dtype=torch.bfloat16)

    def start(*halves, progress=0.0):
        monkeypatch.setattr(ahead, "HALVES", {half.__name__: half for half in halves})
        code = "import test_ahead; from mvd import ahead; "
        for half in halves:
            code += f"ahead.HALVES['{half.__name__}'] = test_ahead.{half.__name__}; "
        monkeypatch.setattr(ahead, "COMMAND", [sys.executable, "-c", code + "ahead.main()"])
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
        return ahead.workers(True, s, config, context, progress)

    return start


def test_a_worker_takes_the_stages_in_turn(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    with start(note_stage, fail_at_the_second_stage) as processes:
        assert not ahead.ready(processes, last=False), "they have just begun"
        assert not ahead.ready(processes, last=True)
        for process in processes:
            process.wait(120)
        assert ahead.ready(processes, last=False) and ahead.ready(processes, last=True)
        reports = [process.stdout.read() for process in processes]
    assert reports == [b"..", b"."], "a byte for each stage, and nothing else"
    assert [process.returncode for process in processes] == [0, 1]
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes == [f"{size} meta torch.bfloat16 True" for size in (8, 16)]
    assert capfd.readouterr() == ("", ""), "a worker writes into the run's own output"


def test_a_worker_ends_with_its_run(start):
    """When the context is left, and also when the run was killed: then its pipe is closed."""
    with start(work_on) as (process,):
        assert os.getsid(process.pid) != os.getsid(0), "Ctrl-C would reach it"
        assert process.stdout.read(1) == b".", "it has failed"
        process.stdin.close()
        assert process.wait(120) == 1
    with pytest.raises(KeyError):
        with start(work_on) as (process,):
            raise KeyError
    assert process.returncode == -signal.SIGKILL


def test_stages_that_are_over_are_not_compiled(start, monkeypatch):
    jobs = []
    monkeypatch.setattr(ahead, "start", lambda job: jobs.append(job) or finished())
    for progress, sizes in ((0.0, [8, 16]), (0.49, [8, 16]), (0.5, [16])):
        jobs.clear()
        with start(note_stage, work_on, progress=progress) as processes:
            assert len(processes) == 2
        for job in jobs:
            assert [stage.size for stage in job["stages"]] == sizes


def finished():
    return subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)


def test_workers_are_started_only_where_there_is_room(model_file, monkeypatch):
    free, cores = 64 << 30, 16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    assert ahead.has_room("cuda")
    free = 1 << 30
    assert not ahead.has_room("cuda")
    free, cores = 64 << 30, 2
    assert not ahead.has_room("cuda")
    config, context = MVDream.load(model_file).config, torch.zeros(2, 7, 16)
    for wanted, cores in ((True, 2), (False, 16)):
        with ahead.workers(wanted, settings(), config, context, 0.0) as processes:
            assert processes == []
    assert ahead.ready([], last=False) and ahead.ready([], last=True), "nobody is waited for"


@pytest.fixture
def tuned():
    """Settings as of `ahead.compile_stages`: the cache goes by them. They are put back."""
    search, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    tune_cuda(tf32=False)
    yield
    torch.backends.cudnn.benchmark = search
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda:0", marks=pytest.mark.gpu),
    ],
)
def test_the_run_finds_everything_in_the_cache(model_file, device, tuned, tmp_path, monkeypatch):
    """With PyTorch's own compiler. On a CPU it takes minutes, and a compiler of C++."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here; code for a CPU depends on it
    monkeypatch.setattr(ahead, "has_room", lambda device: True)
    s = settings()
    model = MVDream.load(model_file, torch.device(device))
    with torch.no_grad():
        context = model.embed([s.prompt, s.negative])
    model.to(memory_format=torch.channels_last)
    with ahead.workers(True, s, model.config, context, 0.0) as processes:
        for process in processes:
            assert process.wait(600) == 0, "a worker has failed"
    torch.compiler.reset()
    counters.clear()
    distillation = sds.Distillation(s, model, context)
    model.compile_networks()
    with side_stream(torch.device(device)):
        for stage in sds.stages(s):
            distillation.begin(stage, compiled=True)
            distillation.step()
    found = counters["inductor"]
    assert found["fxgraph_cache_hit"] >= 6 and not found["fxgraph_cache_miss"], dict(found)
