"""A sentence -> a 3D object, by multi-view score distillation (MVDream §3.3).

    python distill.py "a bulldog wearing a crown"
    python distill.py "an astronaut riding a horse" --model mvdream-sd21

A field is rendered from four random sides, the model says how the pictures should change, the field learns. --mode 2d asks the
same network without cameras, as DreamFusion does: compare the faces. Ctrl-C or a kill: the same command with --resume goes on.
"""
import json
import time
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mvd import cameras, cli, mesh, pictures, render, run, sds
from mvd.device import GraphedStep, choose_device, choose_dtype, load_optimizer, random_state, set_random_state, side_stream
from mvd.errors import UserError
from mvd.files import write_safetensors
from mvd.model import MVDream
from mvd.nerf import NeRF, NeRFConfig

NEGATIVE = ("ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, lowres, "
            "low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, bad proportions")


@dataclass
class Settings:
    """The defaults are the released ones, for the full-size model; a model's header may hold others (`ModelConfig.distill`)."""
    prompt: str = field(metadata={"help": "what to make, in quotes", "positional": True})
    model: str = field(default="tiny", metadata={"help": "tiny, mvdream-sd21, sd21, or the path of a checkpoint"})
    mode: str = field(default="3d", metadata={"help": "3d: multi-view distillation; 2d: every view alone", "choices": ("3d", "2d")})
    out: str | None = field(default=None, metadata={"help": "folder of the run (default: runs/<prompt>)"})
    resume: bool = field(default=False, metadata={"help": "go on from the run's checkpoint"})
    device: str = field(default="auto", metadata={"help": "cuda, mps or cpu; auto takes the best"})
    dtype: str = field(default="auto", metadata={"help": "of the model; auto: bfloat16 on cuda, else float32",
                                                 "choices": ("auto", "float32", "bfloat16", "float16")})
    seed: int = field(default=0, metadata={"help": "of everything random", "min": 0, "max": 2 ** 63 - 1})
    steps: int = field(default=10000, metadata={"help": "optimisation steps; every schedule is a share of them", "min": 1})
    save_every: int = field(default=250, metadata={"help": "steps between checkpoints", "min": 1})
    # what the model is asked
    negative: str = field(default=NEGATIVE, metadata={"help": "negative prompt"})
    suffix: str = field(default="", metadata={"help": "what is added to the prompt in 3d mode"})
    guidance: float = field(default=50.0, metadata={"help": "guidance scale", "min": 0})
    rescale: float = field(default=0.5, metadata={"help": "guidance rescale of the x0 loss", "min": 0, "max": 1})
    loss: str = field(default="x0", metadata={"help": "x0: reconstruction of the predicted latents; sds: the classic gradient",
                                              "choices": ("x0", "sds")})
    t_start: float = field(default=0.98, metadata={"help": "time at the start, of 1", "min": 0, "max": 1})
    t_min: float = field(default=0.02, metadata={"help": "least time at the end", "min": 0, "max": 1})
    t_max: float = field(default=0.50, metadata={"help": "greatest time at the end", "min": 0, "max": 1})
    anneal: float = field(default=0.8, metadata={"help": "share of the run over which the times fall", "min": 0.001, "max": 1})
    # pictures
    coarse_size: int = field(default=64, metadata={"help": "pixels of a rendering at first", "min": 8})
    coarse_sets: int = field(default=2, metadata={"help": "sets of four views in a batch at first", "min": 1})
    fine_size: int = field(default=256, metadata={"help": "pixels of a rendering later", "min": 8})
    fine_sets: int = field(default=1, metadata={"help": "sets of four views in a batch later", "min": 1})
    fine_from: float = field(default=0.5, metadata={"help": "share of the run after which the later size is used", "min": 0, "max": 1})
    budget: int = field(default=1 << 21, metadata={"help": "samples of the field in a step", "min": 1024})
    step_size: float = field(default=render.DIAGONAL / 512, metadata={"help": "distance between samples", "min": 0.001, "max": 0.2})
    random_background: float = field(default=0.5, metadata={"help": "share of steps with one random colour behind instead of the "
                                                                    "learned environment", "min": 0, "max": 1})
    grey_background: bool = field(default=False, metadata={"help": "the random colours are greys"})
    shading: bool = field(default=False, metadata={"help": "point light, textureless steps and orientation loss"})
    shading_from: float = field(default=0.5, metadata={"help": "share of the run before the light goes on", "min": 0, "max": 1})
    # the field
    levels: int = field(default=16, metadata={"help": "levels of the hash grid", "min": 1})
    log2_entries: int = field(default=19, metadata={"help": "entries of a level, as a power of two", "min": 8, "max": 24})
    coarsest: int = field(default=16, metadata={"help": "cells along the coarsest level", "min": 2})
    finest: int = field(default=4096, metadata={"help": "cells along the finest level", "min": 2})
    hidden: int = field(default=64, metadata={"help": "width of the field's networks", "min": 1})
    blob_strength: float = field(default=10.0, metadata={"help": "density that the centre starts with"})
    lr_grid: float = field(default=0.01, metadata={"help": "learning rate of the hash grid", "min": 0})
    lr: float = field(default=0.001, metadata={"help": "learning rate of the networks", "min": 0})
    occupancy_every: int = field(default=16, metadata={"help": "steps between visits to the occupancy grid", "min": 1})
    occupancy_warm_up: float = field(default=0.0256, metadata={"help": "share of the run in which a visit takes in every cell",
                                                               "min": 0, "max": 1})
    density_threshold: float = field(default=25.0, metadata={"help": "density at the mesh's surface", "min": 0})


