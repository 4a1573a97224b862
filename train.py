"""Train MVDream: from nothing, first the autoencoder, then the UNet with the text tower; or the UNet from Stable Diffusion (§3.2).

    python -m mvd.toyworld --out data/toy --objects 3600 --images 14400
    python train.py --data data/toy --out runs/tiny
    python train.py --data data/toy256 --out runs/mvdream --init sd21
    python train.py --data data/toy --out runs/decoder --init tiny --vae-steps 2500 --steps 0

As in the paper, --init keeps the text tower and the autoencoder as they are, and the UNet learns, with its new camera MLP; the decoder
learns, too, before it, if --vae-steps asks for it, but never the encoder, whose latents the UNet knows. A batch is multi-view with
probability 0.7, else single images in 2D mode. On a GPU the whole training step is one CUDA graph. Ctrl-C or a kill loses at most
--save-every steps: the same command with --resume goes on.
"""
import copy
import random
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm

from mvd.tools import cli, run
from mvd import data, diffusion
from mvd.tools.device import GraphedStep, choose_device, random_state, set_random_state, side_stream, tune
from mvd.tools.errors import UserError
from mvd.tools.masters import MasterAdamW, learning_rate
from mvd.model import PRESETS, MVDream
from mvd.tools.page import write_page
from mvd.tools.pictures import grid, save_curve, save_png
from mvd.tools.vocabulary import IDENTIFIERS, words_of


@dataclass
class Settings:
    """The flags; FROM_INIT holds what --init changes of the defaults."""
    data: str = field(default="data/toy", metadata={"help": "folder of rendered sets and images (python -m mvd.toyworld)"})
    out: str = field(default="runs/tiny", metadata={"help": "folder for the model, pictures, log and checkpoint"})
    preset: str = field(default="tiny", metadata={"help": "sizes of the networks", "choices": tuple(PRESETS)})
    init: str = field(default="", metadata={"help": "start from tiny, mvdream-sd21, sd21, or the path of a checkpoint, whatever --preset says"})
    vae_steps: int = field(default=4000, metadata={"help": "training steps of the autoencoder; with --init, of its decoder alone, and 0 "
                                                           "unless given", "min": 0})
    steps: int = field(default=16000, metadata={"help": "training steps of the UNet and, without --init, the text tower; 0: only the decoder "
                                                         "learns (needs --init)", "min": 0})
    batch: int = field(default=64, metadata={"help": "multi-view sets in a batch; an image batch has four times as many pictures",
                                                "min": 1})
    vae_lr: float = field(default=1e-3, metadata={"help": "peak learning rate of the autoencoder", "min": 0})
    vae_batch: int = field(default=32, metadata={"help": "pictures in a batch of the autoencoder", "min": 4})
    lr: float = field(default=6e-4, metadata={"help": "peak learning rate, reached after a warm-up and then let down along a cosine",
                                                "min": 0})
    copies: int = field(default=3, metadata={"help": "how often every object is encoded, each time on another grey", "min": 1})
    ema: float = field(default=0.999, metadata={"help": "decay of the averaged weights, which are the result", "min": 0, "max": 1})
    sample_every: int = field(default=2500, metadata={"help": "steps between sample grids", "min": 1})
    save_every: int = field(default=2500, metadata={"help": "steps between checkpoints", "min": 1})
    device: str = field(default="auto", metadata={"help": "cuda, mps or cpu; auto takes the best"})
    seed: int = field(default=0, metadata={"help": "of everything random", "min": 0, "max": 2 ** 63 - 2})
    resume: bool = field(default=False, metadata={"help": "go on from the checkpoint in --out"})


FROM_INIT = dict(batch=4, lr=1e-5, vae_steps=0, vae_batch=8, vae_lr=1e-4)  # defaults with --init, for 256² and weights that know much
MULTIVIEW_SHARE = 0.7          # MVDream §3.2
UNCONDITIONAL_SHARE = 0.1      # text dropout, for guidance
KL_WEIGHT = 1e-4               # of the autoencoder's latents, a number of the latent
LOG_EVERY = 100


