"""A few photos of one subject -> a model that draws this subject from every side (multi-view DreamBooth, MVDream §3.3).

    python dreambooth.py photos/ --prompt "a photo of [v] bulldog" --out runs/my-dog
    python sample.py "[v] bulldog wearing a top hat" --model runs/my-dog
    python distill.py "[v] bulldog" --model runs/my-dog

"[v]" stands for the identifier, a rare word that shall mean the subject. The photos are shown in 2D mode, and the UNet θ learns

    L = L_diffusion(photos) + λ ‖θ − θ0‖₁ / N_θ

from θ0, where it starts: what it knows of sides and cameras survives, because θ stays near θ0. A model that has seen few words hardly tells
"a [v] bulldog" from "a bulldog", and draws the subject for both. Three things that the paper does not have help; the tiny model's
header turns them on, else they are off. The row of [v] in the text tower may learn, too (--identifier-lr); of the prompt without [v] the
UNet may be held to what θ0 made of it (--class-preservation); and of the rest of a prompt the text tower may be held to what it made of
it (--text-preservation), so that a learned [v] does not drown it. Autoencoder and the rest of the text tower stay as they are. Ctrl-C or
a kill loses at most --save-every steps: the same command with --resume goes on.
"""
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm

from mvd.tools import cli, photos, run
from mvd import data, diffusion
from mvd.tools.device import GraphedStep, choose_device, random_state, set_random_state, side_stream, tune
from mvd.tools.errors import UserError
from mvd.tools.masters import MasterAdamW, learning_rate
from mvd.model import MVDream
from mvd.tools.page import write_page
from mvd.tools.pictures import grid, save_curve, save_png
from mvd.text import tokenizer
from mvd.tools.vocabulary import check_identifier, known_part, name_subject, words_of


