"""A few photos of one subject -> a model that draws it from every side (MVDream §3.3).

    python dreambooth.py photos/ --prompt "a photo of [v] bulldog" --out runs/my-dog
    python sample.py "[v] bulldog wearing a top hat" --model runs/my-dog
    python distill.py "[v] bulldog" --model runs/my-dog

"[v]" stands for the identifier, a rare word that comes to mean the subject. The photos are shown
in 2D mode, and the UNet θ learns, starting from θ0 (multi-view DreamBooth, MVDream §3.3):

    L = L_diffusion(photos) + λ ‖θ - θ0‖₁ / N_θ

What it knows of sides and cameras survives, because θ stays near θ0. Text tower and autoencoder
stay as they are by default. Ctrl-C or a kill loses at most --save-every steps: the same command
with --resume goes on.

Not in the paper: a model that has seen few words hardly tells "a [v] bulldog" from "a bulldog",
and draws the subject for both. Three terms help; they are off unless a preset turns them on.
--identifier-lr lets the row of [v] in the text tower learn, too. --class-preservation holds what
the UNet makes of the prompt without [v]. --text-preservation holds what the text tower makes of
the rest of a prompt, so that a learned [v] does not drown it; its weight grows during the run.
"""
from dataclasses import asdict, dataclass

import mvd  # before torch: tools/threads.py
import torch
from torch.func import functional_call
from tqdm import tqdm

from mvd import data, diffusion, presets
from mvd.model import MVDream, read_config
from mvd.text import tokenizer
from mvd.tools import cli, photos, run
from mvd.tools.cli import setting
from mvd.tools.device import (
    GraphedStep,
    choose_device,
    choose_dtype,
    load_optimizer,
    random_state,
    set_random_state,
    side_stream,
    tune_cuda,
)
from mvd.tools.errors import UserError
from mvd.tools.optimizer import Rounded, adamw, learning_rate, set_rates
from mvd.tools.page import write_page
from mvd.tools.pictures import grid, save_png
from mvd.tools.vocabulary import SUBJECT, check_identifier, known_part, name_subject, words_of

# How often a photo is encoded, each time with another grey behind what is transparent.
GREYS = 8
LOG_EVERY = 10
# What to try when the loss is no longer a number.
IF_LOST = "try a lower --lr or --identifier-lr"
# What may be another on --resume.
MAY_CHANGE = ("sample_every", "save_every", "dtype")
# What to try where memory does not suffice.
SMALLER = "a smaller --batch, --class-preservation 0, --identifier-lr 0, or a smaller --model"
# Tensors of weights that `preserve` takes together: few launches, and little memory.
BLOCK = 32


