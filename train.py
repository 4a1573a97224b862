"""Train MVDream (§3.1): from nothing, first the autoencoder, then the UNet with the text tower.

    python -m mvd.toyworld --out data/toy --objects 3600 --images 14400
    python train.py --data data/toy --out runs/tiny
    python train.py --objects renders/ --images shards/*.tar --init sd21 --out runs/mvdream
    torchrun --nproc-per-node=8 train.py --objects renders/ --init sd21 --out runs/mvdream

Or from a model, with --init: then, as in the paper, the text tower and the autoencoder stay, and
the UNet learns, with its new camera MLP. With --vae-steps the decoder learns, too, before the
UNet; never the encoder, whose latents the UNet knows. Beside it, if the preset has one, a light
encoder learns to give the same latents, for distill.py.

A batch is multi-view with probability 0.7, else single images in 2D mode. Data that fits is held in
memory, its latents computed once; else it is read from its files at every step. Everything random
is a function of the seed, the step and the place in the batch (`mvd/data/order.py`), so any number
of processes trains the same, and a run that was interrupted or killed goes on with --resume as if
nothing had happened; at most --save-every steps are done again.
"""
import contextlib
import copy
import json
import os
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import mvd  # before torch: tools/threads.py
import torch
import torch.nn.functional as F
from tqdm import tqdm

from mvd import bench, data, diffusion, fit, presets
from mvd.cameras import VIEWS
from mvd.model import MVDream, read_config
from mvd.presets import PRESETS
from mvd.tools import cli, parallel, run
from mvd.tools.cli import setting
from mvd.tools.device import can_compile, choose_dtype, tune_cuda
from mvd.tools.errors import BadMember, UserError
from mvd.tools.page import write_page
from mvd.tools.pictures import grid, save_png
from mvd.tools.progress import operations_per_view
from mvd.tools.vocabulary import IDENTIFIERS, words_of
from mvd.vae import Encoder

# The share of texts that are left out, for guidance.
UNCONDITIONAL_SHARE = 0.1
# Weight of the autoencoder's squared error, beside the absolute one.
SQUARED_WEIGHT = 5
# Weight of the autoencoder's KL divergence, per number of the latents.
KL_WEIGHT = 1e-4
# The autoencoder learns from rendered pictures in three quarters of its steps.
RENDERED_SHARE = 0.75
# Of many objects one in fifty is held out, to measure the loss on; at most so many.
MOST_HELD_OUT = 32
# How often each of these is noised for that.
VALIDATIONS = 4
# So many pictures are read without other processes.
FEW_PICTURES = 5000
# So many new words are listed.
MOST_WORDS = 100
# The share of the free memory that pictures and latents may take.
MEMORY_SHARE = 0.4
# How the log calls the two kinds of batches.
NAMES = {"objects": "multiview", "images": "single"}
# The pictures of Stable Diffusion have 512 pixels, MVDream's 256.
LARGEST = 256