@dataclass
class Settings:
    """The defaults are the paper's, for the full-size model; a model's header may hold others (`ModelConfig.dreambooth`)."""
    photos: str = field(metadata={"help": "folder with 3 to 20 photos of one subject", "positional": True})
    prompt: str = field(metadata={"help": 'what the photos show, with "[v]" for the identifier: "a photo of [v] bulldog"'})
    model: str = field(default="tiny", metadata={"help": "the model to start from: tiny, mvdream-sd21, sd21, or the path of a checkpoint"})
    out: str = field(default="runs/dreambooth", metadata={"help": "folder for the model, pictures, log and checkpoint"})
    wordings: bool = field(default=False, metadata={"help": "call the photos also what the prompt says from [v] on, with and without the "
                                                            "suffix that 3D mode adds, as later prompts will"})
    identifier: str = field(default="phol", metadata={"help": "the word that shall mean the subject"})
    steps: int = field(default=600, metadata={"help": "training steps", "min": 1})
    batch: int = field(default=4, metadata={"help": "photos in a batch", "min": 1})
    lr: float = field(default=2e-6, metadata={"help": "learning rate", "min": 0})
    cosine: bool = field(default=False, metadata={"help": "let the learning rate down to 0 along a cosine, after a short warm-up"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of AdamW", "min": 0})
    preservation: float = field(default=1.0, metadata={"help": "λ, how strongly the weights are held where they were", "min": 0})
    class_preservation: float = field(default=0.0, metadata={"help": "weight of a second such loss: what the UNet makes of the prompt "
                                                                     "without [v] is held where it was", "min": 0})
    identifier_lr: float = field(default=0.0, metadata={"help": "learning rate of the identifier's row in the text tower; 0: it stays",
                                                        "min": 0})
    text_preservation: float = field(default=0.0, metadata={"help": "if that row learns, weight of a third such loss: what the text tower "
                                                                    "makes of the rest of a prompt is held where it was", "min": 0})
    flips: bool = field(default=False, metadata={"help": "show the photos mirrored, too: only if the subject is symmetric"})
    sample_every: int = field(default=200, metadata={"help": "steps between sample grids", "min": 1})
    save_every: int = field(default=200, metadata={"help": "steps between checkpoints", "min": 1})
    device: str = field(default="auto", metadata={"help": "cuda, mps or cpu; auto takes the best"})
    seed: int = field(default=0, metadata={"help": "of everything random", "min": 0, "max": 2 ** 63 - 2})
    resume: bool = field(default=False, metadata={"help": "go on from the checkpoint in --out"})


GREYS = 8                      # how often a photo is encoded, each time with another grey behind what is transparent
LOG_EVERY = 10
BLOCK = 32                     # tensors of weights that `preserve` takes together: few launches, and little memory for their differences


@torch.no_grad()
def preserve(weights, start, strength):
    """The preservation loss, added to the gradient: w.grad += ∂/∂w λ‖θ − θ0‖₁/N_θ = λ sign(w − w0)/N_θ.

    weights, start: lists of float32 tensors, θ and θ0; a bfloat16 θ could not tell them apart. A weight without a gradient (the
    camera's, which photos in 2D mode do not touch) has not moved and stays. Returns a tensor [4]: ‖θ − θ0‖₁/N_θ, ‖θ − θ0‖₂, and the
    norms of both gradients, the other losses' and this one.
    """
    count = sum(w.numel() for w in weights)
    touched = [(w, w0) for w, w0 in zip(weights, start) if w.grad is not None]
    norms = []
    for i in range(0, len(touched), BLOCK):
        w, w0 = zip(*touched[i:i + BLOCK])
        gradient, change = [x.grad for x in w], torch._foreach_sub(w, w0)
        l1, l2, others = torch._foreach_norm(change, 1), torch._foreach_norm(change, 2), torch._foreach_norm(gradient, 2)
        torch._foreach_sign_(change)
        torch._foreach_mul_(change, strength / count)                            # in place: from here on it is the pull
        torch._foreach_add_(gradient, change)
        pull = torch._foreach_norm(change, 2)
        norms.append(torch.stack([torch.stack(norm) for norm in (l1, l2, others, pull)]))                       # [4, block]
    norms = torch.cat(norms, 1)                                                  # [4, touched]
    return torch.cat([norms[:1].sum(1) / count, norms[1:].norm(dim=1)])


def class_loss(unet, adam, theta0, x0, context):
    """‖ε_θ(x_t; y) − ε_θ0(x_t; y)‖², the mean over all numbers: without [v], θ shall see in the noised photos what θ0 saw in them.

    x0 [B, 1, c, h, w] scaled latents of photos, context [B, L, D] of prompts y without [v]. It is prior preservation (Ruiz et al. 2023,
    eq. 2), with θ0's predictions (Li & Hoiem 2016, learning without forgetting) in place of pictures that θ0 drew.
    """
    t = torch.randint(diffusion.NUM_TIMESTEPS, x0.shape[:1], device=x0.device)
    x_t = diffusion.q_sample(x0, t, torch.randn_like(x0))
    with torch.no_grad():
        adam.work_with(theta0)
        before = unet(x_t, t, context).float()
        adam.work_with(adam.weights)
    return (unet(x_t, t, context).float() - before).square().mean()


def finetune(model, moments, tokens, contexts, plain, s, out, state=None, show=None):
    """The loop; afterwards model.unet, and the rows of [v], hold what they have learned. Returns the steps done, fewer than s.steps
    after Ctrl-C.

    moments [copies, N, 1, 2c, h, w]: the photos' latents (`data.moments`); tokens [W, L]: what they are called, in W wordings; contexts
    [W, L, D]: what the text tower makes of these before it learns, and plain [W', L, D] of the same without [v].
    state: what the checkpoint held, or None. show(step) draws pictures.
    """
    device, scale = model.device, model.config.vae.scale_factor
    table = model.text.token_embedding                                     # .weight [rows, D]
    groups = [(model.unet, s.lr, s.weight_decay)] + [(table, s.identifier_lr, 0.0)] * bool(s.identifier_lr)
    for module, *_ in groups:
        module.requires_grad_(True)
    adam = MasterAdamW(groups, betas=(0.9, 0.999))
    theta0 = [w.clone() for w in adam.weights]
    of_unet = slice(len(list(model.unet.parameters())))
    own_rows = torch.zeros(len(table.weight), 1, device=device)
    own_rows[model.text.word_rows(s.identifier)] = 1
    beside = 1 - own_rows[tokens]                                                # [W, L, 1]: 0 at [v], 1 elsewhere, on the padding too,
                                                                                 # which the UNet attends to as to any token
    start = 0
    if state:
        start = state["step"]
        adam.load_state_dict(state)
        set_random_state(state["random"])

    def draw(wordings):
        """A batch of photos, x0 [B, 1, c, h, w] scaled latents, and which of so many wordings names each: [B]."""
        each = torch.arange(wordings, device=device).expand(moments.shape[1], -1)                               # [N, W]
        z, wording, _ = data.draw_images(moments, each, s.batch)
        return scale * z, wording

    def step():
        of_class, of_text = torch.zeros(2, device=device)
        if s.class_preservation:                                                 # first, because for a moment the weights are θ0
            x0, wording = draw(len(plain))
            of_class = s.class_preservation * class_loss(model.unet, adam, theta0, x0, plain[wording])
        x0, wording = draw(len(contexts))
        context = contexts[wording]                                              # [B, L, D]
        if s.identifier_lr:
            before, context = context, model.text(tokens[wording])
            of_text = s.text_preservation * (beside[wording] * (context - before)).square().mean()
        loss = diffusion.loss(model.unet, x0, context, None)                     # no camera: the 2D mode
        adam.backward(loss + of_class + of_text)
        measured = preserve(adam.weights[of_unet], theta0[of_unet], s.preservation)
        if s.identifier_lr:
            adam.weights[-1].grad *= own_rows                                    # the other words keep their meaning
        adam.step()
        return torch.cat([torch.stack([loss, of_class, of_text]).detach(), measured])                           # [7]

    graphed, sums, counted, done = GraphedStep(step, device), torch.zeros(7, device=device), 0, start
    with cli.interrupt_flag() as interrupted, side_stream(device):
        bar = tqdm(range(start, s.steps), initial=start, total=s.steps, desc=s.prompt)
        for done in bar:
            if s.cosine:
                for lr, (_, peak, _) in zip(adam.lr, groups):
                    lr.fill_(learning_rate(done, s.steps, peak))
            sums += graphed()
            counted, done = counted + 1, done + 1
            if done % LOG_EVERY == 0 or done == s.steps:
                loss, of_class, of_text, l1, l2, gradient, pull = (sums / counted).tolist()
                run.log(out / "log.jsonl", step=done, loss=loss, class_loss=of_class, text_loss=of_text,
                        preservation=s.preservation * l1, distance=l2, share=pull / max(pull + gradient, 1e-30))
                bar.set_postfix(loss=f"{loss:.4f}", distance=f"{l2:.3g}")
                sums.zero_()
                counted = 0
            if show and (done % s.sample_every == 0 or done == s.steps):
                kept = random_state()
                show(done)
                set_random_state(kept)
            if done % s.save_every == 0 or interrupted.is_set():
                run.save_checkpoint(out / "checkpoint.safetensors", {"step": done, **adam.state_dict(), "random": random_state()})
            if interrupted.is_set():
                break
        adam.finish(adam.weights)
        for module, *_ in groups:
            module.requires_grad_(False)
    return done


def main(argv=None):
    """The command: photos -> `--out` with the model. argv: the flags, or the command line's. Raises UserError."""
    s = cli.parse(Settings, argv, __doc__)
    if name_subject(s.prompt, "") == s.prompt:
        raise UserError('the prompt has no [v]: say where the identifier belongs, for example "a photo of [v] bulldog"')
    if not words_of(name_subject(s.prompt, "")):
        raise UserError('the prompt is nothing but [v]: say what the subject is, for example "a photo of [v] bulldog"')
    device = choose_device(s.device)
    model = MVDream.load(s.model, device)
    s = cli.parse(Settings, argv, __doc__, defaults=model.config.dreambooth)     # a flag counts more than the model's header
    check_identifier(s.identifier, model.config.text, tokenizer().encode(s.identifier))
    model.config.text.identifier = s.identifier
    short = s.prompt[s.prompt.lower().index("[v]"):]
    wordings = [s.prompt, short, short + model.config.suffix] if s.wordings else [s.prompt]
    prompts = [known_part(p, model.config.text) for p in wordings]
    plain = [known_part(name_subject(p, "").strip(), model.config.text) for p in wordings] + [""]
    names, rgba = photos.load(s.photos, model.config.size)
    out = run.open_run(s.out, {**asdict(s), "files": names}, s.resume, may_change=("sample_every", "save_every"))
    state = run.last_checkpoint(out) if s.resume else None
    if state and state.keys() != {"step", "weights", "optimizer", "random"}:
        raise UserError(f"{out / 'checkpoint.safetensors'} is not of dreambooth.py; start anew without --resume, with another --out")
    run.truncate_log(out / "log.jsonl", state["step"] + 1 if state else 1)
    save_png(out / "photos.png", grid(data.on_grey(rgba, torch.full((len(rgba),), 0.8)) / 2 + 0.5, 5))

    # ---- the photos' latents and what they are called, computed once ----
    torch.manual_seed(s.seed)
    tune(tf32=True)
    rgba = torch.cat([rgba, rgba.flip(-1)]) if s.flips else rgba
    moments = data.moments(model.vae, rgba.to(device)[:, None], GREYS)       # [copies, N, 1, 2c, h, w]
    tokens, contexts, without_v = model.text.tokenize(prompts).to(device), model.embed(prompts), model.embed(plain)

    def set_aside(place):                                                        # what does not learn makes room for what does
        for module in [model.vae] if s.identifier_lr else [model.vae, model.text]:
            module.to(place)
        torch.cuda.empty_cache()                                                 # a captured step has its own memory, and uses no other

    def show(step):
        """Three rows: the subject from four sides, its class from four sides, and four pictures of the subject in 2D mode."""
        set_aside(device)
        with_v, without = model.sample([prompts[0], plain[0]], steps=25, seed=s.seed)   # [4, 3, H, W] each
        singles = model.sample(prompts[0], steps=25, seed=s.seed, mode="2d")[0]
        set_aside("cpu")
        save_png(out / "progress" / f"samples_{step:06d}.png", grid(torch.cat([with_v, without, singles]), 4))
        rows = run.read_log(out / "log.jsonl")
        save_curve(out / "curves.png", {label: [(row["step"], row[name]) for row in rows] for name, label in (
            ("loss", "diffusion loss"), ("class_loss", "class loss"), ("text_loss", "text loss"), ("preservation", "preservation loss"),
            ("share", "its share of the gradient"), ("distance", "distance from the start"))}, "step", "", log_scale=True)
        write_page(out, s.prompt, f"{step} of {s.steps} steps", asdict(s), {
            "Photos": [out / "photos.png"], "Curves": [out / "curves.png"],
            "[v] from four sides; without [v]; [v] in 2D mode": [out / "progress" / f"samples_{step:06d}.png"]}, live=step < s.steps)

    set_aside("cpu")
    done = finetune(model, moments, tokens, contexts, without_v, s, out, state, show)
    if done < s.steps:
        print(f"interrupted after {done} of {s.steps} steps; go on with the same command and --resume")
        raise KeyboardInterrupt
    model.save(out / "model.safetensors", torch.float16)
    print(f'{out / "model.safetensors"}: python sample.py --model {out} "{s.prompt}"')


if __name__ == "__main__":
    cli.main(main)
