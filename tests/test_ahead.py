"""ahead.py: what is compiled beside a run is what the run needs."""
import contextlib
import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvd import MVDream, ahead, sds
from mvd.model import lay_out
from mvd.tools.device import UNDISTURBED, side_stream, tune_cuda
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
    config.vae.light = (32, 32)
    return saved_model(tmp_path_factory.mktemp("model"), config)


def settings(**changes):
    return sds.DistillSettings("a red bulldog", **{**SETTINGS, **changes})


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
        dict(light_encoder=False),
    ],
)
def test_the_tasks_of_a_step_are_what_the_step_compiles(
    model_file, changes, given_up, monkeypatch
):
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
    lay_out(model.vae)
    lay_out(model.unet)
    job = ahead.Job(s, model.config, context.dtype, context.device, memory=0)
    for stage in sds.stages(s):
        torch.compiler.reset()
        distillation = sds.Distillation(s, model, context)
        distillation.begin(stage, compiled=True)
        distillation.step()
        wanted, seen[:] = list(seen), []
        assert len(wanted) >= 8, "of rendering, encoder and UNet something is not compiled"

        tasks = [task for task in ahead.tasks(s, model.config) if task.stage == stage]
        for alone in (True, False):  # each task in a process of its own; all of them in one
            made, known = [], {}
            for task in tasks:
                torch.compiler.reset()
                seen[:] = []
                empty = ahead.empty_distillation(task.part, job)
                empty.begin(stage, compiled=True)
                place = {} if alone else known.setdefault(task.part, {})
                ahead.compile_piece(empty, task.part, task.piece, place)
                assert seen, f"{task} has nothing to do"
                made += seen
            for graph in wanted:
                assert graph in made, f"at {stage} nobody compiles this:\n{graph[0]}\n{graph[1]}"
            for graph in made:
                assert graph in wanted, f"at {stage} no step needs this:\n{graph[0]}\n{graph[1]}"

        # In the run itself, once its thread has taken over everything, nothing is left to compile.
        torch.compiler.reset()
        distillation.begin(stage)
        distillation.optimizer.zero_grad(set_to_none=True)
        before = copy.deepcopy(distillation.state_dict())
        helper, _ = given_up(tasks=tasks)
        with ahead.take_overs(distillation, helper) as is_compiled:
            assert is_compiled(stage, None)
        places = [weight.data_ptr() for weight in model.parameters()]
        assert distillation.stage == stage
        assert distillation.rendering == distillation.render_images, "the step itself is changed"
        assert all(p.grad is None for p in distillation.nerf.parameters()), "it has a gradient"
        for part, tensors in before["nerf"].items():
            assert torch.equal(tensors, distillation.state_dict()["nerf"][part]), f"{part} learned"
        seen[:] = []
        programs = [vars(model.unet).get(name) for name in model.unet.PIECES]
        distillation.begin(stage, compiled=True)
        assert programs != [vars(model.unet).get(name) for name in model.unet.PIECES], (
            "the thread has changed the network that the run asks"
        )
        assert places == [weight.data_ptr() for weight in model.parameters()], (
            "a graph of the run would read where the weights were"
        )
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


def test_only_one_of_the_pieces_is_run():
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
    known = {}
    for piece, name in enumerate(["square", "halve", "square", "halve"]):
        calls.clear()
        ways_back.clear()
        with ahead.only(network, piece, known):
            network.forward(torch.ones(2, requires_grad=True))
        assert calls == ways_back == [name], f"piece {piece}"
        with ahead.only(network, piece, {}), torch.no_grad():
            network.forward(torch.ones(2))
        assert calls == 2 * [name] and ways_back == [name]
    assert len(known) == 4, "some pieces are not known"
    with ahead.only(network, 3, known):
        results = [network.square("not asked"), network.halve("not asked")]
    assert results[0] is known[Network, 0] and results[1] is known[Network, 1]
    assert network.square is square, "the network is not put back"