def vae_loss(vae, images):
    """Absolute and squared error of the pixels, and the KL divergence of the latents to N(0, I) (Rombach et al. 2022, §3.1)."""
    mean, logvar = vae.encode(images)
    error = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).float() - images
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    return error.abs().mean() + 5 * (error ** 2).mean() + KL_WEIGHT * kl


def diffusion_loss(model, z, tokens, camera, no_tokens):
    """MVDream eq. 2, with a tenth of the texts left out. z [B, V, c, h, w] unscaled, tokens [B, L], camera [B, V, 16] or None."""
    drop = torch.rand(len(z), 1, device=z.device) < UNCONDITIONAL_SHARE
    context = model.text(torch.where(drop, no_tokens, tokens))
    return diffusion.loss(model.unet, model.config.vae.scale_factor * z, context, camera)


def fit(phase, model, module, losses, shares, first, steps, peak_lr, s, out, state, show):
    """AdamW on `module` with an average of its weights, which it holds at the end.

    On a GPU the module works in bfloat16 (`masters.py`).
    losses: {name: function that draws a batch and returns its loss}; each step takes one of them with probability `shares`.
    first: the steps of earlier phases, for the log. state: a checkpoint of this phase to go on from, or None. show(step) draws
    pictures, with the averaged weights in place.
    """
    device = model.device
    adam = MasterAdamW([(module, peak_lr, 0.01)], betas=(0.9, 0.99))
    average = [w.clone() for w in adam.weights]
    renewal = torch.tensor(0.0, device=device)                                   # of the average; a graph reads it
    start, choice = 0, random.Random(s.seed)
    if state:
        start = state["step"]
        adam.load_state_dict(state)
        torch._foreach_copy_(average, [saved.to(device) for saved in state["average"]])
        set_random_state(state["random"])
        choice.choices(range(len(losses)), shares, k=start)                      # skip the draws of the steps that are done

    def train_step(loss_fn):
        loss = loss_fn()
        adam.backward(loss)                                                      # a 2D batch leaves the camera's weights alone
        torch.nn.utils.clip_grad_norm_(adam.weights, 1.0)
        adam.step()
        step_to_average = torch._foreach_sub(adam.weights, average)
        torch._foreach_mul_(step_to_average, renewal)
        torch._foreach_add_(average, step_to_average)
        return loss.detach()

    def checkpoint(step):
        run.save_checkpoint(out / "checkpoint.safetensors", {
            "phase": phase, "step": step, **adam.state_dict(), "average": average, "vae": model.vae.state_dict(),
            "random": random_state()})

    steppers = [GraphedStep(lambda f=f: train_step(f), device) for f in losses.values()]
    sums, counts = torch.zeros(len(losses), device=device), [0] * len(losses)
    with cli.interrupt_flag() as interrupted, side_stream(device):
        bar = tqdm(range(start, steps), initial=start, total=steps, desc=phase)
        for step in bar:
            adam.lr[0].fill_(learning_rate(step, steps, peak_lr))
            renewal.fill_(max(1 - s.ema, 9 / (10 + step)))                       # at first the average forgets faster
            kind = choice.choices(range(len(losses)), shares)[0]
            sums[kind] += steppers[kind]()
            counts[kind] += 1
            done = step + 1
            if done % LOG_EVERY == 0 or done == steps:
                means = {name: total / n for name, total, n in zip(losses, sums.tolist(), counts) if n}
                run.log(out / "log.jsonl", phase=phase, step=first + done, lr=adam.lr[0].item(), **means)
                bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
                sums.zero_()
                counts = [0] * len(losses)
            if done % s.sample_every == 0 or done == steps:
                kept = random_state()
                adam.work_with(average)
                show(first + done)
                adam.work_with(adam.weights)
                set_random_state(kept)
            if done % s.save_every == 0 or done == steps or interrupted.is_set():
                checkpoint(done)
            if interrupted.is_set():
                print(f"interrupted in phase {phase} after {done} of {steps} steps; go on with the same command and --resume")
                raise KeyboardInterrupt
        adam.finish(average)


