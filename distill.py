"""A sentence -> a 3D object, by multi-view score distillation (MVDream §3.2).

    python distill.py "a bulldog wearing a crown"
    python distill.py "an astronaut riding a horse" --model mvdream-sd21

A field is rendered from random sides, four at a time, the model says how the pictures should
change, and the field learns. --mode 2d asks the same network without cameras, as DreamFusion does:
compare the faces. After Ctrl-C or a kill the same command with --resume goes on.

A run's folder shows itself in index.html. For other 3D tools there are mesh.glb, mesh.obj and
views/: eight RGBA pictures and their cameras, transforms.json, in the format of NeRF's synthetic
scenes.
"""
import json
import time
from dataclasses import asdict
from functools import partial

import mvd  # before torch: tools/threads.py
import torch
from tqdm import tqdm

from mvd import ahead, cameras, mesh, presets, render, sds
from mvd.data.transforms import write_transforms
from mvd.model import MVDream, lay_out, read_config
from mvd.sds import DistillSettings
from mvd.tools import cli, pictures, run
from mvd.tools.device import (
    GraphedStep,
    can_compile,
    choose_device,
    choose_dtype,
    load_optimizer,
    random_state,
    set_random_state,
    side_stream,
    tune_cuda,
)
from mvd.tools.errors import UserError
from mvd.tools.files import write_safetensors
from mvd.tools.page import write_page
from mvd.tools.vocabulary import known_part

# The grey behind the results.
PICTURE_GREY = 0.8
LOG_EVERY = 10
# What to try when the loss is no longer a number.
IF_LOST = "try --dtype float32, or a lower --lr, --lr-grid or --guidance"
# What the progress pictures show, for the page.
PROGRESS = "Progress: the render, with noise, what the model believes it shows, the difference"
# Steps before the first picture, and before the run compiles anything itself.
FIRST_LOOK = 20
# If fewer steps are left, they do not make up for compiling.
COMPILE_FROM = 4000
# A step's random numbers are those of a seed of its own, which is no step's of the next run's.
SEEDS_APART = 1_000_003
# What to try where memory does not suffice.
SMALLER = (
    "half the --coarse-budget and --fine-budget, --coarse-sets 1, --fine-sets 1, or a smaller "
    "--fine-size"
)
# Settings that may differ when a run is resumed.
MAY_CHANGE = ("save_every", "show_every", "compile", "mesh_size", "density_threshold")


def preset_settings(flags):
    """The settings of the model that the flags name."""
    return presets.settings_for("distill", read_config(flags.model))


# ---- pictures of the field -------------------------------------------------------------------

def view_from(distillation, azimuths, size, *, normals=False, elevation=15.0, fov=40.0):
    """Pictures of the field at azimuths [V] (degrees), and the cameras that took them.

    The cameras stand in the middle of the range that training draws from. Returns
    (render.Pictures, {"elevation", "azimuth", "fov", "distance"}).
    """
    azimuths = torch.as_tensor(azimuths, dtype=torch.float32)
    distance = 0.9 / torch.tan(torch.deg2rad(torch.tensor(fov / 2))).item()
    c2w = cameras.orbit(elevation, azimuths, distance).to(distillation.device)
    views = render.render_views(
        distillation.nerf,
        distillation.occupancy,
        c2w,
        fov,
        size,
        background=PICTURE_GREY,
        step=distillation.s.step_size,
        normals=normals,
    )
    return views, dict(elevation=elevation, azimuth=azimuths, fov=fov, distance=distance)


