"""Compile the steps of a distillation ahead, beside the run that is going to take them.

torch.compile works in one thread of Python: more than a minute for the UNet, and as long again for
the rest of a step. But it keeps what it has made on disk. So several processes compile a step piece
by piece, with weights that nobody has filled in, while the run takes a few uncompiled steps.
Whenever a piece is done, a thread of the run calls torch.compile for it, too, and finds the result
on disk. When all pieces are there, the run's compiled steps begin:

    the run          a picture, now and then a step           compiled steps ...
    its thread              takes over piece after piece      the same for the fine step
    fork server      hands out the pieces, says which are done
    seven workers    a piece of the coarse step, the next one, ..., then those of the fine step

How many steps are uncompiled depends on how busy the computer is: one more reason why a seed does
not repeat bit for bit on a GPU.
"""
import concurrent.futures
import contextlib
import copy
import gc
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from . import sds
from .model import ModelConfig, MVDream, Uninitialised, read_config
from .tools.device import THREAD, UNDISTURBED, can_compile, side_stream, tune_cuda

# Memory of the GPU, in bytes, that a process and the run need. The run's is for its graph and for
# what it takes over beside it.
MEMORY_OF_WORKER = 4 << 30
MEMORY_OF_RUN = 11 << 30
# CUDA itself takes so much of a process's memory.
CONTEXT = 1 << 29
# PyTorch translates what a process has compiled into the GPU's language in so many more.
TRANSLATORS = 4
# Fewer processes than FEWEST do not make up for what they take from the run; more than MOST gain
# nothing.
FEWEST, MOST = 3, 7
# Seconds that a worker has for all its tasks. It may hang.
PATIENCE = 600
# Seconds for which a run that waits for its workers rests between two steps: what the GPU and the
# cores do for uncompiled steps they cannot do for the workers.
REST = 1.0
# Seconds between two looks whether the run has ended.
LOOK_EVERY = 0.1
# Python changes to a thread that waits after so many seconds. By default it is 5 ms, and a step
# of the run waits a dozen times.
TURN = 0.0005


class Task(NamedTuple):
    """What a worker compiles in one go."""
    stage: sds.Stage
    part: str       # of a step: "field", "encoder" or "unet"
    piece: int      # its number, in the order of a step; of the field: 0 samples, 1 pictures


class Job(NamedTuple):
    """What a worker must know to compile as the run would."""
    s: sds.DistillSettings
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    memory: int     # bytes of the GPU; should it need more, the worker is to fail, not the run


class Helper(NamedTuple):
    """The run's side of the fork server."""
    connection: Connection
    tasks: list     # all that workers compile, as of `tasks`; empty: there are no workers
    done: set       # of these: what they have compiled, or given up


# ---- the run's side: workers -----------------------------------------------------------------

def tasks(s, config):
    """What is compiled for the steps of a run, in the order in which it is begun: [Task].

    What takes long comes first, so that nobody waits for it in the end. s: DistillSettings; config:
    the ModelConfig.
    """
    light = s.light_encoder and config.vae.light
    levels = config.vae.light if light else config.vae.channel_mult
    encoder = len(levels) + 1  # these, and what follows
    unet = 2 * len(config.unet.channel_mult) + 3  # levels down and up, before, between and behind
    places = [("field", 1), ("field", 0)]
    places += [("encoder", piece) for piece in range(encoder)]
    places += [("unet", piece) for piece in reversed(range(unet))]
    return [Task(stage, *place) for stage in sds.stages(s) for place in places]


