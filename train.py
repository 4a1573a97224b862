"""Train MVDream (§3.1): from nothing, first the autoencoder, then the UNet with the text tower.

    python -m mvd.toyworld --out data/toy --objects 3600 --images 14400
    python train.py --data data/toy --out runs/tiny
    python train.py --data data/toy256 --out runs/mvdream --init sd21
    python train.py --data data/toy --out runs/decoder --init tiny --vae-steps 2500 --steps 0

Or from a model, with --init: then, as in the paper, the text tower and the autoencoder stay, and
the UNet learns, with its new camera MLP. With --vae-steps the decoder learns, too, before the
UNet; never the encoder, whose latents the UNet knows.

A batch is multi-view with probability 0.7, else single images in 2D mode. On a GPU a training step
is one CUDA graph. Ctrl-C or a kill loses at most --save-every steps: the same command with
--resume goes on.
"""
import copy
import random
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from mvd import data, diffusion, presets
from mvd.cameras import VIEWS
from mvd.model import MVDream
from mvd.presets import PRESETS
from mvd.tools import cli, run
from mvd.tools.cli import setting
from mvd.tools.device import (
    GraphedStep,
    choose_device,
    load_optimizer,
    random_state,
    set_random_state,
    side_stream,
    tune_cuda,
)
from mvd.tools.errors import UserError
from mvd.tools.optimizer import Rounded, adamw, learning_rate, set_rates, swapped_in
from mvd.tools.page import write_page
from mvd.tools.pictures import grid, save_png
from mvd.tools.vocabulary import IDENTIFIERS, words_of

# MVDream §3.1: the share of multi-view batches.
MULTIVIEW_SHARE = 0.7
# The share of texts that are left out, for guidance.
UNCONDITIONAL_SHARE = 0.1
# Weight of the autoencoder's squared error, beside the absolute one.
SQUARED_WEIGHT = 5
# Weight of the autoencoder's KL divergence, per number of the latents.
KL_WEIGHT = 1e-4
LOG_EVERY = 100


@dataclass
class TrainSettings:
    """The flags; a preset (`presets.py`) or --init changes some defaults."""
    data: str = setting("data/toy", "folder of rendered sets and images (python -m mvd.toyworld)")
    out: str = setting("runs/tiny", "folder for the model, pictures, log and checkpoint")
    preset: str = setting("tiny", "sizes of the networks", choices=tuple(PRESETS))
    init: str = setting(
        "",
        "start from tiny, mvdream-sd21, sd21, or the path of a checkpoint, whatever --preset says",
    )
    vae_steps: int = setting(
        4000, "training steps of the autoencoder; with --init, of its decoder alone", min=0
    )
    steps: int = setting(
        16000,
        "training steps of the UNet and, without --init, the text tower; 0: only the decoder "
        "learns (needs --init)",
        min=0,
    )
    views: int = setting(VIEWS, "views of a multi-view set", min=1, max=64)
    batch: int = setting(
        64, "multi-view sets in a batch; an image batch has as many pictures", min=1
    )
    vae_lr: float = setting(1e-3, "peak learning rate of the autoencoder", min=0)
    vae_batch: int = setting(32, "pictures in a batch of the autoencoder", min=4)
    lr: float = setting(6e-4, "peak learning rate: after a warm-up, before a cosine decay", min=0)
    copies: int = setting(
        3, "how often every object is encoded, each time on another grey", min=1
    )
    ema: float = setting(
        0.999, "decay of the averaged weights, which are the result", min=0, max=1
    )
    sample_every: int = setting(
        2500, "steps between sample grids; a shorter run draws none", min=1
    )
    save_every: int = setting(2500, "steps between checkpoints", min=1)
    device: str = setting("auto", "cuda, mps or cpu; auto takes the best")
    seed: int = setting(0, "of everything random", min=0, max=2**63 - 2)
    resume: bool = setting(False, "go on from the checkpoint in --out")