VIEWS = 4
PICTURE_GREY = 0.8                               # behind the results
ORIENTATION = (10.0, 1000.0)                     # weight of the orientation loss, first and from `shading_from` on
LOG_EVERY = 10


def make_step(s, model, nerf, occupancy, optimizer, context, low, high, light, orientation, size, sets):
    """One optimisation step with shapes that never change: a function that returns the loss, without waiting for the device.

    context [2, L, D]: prompt and negative prompt. low, high (range of t), light (0 or 1), orientation (weight): tensors [],
    which the schedule fills in between steps.
    """
    device = context.device
    context = context.repeat_interleave(sets, 0)                                 # [2·sets, L, D]

    def step():
        c2w, fov = sds.draw_cameras(sets, VIEWS, device)                         # [sets, V, 4, 4] [sets]
        origins, directions = cameras.rays(c2w, fov[:, None].expand(sets, VIEWS), size)
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)  # [R, 3]
        colour = torch.rand(1 if s.grey_background else 3, device=device).expand(3)
        plain = torch.rand((), device=device) < s.random_background
        background = torch.where(plain, colour, nerf.background(directions))     # [R, 3]
        shading = None
        if s.shading:                                                            # albedo 25%, diffuse 37.5%, textureless 37.5%
            kind, softness = torch.rand(2, device=device).unbind()
            lamp = render.draw_light(c2w[..., :3, 3])[..., None, :].expand(-1, -1, size * size, -1).reshape(-1, 3)
            shading = render.Shading(lamp, softness * (kind > 0.25) * light, (kind > 0.625) * light)
        seen = render.render(nerf, occupancy, origins, directions, background, s.budget, s.step_size, shading=shading)
        images = seen.rgb.view(sets * VIEWS, size, size, 3).movedim(-1, 1)       # [sets·V, 3, H, W]
        images = F.interpolate(images, (model.config.size,) * 2, mode="bilinear", antialias=size > model.config.size)
        images = (2 * images - 1).unflatten(0, (sets, VIEWS))
        latents = model.encode(images, sample=True)                              # [sets, V, c, h, w]
        t = sds.draw_time(low, high, sets, device)
        camera = cameras.camera_numbers(c2w) if s.mode == "3d" else None
        loss = sds.loss(model.unet, latents, t, context, camera, s.guidance, s.rescale, s.loss)
        total = loss
        if s.shading:
            ray_directions = directions[seen.samples.ray]                        # [S, 3]
            total = loss + orientation * render.orientation_loss(seen.weights, seen.normals, ray_directions, seen.opacity)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return loss.detach()

    return step