@pytest.mark.parametrize("light", [True, False])
def test_the_tasks_are_all_pieces_of_both_stages(model_file, light, monkeypatch):
    s, model = settings(light_encoder=light), MVDream.load(model_file)
    tasks = ahead.tasks(s, model.config)
    assert len(set(tasks)) == len(tasks), "one is there twice"
    coarse, fine = sds.stages(s)
    half = len(tasks) // 2
    assert [task.stage for task in tasks] == half * [coarse] + half * [fine], "the fine half waits"
    count = dict(field=2, encoder=0, unet=0)
    encoder = model.vae.light if light else model.vae.encoder
    for part, network in (("encoder", encoder), ("unet", model.unet)):
        for name in network.PIECES:
            def call(*arguments, part=part, method=getattr(network, name)):
                count[part] += 1
                return method(*arguments)

            monkeypatch.setattr(network, name, call)
    distillation = sds.Distillation(s, model, model.embed([s.prompt, s.negative]))
    distillation.begin(fine)  # whose single set is encoded once
    distillation.step()
    for part, calls in count.items():
        found = [task.piece for task in tasks[:half] if task.part == part]
        assert sorted(found) == list(range(calls)), f"not all pieces of {part} are compiled"


TASKS = [
    ahead.Task(stage, part, piece)
    for stage in sds.stages(settings())
    for part, piece in [("field", 0), ("encoder", 0), ("encoder", 1), ("unet", 0)]
]


@pytest.fixture
def given_up():
    """given_up(*left, tasks) -> a Helper whose workers have given up all tasks but these, and a
    function that says what the fork server would say of those.
    """
    ends = []

    def given_up(*left, tasks=TASKS):
        ours, theirs = multiprocessing.Pipe()
        ends.extend([ours, theirs])
        return ahead.Helper(ours, tasks, set(tasks) - set(left)), theirs.send

    yield given_up
    for end in ends:
        end.close()


# ---- the workers -----------------------------------------------------------------------------

# What they do in the tests below, in place of `ahead.compile_piece`. A task's part names it.

def compile_piece(distillation, part, piece, known):
    globals()[part](distillation)


def note_stage(distillation):
    weights = next(distillation.model.parameters())
    compiled = distillation.rendering != distillation.render_images
    shape = tuple(distillation.context.shape)
    with open(os.environ["NOTES"], "a") as file:
        print(distillation.stage.size, weights.device, weights.dtype, shape, compiled, file=file)


def fail(distillation):
    print("this goes nowhere")
    raise RuntimeError("out of memory")


def die(distillation):
    os._exit(1)


def note_niceness(distillation):
    with open(os.environ["NOTES"], "a") as file:
        print(distillation.stage.size, os.nice(0), file=file)


def sleep(distillation):
    time.sleep(600)


def work_on(distillation):
    """Does not end, and has a helper that does not, either."""
    helper = subprocess.Popen(["sleep", "600"])
    Path(os.environ["NOTES"]).write_text(f"{os.getpid()} {helper.pid}")
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


def hear(helper, *wanted, seconds=60):
    """Listen until all these tasks have been heard of."""
    return wait_until(lambda: ahead.listen(helper) and helper.done.issuperset(wanted), seconds)