@dataclass
class DreamBoothSettings:
    """The flags. The defaults are the paper's, for the full-size model; a preset changes some."""
    photos: str = setting(help="folder with 3 to 20 photos of one subject", positional=True)
    prompt: str = setting(
        help='what the photos show, with "[v]" for the identifier: "a photo of [v] bulldog"'
    )
    model: str = setting(
        "tiny", "the model to start from: tiny, mvdream-sd21, sd21, or the path of a checkpoint"
    )
    out: str = setting("runs/dreambooth", "folder for the model, pictures, log and checkpoint")
    wordings: bool = setting(
        False,
        "call the photos also what the prompt says from [v] on, with and without the suffix that "
        "3D mode adds, as later prompts will",
    )
    identifier: str = setting("phol", "the identifier token for the subject")
    steps: int = setting(600, "training steps", min=1)
    batch: int = setting(4, "photos in a batch", min=1)
    lr: float = setting(2e-6, "learning rate", min=0)
    cosine: bool = setting(False, "cosine decay of the learning rate, after a short warm-up")
    weight_decay: float = setting(0.01, "weight decay of AdamW", min=0)
    preservation: float = setting(
        1.0, "λ, how strongly the weights are held where they were", min=0
    )
    class_preservation: float = setting(
        0.0,
        "weight of the loss that keeps what the UNet makes of the prompt without [v]",
        min=0,
    )
    identifier_lr: float = setting(
        0.0, "learning rate of the identifier's row in the text tower; 0: it stays", min=0
    )
    text_preservation: float = setting(
        0.0,
        "if that row learns, weight at the end (it grows from 0) of the loss that keeps what the "
        "text tower makes of the rest of a prompt",
        min=0,
    )
    flips: bool = setting(False, "show the photos mirrored, too: only if the subject is symmetric")
    sample_every: int = setting(
        200, "steps between sample grids; a shorter run draws none", min=1
    )
    save_every: int = setting(200, "steps between checkpoints", min=1)
    device: str = setting("auto", "cuda, cpu, or mps (untested); auto: cuda, else cpu")
    dtype: str = setting(
        "auto",
        "that the UNet computes with; auto: bfloat16 on cuda (float16 before Ampere), else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = setting(0, "of everything random", min=0)
    resume: bool = setting(False, "go on from the checkpoint in --out")


def preset_settings(flags):
    """The settings of the model that the flags name."""
    return presets.settings_for("dreambooth", read_config(flags.model))


@dataclass
class Subject:
    """What the photos are, and what they are called, computed once."""
    posteriors: torch.Tensor  # [copies, N, 1, 2c, h, w], of the photos (`on_greys`)
    tokens: torch.Tensor      # [W, L]: their name in W wordings
    contexts: torch.Tensor    # [W, L, D]: what the text tower makes of these, before it learns
    plain: torch.Tensor       # [W', L, D]: the same without [v], and of the empty prompt


def on_greys(vae, rgba):
    """Encode photos, uint8 [N, 4, H, W], GREYS times, each time on other greys."""
    copies = []
    for _ in range(GREYS):
        grey = torch.rand(len(rgba), device=rgba.device)
        copies.append(data.encode_posteriors(vae, rgba, grey))
    return torch.stack(copies)[:, :, None]


# ---- the paper's regulariser -----------------------------------------------------------------

@torch.no_grad()
def preserve(weights, start, strength):
    """Add the gradient of λ ‖θ - θ0‖₁ / N_θ: w.grad += λ sign(w - w0) / N_θ.

    weights, start: lists of float32 tensors, θ and θ0. (In bfloat16, θ - θ0 would round to 0.)
    N_θ: all their numbers, also of those without a gradient. A weight without a gradient, such as
    the camera's, has not moved and stays. Returns a tensor
    [4]: ‖θ - θ0‖₁ / N_θ, ‖θ - θ0‖₂, and the 2-norms of both gradients: of the other losses, and of
    this one.

    For speed it is a few operations per block of tensors. One by one, which is as right, it reads:

        change = w - w0
        w.grad += strength / count * change.sign()
    """
    count = sum(w.numel() for w in weights)
    touched = [(w, w0) for w, w0 in zip(weights, start) if w.grad is not None]
    blocks = []
    for i in range(0, len(touched), BLOCK):
        w, w0 = zip(*touched[i : i + BLOCK])
        gradient = [weight.grad for weight in w]
        change = torch._foreach_sub(w, w0)
        l1 = torch._foreach_norm(change, 1)
        l2 = torch._foreach_norm(change, 2)
        others = torch._foreach_norm(gradient, 2)
        # In place: from here on, `change` is the pull.
        torch._foreach_sign_(change)
        torch._foreach_mul_(change, strength / count)
        torch._foreach_add_(gradient, change)
        pull = torch._foreach_norm(change, 2)
        blocks.append(torch.stack([torch.stack(norms) for norms in (l1, l2, others, pull)]))
    norms = torch.cat(blocks, 1)  # [4, touched]
    return torch.cat([norms[:1].sum(1) / count, norms[1:].norm(dim=1)])


# ---- what was added --------------------------------------------------------------------------

def class_loss(unet, theta0, x0, context):
    """‖ε_θ(x_t; y) - ε_θ0(x_t; y)‖², the mean over all numbers, of prompts y without [v].

    Keeps θ's predictions on the class prompt close to θ0's. It is prior preservation (Ruiz et al.
    2023, eq. 2) with θ0's predictions (learning without forgetting, Li & Hoiem 2016) in place of
    pictures that θ0 drew.

    theta0: {name: weight}. x0 [B, 1, c, h, w]: scaled latents of photos. context [B, L, D].
    """
    dtype = unet.conv_out.weight.dtype

    def start(*inputs):
        weights = {name: w.to(dtype) for name, w in theta0.items()}
        return functional_call(unet, weights, inputs)

    start.prediction = unet.prediction
    t = torch.randint(diffusion.NUM_TIMESTEPS, x0.shape[:1], device=x0.device)
    x_t = diffusion.q_sample(x0, t, torch.randn_like(x0))
    with torch.no_grad():
        before = diffusion.predict_noise(start, x_t, t, context)
    return (diffusion.predict_noise(unet, x_t, t, context) - before).square().mean()


# ---- the loop --------------------------------------------------------------------------------

class FineTuning:
    """The weights that learn, and the step that moves them."""

    def __init__(self, model, subject, s):
        """model: MVDream; subject: Subject; s: DreamBoothSettings."""
        self.model, self.subject, self.s = model, subject, s
        self.device = model.device
        self.table = model.text.token_embedding  # .weight [rows, D]
        self.rates = [s.lr]
        model.unet.requires_grad_(True)
        groups = [(model.unet.parameters(), s.lr, s.weight_decay)]
        if s.identifier_lr:
            self.table.requires_grad_(True)
            self.rates.append(s.identifier_lr)
            groups.append((self.table.parameters(), s.identifier_lr, 0.0))
        self.theta = dict(model.unet.named_parameters())
        self.theta0 = {name: w.detach().clone() for name, w in self.theta.items()}
        dtype = choose_dtype(s.dtype, self.device)
        self.rounded = Rounded(model.unet, dtype)
        # Of float16 alone: is the step left out, as its gradient was too large?
        self.skip = torch.zeros((), device=self.device) if dtype == torch.float16 else None
        self.optimizer = adamw(groups, betas=(0.9, 0.999), skip=self.skip)
        # The weight of the text loss. A tensor, so that a CUDA graph reads what `anneal` wrote.
        self.text_preservation = torch.zeros((), device=self.device)
        # Which rows of the table are the identifier's, [rows, 1].
        self.own_rows = torch.zeros(len(self.table.weight), 1, device=self.device)
        self.own_rows[model.text.word_rows(s.identifier)] = 1

    def draw(self, wordings):
        """A batch of photos: scaled latents [B, 1, c, h, w], and which wording names each [B]."""
        copies, photos = self.subject.posteriors.shape[:2]
        counts = photos, copies, wordings
        photo, copy, wording = data.draw_indices(counts, self.s.batch, self.device)
        z = data.sample_posterior(self.subject.posteriors[copy, photo])
        return self.model.config.vae.scale_factor * z, wording

    def text_loss(self, context, wording):
        """How far the text tower's output has moved at all tokens but [v], mean square.

        All tokens count but the identifier's: words, the end, and the padding, too, to which the
        UNet attends as to any other token.
        """
        beside = 1 - self.own_rows[self.subject.tokens]  # [W, L, 1]
        change = beside[wording] * (context - self.subject.contexts[wording])
        return change.square().mean()

    def losses(self):
        """The three losses that have a gradient by autograd: diffusion, class, text; [] each."""
        s, subject, unet = self.s, self.subject, self.model.unet
        of_class, of_text = torch.zeros(2, device=self.device)
        if s.class_preservation:
            x0, wording = self.draw(len(subject.plain))
            of_class = class_loss(unet, self.theta0, x0, subject.plain[wording])
            of_class = s.class_preservation * of_class
        x0, wording = self.draw(len(subject.contexts))
        context = subject.contexts[wording]  # [B, L, D]
        if s.identifier_lr:
            context = self.model.text(subject.tokens[wording])
            of_text = self.text_preservation * self.text_loss(context, wording)
        # No camera: the 2D mode.
        return diffusion.denoising_loss(unet, x0, context), of_class, of_text

    def step(self):
        """One optimisation step: the three losses, then what `preserve` returns, [7]."""
        with self.rounded:
            loss, of_class, of_text = self.losses()
            ((loss + of_class + of_text) * self.rounded.scale).backward()
        if self.skip is not None:
            self.unscale()
        measured = preserve(
            list(self.theta.values()), list(self.theta0.values()), self.s.preservation
        )
        if self.s.identifier_lr:
            self.table.weight.grad *= self.own_rows  # the other words keep their meaning
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        measured = torch.cat([torch.stack([loss, of_class, of_text]).detach(), measured])
        if self.skip is not None:
            self.adapt(measured)
        return measured

    def unscale(self):
        """Divide the gradients by the loss scale, and skip the step if one is not finite."""
        weights = [*self.theta.values(), self.table.weight]
        gradients = [w.grad for w in weights if w.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.rounded.scale)
        norms = torch.stack(torch._foreach_norm(gradients))
        self.skip.copy_(~norms.isfinite().all())

    def adapt(self, measured):
        """Choose the next loss scale. measured: what `step` returns.

        A gradient that only the scale made too large is reported as 0: that is no reason to stop.
        """
        overflow = self.skip * (self.rounded.scale > 1)
        measured[5].masked_fill_(overflow > 0, 0)
        self.rounded.adapt(self.skip)

    def anneal(self, step):
        """Set what changes in the course of a run. step: 0..steps - 1."""
        s = self.s
        # Large from the start, it keeps some subjects from being learned.
        self.text_preservation.fill_(s.text_preservation * step / s.steps)
        if s.cosine:
            rates = [learning_rate(step, s.steps, peak) for peak in self.rates]
            set_rates(self.optimizer, *rates)

    def state_dict(self):
        """What a checkpoint holds: the weights that learn, and the optimizer."""
        weights = {"unet": self.model.unet.state_dict(), "table": self.table.state_dict()}
        optimizer = self.optimizer.state_dict()
        return {**weights, "optimizer": optimizer, "rounding": self.rounded.state_dict()}

    def load_state_dict(self, state):
        self.model.unet.load_state_dict(state["unet"])
        self.table.load_state_dict(state["table"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.rounded.load_state_dict(state.get("rounding"))

    def finish(self):
        """Training is over: nothing learns any more."""
        self.model.unet.requires_grad_(False)
        self.table.requires_grad_(False)


def finetune(model, subject, s, out, state=None, *, show=None):
    """The loop; afterwards model.unet, and the row of [v], hold what they have learned.

    state: what the checkpoint held, or None. show(step) draws pictures. Raises KeyboardInterrupt
    after Ctrl-C or SIGTERM, when the checkpoint is written.
    """
    tuning = FineTuning(model, subject, s)
    start = 0
    if state:
        start = state["step"]
        tuning.load_state_dict(state)
        set_random_state(state["random"])
    graphed = GraphedStep(tuning.step, tuning.device)
    sums, count = torch.zeros(7, device=tuning.device), 0
    with cli.interrupt_flag() as interrupted, side_stream(tuning.device):
        bar = tqdm(range(start, s.steps), initial=start, total=s.steps, desc=s.prompt)
        for step in bar:
            tuning.anneal(step)
            measured = graphed()
            sums += measured
            count += 1
            done = step + 1
            last = done == s.steps
            if done % LOG_EVERY == 0 or last:
                means = sums / count
                check_step(out, done, means)
                row = log_row(means, s.preservation)
                run.log(out / "log.jsonl", step=done, **row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", distance=f"{row['distance']:.3g}")
                sums.zero_()
                count = 0
            if show and (done % s.sample_every == 0 or (last and s.steps > s.sample_every)):
                kept = random_state()
                with tuning.rounded:
                    show(done)
                set_random_state(kept)
            stop = interrupted.is_set()
            if done % s.save_every == 0 or stop:
                check_step(out, done, measured)
                state = {"step": done, **tuning.state_dict(), "random": random_state()}
                run.save_checkpoint(out / run.CHECKPOINT, state)
            if stop and not last:
                print(f"interrupted after {done} of {s.steps} steps; {run.GO_ON}")
                raise cli.interruption(interrupted.code)
    tuning.finish()


def check_step(out, done, measured):
    """Raise UserError if the loss of a step, or the gradient that it moved along, is not finite."""
    loss, of_class, of_text, _, _, gradient, _ = measured.tolist()
    run.check_finite(out, done, IF_LOST, loss=loss + of_class + of_text, gradient=gradient)


def log_row(means, strength):
    """The seven numbers of a step by name.

    The losses but the first include their weights. share: the preservation's part of the gradient.
    """
    loss, of_class, of_text, l1, l2, gradient, pull = means.tolist()
    return {
        "loss": loss,
        "class_loss": of_class,
        "text_loss": of_text,
        "preservation": strength * l1,
        "distance": l2,
        "share": pull / max(pull + gradient, 1e-30),
    }


# ---- pictures --------------------------------------------------------------------------------

# The lines of the chart, by the names that they have in the log.
CURVES = {
    "loss": "diffusion loss",
    "class_loss": "class loss",
    "text_loss": "text loss",
    "preservation": "preservation loss",
    "share": "its share of the gradient",
    "distance": "distance from the start",
}


def set_aside(model, s, place):
    """Move what does not learn to the CPU, to make room on the GPU for what does, or back."""
    model.vae.to(place)
    if not s.identifier_lr:
        model.text.to(place)
    # A captured step has its own memory, and uses no other.
    torch.cuda.empty_cache()


def show_samples(model, s, out, prompts, step):
    """Draw three rows: the subject from all sides, its class, and the subject in 2D mode.

    prompts: (with [v], without [v]).
    """
    with_v, without_v = prompts
    device = model.device
    set_aside(model, s, device)
    rows = [*model.sample([with_v, without_v], seed=s.seed)]
    rows.append(model.sample(with_v, seed=s.seed, mode="2d")[0])
    set_aside(model, s, "cpu")
    picture = out / "progress" / f"samples_{step:06d}.png"
    save_png(picture, grid(torch.cat(rows), len(rows[0])))
    show_page(s, out, step)


def show_page(s, out, step):
    """Write the page of the run after so many steps."""
    log = run.read_log(out / "log.jsonl")
    curves = {}
    for name, label in CURVES.items():
        curves[label] = [(row["step"], row[name]) for row in log]
    newest = sorted((out / "progress").glob("samples_*.png"))[-1:]
    figures = {
        "Photos": [out / "photos.png"],
        "Curves": curves,
        "[v] from all sides; without [v]; [v] in 2D mode": newest,
    }
    status = f"{step} of {s.steps} steps"
    write_page(out, s.prompt, status, asdict(s), figures, live=step < s.steps)


# ---- the command -----------------------------------------------------------------------------

def check_prompt(prompt):
    """Raise UserError unless the prompt holds [v] and something else."""
    rest = name_subject(prompt, "")
    if rest == prompt:
        raise UserError(
            "the prompt has no [v]: say where the identifier belongs, "
            'for example "a photo of [v] bulldog"'
        )
    if not set(words_of(rest)) - {","}:
        raise UserError(
            "the prompt is nothing but [v]: say what the subject is, "
            'for example "a photo of [v] bulldog"'
        )


def name_photos(s, config):
    """What the photos are called: ([prompt, ...], [the same without [v], ..., ""])."""
    names = [s.prompt]
    if s.wordings:
        short = s.prompt[SUBJECT.search(s.prompt).start() :]
        names += [short, short + config.suffix]
    prompts = [known_part(name, config.text) for name in names]
    plain = [known_part(name_subject(name, "").strip(), config.text) for name in names]
    return prompts, [*plain, ""]


def read_state(s, out):
    """The checkpoint to go on from, or None. Truncates the log to it. Raises UserError."""
    state = run.last_checkpoint(out) if s.resume else None
    if state and state.keys() - {"rounding"} != {"step", "unet", "table", "optimizer", "random"}:
        raise UserError(
            f"{out / run.CHECKPOINT} is not of dreambooth.py; {run.ANEW}"
        )
    run.truncate_log(out / "log.jsonl", state["step"] + 1 if state else 1)
    return state


def learn(s, model, rgba, prompts, plain, out):
    """Teach the model its subject, from the checkpoint on if there is one. Raises UserError.

    rgba: the photos, uint8 [N, 4, H, W]. prompts, plain: as `name_photos` gives them.
    """
    state = read_state(s, out)
    cli.print_changes(s, *presets.settings_for("dreambooth", model.config))
    on_grey = data.on_grey(rgba, torch.full((len(rgba),), 0.8))
    save_png(out / "photos.png", grid(on_grey / 2 + 0.5, 5))

    torch.manual_seed(s.seed)
    tune_cuda(tf32=True, search=True)
    if s.flips:
        rgba = torch.cat([rgba, rgba.flip(-1)])
    subject = Subject(
        posteriors=on_greys(model.vae, rgba.to(model.device)),
        tokens=model.text.tokenize(prompts).to(model.device),
        contexts=model.embed(prompts),
        plain=model.embed(plain),
    )

    def show(step):
        show_samples(model, s, out, (prompts[0], plain[0]), step)

    set_aside(model, s, "cpu")
    finetune(model, subject, s, out, state, show=show)


def main(argv=None):
    """The command: photos -> `--out` with the model.

    argv: the flags; None: the command line's. Raises UserError; KeyboardInterrupt after a signal.
    """
    s = cli.parse(DreamBoothSettings, argv, __doc__, preset_settings)
    check_prompt(s.prompt)
    device = choose_device(s.device)
    model = MVDream.load(s.model, device)
    check_identifier(s.identifier, model.config.text, tokenizer().encode(s.identifier))
    model.config.text.identifier = s.identifier
    prompts, plain = name_photos(s, model.config)
    names, rgba = photos.load(s.photos, model.config.size)  # uint8 [N, 4, H, W]
    config = {**asdict(s), "files": names}
    out = run.open_run(s.out, config, s.resume, may_change=MAY_CHANGE)
    with run.starting(out):
        learn(s, model, rgba, prompts, plain, out)
    show_page(s, out, s.steps)
    model.save(out / "model.safetensors", torch.float16)
    print(f'{out / "model.safetensors"}: python sample.py --model {out} "{s.prompt}"')


if __name__ == "__main__":
    cli.main(main, SMALLER)
