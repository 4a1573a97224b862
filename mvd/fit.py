"""The training loop: steps of AdamW on a module, with an average of its weights.

It trains on one device or, started by torchrun, on many: each process makes its part of a step's
batch, and the gradient is averaged before the update. On a GPU the two parts of a step, gradients
and update, are CUDA graphs. The loop logs, draws pictures, writes checkpoints, and ends between two
steps when it is told to.
"""
import contextlib
import functools
from dataclasses import dataclass

import torch
from tqdm import tqdm

from . import diffusion
from .data import Dice, Plan
from .tools import cli, parallel, run
from .tools.device import GraphedStep, load_optimizer, side_stream
from .tools.errors import UserError
from .tools.optimizer import Rounded, Vector, adamw, exchanged, learning_rate, set_rates
from .tools.progress import QUARTERS, Progress

LOG_EVERY = 100
# What the bar shows of a row of the log, as far as there is room.
ON_BAR = (
    "multiview", "single", "views_per_s", "share_of_speed", "memory_gib", "gradient_norm", "lr",
    "multiview_by_noise", "single_by_noise",
)
# So many steps in a row whose loss is not finite stop a run.
MOST_FAILURES = 10
# Beside the signals' numbers, as the code of a process: it cannot go on.
PROBLEM = 99


# ---- what is trained, and its steps ----------------------------------------------------------

@dataclass
class Phase:
    """What one run of the loop trains."""
    name: str         # "vae" or "unet"
    module: torch.nn.Module
    loss: object      # loss(kind, dice, *batch) -> (errors [n], time steps [n] or None)
    plan: Plan
    stream: object    # yields what each batch needs, as `data.feed` does
    peak_lr: float
    first: int        # steps of earlier phases, for the log
    show: object      # show(step) draws pictures, with the averaged weights in place
    names: dict       # {kind: its name in the log}
    more: object = dict   # more() -> what else a checkpoint holds
    report: object = dict  # report() is called in all processes before a line of the log
    rows: tuple = None    # (a table, which of its rows learn, bool [rows, 1]); None: all learn
    share: object = None  # share(views per second) -> the share of the device's speed
    dtype: torch.dtype = torch.float32  # that the module computes with, the same in all processes