def look(s, nerf, occupancy, azimuths, size, normals=False, elevation=15.0, fov=40.0):
    """Pictures of the field at azimuths [V] degrees, framed as the middle of the training cameras, and these cameras."""
    distance = 0.9 / torch.tan(torch.deg2rad(torch.tensor(fov / 2))).item()
    c2w = cameras.orbit(elevation, torch.as_tensor(azimuths, dtype=torch.float32), distance).to(occupancy.upper.device)
    picture = render.render_image(nerf, occupancy, c2w, fov, size, PICTURE_GREY, s.step_size, normals)
    return picture, dict(elevation=elevation, azimuth=torch.as_tensor(azimuths, dtype=torch.float32), fov=fov, distance=distance)


def write_results(s, nerf, occupancy, out, size):
    """Pictures from eight sides, turntable, depth, normals, field and mesh. Returns the mean opacity along the pictures' borders,
    where nothing should be."""
    eight, camera = look(s, nerf, occupancy, [45.0 * i for i in range(8)], size, normals=True)
    pictures.save_png(out / "views4.png", pictures.grid(eight.rgb[::2], 4))
    pictures.save_png(out / "views.png", pictures.grid(eight.rgb, 4))
    pictures.save_png(out / "depth.png", pictures.grid(pictures.depth_picture(eight.depth, eight.opacity), 4))
    pictures.save_png(out / "normals.png", pictures.grid(pictures.normal_picture(eight.normal, eight.opacity), 4))
    write_safetensors(out / "views.safetensors", {"rgb": eight.rgb, "opacity": eight.opacity, **{
        name: torch.as_tensor(value) for name, value in camera.items()}})
    frames, _ = look(s, nerf, occupancy, [360 / 36 * i for i in range(36)], size)
    pictures.save_turntable(out / "turntable.webp", frames.rgb)
    write_safetensors(out / "field.safetensors", nerf.state_dict(), {"config": json.dumps(asdict(nerf.config))})
    try:
        surface = mesh.extract(nerf.density, lambda x: nerf(x)[1], threshold=s.density_threshold, device=occupancy.upper.device)
    except UserError as error:
        print(f"no mesh: {error}")
    else:
        mesh.write_glb(out / "mesh.glb", surface)
        mesh.write_obj(out / "mesh.obj", surface)
    edges = (eight.opacity[..., 0, :], eight.opacity[..., -1, :], eight.opacity[..., 0], eight.opacity[..., -1])   # [V, 1, size]
    return torch.stack(edges).mean().item()


