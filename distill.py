"""A sentence -> a 3D object, by multi-view score distillation (MVDream §3.3).

    python distill.py "a bulldog wearing a crown"
    python distill.py "an astronaut riding a horse" --model mvdream-sd21

A field is rendered from four random sides, the model says how the pictures should change, the field learns. --mode 2d asks the
same network without cameras, as DreamFusion does: compare the faces. Ctrl-C or a kill: the same command with --resume goes on.
"""
import json
import time
from dataclasses import asdict, replace
from functools import partial

import torch
from tqdm import tqdm

from mvd import cameras, mesh, render, sds
from mvd.tools import cli, pictures, run
from mvd.tools.device import (GraphedStep, can_compile, choose_device, choose_dtype, load_optimizer, random_state, set_random_state,
                        side_stream, tune)
from mvd.tools.errors import UserError
from mvd.tools.files import write_safetensors
from mvd.tools.vocabulary import known_part
from mvd.model import MVDream
from mvd.tools.page import write_page
from mvd.sds import Settings

PICTURE_GREY = 0.8                               # behind the results
LOG_EVERY = 10
FIRST_LOOK = 20                                  # steps before the first picture, and before anything is compiled
COMPILE_FROM = 1000                              # steps of a run that is long enough to make up for compiling


def look(s, nerf, occupancy, azimuths, size, normals=False, elevation=15.0, fov=40.0):
    """Pictures of the field at azimuths [V] degrees, framed as the middle of the training cameras, and these cameras."""
    distance = 0.9 / torch.tan(torch.deg2rad(torch.tensor(fov / 2))).item()
    c2w = cameras.orbit(elevation, torch.as_tensor(azimuths, dtype=torch.float32), distance).to(occupancy.upper.device)
    picture = render.render_image(nerf, occupancy, c2w, fov, size, PICTURE_GREY, s.step_size, normals)
    return picture, dict(elevation=elevation, azimuth=torch.as_tensor(azimuths, dtype=torch.float32), fov=fov, distance=distance)


def write_results(s, nerf, occupancy, out, size, done):
    """Pictures from eight sides, turntable, depth, normals, field, mesh, loss and page after so many steps. Returns the mean opacity along
    the pictures' borders, where nothing should be."""
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
    rows = [(row["step"], row["loss"]) for row in run.read_log(out / "log.jsonl")]
    pictures.save_curve(out / "loss.png", {"loss": rows}, "step", "loss", log_scale=True)
    write_page(out, s.prompt, f"{done} of {s.steps} steps", asdict(s), {
        "From eight sides": [out / "views.png"], "Progress": sorted((out / "progress").glob("*.png")),
        "Normals": [out / "normals.png"], "Depth": [out / "depth.png"], "Loss": [out / "loss.png"]}, frames.rgb)
    edges = (eight.opacity[..., 0, :], eight.opacity[..., -1, :], eight.opacity[..., 0], eight.opacity[..., -1])   # [V, 1, size]
    return torch.stack(edges).mean().item()


def distill(s, prompts, model, out, state=None):
    """The loop. prompts: what to make and the negative prompt, in words that the model knows. state: what the checkpoint held, or None.
    Returns (nerf, occupancy, steps done), which are fewer than s.steps after Ctrl-C; the checkpoint is written. Raises UserError if the
    state is of another field, and then has changed no file."""
    device = model.device
    prompt, negative = prompts
    with torch.no_grad():
        context = model.embed([prompt + (s.suffix if s.mode == "3d" else ""), negative])     # [2, L, D]
    torch.manual_seed(s.seed)
    nerf, occupancy, optimizer = sds.make_field(s, device)
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

    stages = sds.stages(s)
    schedule, done = sds.Schedule(device), start
    stage, graphed, compiled = None, None, False
    visits = {everywhere: GraphedStep(partial(occupancy.update, nerf.density, s.step_size, everywhere), device)
              for everywhere in (True, False)}
    show_every, compiler = max(1, s.steps // 20), s.compile and s.steps >= COMPILE_FROM and can_compile(device)
    with cli.interrupt_flag() as interrupted, side_stream(device):
        bar = tqdm(range(start, s.steps), initial=start, total=s.steps, desc=s.prompt)
        for step in bar:
            progress = step / s.steps
            wanted, compile_now = stages[progress >= s.fine_from], compiler and step >= FIRST_LOOK
            if compile_now and not compiled:
                model.compile_networks()
            if (wanted, compile_now) != (stage, compiled):                       # the first step, or now larger, or now compiled
                stage, compiled, graphed = wanted, compile_now, None             # the earlier step's memory is free
                graphed = GraphedStep(sds.make_step(replace(s, compile=compiled), model, nerf, occupancy, optimizer, context,
                                                    schedule, stage), device)
            schedule.set(s, progress)
            if step % s.occupancy_every == 0:
                visits[progress < s.occupancy_warm_up]()
            loss = graphed()
            done = step + 1
            if done % LOG_EVERY == 0 or done == s.steps:
                run.log(out / "log.jsonl", step=done, loss=loss.item(), t_low=schedule.low.item(), t_high=schedule.high.item())
                bar.set_postfix(loss=f"{loss.item():.2f}")
            if done % show_every == 0 or done == FIRST_LOOK:
                four, _ = look(s, nerf, occupancy, [0.0, 90.0, 180.0, 270.0], s.coarse_size)
                pictures.save_png(out / "progress" / f"{done:06d}.png", pictures.grid(four.rgb, 4))
                write_page(out, s.prompt, f"{done} of {s.steps} steps", asdict(s),
                           {"Progress": sorted((out / "progress").glob("*.png"))}, live=True)
                torch.cuda.empty_cache()                                         # each picture takes its own number of samples
            if done % s.save_every == 0 or done == s.steps or interrupted.is_set():
                checkpoint(done)
            if interrupted.is_set():
                break
    return nerf, occupancy, done


def main():
    """The command: a prompt -> a run's folder with all results. Raises UserError; KeyboardInterrupt after Ctrl-C."""
    begin = time.time()
    s = cli.parse(Settings, description=__doc__)
    if not s.prompt.strip():
        raise UserError('the prompt is empty: say what to make, for example "a bulldog wearing a crown"')
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    tune(tf32=dtype != torch.float32)
    model = MVDream.load(s.model, device, dtype)
    s = cli.parse(Settings, description=__doc__, defaults=model.config.distill)  # a flag counts more than the model's header
    for low, high in (("coarsest", "finest"), ("t_min", "t_max")):
        if getattr(s, low) > getattr(s, high):
            raise UserError(f"--{low.replace('_', '-')} {getattr(s, low)} is above --{high.replace('_', '-')} {getattr(s, high)}")
    prompts = [known_part(p, model.config.text) for p in (s.prompt, s.negative)]         # all unknown: the end
    out = run.open_run(s.out, asdict(s), s.resume, f"runs/{run.slug(s.prompt)}{'-2d' if s.mode == '2d' else ''}", ("save_every", "compile"))
    state = run.last_checkpoint(out) if s.resume else None
    nerf, occupancy, done = distill(s, prompts, model, out, state)
    if done < s.steps:
        print(f"interrupted after {done} of {s.steps} steps; go on with the same command and --resume; writing the results so far "
              f"to {out}")
    haze = write_results(s, nerf, occupancy, out, model.config.size, done)
    if done < s.steps:
        raise KeyboardInterrupt
    print(f"{out}: {s.steps} steps and all results in {time.time() - begin:.0f} s, opacity along the borders {haze:.4f}; "
          f"open {out / 'index.html'}")


if __name__ == "__main__":
    cli.main(main)