class Steps:
    """A phase's weights, and the two parts of a step: gradients of batches, and the update.

    On a GPU each is a CUDA graph, so nothing here may wait for the device.
    """

    def __init__(self, phase, s, device):
        self.phase, self.s, self.device = phase, s, device
        # Behind the gradient lie the sums of the losses, so that one mean over all processes
        # serves both.
        self.vector = Vector(phase.module, spare=2 * QUARTERS)
        self.skip = torch.zeros((), device=device)
        groups = [([self.vector.theta], phase.peak_lr, 0.01)]
        self.optimizer = adamw(groups, betas=(0.9, 0.99), skip=self.skip)
        self.rounded = Rounded(phase.module, phase.dtype)
        # The number of the step, the average's renewal, failures in a row and the most of them:
        # where graphs read and write.
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.renewal = torch.zeros((), device=device)
        self.failures = torch.zeros((), device=device)
        self.most_failures = torch.zeros((), device=device)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.gradients = {}
        for kind in phase.plan.shares:
            add = functools.partial(self.add_gradient, kind)
            self.gradients[kind] = GraphedStep(add, device, pool)
        self.update = GraphedStep(self.plain_update, device, pool)
        self.start = phase.rows[0].detach().clone() if phase.rows else None

    def add_gradient(self, kind, places, *batch):
        """Add the gradient of one batch, at `places` [n] of the step's batch."""
        dice = Dice(self.s.seed, self.step, places)
        with self.rounded:
            errors, t = self.phase.loss(kind, dice, *batch)
            (errors.mean() / self.s.accumulate * self.rounded.scale).backward()
        quarter = torch.zeros_like(places) if t is None else t * QUARTERS // diffusion.NUM_TIMESTEPS
        sums, counts = self.vector.spare.split(QUARTERS)
        sums.index_add_(0, quarter, errors.detach())
        counts.index_add_(0, quarter, torch.ones_like(errors))

    def plain_update(self):
        """Average the gradient over all processes, clip it, step: what `Progress` sums.

        If a number is not finite, nothing changes but the loss scale and the count of such
        failures. A gradient that only the scale made too large for float16 does not count.
        """
        vector, scale = self.vector, self.rounded.scale
        parallel.average(vector.gradient)
        norm = vector.theta.grad.norm() / scale
        measured = torch.cat([vector.spare, norm[None]])
        finite = measured.isfinite().all()
        self.skip.copy_(~finite)
        # No scale helps where the losses, which lie in `spare`, are not finite themselves.
        failed = self.skip * (~vector.spare.isfinite().all() | (scale == 1))
        self.failures.copy_((self.failures + failed) * self.skip)
        self.most_failures.copy_(torch.maximum(self.most_failures, self.failures))
        vector.theta.grad *= (1 / norm.clamp(min=1e-6)).clamp(max=1) / scale
        self.optimizer.step()
        self.rounded.adapt(self.skip)
        if self.phase.rows:
            table, learn = self.phase.rows
            with torch.no_grad():
                table.copy_(torch.where(learn, table, self.start))
        vector.average.lerp_(vector.theta.detach(), self.renewal * finite)
        vector.gradient.zero_()
        return torch.cat([measured.nan_to_num(0, 0, 0) * finite, self.skip[None]])

    def set(self, step):
        """Say which step comes: 0..plan.steps - 1."""
        phase, s = self.phase, self.s
        self.step.fill_(phase.first + step)
        self.rate = learning_rate(step, phase.plan.steps, phase.peak_lr)
        set_rates(self.optimizer, self.rate)
        # A young average follows the weights: its decay begins at 0.1 and grows to s.ema.
        self.renewal.fill_(max(1 - s.ema, 9 / (10 + step)))

    def take(self, kind, parts):
        """One step from its batches, each a tuple (places, …): what `plain_update` returns."""
        for part in parts:
            on_device = [tensor.to(self.device, non_blocking=True) for tensor in part]
            self.gradients[kind](*on_device)
        return self.update()

    def state_dict(self):
        return {
            "theta": self.vector.theta.detach(),
            "average": self.vector.average,
            "optimizer": self.optimizer.state_dict(),
            "rounding": self.rounded.state_dict(),
        }

    def load_state_dict(self, state):
        with torch.no_grad():
            self.vector.theta.copy_(state["theta"])
        self.vector.average.copy_(state["average"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.rounded.load_state_dict(state.get("rounding"))

    @contextlib.contextmanager
    def averaged(self):
        """Within this context the module computes with the average of its weights."""
        eager = contextlib.nullcontext()
        if self.s.compile and self.device.type == "cuda":
            eager = torch.compiler.set_stance("force_eager")
        with exchanged(self.vector.theta, self.vector.average), self.rounded, eager:
            yield


def fit(phase, model, s, out, state=None):
    """The loop of a phase; afterwards phase.module holds the average of its weights.

    s: TrainSettings; state: a checkpoint of this phase to go on from.
    """
    device, plan = model.device, phase.plan
    steps = Steps(phase, s, device)
    start, saved = 0, None
    if state:
        start = saved = state["step"]
        steps.load_state_dict(state)
        state.clear()  # gigabytes of host memory
    progress = Progress(phase.names, device, phase.share)
    stream = phase.stream(start)

    def save(done):
        nonlocal saved
        if done == saved or steps.failures.item():
            return  # it is saved, or the last good state is older
        saved = done
        if parallel.is_first():
            held = {**steps.state_dict(), **phase.more()}
            run.save_checkpoint(out / run.CHECKPOINT, {"phase": phase.name, "step": done, **held})

    first = parallel.is_first()
    with cli.interrupt_flag() as interrupted, side_stream(device):
        left = range(start, plan.steps)
        bar = tqdm(left, phase.name, plan.steps, initial=start, disable=not first)
        for step in bar:
            parts, code = next_parts(plan, step, stream, interrupted.code)
            if code:
                save(step)
                end(phase, step, code)
            steps.set(step)
            kind, done = plan.kinds[step], step + 1
            progress.add(kind, steps.take(kind, parts), plan.views[kind])
            last = done == plan.steps
            if done % MOST_FAILURES == 0 or last:
                stop_if_lost(steps.most_failures.item(), phase, saved, out)
            if done % LOG_EVERY == 0 or last:
                phase.report()
                row = progress.take()
                place = dict(phase=phase.name, step=phase.first + done, lr=steps.rate)
                if first:
                    run.log(out / "log.jsonl", **place, **row)
                bar.set_postfix(on_bar({**place, **row}))
            with progress.pause():
                shown = done % s.sample_every == 0 or (last and plan.steps > s.sample_every)
                if shown and first:
                    with steps.averaged():
                        phase.show(phase.first + done)
                if done % s.save_every == 0 or last:
                    save(done)
    code = parallel.worst(interrupted.code)
    if code:
        end(phase, plan.steps, code)
    steps.vector.theta.data.copy_(steps.vector.average)


def on_bar(row):
    """What the bar shows of a row of the log: {name: text}; four losses as 0.1/0.2/0.3/0.4."""
    texts = {}
    for name in ON_BAR:
        if name in row:
            values = row[name] if isinstance(row[name], list) else [row[name]]
            texts[name] = "/".join("-" if v is None else f"{v:.3g}" for v in values)
    return texts


def end(phase, done, code):
    """End the run after a signal, when the checkpoint is written."""
    if parallel.is_first():
        print(f"interrupted in phase {phase.name} after {done} of {phase.plan.steps} steps")
        print(run.GO_ON)
    raise cli.interruption(code)


def next_parts(plan, step, stream, code):
    """Fetch a step's batches: [(places, …), …], and the largest code of all processes.

    code: the number of a signal that came, or 0. If any process has no data, all end.
    """
    parts, problem = [], None
    try:
        for part in range(plan.accumulate):
            parts.append((plan.examples(plan.kinds[step], part), *next(stream)))
    except UserError as error:
        problem = error
    code = parallel.worst(PROBLEM if problem else code)
    if code == PROBLEM:
        parallel.together(lambda: fail(problem))
    return parts, code


def fail(problem):
    """Raise the problem, if it is one."""
    if problem:
        raise problem


def stop_if_lost(failures, phase, saved, out):
    """Raise UserError if many steps in a row, or all of a phase, had a number that is not finite.

    saved: the step of the last checkpoint, None if there is none.
    """
    if failures < min(MOST_FAILURES, phase.plan.steps):
        return
    good = "there is no checkpoint yet"
    if (out / run.CHECKPOINT).exists():
        good = f"the last good checkpoint is {out / run.CHECKPOINT}, of step {saved}"
        if saved is None:
            good = f"the last good checkpoint is {out / run.CHECKPOINT}, of the phase before"
    problem = UserError(
        f"phase {phase.name}: the loss or its gradient was not finite in {failures:.0f} steps in a "
        f"row; these steps changed nothing, and {good}; try a lower learning rate, or look at the "
        "data with python -m mvd.data"
    )
    parallel.together(lambda: fail(problem))