# Defaults with --init, for 256² pixels and weights that know much.
FROM_INIT = dict(batch=4, lr=1e-5, vae_steps=0, vae_batch=8, vae_lr=1e-4)


def default_settings(flags):
    """What --init or the preset changes of the defaults."""
    if flags.init:
        return "--init (FROM_INIT in train.py)", FROM_INIT
    if flags.preset not in PRESETS:
        return "", {}  # the parser will say so
    return presets.settings_for("train", PRESETS[flags.preset].model)


# ---- the losses ------------------------------------------------------------------------------

def vae_loss(vae, images):
    """Pixel errors, absolute and squared, and the KL divergence of the latents to N(0, I).

    Rombach et al. 2022, §3.1, without their perceptual and adversarial losses. images
    [N, 3, H, W] in [-1, 1].
    """
    mean, logvar = vae.encode(images)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = vae.decode(z).float() - images
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + SQUARED_WEIGHT * (error**2).mean() + KL_WEIGHT * kl


def diffusion_loss(model, z, tokens, camera, no_tokens):
    """MVDream eq. 2, with a tenth of the texts left out.

    z [B, V, c, h, w] unscaled, tokens [B, L], camera [B, V, 16] or None, no_tokens [1, L]: the
    empty text.
    """
    drop = torch.rand(len(z), 1, device=z.device) < UNCONDITIONAL_SHARE
    context = model.text(torch.where(drop, no_tokens, tokens))
    scaled = model.config.vae.scale_factor * z
    return diffusion.denoising_loss(model.unet, scaled, context, camera)


# ---- the loop --------------------------------------------------------------------------------

@dataclass
class Phase:
    """What one run of the loop trains."""
    name: str             # "vae" or "unet"
    module: torch.nn.Module
    losses: dict          # {name: function that draws a batch and returns its loss []}
    shares: list          # the probability of each
    steps: int
    peak_lr: float
    first: int            # steps of earlier phases, for the log
    show: object          # show(step) draws pictures, with the averaged weights in place


def fit(phase, model, s, out, state=None):
    """AdamW on phase.module with an average of its weights, which it holds at the end.

    Each step takes one of the losses, by chance. s: TrainSettings; state: a checkpoint of this
    phase to go on from.
    """
    device = model.device
    weights = list(phase.module.parameters())
    optimizer = adamw([(weights, phase.peak_lr, 0.01)], betas=(0.9, 0.99))
    in_bfloat16 = Rounded(phase.module)
    average = [w.detach().clone() for w in weights]
    renewal = torch.tensor(0.0, device=device)  # of the average; a CUDA graph reads it
    choice = random.Random(s.seed)
    kinds = range(len(phase.losses))
    start = resume(phase, optimizer, average, state) if state else 0
    choice.choices(kinds, phase.shares, k=start)  # skip those of the steps that are done

    def train_step(loss_fn):
        with in_bfloat16:
            loss = loss_fn()
            loss.backward()  # a 2D batch gives the camera MLP no gradient
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, weights, renewal)
        return loss.detach()

    steppers = [GraphedStep(lambda f=f: train_step(f), device) for f in phase.losses.values()]
    log = Means(list(phase.losses), device)

    with cli.interrupt_flag() as interrupted, side_stream(device):
        bar = tqdm(range(start, phase.steps), initial=start, total=phase.steps, desc=phase.name)
        for step in bar:
            rate = learning_rate(step, phase.steps, phase.peak_lr)
            set_rates(optimizer, rate)
            # A young average follows the weights: its decay begins at 0.1 and grows to s.ema.
            renewal.fill_(max(1 - s.ema, 9 / (10 + step)))
            kind = choice.choices(kinds, phase.shares)[0]
            log.add(kind, steppers[kind]())
            done = step + 1
            last = done == phase.steps
            if done % LOG_EVERY == 0 or last:
                means = log.take()
                place = dict(phase=phase.name, step=phase.first + done, lr=rate)
                run.log(out / "log.jsonl", **place, **means)
                bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
            if done % s.sample_every == 0 or (last and phase.steps > s.sample_every):
                kept = random_state()
                with swapped_in(weights, average), in_bfloat16:
                    phase.show(phase.first + done)
                set_random_state(kept)
            if done % s.save_every == 0 or last or interrupted.is_set():
                save_state(out, phase, done, model, optimizer, average)
            if interrupted.is_set():
                print(f"interrupted in phase {phase.name} after {done} of {phase.steps} steps")
                print(run.GO_ON)
                raise KeyboardInterrupt
    with torch.no_grad():
        torch._foreach_copy_(weights, average)