@pytest.fixture
def start(model_file, monkeypatch):
    """A context with so many workers on the CPU, for a task per function and stage: its Helper."""
    monkeypatch.setattr(ahead, "spare_memory", lambda device: 64 << 30)
    monkeypatch.setattr(ahead, "compile_piece", compile_piece)
    monkeypatch.setattr(ahead, "import_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)  # another test has asked
    s = settings(model=str(model_file))

    @contextlib.contextmanager
    def start(count, *functions):
        names = list(enumerate(function.__name__ for function in functions))
        tasks = [ahead.Task(stage, name, i) for stage in sds.stages(s) for i, name in names]
        monkeypatch.setattr(ahead, "room", lambda device: count)
        monkeypatch.setattr(ahead, "tasks", lambda s, config: list(tasks))
        with ahead.fork_server(True) as helper:
            ahead.start_workers(helper, s, torch.bfloat16, torch.device("cpu"))
            assert helper.tasks == tasks
            yield helper

    return start


def test_a_worker_takes_one_task_after_the_other(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    with start(1, note_stage) as helper:
        assert hear(helper, *helper.tasks) and helper.done == set(helper.tasks)
    notes = (tmp_path / "notes").read_text().splitlines()
    assert [line.split()[0] for line in notes] == ["8", "16"], "the coarse stage comes first"
    assert all("meta torch.bfloat16 (2, " in line and line.endswith("True") for line in notes)
    assert capfd.readouterr() == ("", ""), "a worker writes into the run's own output"


def test_workers_share_out_the_tasks(start, tmp_path, monkeypatch):
    """While one is busy the other does all that is left."""
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    with start(2, sleep, note_stage, note_stage) as helper:
        busy = helper.tasks[0]
        coarse = [task for task in helper.tasks if task.stage == busy.stage]
        assert hear(helper, *coarse[1:]), "nobody does what is left"
        assert busy not in helper.done


def test_the_fine_stage_gives_way_to_the_coarse_one(start, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    with start(1, note_niceness, note_niceness) as helper:
        assert hear(helper, *helper.tasks)
    before = os.nice(0)
    wanted = [f"8 {before}"] * 2 + [f"16 {min(before + 5, 19)}"] * 2
    assert (tmp_path / "notes").read_text().splitlines() == wanted


@pytest.mark.parametrize("failure", [fail, die])
def test_a_worker_that_fails_gives_up_its_task_and_no_other(
    failure, start, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    with start(3, failure, note_stage, note_stage) as helper:
        assert hear(helper, *helper.tasks), "what it was at is not given up"
    notes = (tmp_path / "notes").read_text().splitlines()
    assert len(notes) == 4, "the others have not gone on"
    assert capfd.readouterr() == ("", ""), "a worker writes into the run's own output"


def test_when_no_worker_is_left_all_tasks_are_given_up(start):
    with start(2, die, die, die) as helper:
        assert hear(helper, *helper.tasks), "the run waits for what nobody does"


def test_a_worker_and_its_helpers_end_with_its_run(start, tmp_path, monkeypatch):
    """When the context is left, and also when the run was killed: then the connection closes."""
    notes = tmp_path / "notes"
    monkeypatch.setenv("NOTES", str(notes))

    def pids():
        assert wait_until(lambda: notes.exists() and len(notes.read_text().split()) == 2)
        worker, its_helper = map(int, notes.read_text().split())
        assert is_running(worker) and is_running(its_helper)
        assert os.getsid(worker) != os.getsid(0), "Ctrl-C would reach it"
        return worker, its_helper

    with pytest.raises(KeyError), start(1, work_on):
        worker, its_helper = pids()
        raise KeyError
    assert wait_until(lambda: not is_running(worker)), "it goes on without its run"
    assert wait_until(lambda: not is_running(its_helper)), "its helper goes on"

    notes.unlink()
    with start(1, work_on) as helper:
        worker, its_helper = pids()
        helper.connection.close()
        assert wait_until(lambda: not is_running(worker)), "it goes on without its run"
        assert wait_until(lambda: not is_running(its_helper)), "its helper goes on"


def test_nobody_is_waited_for_if_the_fork_server_has_died(start, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    monkeypatch.setenv("NOTES", str(notes))
    with start(1, work_on) as helper:
        assert wait_until(lambda: notes.exists() and notes.read_text())
        worker = int(notes.read_text().split()[0])
        os.kill(os.getpgid(worker), signal.SIGKILL)
        _, fine = sds.stages(settings())
        assert list(ahead.arrivals(helper, fine, threading.Event())) == []


def test_workers_do_not_wait_for_threads_of_the_run(start, tmp_path, monkeypatch):
    """OpenMP's threads do not survive a fork."""
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    torch.set_num_threads(2)
    try:
        torch.rand(2000, 2000) @ torch.rand(2000, 2000)
        with start(1, compute) as helper:
            assert hear(helper, helper.tasks[0]), "it waits for ever"
    finally:
        torch.set_num_threads(1)


def compute(distillation):
    torch.rand(2000, 2000) @ torch.rand(2000, 2000)


def test_a_run_that_has_asked_for_gpus_goes_on_alone(start, monkeypatch):
    """A process that is forked then cannot use them."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with start(1, note_stage) as helper:
        assert wait_until(lambda: not ahead.listen(helper)), "the run waits for nobody"
        assert list(ahead.arrivals(helper, sds.stages(settings())[0], threading.Event())) == []


def test_there_is_no_helper_where_none_is_of_use(monkeypatch):
    """Nor where the GPU is in use already: a process that is forked then cannot use it."""
    def is_there(wanted=True, in_use=False, platform="linux"):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
        monkeypatch.setattr(sys, "platform", platform)
        with ahead.fork_server(wanted) as helper:
            return helper is not None

    assert is_there()
    assert not is_there(wanted=False)
    assert not is_there(in_use=True)
    assert not is_there(platform="win32")
    assert not ahead.has_workers(None)


def test_workers_are_started_only_where_there_is_room(model_file, monkeypatch):
    free, cores, compiler = 64 << 30, 16, True
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(ahead, "can_compile", lambda device: compiler)
    assert ahead.room("cuda") == ahead.MOST
    for count in range(1, 6):
        free = ahead.MEMORY_OF_RUN + count * ahead.MEMORY_OF_WORKER
        assert ahead.room("cuda") == (count if count >= ahead.FEWEST else 0), "they need memory"
    free, cores = 64 << 30, 10
    assert ahead.room("cuda") == 5
    cores = 4
    assert ahead.room("cuda") == 0, "so few make the run slower"
    cores = 16
    free = 1 << 30
    assert ahead.room("cuda") == 0
    free, compiler = 64 << 30, False
    assert ahead.room("cuda") == 0
    s = settings(model=str(model_file))

    def count(processes):
        monkeypatch.setattr(ahead, "room", lambda device: processes)
        ours, theirs = multiprocessing.Pipe()
        helper = ahead.Helper(ours, [], set())
        ahead.start_workers(helper, s, torch.float32, torch.device("cuda:0"))
        if not helper.tasks:
            with pytest.raises(EOFError):  # it has nothing to wait for
                theirs.recv()
            return 0
        started, job = theirs.recv()
        assert helper.tasks == ahead.tasks(s, job.config) and ahead.has_workers(helper)
        assert (job.s, job.dtype, job.device) == (s, torch.float32, torch.device("cuda:0"))
        taken = started * (job.memory + ahead.CONTEXT)
        assert taken <= free - ahead.MEMORY_OF_RUN, "they may take what the run needs"
        return started

    assert [count(n) for n in (0, 3, 7)] == [0, 3, 7]


def test_a_worker_that_cannot_be_started_asks_for_nothing(monkeypatch):
    def refuse(process):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", refuse)
    with pytest.raises(EOFError):
        ahead.start(None, None).recv()


# ---- the thread of the run -------------------------------------------------------------------

@pytest.fixture
def run(monkeypatch):
    """A run, without a model, that notes what is taken over: `took`."""
    class Run(SimpleNamespace):
        def begin(self, stage, compiled):
            assert compiled and self.encoder is not run.encoder
            self.stage = stage

    def compile_piece(apart, part, piece, known):
        assert threading.current_thread() is not threading.main_thread(), "the run would stop"
        assert UNDISTURBED.locked(), "a graph could be captured now"
        assert apart.nerf is not run.nerf, "the run's field would have gradients"
        assert known.setdefault("stage", apart.stage) == apart.stage, "that is of another stage"
        run.took.append(ahead.Task(apart.stage, part, piece))

    coarse, _ = sds.stages(settings())
    model, encoder = torch.nn.Module(), torch.nn.Module()
    model.unet = torch.nn.Module()
    field = torch.nn.Linear(1, 1)
    run = Run(
        stage=coarse, device=torch.device("cpu"), model=model, encoder=encoder, nerf=field, took=[]
    )
    monkeypatch.setattr(ahead, "compile_piece", compile_piece)
    return run


def test_the_thread_takes_over_what_is_done(run, given_up):
    coarse, fine = sds.stages(settings())
    half = len(TASKS) // 2
    *some, last = TASKS[:half]
    helper, say = given_up(last, TASKS[-1])
    with ahead.take_overs(run, helper) as is_compiled:
        assert not is_compiled(coarse, 0), "one task is not done"
        assert wait_until(lambda: run.took == some)
        assert not is_compiled(coarse, 0) and run.stage == coarse
        say(last)
        assert wait_until(lambda: is_compiled(coarse, 0.1))
        assert run.took == TASKS[:half]
        assert is_compiled(coarse, 0) and len(run.took) == half, "taken over twice"
        say(TASKS[-1])
        assert is_compiled(fine, None)
        assert run.took == TASKS
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_a_run_that_ends_does_not_wait_for_its_workers(run, given_up):
    coarse, _ = sds.stages(settings())
    helper, _ = given_up(TASKS[0])

    def end():
        with pytest.raises(KeyError), ahead.take_overs(run, helper) as is_compiled:
            assert not is_compiled(coarse, 0)
            raise KeyError

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits"
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_what_fails_in_the_thread_fails_in_the_run(run, given_up, monkeypatch):
    """When the run needs it, not before."""
    def fail(*rest):
        raise RuntimeError("no memory")

    coarse, _ = sds.stages(settings())
    monkeypatch.setattr(ahead, "compile_piece", fail)
    helper, _ = given_up()
    with ahead.take_overs(run, helper) as is_compiled:
        assert wait_until(lambda: is_compiled(coarse, 0))
        with pytest.raises(RuntimeError, match="no memory"):
            is_compiled(coarse, ahead.REST)
    assert not UNDISTURBED.locked()


def test_a_run_without_workers_compiles_alone(run):
    for helper in (None, ahead.Helper(None, [], set())):
        with ahead.take_overs(run, helper) as is_compiled:
            assert all(is_compiled(stage, 0) for stage in sds.stages(settings()))
    assert not run.took


# ---- all of it -------------------------------------------------------------------------------

def count_programs(model_file, device, dtype, processes):
    """Print how many programs a run finds on disk after its workers, and how many it does not."""
    from torch._dynamo.utils import counters

    device, dtype = torch.device(device), getattr(torch, dtype)
    torch.set_num_threads(1)  # as in the workers; code for a CPU depends on it
    ahead.room = lambda device: processes
    ahead.spare_memory = lambda device: 32 << 30
    s = settings(model=model_file)
    with ahead.fork_server(True) as helper:
        tune_cuda(tf32=dtype != torch.float32, search=False)  # the cache goes by it
        ahead.start_workers(helper, s, dtype, device)
        assert hear(helper, *helper.tasks, seconds=600)
    model = MVDream.load(model_file, device, dtype)
    with torch.no_grad():
        context = model.embed([s.prompt, s.negative])
    lay_out(model.vae)
    lay_out(model.unet)
    distillation = sds.Distillation(s, model, context)
    with side_stream(device):
        for stage in sds.stages(s):
            distillation.begin(stage, compiled=True)
            distillation.step()
    found = counters["inductor"]
    print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])


@pytest.mark.parametrize(
    "device, dtype, processes",
    [
        pytest.param("cpu", "float32", 3, marks=pytest.mark.slow),
        pytest.param("cuda:0", "bfloat16", 7, marks=pytest.mark.gpu),
    ],
)
def test_the_run_finds_everything_in_the_cache(model_file, device, dtype, processes, tmp_path):
    """With PyTorch's own compiler. On a CPU it takes minutes, and a compiler of C++.

    In a process of its own: this one may have used the GPU, and then cannot have workers.
    """
    folders = dict(TORCHINDUCTOR_CACHE_DIR="inductor", TRITON_CACHE_DIR="triton")
    environment = {name: str(tmp_path / folder) for name, folder in folders.items()}
    call = f"count_programs({str(model_file)!r}, {device!r}, {dtype!r}, {processes})"
    result = subprocess.run(
        [sys.executable, "-c", f"import conftest, test_ahead; test_ahead.{call}"],
        cwd=Path(__file__).parent,
        env=dict(os.environ, OMP_NUM_THREADS="1", **environment),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    found, missed = map(int, result.stdout.split())
    # At least: the field, three pieces of the encoder and nine of the UNet.
    assert found >= 13, "the cache was hardly used"
    assert not missed, f"{missed} programs are compiled anew, beside {found}"