def distill(s, model, out, state=None):
    """The loop. state: what the checkpoint held, or None. Returns (nerf, occupancy, steps done), which are fewer than s.steps after
    Ctrl-C; the checkpoint is written. Raises UserError if the state is of another field, and then has changed no file."""
    device = model.device
    cuda = device.type == "cuda"
    prompts = [s.prompt + (s.suffix if s.mode == "3d" else ""), s.negative]
    with torch.no_grad():
        context = model.embed(prompts)                                           # [2, L, D]
    torch.manual_seed(s.seed)
    nerf = NeRF(NeRFConfig(levels=s.levels, log2_entries=s.log2_entries, coarsest=s.coarsest, finest=s.finest, hidden=s.hidden,
                           blob_strength=s.blob_strength)).to(device)
    occupancy = render.OccupancyGrid().to(device)
    networks = [p for name, p in nerf.named_parameters() if not name.startswith("grid.")]
    optimizer = torch.optim.AdamW([{"params": list(nerf.grid.parameters()), "lr": s.lr_grid}, {"params": networks, "lr": s.lr}],
                                  betas=(0.9, 0.99), eps=1e-15, capturable=cuda)
    start = 0
    if state:
        shapes, wanted = ({name: tensor.shape for name, tensor in f.items()} for f in (state.get("nerf", {}), nerf.state_dict()))
        if shapes != wanted:
            raise UserError(f"{out / 'checkpoint.safetensors'} is not of this run; start anew without --resume, with another --out")
        start = state["step"]
        nerf.load_state_dict(state["nerf"])
        occupancy.load_state_dict(state["occupancy"])
        load_optimizer(optimizer, state["optimizer"])
        set_random_state(state["random"])
    run.truncate_log(out / "log.jsonl", start + 1)

    def checkpoint(step):
        run.save_checkpoint(out / "checkpoint.safetensors", {
            "step": step, "nerf": nerf.state_dict(), "occupancy": occupancy.state_dict(), "optimizer": optimizer.state_dict(),
            "random": random_state()})

    low, high, light, orientation = (torch.zeros((), device=device) for _ in range(4))
    scheduled = (low, high, light, orientation)
    coarse, fine = (GraphedStep(make_step(s, model, nerf, occupancy, optimizer, context, *scheduled, size, sets), device)
                    for size, sets in ((s.coarse_size, s.coarse_sets), (s.fine_size, s.fine_sets)))
    show_every = max(1, s.steps // 20)
    with cli.interrupt_flag() as interrupted, side_stream(device):
        bar = tqdm(range(start, s.steps), initial=start, total=s.steps, desc=s.prompt)
        for step in bar:
            progress = step / s.steps
            for value, tensor in zip(sds.time_range(progress, (s.t_start, s.t_min), (s.t_start, s.t_max), s.anneal), (low, high)):
                tensor.fill_(value)
            light.fill_(progress >= s.shading_from)
            orientation.fill_(ORIENTATION[0] + (ORIENTATION[1] - ORIENTATION[0]) * min(1.0, progress / max(s.shading_from, 1e-9)))
            if step % s.occupancy_every == 0:
                occupancy.update(nerf.density, s.step_size, everywhere=progress < s.occupancy_warm_up)
            loss = (coarse if progress < s.fine_from else fine)()
            done = step + 1
            if done % LOG_EVERY == 0 or done == s.steps:
                run.log(out / "log.jsonl", step=done, loss=loss.item(), t_low=low.item(), t_high=high.item())
                bar.set_postfix(loss=f"{loss.item():.2f}")
            if done % show_every == 0:
                four, _ = look(s, nerf, occupancy, [0.0, 90.0, 180.0, 270.0], s.coarse_size)
                pictures.save_png(out / "progress" / f"{done:06d}.png", pictures.grid(four.rgb, 4))
            if done % s.save_every == 0 or done == s.steps or interrupted.is_set():
                checkpoint(done)
            if interrupted.is_set():
                break
    return nerf, occupancy, done if start < s.steps else s.steps


def main():
    begin = time.time()
    s = cli.parse(Settings, description=__doc__)
    if not s.prompt.strip():
        raise UserError('the prompt is empty: say what to make, for example "a bulldog wearing a crown"')
    device = choose_device(s.device)
    model = MVDream.load(s.model, device, choose_dtype(s.dtype, device))
    s = cli.parse(Settings, description=__doc__, defaults=model.config.distill)  # a flag counts more than the model's header
    for low, high in (("coarsest", "finest"), ("t_min", "t_max")):
        if getattr(s, low) > getattr(s, high):
            raise UserError(f"--{low.replace('_', '-')} {getattr(s, low)} is above --{high.replace('_', '-')} {getattr(s, high)}")
    known = replace(s, prompt=model.text.known_part(s.prompt), negative=model.text.known_part(s.negative))  # all unknown: the end
    out = run.open_run(s.out, asdict(s), s.resume, f"runs/{run.slug(s.prompt)}{'-2d' if s.mode == '2d' else ''}", ("save_every",))
    state = run.last_checkpoint(out) if s.resume else None
    nerf, occupancy, done = distill(known, model, out, state)
    if done < s.steps:
        print(f"interrupted after {done} of {s.steps} steps; go on with the same command and --resume; writing the results so far "
              f"to {out}")
    haze = write_results(s, nerf, occupancy, out, model.config.size)
    rows = [(row["step"], row["loss"]) for row in run.read_log(out / "log.jsonl")]
    pictures.save_curve(out / "loss.png", {"loss": rows}, "step", "loss", log_scale=True)
    if done < s.steps:
        raise KeyboardInterrupt
    print(f"{out}: {s.steps} steps and all results in {time.time() - begin:.0f} s, opacity along the borders {haze:.4f}; "
          f"open {out / 'turntable.webp'}")


if __name__ == "__main__":
    cli.main(main)