def spare_memory(device):
    """Bytes of the GPU that are free, and that a run does not need. Nothing is loaded yet."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - MEMORY_OF_RUN)


def room(device):
    """How many processes can compile beside a run on this computer? Each needs a core or two."""
    if not can_compile(device):
        return 0
    cores = len(os.sched_getaffinity(0))
    count = min(spare_memory(device) // MEMORY_OF_WORKER, cores // 2, MOST)
    return count if count >= FEWEST else 0


@contextlib.contextmanager
def fork_server(wanted):
    """Within this context there is a Helper, if it is `wanted`; else None.

    The fork server is a process that waits for `start_workers` and then forks them, so that nothing
    has to be imported again. It is forked before the run asks for a GPU, be it only how many there
    are: afterwards a forked process cannot use one. It ends with the run, and Ctrl-C in the
    terminal does not reach it.
    """
    if not wanted or sys.platform != "linux" or torch.cuda.is_initialized():
        yield None
        return
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=serve, args=(theirs, ours))
    process.start()
    theirs.close()
    try:
        yield Helper(ours, [], set())
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.kill()  # if it had no time to lead a group of its own
        process.join()


def start_workers(helper, s, dtype, device):
    """Have as many processes as there is room for compile the steps of a run: or none.

    s: DistillSettings; dtype, device: of the model.
    """
    count = room(device)
    if not count:
        helper.connection.close()  # which ends it
        return
    memory = spare_memory(device) // count - CONTEXT
    job = Job(s, read_config(s.model), dtype, device, memory)
    with contextlib.suppress(OSError):  # it has ended
        helper.connection.send((count, job))
        helper.tasks.extend(tasks(s, job.config))


def has_workers(helper):
    """Does anybody compile for the run? helper: Helper or None."""
    return helper is not None and bool(helper.tasks)


def listen(helper):
    """Note what workers say within LOOK_EVERY seconds. False: nobody says anything any more."""
    try:
        if helper.connection.poll(LOOK_EVERY):
            helper.done.add(helper.connection.recv())
    except (EOFError, OSError):
        return False
    return True


# ---- the run's side: what they have compiled -------------------------------------------------

@contextlib.contextmanager
def take_overs(distillation, helper):
    """Within this context a thread makes what the workers compile the run's own.

    Yields a function: will this stage be compiled within so many seconds? Who asks for the first
    time sets the thread to it. Where there are no workers the answer is yes: then the run compiles
    a step when it takes it.
    """
    if not has_workers(helper):
        yield lambda stage, patience: True
        return
    futures, stop = {}, threading.Event()
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(import_compiler)

        def is_compiled(stage, patience):
            if stage not in futures:
                futures[stage] = thread.submit(take_over, distillation, stage, helper, stop)
            concurrent.futures.wait([futures[stage]], patience)
            if futures[stage].done() and patience:
                futures[stage].result()  # raises what it has raised
            return futures[stage].done()

        try:
            yield is_compiled
        finally:
            stop.set()
            sys.setswitchinterval(before)


def arrivals(helper, stage, stop):
    """Yield the tasks of this stage as they are compiled, or given up, until `stop` is set."""
    waiting = [task for task in helper.tasks if task.stage == stage]
    while waiting and not stop.is_set():
        task = next((task for task in waiting if task in helper.done), None)
        if task:
            waiting.remove(task)
            yield task
        elif not listen(helper):
            return


def take_over(distillation, stage, helper, stop):
    """Compile the pieces of a stage as they arrive, from what the workers have put on disk.

    The run may take steps meanwhile, compiled or not.
    """
    apart = copy.copy(distillation)
    apart.nerf = copy.deepcopy(distillation.nerf)  # for gradients of its own
    apart.model = twin(distillation.model)
    apart.model.unet = twin(apart.model.unet)
    apart.encoder = twin(apart.encoder)
    known = {}
    with side_stream(distillation.device, THREAD):
        apart.begin(stage, compiled=True)
        for task in arrivals(helper, stage, stop):
            with UNDISTURBED:
                compile_piece(apart, task.part, task.piece, known)
                torch.cuda.empty_cache()


def twin(module):
    """Another module with the same layers: what is set in it is not set in the first one."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other


# ---- both sides: how a part is compiled ------------------------------------------------------

def unfilled(function, *arguments):
    """What a function would return, of the same shapes and layouts, but nothing is computed."""
    def allocate(x):
        return torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device=x.device, requires_grad=x.requires_grad
        )

    with FakeTensorMode(allow_non_fake_inputs=True):
        result = function(*arguments)
    return tree_map_only(torch.Tensor, allocate, result)


@contextlib.contextmanager
def only(network, piece, known):
    """Within this context a compiled network runs a single piece, its call of that number.

    Where gradients are wanted, as in the encoder, a piece returns one tensor, and its way back is
    run at once, so that it is compiled, too. known: as of `compile_piece`.
    """
    programs = {name: getattr(network, name) for name in network.PIECES}
    calls = itertools.count()

    def choose(name, *arguments):
        call = next(calls)
        key = type(network), call
        if call == piece:
            known[key] = programs[name](*arguments)
            if torch.is_grad_enabled():
                known[key].sum().backward()
                known[key] = known[key].detach().requires_grad_()
        elif key not in known:
            known[key] = unfilled(getattr(type(network), name), network, *arguments)
        return known[key]

    for name in programs:
        setattr(network, name, partial(choose, name))
    try:
        yield
    finally:
        for name, program in programs.items():
            setattr(network, name, program)