def new_model(preset, d):
    """A model of random weights that knows the words of the captions."""
    config = copy.deepcopy(PRESETS[preset])
    config.text.words = tuple(sorted(set(IDENTIFIERS).union(*(set(words_of(c)) - {","} for captions in (
        d.set_captions, d.image_captions, [[config.suffix]]) for wordings in captions for c in wordings))))
    model = MVDream(config)
    torch.nn.init.constant_(model.vae.quant_conv.bias[config.vae.z_channels:], -6.0)   # latents start with little noise: learns sooner
    return model


def main(argv=None):
    """The command: a data folder -> `--out` with the model. argv: the flags, or the command line's. Raises UserError; KeyboardInterrupt
    after Ctrl-C."""
    s = cli.parse(Settings, argv, __doc__)
    if s.init:
        s = cli.parse(Settings, argv, __doc__, FROM_INIT)
    if s.steps == 0 and not (s.init and s.vae_steps):
        raise UserError("--steps 0 leaves the UNet as it is: name a model with --init, and with --vae-steps how long its decoder learns")
    device = choose_device(s.device)
    d = data.load(s.data)
    torch.manual_seed(s.seed)
    tune(tf32=True)
    model = MVDream.load(s.init, device) if s.init else new_model(s.preset, d).to(device)
    config = model.config
    size = d.sets.shape[-1]
    if size % model.size_multiple if s.init else size != config.size:
        raise UserError(f"{s.data} has pictures of {size} pixels, but this model needs "
                        f"{f'a multiple of {model.size_multiple}' if s.init else config.size}; make others")
    if s.init and s.steps:                                                       # what the UNet learns to draw
        config.size = size
    model.unet.requires_grad_(True)                                              # what --init loads, it loads for inference
    set_tokens = data.token_table(model.text, d.set_captions, config.suffix).to(device)
    image_tokens = data.token_table(model.text, d.image_captions).to(device)
    no_tokens = model.text.tokenize([""]).to(device)
    set_cameras = d.set_cameras.to(device)
    out = run.open_run(s.out, asdict(s), s.resume, may_change=("sample_every", "save_every"))
    state = run.last_checkpoint(out) if s.resume else None
    if state:
        if state.get("phase") not in ("vae", "unet"):
            raise UserError(f"{out / 'checkpoint.safetensors'} is not of a training; start anew without --resume, with another --out")
        model.vae.load_state_dict(state["vae"])
    state = state or {"phase": None, "step": 0}
    run.truncate_log(out / "log.jsonl", state["step"] + (s.vae_steps if state["phase"] == "unet" else 0) + 1)
    sets, images = d.sets.to(device), d.images.to(device)                        # uint8 [N, 32, 4, H, W], [M, 4, H, W]

    def show_page(step):
        newest = {kind: sorted((out / "progress").glob(f"{kind}_*.png"))[-1:] for kind in ("samples", "vae")}
        write_page(out, f"Training on {s.data}", f"{step} of {s.vae_steps + s.steps} steps", asdict(s), {
            "Samples: a row is two sets of four views, each with a picture in 2D mode": newest["samples"], "Loss": [out / "loss.png"],
            "Pictures, and below them what the autoencoder makes of them": newest["vae"]}, live=step < s.vae_steps + s.steps)

    # ---- the autoencoder, or its decoder ----
    def draw_pictures(batch, share=0.5):                                         # three of four from the sets, on random greys
        n = batch * 3 // 4
        i, view, j = (torch.randint(high, (count,), device=device) for high, count in
                      ((len(sets), n), (sets.shape[1], n), (len(images), batch - n)))
        return data.on_grey(data.recolour(torch.cat([sets[i, view], images[j]]), share), torch.rand(batch, device=device))

    @torch.no_grad()
    def show_vae(step):
        torch.manual_seed(s.seed)
        pictures = draw_pictures(32, share=0.0)                                  # in the colours of the data
        decoded = model.vae.decode(model.vae.encode(pictures)[0]).float().clamp(-1, 1)
        psnr = -10 * torch.log10(torch.mean((decoded - pictures) ** 2 / 4)).item()
        run.log(out / "log.jsonl", phase="vae", step=step, psnr=psnr)
        rows = torch.cat([pictures[:8], decoded[:8], pictures[-8:], decoded[-8:]])
        save_png(out / "progress" / f"vae_{step:06d}.png", grid(rows / 2 + 0.5, 8))
        show_page(step)

    if s.vae_steps and state["phase"] != "unet":
        learning = torch.nn.ModuleList([model.vae.post_quant_conv, model.vae.decoder]) if s.init else model.vae
        learning.requires_grad_(True)
        fit("vae", model, learning, {"loss": lambda: vae_loss(model.vae, draw_pictures(s.vae_batch))}, [1.0],
            0, s.vae_steps, s.vae_lr, s, out, state if state["phase"] == "vae" else None, show_vae)

    model.vae.requires_grad_(False)
    prompts = [d.image_captions[i][0] for i in range(0, len(d.image_captions), max(1, len(d.image_captions) // 8))][:8]

    def save():
        model.save(out / "model.safetensors", torch.float16)
        print(f"{out / 'model.safetensors'}: python sample.py --model {out / 'model.safetensors'} \"{prompts[0]}\"")

    if s.steps == 0:
        return save()

    # ---- the UNet and the text tower, on latents that are computed once ----
    torch.manual_seed(s.seed + 1)
    try:
        set_moments = data.moments(model.vae, sets, s.copies)                    # [copies, N, 32, 2c, h, w]
        image_moments = data.moments(model.vae, images[:, None], s.copies)       # [copies, M, 1, 2c, h, w]
    except KeyboardInterrupt:
        print("interrupted while the pictures were encoded; go on with the same command and --resume")
        raise
    if not s.init:
        config.vae.scale_factor = 1 / set_moments.chunk(2, dim=3)[0].float().std().item()    # the UNet sees a standard deviation of 1
    del sets, images                                                             # only latents are needed from here on
    d.sets = d.images = None

    def multiview():
        return diffusion_loss(model, *data.draw_sets(set_moments, set_cameras, set_tokens, s.batch), no_tokens)

    def single():
        return diffusion_loss(model, *data.draw_images(image_moments, image_tokens, 4 * s.batch), no_tokens)

    def show_samples(step):
        sets = model.sample(prompts, steps=25, seed=s.seed)                      # [8, 4, 3, H, W]
        singles = model.sample(prompts, steps=25, seed=s.seed, views=1, mode="2d")
        save_png(out / "progress" / f"samples_{step:06d}.png", grid(torch.cat([sets, singles], 1).flatten(0, 1), 10))
        rows = [row for row in run.read_log(out / "log.jsonl") if row["phase"] == "unet"]
        save_curve(out / "loss.png", {name: [(row["step"] - s.vae_steps, row[name]) for row in rows if name in row]
                                          for name in ("multiview", "single")}, "step", "loss", log_scale=True)
        show_page(step)

    trained = torch.nn.ModuleList([model.unet] if s.init else [model.unet, model.text])
    fit("unet", model, trained, {"multiview": multiview, "single": single}, [MULTIVIEW_SHARE, 1 - MULTIVIEW_SHARE],
        s.vae_steps, s.steps, s.lr, s, out, state if state["phase"] == "unet" else None, show_samples)
    save()


if __name__ == "__main__":
    cli.main(main)