def resume(phase, optimizer, average, state):
    """Go on from a checkpoint of this phase: returns the steps that are done."""
    phase.module.load_state_dict(state["module"])
    load_optimizer(optimizer, state["optimizer"])
    torch._foreach_copy_(average, [saved.to(average[0].device) for saved in state["average"]])
    set_random_state(state["random"])
    return state["step"]


@torch.no_grad()
def update_average(average, weights, renewal):
    """average += renewal · (weights - average), for lists of tensors."""
    change = torch._foreach_sub(weights, average)
    torch._foreach_mul_(change, renewal)
    torch._foreach_add_(average, change)


class Means:
    """Means of losses between two lines of the log, summed without waiting for the device."""

    def __init__(self, names, device):
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.counts = [0] * len(names)

    def add(self, kind, loss):
        self.sums[kind] += loss
        self.counts[kind] += 1

    def take(self):
        """{name: mean} of the losses that were added since the last time."""
        means = {}
        for name, total, count in zip(self.names, self.sums.tolist(), self.counts):
            if count:
                means[name] = total / count
        self.sums.zero_()
        self.counts = [0] * len(self.names)
        return means


def save_state(out, phase, step, model, optimizer, average):
    """Write the checkpoint from which --resume goes on."""
    state = {
        "phase": phase.name,
        "step": step,
        "module": phase.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "vae": model.vae.state_dict(),
        "random": random_state(),
    }
    run.save_checkpoint(out / run.CHECKPOINT, state)


# ---- the two phases --------------------------------------------------------------------------