def compile_piece(distillation, part, piece, known):
    """Run a piece of one part of a step, compiled, and its way back.

    known: {place: result} of what was run or found out before for this stage; added to.
    """
    def render(draws):
        return distillation.render_images(draws, distillation.find_samples(draws))

    draws = distillation.draw()
    model = distillation.model
    if part == "field":
        if piece == 0:
            distillation.sampling(draws)
            return
        images, _, penalty = distillation.rendering(draws, distillation.find_samples(draws))
        (images.sum() + penalty).backward()
    elif part == "encoder":
        if "images" not in known:
            known["images"], _, _ = unfilled(render, draws)
        with only(distillation.encoder, piece, known):
            distillation.encode(known["images"])
    else:
        side = model.config.size // model.latent_factor
        shape = (distillation.stage.sets, distillation.s.views, model.config.unet.in_channels)
        latents = torch.zeros(*shape, side, side, device=distillation.device)
        with only(model.unet, piece, known):
            distillation.ask(latents, draws)


# ---- in processes of their own ---------------------------------------------------------------

def serve(connection, ours):
    """The fork server: waits for a job, starts workers, and hands out the tasks.

    ours: the run's end of the connection. The errors of workers are thrown away: the run then
    compiles that piece itself, and shows its own error.
    """
    ours.close()  # so that the connection closes however the run ends
    os.setsid()
    # OpenMP's threads do not survive a fork: who waits for them waits for ever.
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = nowhere = open(os.devnull, "r+")
    for stream in (0, 1, 2):
        os.dup2(nowhere.fileno(), stream)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(TRANSLATORS))
    # A worker's translators are forked, too.
    os.environ.setdefault("TORCHINDUCTOR_WORKER_START", "fork")
    try:
        count, job = connection.recv()
        if not torch.cuda._is_in_bad_fork():  # the run had asked for GPUs before it forked
            workers = [start(job, connection) for _ in range(count)]
            hand_out(connection, workers, tasks(job.s, job.config))
    except EOFError:
        pass  # the run has no room for workers
    finally:
        os.killpg(0, signal.SIGKILL)  # with all that they have started


def start(job, connection):
    """Start a worker: the server's end of the connection with it."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    with contextlib.suppress(OSError):  # there are too many processes
        fork.Process(target=work, args=(connection, ours, theirs, job)).start()
    theirs.close()
    return ours


def hand_out(connection, workers, waiting):
    """Give each worker a task whenever it asks for one, and tell the run which are done.

    A task whose worker ends is given up, and so are all that wait when none is left. workers: their
    connections; waiting: [Task]. Returns when the run has ended.
    """
    task_of = dict.fromkeys(workers)  # {connection: the task it is at, or None}
    while connection not in (heard := wait([connection, *task_of])):
        for worker in heard:
            task = task_of.pop(worker)
            if task:
                connection.send(task)
            with contextlib.suppress(EOFError, OSError):  # it has ended
                worker.recv()
                task = waiting[0] if waiting else None
                worker.send(task)
                task_of[worker] = task
                del waiting[:1]
        if not task_of:
            for task in waiting:
                connection.send(task)
            waiting = []


def import_compiler():
    """Import PyTorch's compiler: only where it is needed, since that takes seconds."""
    importlib.import_module("torch._inductor.compile_fx")


def work(connection, ours, server, job):
    """A worker: asks the server for a task, and for the next one when that is compiled or fails.

    connection: the server's with the run; ours: the server's end of `server`.
    """
    connection.close()  # so that they close when the fork server ends
    ours.close()
    signal.alarm(PATIENCE)  # ends it
    import_compiler()  # which forks the translators, before the GPU is touched
    tune_cuda(tf32=job.dtype != torch.float32, search=False)
    if job.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(job.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory / total), job.device)
    stage, part = sds.stages(job.s)[0], None
    server.send("ready")
    while task := server.recv():
        if task.stage != stage:
            os.nice(5)  # the run, and others, may still be at the coarse stage
        if task.part != part:
            distillation = None
            gc.collect()  # a compiled network and its programs hold each other
            torch.cuda.empty_cache()
            distillation = empty_distillation(task.part, job)
        if (task.stage, task.part) != (stage, part):
            stage, part, known = task.stage, task.part, {}
        with contextlib.suppress(Exception), side_stream(job.device):
            distillation.begin(stage, compiled=True)
            compile_piece(distillation, part, task.piece, known)
        server.send("done")


def empty_distillation(part, job):
    """A Distillation like the run's. Of its model only what this part of a step needs is there."""
    with torch.device("meta"), Uninitialised():
        model = MVDream(job.config).to(job.dtype).requires_grad_(False).eval()
    if part == "encoder":
        model.vae.to_empty(device=job.device)
    if part == "unet":
        model.unet.to_empty(device=job.device)
    text = job.config.text
    context = torch.zeros(2, text.context_length, text.width, dtype=job.dtype, device=job.device)
    return sds.Distillation(job.s, model, context)