def show_progress(distillation, result, out, done):
    """Write progress/<step>.png: a row per view, and the method from left to right.

    The columns are the render; the same with noise, x_t; what the model takes it for, x̂_0; and
    the difference of this and the render, which the field is to follow (grey: none). x_t and x̂_0
    are latents, which are decoded. result: the sds.Step that was just taken; of its first set.
    """
    s, model = distillation.s, distillation.model
    latents = torch.cat([result.x_t[:1], result.x0_hat[:1]])  # [2, V, c, h, w]
    with torch.no_grad():
        noisy, believed = model.decode(latents).float()
    rendered = result.images[0].float()
    columns = torch.stack([rendered, noisy, believed, believed - rendered], 1)  # [V, 4, 3, H, W]
    shown = (columns / 2 + 0.5).clamp(0, 1).flatten(0, 1)
    shown = torch.nn.functional.interpolate(shown, model.config.size // 2, mode="area")
    pictures.save_png(out / "progress" / f"{done:06d}.png", pictures.grid(shown, 4))
    figures = {PROGRESS: progress_files(out)}
    write_page(out, s.prompt, f"{done} of {s.steps} steps", asdict(s), figures, live=True)
    # A picture's allocations vary in size: give their memory back to the step.
    torch.cuda.empty_cache()


def write_views(folder, views, camera):
    """Write the views, without their grey background, and their cameras into a folder.

    views, camera: as `view_from` returns them.
    """
    # Straight alpha: rgb is colour * opacity + grey * (1 - opacity).
    behind = PICTURE_GREY * (1 - views.opacity)
    colour = (views.rgb - behind) / views.opacity.clamp(min=1e-6)
    rgba = torch.cat([colour, views.opacity], 1)
    names = pictures.save_views(folder, [pictures.to_pil(view) for view in rgba])
    c2w = cameras.orbit(camera["elevation"], camera["azimuth"], camera["distance"])
    write_transforms(folder, names, c2w, camera["fov"], size=rgba.shape[-1])


def progress_files(out):
    return sorted((out / "progress").glob("*.png"))


def write_mesh(distillation, out):
    """Write mesh.glb and mesh.obj and print what they are like, or that there is no surface."""
    nerf, s = distillation.nerf, distillation.s

    def albedo(points):
        return nerf(points)[1]

    try:
        surface = mesh.extract(
            nerf.density,
            albedo,
            resolution=s.mesh_size,
            threshold=s.density_threshold,
            device=distillation.device,
        )
    except UserError as error:
        print(f"no mesh: {error}")
        return
    mesh.write_glb(out / "mesh.glb", surface)
    mesh.write_obj(out / "mesh.obj", surface)
    volume = mesh.volume(surface.vertices, surface.faces)
    watertight = "watertight" if mesh.is_watertight(surface.faces) else "not watertight"
    print(
        f"{out / 'mesh.glb'}: {len(surface.faces):,} faces, volume {volume:.3f} of the box's 8, "
        f"{watertight}"
    )


def write_results(distillation, out, size, done):
    """Write everything that a run ends with: pictures, turntable, field, mesh, page.

    size: pixels of a picture. done: steps so far. Returns the mean opacity along the borders of
    the pictures, where nothing should be.
    """
    s = distillation.s
    turned, camera = view_from(
        distillation, [11.25 * i for i in range(32)], size, normals=True
    )
    # Every fourth frame: 45 degrees apart.
    eight = render.Pictures(*[part[::4] for part in turned])
    camera["azimuth"] = camera["azimuth"][::4]
    depth = pictures.depth_picture(eight.depth, eight.opacity)
    turned_normals = pictures.normal_picture(turned.normal, turned.opacity)
    normals = turned_normals[::4]
    pictures.save_png(out / "views4.png", pictures.grid(eight.rgb[::2], 4))
    pictures.save_png(out / "views.png", pictures.grid(eight.rgb, 4))
    pictures.save_png(out / "depth.png", pictures.grid(depth, 4))
    pictures.save_png(out / "normals.png", pictures.grid(normals, 4))
    tensors = {name: torch.as_tensor(value) for name, value in camera.items()}
    tensors.update(rgb=eight.rgb, opacity=eight.opacity, normal=eight.normal)
    write_safetensors(out / "views.safetensors", tensors)
    write_views(out / "views", eight, camera)
    pictures.save_turntable(out / "turntable.webp", turned.rgb)
    # Side by side: the page turns both together.
    frames = torch.cat([turned.rgb, turned_normals], -1)

    nerf = distillation.nerf
    config = json.dumps(asdict(nerf.config))
    write_safetensors(out / "field.safetensors", nerf.state_dict(), {"config": config})
    write_mesh(distillation, out)

    rows = run.read_log(out / "log.jsonl")
    figures = {
        "From eight sides": [out / "views.png"],
        PROGRESS: progress_files(out),
        "Normals": [out / "normals.png"],
        "Depth": [out / "depth.png"],
    }
    for name in ("loss", "gradient", "opacity"):
        figures[name.capitalize()] = {name: [(row["step"], row[name]) for row in rows]}
    status = f"{done} of {s.steps} steps"
    write_page(out, s.prompt, status, asdict(s), figures, frames=frames)

    top, bottom = eight.opacity[..., 0, :], eight.opacity[..., -1, :]
    left, right = eight.opacity[..., 0], eight.opacity[..., -1]
    return torch.stack([top, bottom, left, right]).mean().item()


# ---- the loop --------------------------------------------------------------------------------

def resume(distillation, state, out):
    """Go on from a checkpoint: returns the steps that are done. Raises UserError."""
    field = distillation.nerf.state_dict()
    wanted = {name: tensor.shape for name, tensor in field.items()}
    found = {name: tensor.shape for name, tensor in state.get("nerf", {}).items()}
    if found != wanted:
        raise UserError(
            f"{out / run.CHECKPOINT} is not of this run; {run.ANEW}"
        )
    distillation.nerf.load_state_dict(state["nerf"])
    distillation.occupancy.load_state_dict(state["occupancy"])
    load_optimizer(distillation.optimizer, state["optimizer"])
    set_random_state(state["random"])
    return state["step"]


def new_step(distillation, stage, compiled, graphed):
    """The step of a stage, made anew since its code or its shapes change; a CUDA graph if asked."""
    distillation.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    distillation.begin(stage, compiled)
    return GraphedStep(distillation.step, distillation.device) if graphed else distillation.step


def worth_compiling(s, steps, device):
    """Is it worth while to compile the steps of a run, if so many are left?"""
    return s.compile and steps >= COMPILE_FROM and can_compile(device)


def distill(s, context, model, out, state=None, helper=None):
    """The loop: returns (Distillation, steps done, the signal that ended it or 0).

    context [2, L, D]: prompt and negative prompt. state: what the checkpoint held, or None. helper:
    an `ahead.Helper`, whose workers compile for it, or None. The checkpoint is written before it
    returns. Raises UserError if the state is of another field, and then has changed no file.
    """
    device = model.device
    torch.manual_seed(s.seed)
    distillation = sds.Distillation(s, model, context)
    start = done = resume(distillation, state, out) if state else 0
    run.truncate_log(out / "log.jsonl", start + 1)
    cli.print_changes(s, *presets.settings_for("distill", model.config))

    visits = occupancy_visits(distillation)
    show_every = s.show_every or max(FIRST_LOOK, s.steps // 10)
    coarse, fine = sds.stages(s)
    worth_it = worth_compiling(s, s.steps - start, device)
    # Where the run compiles alone the few steps before are not worth a graph.
    graphed = not worth_it or ahead.has_workers(helper)
    stage, compiled = None, False

    taking_over = ahead.take_overs(distillation, helper)
    with cli.interrupt_flag() as interrupted, side_stream(device), taking_over as is_compiled:
        bar = tqdm(range(start, s.steps), initial=start, total=s.steps, desc=s.prompt)
        for step in bar:
            progress = step / s.steps
            wanted = fine if progress >= s.fine_from else coarse
            ready = worth_it and step >= FIRST_LOOK and is_compiled(wanted, ahead.REST)
            while compiled and not ready and not interrupted.is_set():
                ready = is_compiled(wanted, ahead.REST)
            if compiled and not ready:
                break
            if ahead.has_workers(helper):
                # Whenever the thread compiles, PyTorch sets its random numbers back.
                torch.manual_seed((s.seed * SEEDS_APART + step) % 2**63)
            if (wanted, ready) != (stage, compiled):
                stage, compiled = wanted, ready
                # First free the earlier step: its graph takes as much memory as the next one's.
                take_step = result = None
                take_step = new_step(distillation, stage, compiled, compiled or graphed)
            distillation.anneal(progress)
            if step % s.occupancy_every == 0:
                visits[progress < s.occupancy_warm_up]()
            result = take_step()
            if compiled and take_step.graph and progress < s.fine_from < 1:
                is_compiled(fine, 0)  # ask in time, so that nobody waits at half-time
            done = step + 1
            if done % LOG_EVERY == 0 or done == s.steps:
                log_step(out, done, result, distillation)
                bar.set_postfix(loss=f"{result.loss.item():.2f}")
            if done % show_every == 0 or (done == FIRST_LOOK and s.steps > FIRST_LOOK):
                show_progress(distillation, result, out, done)
            if done % s.save_every == 0:
                save(distillation, result, out, done)
            if interrupted.is_set():
                break
        if done > start and done % s.save_every:
            save(distillation, result, out, done)
    return distillation, done, interrupted.code


def save(distillation, result, out, done):
    """Write the checkpoint. Raises as `check_step`."""
    check_step(out, done, result)
    state = {"step": done, **distillation.state_dict(), "random": random_state()}
    run.save_checkpoint(out / run.CHECKPOINT, state)


def occupancy_visits(distillation):
    """{everywhere or not: a visit to the occupancy grid}; on a GPU each is a CUDA graph."""
    visits = {}
    for everywhere in (True, False):
        visit = partial(
            distillation.occupancy.update,
            distillation.nerf.density,
            distillation.s.step_size,
            everywhere,
        )
        visits[everywhere] = GraphedStep(visit, distillation.device)
    return visits


def check_step(out, done, result):
    """Raise UserError if the loss of a step, an sds.Step, or its gradient is not finite."""
    numbers = dict(loss=result.loss.item(), gradient=result.gradient.item())
    run.check_finite(out, done, IF_LOST, **numbers)


def log_step(out, done, result, distillation):
    """Add a line to the log: what to watch in score distillation. Raises as `check_step`."""
    check_step(out, done, result)
    run.log(
        out / "log.jsonl",
        step=done,
        loss=result.loss.item(),
        gradient=result.gradient.item(),
        opacity=result.opacity.item(),
        t_low=distillation.t_low.item(),
        t_high=distillation.t_high.item(),
    )


def check(s):
    """Raise UserError for settings that contradict each other."""
    if not s.prompt.strip():
        raise UserError(
            'the prompt is empty: say what to make, for example "a bulldog wearing a crown"'
        )
    for low, high in (("coarsest", "finest"), ("t_min", "t_max")):
        least, most = getattr(s, low), getattr(s, high)
        if least > most:
            raise UserError(f"{cli.flag_of(low)} {least} is above {cli.flag_of(high)} {most}")


@torch.no_grad()
def embed(s, model):
    """What the model is told: prompt and negative prompt, context [2, L, D].

    The suffix is added to the part of the prompt that the model knows.
    """
    prompt, negative = [known_part(text, model.config.text) for text in (s.prompt, s.negative)]
    suffix = s.suffix if s.mode == "3d" else ""
    return model.embed([prompt + suffix, negative])


def main(argv=None):
    """The command: a prompt -> a run's folder with all results.

    Raises UserError; KeyboardInterrupt after a signal.
    """
    begin = time.time()
    s = cli.parse(DistillSettings, argv, __doc__, preset_settings)
    check(s)
    # A run that is resumed mostly finds on disk what was compiled for it; else it compiles alone.
    # Not `worth_compiling`, which asks for the GPU.
    helped = s.compile and s.steps >= COMPILE_FROM and not s.resume
    with ahead.fork_server(helped) as helper:
        device = choose_device(s.device)
        dtype = choose_dtype(s.dtype, device)
        tune_cuda(tf32=dtype != torch.float32, search=False)
        if helper:
            ahead.start_workers(helper, s, dtype, device)
        model = MVDream.load(s.model, device, dtype)
        context = embed(s, model)
        model.text = None  # its work is done, and at full size it takes 0.7 GiB
        # As where they are compiled: later a graph would read where the weights were. And on a CPU
        # channels last save a sixth of each step's encoding, and a twentieth of the UNet.
        lay_out(model.vae)
        lay_out(model.unet)
        default = f"runs/{run.slug(s.prompt)}{'-2d' if s.mode == '2d' else ''}"
        out = run.open_run(s.out, asdict(s), s.resume, default, MAY_CHANGE)
        with run.starting(out):
            state = run.last_checkpoint(out) if s.resume else None
            distillation, done, code = distill(s, context, model, out, state, helper)
    torch.cuda.empty_cache()  # the step's graph is gone, and the results need memory
    if done < s.steps:
        print(
            f"interrupted after {done} of {s.steps} steps; {run.GO_ON}; "
            f"writing the results so far to {out}"
        )
    border = write_results(distillation, out, model.config.size, done)
    if done < s.steps:
        raise cli.interruption(code)
    print(
        f"{out}: {s.steps} steps and all results in {time.time() - begin:.0f} s, "
        f"opacity along the borders {border:.4f}; open {out / 'index.html'}"
    )


if __name__ == "__main__":
    cli.main(main, SMALLER)