class Training:
    """A run: the model, its data, its folder, and the two phases that train it."""

    def __init__(self, s, model, d):
        """s: TrainSettings; model: MVDream; d: data.Data. Raises UserError for unknown words."""
        self.s = s
        self.model = model
        self.d = d
        self.out = None  # the run's folder, made when all else is checked
        self.device = model.device
        self.sets = d.sets.to(self.device)  # uint8 [N, views, 4, H, W]
        self.images = d.images.to(self.device)  # uint8 [M, 4, H, W]
        every = max(1, len(d.image_captions) // 8)
        self.prompts = [captions[0] for captions in d.image_captions[::every]][:8]
        text, suffix = model.text, model.config.suffix
        self.set_tokens = data.token_table(text, d.set_captions, suffix).to(self.device)
        self.image_tokens = data.token_table(text, d.image_captions).to(self.device)
        self.no_tokens = text.tokenize([""]).to(self.device)

    def show_page(self, step):
        """Write the page of the run after so many steps of both phases."""
        s, progress = self.s, self.out / "progress"
        newest = {}
        for kind in ("samples", "vae"):
            newest[kind] = sorted(progress.glob(f"{kind}_*.png"))[-1:]
        curves = {"multiview": [], "single": []}
        for row in run.read_log(self.out / "log.jsonl"):
            for name, points in curves.items():
                if row["phase"] == "unet" and name in row:
                    points.append((row["step"] - s.vae_steps, row[name]))
        samples = "Samples: a row is two sets of views, each with a picture in 2D mode"
        figures = {
            samples: newest["samples"],
            "Loss": curves,
            "Pictures, and below them what the autoencoder makes of them": newest["vae"],
        }
        total = s.vae_steps + s.steps
        status = f"{step} of {total} steps"
        title = f"Training on {s.data}"
        write_page(self.out, title, status, asdict(s), figures, live=step < total)

    # ---- the autoencoder, or its decoder ----

    def draw_pictures(self, batch, share=0.5):
        """[batch, 3, H, W] in [-1, 1], on random greys, a `share` of them in other colours.

        Three quarters come from the sets, the rest are single images.
        """
        n = batch * 3 // 4
        i, view = data.draw_indices(self.sets.shape[:2], n, self.device)
        (j,) = data.draw_indices(self.images.shape[:1], batch - n, self.device)
        pictures = torch.cat([self.sets[i, view], self.images[j]])
        pictures = data.recolour(pictures, share)
        grey = torch.rand(batch, device=self.device)
        return data.on_grey(pictures, grey)

    @torch.no_grad()
    def show_vae(self, step):
        """Draw pictures and what the autoencoder makes of them; log how near they are."""
        torch.manual_seed(self.s.seed)
        pictures = self.draw_pictures(32, share=0.0)  # in the colours of the data
        mean, _ = self.model.vae.encode(pictures)
        decoded = self.model.vae.decode(mean).float().clamp(-1, 1)
        psnr = -10 * torch.log10(torch.mean((decoded - pictures) ** 2 / 4)).item()
        run.log(self.out / "log.jsonl", phase="vae", step=step, psnr=psnr)
        rows = torch.cat([pictures[:8], decoded[:8], pictures[-8:], decoded[-8:]])
        save_png(self.out / "progress" / f"vae_{step:06d}.png", grid(rows / 2 + 0.5, 8))
        self.show_page(step)

    def train_vae(self, state):
        """Phase one. With --init only the decoder learns."""
        s, vae = self.s, self.model.vae
        learning = vae
        if s.init:
            learning = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
        learning.requires_grad_(True)

        def loss():
            return vae_loss(vae, self.draw_pictures(s.vae_batch))

        phase = Phase(
            name="vae", module=learning, losses={"loss": loss}, shares=[1.0],
            steps=s.vae_steps, peak_lr=s.vae_lr, first=0, show=self.show_vae,
        )
        fit(phase, self.model, s, self.out, state)

    # ---- the UNet and the text tower, on latents that are computed once ----

    def encode(self):
        """The posteriors of all sets [copies, N, n, 2c, h, w] and images [copies, M, 1, 2c, h, w].

        A new model's latents are scaled such that the UNet sees a standard deviation of 1.
        """
        vae, copies = self.model.vae, self.s.copies
        try:
            sets = data.encode_posteriors(vae, self.sets, copies)
            images = data.encode_posteriors(vae, self.images[:, None], copies)
        except KeyboardInterrupt:
            print(f"interrupted while the pictures were encoded; {run.GO_ON}")
            raise
        if not self.s.init:
            mean, _ = sets.chunk(2, dim=3)
            self.model.config.vae.scale_factor = 1 / mean.float().std().item()
        # Only latents are needed from here on.
        self.sets = self.images = self.d.sets = self.d.images = None
        return sets, images

    def show_samples(self, step):
        """Draw eight sets of views, each with a picture in 2D mode."""
        s = self.s
        sets = self.model.sample(self.prompts, views=s.views, steps=25, seed=s.seed)
        singles = self.model.sample(self.prompts, steps=25, seed=s.seed, views=1, mode="2d")
        pictures = torch.cat([sets, singles], 1).flatten(0, 1)
        path = self.out / "progress" / f"samples_{step:06d}.png"
        save_png(path, grid(pictures, 2 * (s.views + 1)))
        self.show_page(step)

    def train_unet(self, state):
        """Phase two. With --init the text tower stays as it is."""
        s, model = self.s, self.model
        torch.manual_seed(s.seed + 1)
        sets, images = self.encode()
        cameras = self.d.set_cameras.to(self.device)

        def multiview():
            batch = data.multiview_batch(sets, cameras, self.set_tokens, s.batch, s.views)
            z, tokens, camera = batch
            return diffusion_loss(model, z, tokens, camera, self.no_tokens)

        def single():
            z, tokens = data.image_batch(images, self.image_tokens, s.views * s.batch)
            return diffusion_loss(model, z, tokens, None, self.no_tokens)

        learning = [model.unet] if s.init else [model.unet, model.text]
        phase = Phase(
            name="unet", module=torch.nn.ModuleList(learning),
            losses={"multiview": multiview, "single": single},
            shares=[MULTIVIEW_SHARE, 1 - MULTIVIEW_SHARE], steps=s.steps, peak_lr=s.lr,
            first=s.vae_steps, show=self.show_samples,
        )
        fit(phase, model, s, self.out, state)


# ---- the command -----------------------------------------------------------------------------

def new_model(preset, d):
    """A model of random weights that knows the words of the captions of d (data.Data)."""
    config = copy.deepcopy(PRESETS[preset].model)
    words = set(IDENTIFIERS) | set(words_of(config.suffix))
    for captions in (*d.set_captions, *d.image_captions):
        for caption in captions:
            words.update(words_of(caption))
    config.text.words = tuple(sorted(words - {","}))
    model = MVDream(config)
    # Latents start with little noise: the autoencoder learns sooner.
    logvar_bias = model.vae.quant_conv.bias[config.vae.z_channels :]
    torch.nn.init.constant_(logvar_bias, -6.0)
    return model


def check_size(s, model, size):
    """Raise UserError unless the model can learn from pictures of `size` pixels."""
    wanted = model.config.size
    fits = size == wanted
    if s.init:
        wanted = f"a multiple of {model.size_multiple}"
        fits = size % model.size_multiple == 0
    if not fits:
        raise UserError(
            f"{s.data} has pictures of {size} pixels, but this model needs {wanted}; make others"
        )


def read_state(s, out):
    """The checkpoint to go on from, or one of no phase. Truncates the log to it."""
    state = run.last_checkpoint(out) if s.resume else None
    if state and state.get("phase") not in ("vae", "unet"):
        raise UserError(
            f"{out / run.CHECKPOINT} is not of a training; {run.ANEW}"
        )
    state = state or {"phase": None, "step": 0}
    before = s.vae_steps if state["phase"] == "unet" else 0
    run.truncate_log(out / "log.jsonl", before + state["step"] + 1)
    return state


def main(argv=None):
    """The command: a data folder -> `--out` with the model.

    argv: the flags; None: the command line's. Raises UserError; KeyboardInterrupt after Ctrl-C.
    """
    s = cli.parse(TrainSettings, argv, __doc__, default_settings)
    if s.steps == 0 and not (s.init and s.vae_steps):
        raise UserError(
            "--steps 0 leaves the UNet as it is: name a model with --init, "
            "and with --vae-steps how long its decoder learns"
        )
    device = choose_device(s.device)
    d = data.read_folder(s.data, s.views)
    torch.manual_seed(s.seed)
    tune_cuda(tf32=True)
    model = MVDream.load(s.init, device) if s.init else new_model(s.preset, d).to(device)
    size = d.sets.shape[-1]
    check_size(s, model, size)
    if s.init and s.steps:
        model.config.size = size  # what the UNet learns to draw
    model.unet.requires_grad_(True)  # what --init loads, it loads for inference

    training = Training(s, model, d)
    may_change = ("sample_every", "save_every")
    training.out = out = run.open_run(s.out, asdict(s), s.resume, may_change=may_change)
    state = read_state(s, out)
    cli.print_changes(s, *default_settings(s))
    if state["phase"]:
        model.vae.load_state_dict(state["vae"])
    if s.vae_steps and state["phase"] != "unet":
        training.train_vae(state if state["phase"] == "vae" else None)
    model.vae.requires_grad_(False)
    if s.steps:
        training.train_unet(state if state["phase"] == "unet" else None)
    training.show_page(s.vae_steps + s.steps)
    path = out / "model.safetensors"
    model.save(path, torch.float16)
    print(f'{path}: python sample.py --model {path} "{training.prompts[0]}"')


if __name__ == "__main__":
    cli.main(main)