@dataclass
class TrainSettings:
    """The flags; a preset (`presets.py`) or --init changes some defaults."""
    data: str = setting(
        "", "folder of python -m mvd.toyworld: sets and images; data/toy, if no data is named"
    )
    objects: tuple = setting((), "rendered objects: folders, tar files or patterns")
    images: tuple = setting((), "captioned images: folders, tar shards or patterns")
    captions: tuple = setting((), "tables of the objects' captions that lie elsewhere (csv, json)")
    background: str = setting(
        "", "what is behind objects whose pictures have no alpha: white, black, grey or r,g,b"
    )
    bound: float = setting(
        30.0, "degrees that a view of a set may be off its place on an even orbit", min=0, max=180
    )
    size: int = setting(128, "pixels of a picture", min=8, max=2048)
    out: str = setting("runs/tiny", "folder for the model, pictures, log and checkpoint")
    preset: str = setting("tiny", "sizes of the networks", choices=tuple(PRESETS))
    init: str = setting(
        "",
        "start from tiny, mvdream-sd21, sd21, or the path of a checkpoint, whatever --preset says",
    )
    autoencoder: str = setting("", "without --init: take the trained autoencoder of this model")
    attention: str = setting(
        "3d", "of a new model, between views: all, at each pixel, none",
        choices=("3d", "pixel", "view"),
    )
    camera: str = setting(
        "time", "of a new model: the camera is added to the time, appended to the text, or unknown",
        choices=("time", "text", "none"),
    )
    multiview_share: float = setting(0.7, "share of multi-view batches", min=0, max=1)
    vae_steps: int = setting(
        4000,
        "training steps of the autoencoder; with --init, of its decoder and light encoder alone",
        min=0,
    )
    steps: int = setting(
        16000,
        "training steps of the UNet and, without --init, the text tower; 0: only the decoder "
        "learns (needs --init)",
        min=0,
    )
    views: int = setting(VIEWS, "views of a multi-view set", min=1, max=64)
    batch: int = setting(
        64, "multi-view sets in a batch of one process; an image batch has as many pictures", min=1
    )
    accumulate: int = setting(1, "batches of each process whose gradients make one step", min=1)
    vae_lr: float = setting(1e-3, "peak learning rate of the autoencoder", min=0)
    vae_batch: int = setting(32, "pictures in a batch of the autoencoder", min=4)
    lr: float = setting(6e-4, "peak learning rate: after a warm-up, before a cosine decay", min=0)
    copies: int = setting(
        3, "how often what is held in memory is encoded, each time on other greys", min=1
    )
    memory: float | None = setting(
        None,
        "GiB of pictures and latents to hold, 0.4 of what is free unless you say; more is read "
        "from the files at every step",
        min=0,
    )
    workers: int | None = setting(
        None, "processes that read files, one less than there are cores unless you say", min=0
    )
    ema: float = setting(
        0.999, "decay of the averaged weights, which are the result", min=0, max=1
    )
    compile: bool = setting(
        False, "on CUDA: let torch.compile fuse the autoencoder's operations, if it is run at "
        "every step",
    )
    sample_every: int = setting(
        2500, "steps between sample grids; a shorter run draws none", min=1
    )
    save_every: int = setting(2500, "steps between checkpoints", min=1)
    device: str = setting("auto", "cuda, cpu, or mps (untested); auto: cuda, else cpu")
    dtype: str = setting(
        "auto",
        "that the networks compute with; auto: bfloat16 on cuda (float16 before Ampere), else "
        "float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = setting(0, "of everything random", min=0)
    resume: bool = setting(False, "go on from the checkpoint in --out")


# Defaults with --init, for 256² pixels and weights that know much.
FROM_INIT = dict(batch=4, lr=1e-5, vae_steps=0, vae_batch=8, vae_lr=1e-4, compile=True)
# What to try where memory does not suffice.
SMALLER = (
    "smaller --batch and --vae-batch (with a larger --accumulate a step stays the same), a smaller "
    "--size, or --memory 0, which reads the files at every step"
)
# What may be another on --resume; of batches only if a whole step's stays the same.
MAY_CHANGE = (
    "sample_every", "save_every", "workers", "batch", "vae_batch", "accumulate", "memory",
    "compile", "dtype",
)


def first_config(flags):
    """The ModelConfig that --init, or else the preset, begins with."""
    return read_config(flags.init) if flags.init else PRESETS[flags.preset].model


def default_settings(flags):
    """What --init or the preset changes of the defaults."""
    if not flags.init and flags.preset not in PRESETS:
        return "", {}  # the parser will say so
    return settings_of(flags, first_config(flags))


def settings_of(flags, config):
    """What a model changes of the defaults: (where it stands, {setting: value})."""
    if flags.init:
        size = min(config.size, LARGEST)
        return "--init (FROM_INIT in train.py)", {**FROM_INIT, "size": size}
    place, changes = presets.settings_for("train", config)
    changes = {"size": config.size, **changes}
    if flags.autoencoder:
        changes["vae_steps"] = 0
    return place, changes


# ---- the losses ------------------------------------------------------------------------------

def vae_errors(vae, images, dice):
    """Pixel errors, absolute and squared, and the KL divergence of the latents to N(0, I): [N].

    Rombach et al. 2022, §3.1, without their perceptual and adversarial losses. images
    [N, 3, H, W] in [-1, 1].
    """
    mean, logvar = vae.encode(images)
    mean, logvar = mean.float(), logvar.float()
    z = mean + torch.exp(0.5 * logvar) * dice.normal("posterior", mean.shape[1:])
    error = (vae.decode(z).float() - images).flatten(1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1)
    return error.abs().mean(1) + SQUARED_WEIGHT * (error**2).mean(1) + KL_WEIGHT * kl.mean(1)


def light_errors(vae, images):
    """How far the posterior of the light encoder is from the encoder's: [N].

    The mean square over means and log-variances. The encoder, and the product with which both end,
    do not learn from it. images [N, 3, H, W] in [-1, 1].
    """
    with torch.no_grad():
        wanted = vae.encoder(images)
    difference = F.conv2d(vae.light(images) - wanted, vae.quant_conv.weight.detach())
    return (difference.float()**2).flatten(1).mean(1)


def diffusion_errors(model, z, tokens, camera, no_tokens, dice):
    """MVDream eq. 2 for each set, with a tenth of the texts left out: errors [B], time steps [B].

    z [B, V, c, h, w] unscaled, tokens [B, L], camera [B, V, 16] or None, no_tokens [1, L]: the
    empty text.
    """
    drop = dice.uniform("drop", (1,)) < UNCONDITIONAL_SHARE
    context = model.text(torch.where(drop, no_tokens, tokens))
    t = dice.below("t", diffusion.NUM_TIMESTEPS)
    noise = dice.normal("noise", z.shape[1:])
    scaled = model.config.vae.scale_factor * z
    errors = diffusion.squared_errors(model.unet, scaled, context, camera, t, noise)
    return errors.flatten(1).mean(1), t


# ---- the data --------------------------------------------------------------------------------

def places_of(s):
    """The paths of objects, and those of images. Raises UserError."""
    objects, images = list(s.objects), list(s.images)
    folder = s.data or ("" if objects or images else "data/toy")
    if folder:
        sets, singles = Path(folder, "sets"), Path(folder, "images")
        if Path(folder, "index.jsonl").exists():
            raise UserError(
                f"{folder} was made by an older version of mvd; make it again, in another folder, "
                "with `python -m mvd.toyworld --out`"
            )
        if not (sets / "captions.json").exists() or not singles.is_dir():
            raise UserError(
                f"{folder} does not hold a whole data set: make one with "
                f"`python -m mvd.toyworld --out {folder}`, or name --objects and --images"
            )
        objects.append(str(sets))
        images.append(str(singles))
    return objects, images


def find_data(s):
    """What is trained on: (Objects or None, Images or None, [Found])."""
    objects, images, found = None, None, []
    object_paths, image_paths = places_of(s)
    if object_paths:
        objects, of_objects = data.find_objects(
            object_paths, captions=s.captions, background=s.background or None
        )
        found += of_objects
    if image_paths:
        images, of_images = data.find_images(image_paths)
        found += of_images
    return objects, images, found


def fits_in_memory(s, found, config, device):
    """Can all pictures, and `copies` latents of each, be held in memory?"""
    side = s.size // 2 ** (len(config.vae.channel_mult) - 1)
    latents = 2 * 2 * config.vae.z_channels * side**2  # means and deviations, two bytes each
    wanted = sum(f.pictures for f in found) * (4 * s.size**2 + s.copies * latents)
    if s.memory is not None:
        return wanted <= s.memory * 2**30
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / local_ranks()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return wanted <= MEMORY_SHARE * free


def local_ranks():
    """How many processes of this run share this computer."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def workers_of(s, pictures):
    """How many processes read: none for little, since they take seconds to start."""
    if s.workers is not None:
        return s.workers
    return max(1, os.cpu_count() // local_ranks() - 1) if pictures > FEW_PICTURES else 0


def captions_in_files(objects, images):
    """All captions of all items, one after the other."""
    for source in filter(None, (objects, images)):
        for i in tqdm(range(len(source)), desc="captions", leave=False, delay=1):
            try:
                yield from source.captions(i)
            except BadMember:
                pass  # it is left out when its turn comes


def held_out(count, seed):
    """Which of `count` objects are held out, and which are learned from: two int64 tensors."""
    number = min(MOST_HELD_OUT, count // 50)
    if not number:
        return torch.arange(0), torch.arange(count)
    order = data.items_at(count, data.hashed(seed, "held out"), torch.arange(count))
    return order[:number], order[number:].sort().values


# ---- the two phases --------------------------------------------------------------------------

class Training:
    """A run: the model, its data, its folder, and the two phases that train it."""

    def __init__(self, s, device, dtype, sources, in_memory):
        """Read the data and make the model. Raises UserError.

        s: TrainSettings; dtype: from `common_dtype`; sources: from `find_data`; in_memory: is all
        data held?
        """
        self.s, self.device, self.dtype, self.in_memory = s, device, dtype, in_memory
        self.out = None  # the run's folder, made when all else is checked
        self.logged = set()  # names of what was left out, as far as the log has them
        self.to_log = []     # what this process has left out since
        self.objects, self.images, found = sources
        self.pictures = sum(f.pictures for f in found)
        self.left_out_at_first = [entry for f in found for entry in f.left_out]
        bad = sum(pictures for *_, pictures in self.left_out_at_first)
        self.tally = data.Tally(self.pictures + bad)
        self.tally.add(self.left_out_at_first, self.pictures + bad)
        self.workers = workers_of(s, self.pictures)
        if parallel.is_first():
            for f in found:
                print(f.line())
        if in_memory:
            self.read()
        else:
            self.open()
        self.model = load_model(s, self.captions(), device)
        self.new_rows = None
        if s.init:
            self.learn_words(self.captions())
        self.model.unet.requires_grad_(True)  # what --init loads, it loads for inference
        self.unrounded = {}
        if s.init and not s.vae_steps and dtype != torch.float32:
            self.round_frozen()
        self.feed = self.make_feed()
        self.no_tokens = self.model.text.tokenize([""]).to(device)
        self.prompts = self.some_prompts()

    # ---- reading ----

    def read(self):
        """Hold everything in memory."""
        s = self.s
        with tqdm(
            total=self.pictures, desc="reading", unit="picture", disable=not parallel.is_first()
        ) as bar:
            self.held = data.read_everything(
                self.objects, self.images, size=s.size, views=s.views, bound=s.bound,
                workers=self.workers, progress=bar.update,
            )
        self.tally.add(self.held.left_out, 0)
        self.check_counts(len(self.held.object_names), len(self.held.image_names))

    def open(self):
        """Read from files at every step."""
        self.held = None
        self.tally = data.Tally(self.pictures)  # of what is read from now on
        self.check_counts(len(self.objects or ()), len(self.images or ()))

    def captions(self):
        """All captions of all items, one after the other."""
        if self.in_memory:
            return chain(*self.held.object_captions, *self.held.image_captions)
        return captions_in_files(self.objects, self.images)

    def check_counts(self, objects, images):
        """Say which kinds of batches there can be. Raises UserError if there is none."""
        s = self.s
        if self.objects and not objects:
            raise UserError(
                f"no object has {s.views} views within {s.bound:g} degrees of an even orbit, "
                "with a caption; see `python -m mvd.data`, or try a wider --bound"
            )
        share = s.multiview_share
        shares = {"objects": share, "images": 1 - share}
        counts = {"objects": objects, "images": images}
        self.shares = {kind: x for kind, x in shares.items() if counts[kind] and x}
        if not self.shares:
            raise UserError("the kind of data that --multiview-share asks for is not there")
        self.held_out, learned = held_out(objects, s.seed)
        self.learned = {"objects": learned, "images": torch.arange(images)}

    def learn_words(self, captions):
        """Give words that a model with a small vocabulary has never seen rows that learn."""
        text = self.model.text
        words = text.add_words(captions)
        if not words:
            return
        self.new_rows = torch.zeros(len(text.row_of), 1, dtype=torch.bool, device=self.device)
        self.new_rows[text.own_rows(words)] = True
        if parallel.is_first():
            some = " ".join(words[:MOST_WORDS]) + (" ..." if len(words) > MOST_WORDS else "")
            print(f"{len(words)} words are new to the model and are learned: {some}")

    def round_frozen(self):
        """Let what does not learn compute in `dtype`; the file's own numbers wait on the CPU."""
        model = self.model
        for part in (model.vae, model.text):
            if part is model.vae or self.new_rows is None:
                self.unrounded[part] = {k: w.cpu() for k, w in part.state_dict().items()}
                part.to(self.dtype)

    def finish(self):
        """Give what was rounded its own numbers back."""
        for part, weights in self.unrounded.items():
            part.float().load_state_dict(weights)

    def make_feed(self):
        """Where batches come from."""
        s, model = self.s, self.model
        if self.in_memory:
            return data.FromMemory(self.held, model, s.seed, self.learned)
        examples = data.Examples(
            self.objects, self.images, size=s.size, views=s.views, bound=s.bound, seed=s.seed,
            chosen=self.learned,
        )
        return data.FromFiles(examples, model, self.workers, self.count_left_out)

    def some_prompts(self):
        """Eight captions, of images if there are any, to draw."""
        if self.in_memory:
            lists = self.held.image_captions or self.held.object_captions
            return [lists[i][0] for i in range(0, len(lists), max(1, len(lists) // 8))][:8]
        source, prompts = self.images or self.objects, []
        for i in range(0, len(source), max(1, len(source) // 8)):
            with contextlib.suppress(BadMember):
                prompts += source.captions(i)[:1]
        return prompts[:8]

    def begin(self):
        """The run's folder is there: log what was left out while the data was read."""
        rows = run.read_log(self.out / "log.jsonl")
        self.logged = {row["left_out"] for row in rows if "left_out" in row}
        in_memory = self.held.left_out if self.held else []
        left_out = self.left_out_at_first + in_memory
        if parallel.is_first():
            self.to_log = left_out  # all processes have the same
            if left_out:
                print(f"{len(left_out)} left out, named in {self.out / 'log.jsonl'}")
        self.log_left_out()

    def count_left_out(self, batch):
        """Count what was left out of a batch. Raises UserError if it is too much."""
        self.to_log += self.tally.add(batch.left_out, batch.tried)

    def log_left_out(self):
        """Name what any process has left out, once, in the log."""
        entries, self.to_log = parallel.gathered(self.to_log), []
        for name, reason, _ in entries:
            if name not in self.logged and parallel.is_first():
                run.log(self.out / "log.jsonl", left_out=name, reason=reason)
            self.logged.add(name)

    # ---- seeing it ----

    def show_page(self, step):
        """Write the page of the run after so many steps of both phases."""
        s, progress = self.s, self.out / "progress"
        newest = {}
        for kind in ("samples", "vae"):
            newest[kind] = sorted(progress.glob(f"{kind}_*.png"))[-1:]
        curves = {"multiview": [], "single": [], "validation": []}
        for row in run.read_log(self.out / "log.jsonl"):
            for name, points in curves.items():
                if row.get("phase") == "unet" and name in row:
                    points.append((row["step"] - s.vae_steps, row[name]))
        samples = "Samples: a row is two sets of views, each with a picture in 2D mode"
        figures = {
            samples: newest["samples"],
            "Loss": {name: points for name, points in curves.items() if points},
            "Pictures, and below them what the autoencoder makes of them": newest["vae"],
        }
        total = s.vae_steps + s.steps
        status = f"{step} of {total} steps"
        title = f"Training on {s.data or ' '.join([*s.objects, *s.images])}"
        write_page(self.out, title, status, asdict(s), figures, live=step < total)

    def plan(self, shares, sizes, pictures, steps):
        """The batches of a phase."""
        return data.Plan(
            seed=self.s.seed, shares=shares, sizes=sizes, steps=steps, pictures=pictures,
            accumulate=self.s.accumulate, rank=parallel.rank(), ranks=parallel.ranks(),
        )

    # ---- the autoencoder ----

    def vae_loss(self, kind, dice, *batch):
        """Errors of the autoencoder on pictures over greys, half of them in other colours."""
        pictures = data.recolour(self.feed.pictures(kind, *batch), dice)
        pictures = data.on_grey(pictures, dice.uniform("grey"))
        vae = self.model.vae
        errors = vae_errors(vae, pictures, dice)
        if vae.light:
            errors = errors + light_errors(vae, pictures)
        return errors, None

    @torch.no_grad()
    def show_vae(self, step):
        """Draw pictures and what the autoencoder makes of them; log how near they are."""
        rgba = self.feed.some_pictures(32).to(self.device)
        dice = data.Dice(self.s.seed, "shown", torch.arange(len(rgba), device=self.device))
        pictures = data.on_grey(rgba, dice.uniform("grey"))
        vae = self.model.vae
        mean, _ = vae.encode(pictures)
        decoded = vae.decode(mean).float().clamp(-1, 1)
        near = {"psnr": -10 * torch.log10(torch.mean((decoded - pictures) ** 2 / 4))}
        if vae.light:
            near["light_error"] = light_errors(vae, pictures).mean()
        run.log(self.out / "log.jsonl", phase="vae", step=step, **near)
        rows = torch.cat([pictures[:8], decoded[:8], pictures[-8:], decoded[-8:]])
        save_png(self.out / "progress" / f"vae_{step:06d}.png", grid(rows / 2 + 0.5, 8))
        self.show_page(step)

    def train_vae(self, state):
        """Phase one. With --init only the decoder and the light encoder learn."""
        s, vae = self.s, self.model.vae
        learning = vae
        if s.init:
            learning = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
            if vae.light:
                learning.append(vae.light)
        learning.requires_grad_(True)
        shares = {"objects": RENDERED_SHARE, "images": 1 - RENDERED_SHARE}
        shares = {kind: x for kind, x in shares.items() if kind in self.shares}
        # A batch of rendered pictures has whole sets.
        sizes = {"objects": -(-s.vae_batch // s.views) * s.views, "images": s.vae_batch}
        plan = self.plan(shares, sizes, {"objects": 1, "images": 1}, s.vae_steps)
        phase = fit.Phase(
            name="vae", module=learning, loss=self.vae_loss, plan=plan,
            stream=lambda start: self.feed.stream(plan, "vae", start), peak_lr=s.vae_lr, first=0,
            show=self.show_vae, names=NAMES, report=self.log_left_out, dtype=self.dtype,
        )
        fit.fit(phase, self.model, s, self.out, state)

    # ---- the UNet and the text tower ----

    def encode(self):
        """Compute latents once, of what is held; scale those of a new autoencoder.

        The UNet then sees a standard deviation of 1.
        """
        config = self.model.config
        own = not self.s.init and not self.s.autoencoder
        try:
            if self.in_memory:
                self.feed.encode(self.s.copies)
            if own:
                scale = 1 / self.feed.deviation()
                config.vae.scale_factor = parallel.first(lambda: scale)
        except KeyboardInterrupt:
            if (self.out / run.CHECKPOINT).exists():
                print(f"interrupted while the pictures were encoded; {run.GO_ON}")
            raise
        self.held = None  # from here on only latents are needed

    def unet_loss(self, kind, dice, *batch):
        """MVDream eq. 2 on latents."""
        z, tokens, camera = self.feed.latents(kind, dice, *batch)
        return diffusion_errors(self.model, z, tokens, camera, self.no_tokens, dice)

    @torch.no_grad()
    def validation(self):
        """The loss on objects that are held out, with the same noise every time; None: none are."""
        if not len(self.held_out):
            return None
        errors = []
        for turn in range(VALIDATIONS):
            places = turn * len(self.held_out) + torch.arange(len(self.held_out))
            dice = data.Dice(self.s.seed, "validation", places.to(self.device))
            batch = [tensor.to(self.device) for tensor in self.held_out_batch]
            errors.append(self.unet_loss("objects", dice, *batch)[0])
        return torch.cat(errors).mean().item()

    def show_samples(self, step):
        """Draw eight sets of views, each with a picture in 2D mode; log the validation loss."""
        s = self.s
        loss = self.validation()
        if loss is not None:
            run.log(self.out / "log.jsonl", phase="unet", step=step, validation=loss)
        sets = self.model.sample(self.prompts, views=s.views, seed=s.seed)
        singles = self.model.sample(self.prompts, seed=s.seed, views=1, mode="2d")
        pictures = torch.cat([sets, singles], 1).flatten(0, 1)
        path = self.out / "progress" / f"samples_{step:06d}.png"
        save_png(path, grid(pictures, 2 * (s.views + 1)))
        self.show_page(step)

    def share_of_speed(self):
        """A function: views per second -> share of the card's measured speed; None on a CPU."""
        if self.device.type != "cuda":
            return None
        config = self.model.config
        operations = operations_per_view(config, self.s.views, not self.in_memory)
        speed, _ = bench.speeds(self.device, self.dtype)
        return lambda views: views / parallel.ranks() * operations / speed

    def train_unet(self, state):
        """Phase two. With --init the text tower stays as it is, but for words that are new."""
        s, model = self.s, self.model
        self.encode()
        if len(self.held_out):
            self.held_out_batch = self.feed.batch_of(self.held_out)
        learning, rows = [model.unet], None
        if not s.init:
            learning.append(model.text)
        elif self.new_rows is not None:
            model.text.token_embedding.requires_grad_(True)
            learning.append(model.text.token_embedding)
            rows = model.text.token_embedding.weight, self.new_rows
        sizes = {"objects": s.batch, "images": s.views * s.batch}
        plan = self.plan(self.shares, sizes, {"objects": s.views, "images": 1}, s.steps)
        phase = fit.Phase(
            name="unet", module=torch.nn.ModuleList(learning), loss=self.unet_loss, plan=plan,
            stream=lambda start: self.feed.stream(plan, "unet", start), peak_lr=s.lr,
            first=s.vae_steps, show=self.show_samples, names=NAMES, more=self.more, rows=rows,
            share=self.share_of_speed(), report=self.log_left_out, dtype=self.dtype,
        )
        fit.fit(phase, model, s, self.out, state)

    def more(self):
        """What a checkpoint holds beside the weights that its phase learns."""
        return {"vae": self.model.vae.state_dict()} if self.s.vae_steps else {}


# ---- the command -----------------------------------------------------------------------------

def load_model(s, captions, device):
    """The model to begin with: what --init names, or a new one that knows the captions' words."""
    torch.manual_seed(s.seed)  # all processes must begin with the same weights
    if s.init:
        model = MVDream.load(s.init, device)
        if s.vae_steps:
            add_light(model)
        return model
    model = new_model(s, captions)
    if s.autoencoder:
        trained = MVDream.load(s.autoencoder)
        model.config.vae = trained.config.vae
        model.vae = trained.vae
    return model.to(device)


def add_light(model):
    """Give a model without a light encoder a new one, if its preset has one and it fits."""
    vae, config = model.vae, model.config.vae
    widths = PRESETS[model.config.preset].model.vae.light
    fits = len(widths) <= len(config.channel_mult)
    fits = fits and all(w % config.groups == 0 and w > config.groups for w in widths)
    if widths and not vae.light and fits:
        config.light = widths
        vae.light = Encoder(config, widths).to(model.device)
        if parallel.is_first():
            print("the model gets a light encoder, for distill.py")


def new_model(s, captions):
    """A model of random weights that knows the words of the captions, an iterable of texts."""
    config = copy.deepcopy(PRESETS[s.preset].model)
    config.size = s.size
    config.unet.attention, config.unet.camera = s.attention, s.camera
    words = set(IDENTIFIERS) | set(words_of(config.suffix))
    for caption in captions:
        words.update(words_of(caption))
    config.text.words = tuple(sorted(words - {","}))
    model = MVDream(config)
    # Latents start with little noise: the autoencoder learns sooner.
    logvar_bias = model.vae.quant_conv.bias[config.vae.z_channels :]
    torch.nn.init.constant_(logvar_bias, -6.0)
    return model


def check_settings(s):
    """Raise UserError for settings that do not go together."""
    if s.steps == 0 and not (s.init and s.vae_steps):
        raise UserError(
            "--steps 0 leaves the UNet as it is: name a model with --init, "
            "and with --vae-steps how long its decoder learns"
        )
    if s.init and (s.autoencoder or s.attention != "3d" or s.camera != "time"):
        raise UserError(
            "--autoencoder, --attention and --camera are for new models; --init brings its own"
        )
    if s.autoencoder and s.vae_steps:
        raise UserError("--autoencoder brings a trained one: leave out --vae-steps")


def resumable(s, training):
    """What config.json says beside the flags, and what --resume must find again.

    The batches of a whole step, of all processes, the size of the data, and what else learns.
    """
    parts = s.accumulate * parallel.ranks()
    return {
        "step_batch": s.batch * parts,
        "step_vae_batch": s.vae_batch * parts,
        "in_memory": training.in_memory,
        "items": [len(items) for items in training.learned.values()],
        "words": len(training.model.config.text.words),
        "light_widths": training.model.config.vae.light,
    }


def earlier_config(out):
    """The settings of the run in the folder `out`, {} if there is none that can be read."""
    try:
        config = json.loads((Path(out) / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def was_in_memory(s):
    """Did the run that --resume goes on with hold its data in memory? None: there is none."""
    return earlier_config(s.out).get("in_memory") if s.resume else None


def read_state(s, out):
    """The checkpoint to go on from, or one of no phase. Truncates the log to it."""
    state = run.last_checkpoint(out) if s.resume else None
    if state and state.get("phase") not in ("vae", "unet"):
        raise UserError(f"{out / run.CHECKPOINT} is not of a training; {run.ANEW}")
    if state and "theta" not in state:
        raise UserError(
            f"{out / run.CHECKPOINT} was written by an older version of mvd; {run.ANEW}"
        )
    if s.resume and not state and parallel.is_first():
        print("there is no checkpoint yet: the run begins anew")
    state = state or {"phase": None, "step": 0}
    before = s.vae_steps if state["phase"] == "unet" else 0
    if parallel.is_first():
        run.truncate_log(out / "log.jsonl", before + state["step"] + 1)
    return state


def check_same(lowest, highest, out):
    """Raise UserError unless all processes go on from the same step."""
    if lowest != highest:
        raise UserError(
            f"the processes have checkpoints of different steps, {lowest} and {highest}; {out} "
            "must be a folder that all computers share"
        )


def hold_all(s, found, config, device):
    """Is all data held in memory? A run that goes on does as it did; processes do the same."""
    fits = was_in_memory(s)
    if fits is None:
        fits = fits_in_memory(s, found, config, device)
    return not parallel.worst(int(not fits))


def common_dtype(s, device):
    """What all processes compute with: float16 if one of several cards has no bfloat16.

    Their gradients are averaged, so they need the same loss scale.
    """
    dtype = choose_dtype(s.dtype, device)
    return torch.float16 if parallel.worst(dtype == torch.float16) else dtype


def prepare(s, device, dtype, sources, in_memory):
    """Read the data, make the model: Training. Raises UserError."""
    training = Training(s, device, dtype, sources, in_memory)
    model = training.model
    if s.steps:
        model.config.size = s.size  # what the UNet learns to draw
    model.check_size(s.size)
    if s.compile and can_compile(device):
        training.feed.compile_encoder()
    return training


def both_phases(s, training, usual):
    """Both phases, from the checkpoint on if there is one. Raises UserError.

    training: Training, whose folder is made. usual: what `settings_of` says.
    """
    out, model = training.out, training.model
    state = parallel.together(lambda: read_state(s, out))
    phase = state["phase"]
    step = state["step"]
    lowest, highest = -parallel.worst(-step), parallel.worst(step)
    parallel.together(lambda: check_same(lowest, highest, out))
    if parallel.is_first():
        cli.print_changes(s, *usual)
    training.begin()
    if "vae" in state:
        model.vae.load_state_dict(state["vae"])
    if s.vae_steps and phase != "unet":
        training.train_vae(state if phase == "vae" else None)
    model.vae.requires_grad_(False)
    if s.steps:
        training.train_unet(state if phase == "unet" else None)


def main(argv=None):
    """The command: data -> `--out` with the model.

    argv: the flags; None: the command line's. Raises UserError; KeyboardInterrupt after Ctrl-C.
    """
    s = cli.parse(TrainSettings, argv, __doc__, default_settings)
    device = parallel.start(s.device)
    held = run.holds_run(s.out)
    foreign = parallel.in_first_life("there was a run in --out", held)
    s.resume = s.resume or (parallel.restarted() and held and not foreign)
    tune_cuda(tf32=True, search=True)
    parallel.together(lambda: check_settings(s))
    sources = parallel.together(lambda: find_data(s))
    first = parallel.together(lambda: first_config(s))
    usual = settings_of(s, first)
    in_memory = hold_all(s, sources[2], first, device)
    dtype = common_dtype(s, device)
    training = parallel.together(lambda: prepare(s, device, dtype, sources, in_memory))
    model = training.model
    config = {**asdict(s), **resumable(s, training)}
    out = parallel.first(lambda: run.open_run(s.out, config, s.resume, may_change=MAY_CHANGE))
    training.out = out
    with run.starting(out):
        both_phases(s, training, usual)
    training.finish()
    if parallel.is_first():
        training.show_page(s.vae_steps + s.steps)
        path = out / "model.safetensors"
        model.save(path, torch.float16)
        print(f'{path}: python sample.py --model {path} "{training.prompts[0]}"')
    parallel.finish()


if __name__ == "__main__":
    cli.main(main, SMALLER)
