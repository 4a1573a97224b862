"""The method in nine steps, each a few lines, a picture and what it shows.

    python -m mvd.tour                     # all of them: a minute on two CPU cores
    python -m mvd.tour --step 5            # one alone

It writes runs/tour/index.html, one page with the pictures, the words and the code of every step.
It is also the place to play: a step is a function of a `Scene`. Change its arguments, or its lines:

    from mvd import tour
    scene = tour.set_scene("bulldog", "crown", "red")
    picture, words = tour.attention(scene, t=500, places=((4, 8), (6, 6)))
    tour.to_pil(picture).show()

A step returns a picture, [3, H, W] in [0, 1], and what it shows, in words. Latents are decoded to
be looked at, also noisy ones: the network itself never sees a pixel.
"""
import html
import inspect
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from . import cameras, diffusion, presets, render, sds, toyworld
from .metrics.candidates import SAMPLED, real_views
from .model import MVDream
from .tools import cli, page, run
from .tools.cli import setting
from .tools.device import choose_device
from .tools.pictures import grid, save_png, to_pil

# Eight time steps from almost clean to almost nothing but noise.
TIMES = (20, 100, 200, 350, 500, 650, 800, 980)


@dataclass
class TourSettings:
    """The flags."""
    out: str | None = setting(None, "folder of the page (default: runs/tour)")
    step: int = setting(0, "this step alone, 1 to 9; 0: all", min=0, max=9)
    device: str = setting("auto", "cuda, cpu, or mps (untested); auto: cuda, else cpu")
    seed: int = setting(0, "of the noise", min=0)


class Scene(NamedTuple):
    """What the steps start from: a model, a prompt, and a thing that fits it, from four sides."""
    model: MVDream
    prompt: str
    context: torch.Tensor   # [2, L, D]: the prompt, then the empty one, for guidance
    camera: torch.Tensor    # [1, V, 16]
    x0: torch.Tensor        # [1, V, c, h, w], the latents of `views`
    views: torch.Tensor     # [1, V, 3, H, W] in [0, 1], renders as the model was trained on


@torch.no_grad()
def set_scene(subject="bulldog", accessory="crown", colour="red", model="tiny", device="cpu"):
    """A Scene of one thing of the toy world. model: a name for `MVDream.load`, or an MVDream."""
    if isinstance(model, str):
        model = MVDream.load(model, device)
    thing = toyworld.Thing(subject, accessory, colour)
    prompt = toyworld.captions(thing)[0]
    context = model.embed([prompt + model.config.suffix, ""])
    azimuths = torch.tensor(SAMPLED.azimuth)
    c2w = cameras.orbit(SAMPLED.elevation, azimuths)
    camera = cameras.extrinsics(c2w)[None].to(model.device)
    views = real_views([thing], SAMPLED, model.device, size=model.config.size)
    return Scene(model, prompt, context, camera, model.encode(2 * views - 1), views)


# ---- pictures --------------------------------------------------------------------------------

GREEN = (0.1, 0.8, 0.2)
ORANGE = (0.9, 0.4, 0.0)
BLUE = (0.15, 0.4, 0.75)
GREY = (0.4, 0.4, 0.4)
SIDES = [f"azimuth {azimuth:g}" for azimuth in SAMPLED.azimuth]


@torch.no_grad()
def look(scene, latents):
    """Latents [..., c, h, w], decoded: [N, 3, H, W] in [0, 1] on the CPU."""
    latents = latents.flatten(0, -4)[None]
    return (scene.model.decode(latents)[0] / 2 + 0.5).float().clamp(0, 1).cpu()


def to_tensor(picture):
    """A Pillow picture as [3, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.movedim(-1, 0) / 255


def sheet(rows):
    """Rows of named images, one below the other: [3, H', W'] in [0, 1].

    rows: [(images [N, 3, H, W], N names), ...].
    """
    strips = []
    for images, names in rows:
        picture = to_pil(grid(images, len(images)))
        strip = Image.new("RGB", (picture.width, picture.height + 20), "white")
        strip.paste(picture, (0, 18))
        for i, name in enumerate(names):
            place = (i * picture.width // len(images) + 2, 3)
            ImageDraw.Draw(strip).text(place, name, fill="black", font_size=11)
        strips.append(strip)
    width = max(strip.width for strip in strips)
    whole = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return to_tensor(whole)


def painted(images, share, colour):
    """Images [N, 3, H, W] with a colour over them, as much as share [N, 1, h, w] says."""
    share = F.interpolate(share, images.shape[-2:], mode="nearest")
    colour = torch.tensor(colour).view(1, 3, 1, 1)
    return images * (1 - share) + colour * share


# ---- the diffusion model ---------------------------------------------------------------------

@torch.no_grad()
def noise(scene, times=TIMES):
    """1. Noise at eight time steps."""
    t = torch.tensor(times, device=scene.x0.device)
    x0 = scene.x0.expand(len(t), -1, -1, -1, -1)  # [8, V, c, h, w]
    x_t = diffusion.q_sample(x0, t, torch.randn_like(x0))
    picture = sheet([(look(scene, x_t[:, 0]), [f"t = {step}" for step in times])])
    left = diffusion.alphas_cumprod()[times[-1]].item()
    return picture, (
        "In training, noise is added to the latents of a picture, more of it the larger the time "
        f"step t (q_sample): at t = {times[-1]} the picture is {left:.1%} of the variance. The "
        "network sees the result, x_t, and learns to say which noise was added."
    )


@torch.no_grad()
def prediction(scene, times=TIMES):
    """2. One call of the network at each of them."""
    t = torch.tensor(times, device=scene.x0.device)
    x0 = scene.x0.expand(len(t), -1, -1, -1, -1)
    x_t = diffusion.q_sample(x0, t, torch.randn_like(x0))
    context = scene.context[:1].expand(len(t), -1, -1)
    camera = scene.camera.expand(len(t), -1, -1)
    eps = diffusion.predict_noise(scene.model.unet, x_t, t, context, camera)
    x0_hat = diffusion.predict_x0(x_t, t, eps)
    picture = sheet([
        (look(scene, x_t[:, 0]), [f"x_t, t = {step}" for step in times]),
        (look(scene, x0_hat[:, 0]), ["predicted x0"] * len(t)),
    ])
    return picture, (
        "If the predicted noise is taken away from x_t, what is left is the clean picture that the "
        "network expects behind it (predict_x0). After a single call it is almost exact where "
        f"there is little noise; at t = {times[-1]} it is what the words and the camera say."
    )


def sample_states(scene, camera, context, steps, guidance):
    """What a sampler goes through: [(x, predicted x0), ...], [1, V, c, h, w] each."""
    def guided(x_t, t):
        unet = scene.model.unet
        return diffusion.guided_noise(unet, x_t, t, context, camera, guidance)[0]

    shape = scene.x0.shape
    return list(diffusion.sampling_steps(guided, shape, steps, "ddim", device=scene.x0.device))


def sample_picture(scene, states, names):
    """The first view at eight moments, what was expected then, and all views at the end."""
    last = len(states) - 1
    moments = [round(last * i / 7) for i in range(8)]
    x = torch.cat([states[i][0][:, 0] for i in moments])
    x0_hat = torch.cat([states[i][1][:, 0] for i in moments])
    return sheet([
        (look(scene, x), [f"after step {i + 1}" for i in moments]),
        (look(scene, x0_hat), ["predicted x0"] * 8),
        (look(scene, states[last][0]), names),
    ])


def sample(scene, steps=50, guidance=4.0):
    """3. A sample, step by step."""
    states = sample_states(scene, scene.camera, scene.context, steps, guidance)
    return sample_picture(scene, states, SIDES), (
        "A sampler starts from noise alone; each step (ddim_step) takes the predicted x0, vague at "
        "first, and adds to it a little less noise than there was. All four views go through "
        "this together, and at the end (below) they show one thing from four sides. (sample.py "
        "takes dpm_solver_step, which needs half the steps.)"
    )


def sample_without_cameras(scene, steps=50, guidance=4.0):
    """4. The same without cameras."""
    context = scene.model.embed([scene.prompt, ""])
    states = sample_states(scene, None, context, steps, guidance)
    names = [f"picture {i + 1}" for i in range(scene.x0.shape[1])]
    return sample_picture(scene, states, names), (
        "Without cameras (camera=None) the same weights are a text-to-image model: no view sees "
        "the others, and nothing says from which side it looks. Four different things come out, "
        "most of them seen from the front; an object made from these would have several faces."
    )


# ---- attention -------------------------------------------------------------------------------

def queries_and_keys(layer, call):
    """q and k, [B, heads, L, d] each, that a layer (`unet.Attention`) computes during call()."""
    kept = []

    def keep(linear, inputs, output):
        kept.append(layer.split_heads(output))

    with layer.to_q.register_forward_hook(keep), layer.to_k.register_forward_hook(keep):
        call()
    return kept


@torch.no_grad()
def attention(scene, t=200, places=((4, 8), (8, 8), (13, 10))):
    """5. What 3D attention looks at.

    places: (row, column) in the front view, which has 16 rows and 16 columns.
    """
    unet = scene.model.unet
    t = torch.tensor([t], device=scene.x0.device)
    x_t = diffusion.q_sample(scene.x0, t, torch.randn_like(scene.x0))
    # The last transformer of the decoder is one of the finest.
    layer = [b.attention for b in unet.decoder if b.attention][-1].self_attention
    q, k = queries_and_keys(layer, lambda: unet(x_t, t, scene.context[:1], scene.camera))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # [1, heads, V·h·w, V·h·w]
    weights = weights.mean((0, 1)).float().cpu()

    V, h, w = scene.x0.shape[1], *scene.x0.shape[-2:]
    views = scene.views[0].cpu()
    pale = 0.5 + 0.5 * views.mean(1, keepdim=True).expand_as(views)
    rows, others = [], []
    for row, column in places:
        token = row * h // 16 * w + column * w // 16
        maps = weights[token].view(V, 1, h, w)
        others.append(f"{maps[1:].sum():.0%}")
        here = torch.zeros(1, 1, 16, 16)
        here[..., row, column] = 1
        asked = painted(views[:1], here, GREEN)
        answers = painted(pale, maps / maps.max(), ORANGE)
        rows.append((torch.cat([asked, answers]), ["the token", *SIDES]))
    return sheet(rows), (
        "A token of the front view (green) looks at the tokens of all views; the more orange, the "
        "larger its weight softmax(q kᵀ / √d), from the network's own q and k. A token looks at "
        f"its own part from every side: {', '.join(others)} of the weight of the rows goes to "
        "other views, which is how the views come to agree."
    )


# ---- score distillation ----------------------------------------------------------------------

def distil_image(scene, steps=150, guidance=5.0, lr=0.1):
    """6. Score distillation of a single image."""
    model = scene.model
    context = model.embed([scene.prompt, ""])
    x0 = torch.zeros_like(scene.x0[:, :1]).requires_grad_()
    optimizer = torch.optim.Adam([x0], lr=lr)
    moments = [round(steps * i / 7) for i in range(8)]
    images = [look(scene, x0)]
    for step in range(steps):
        low, high = sds.time_range(step / steps)
        t = sds.draw_time(low, high, 1, x0.device)
        loss, _ = sds.distillation_loss(model.unet, x0, t, context, None, guidance=guidance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in moments:
            images.append(look(scene, x0))
    names = [f"after step {moment}" for moment in sorted(set(moments))]
    return sheet([(torch.cat(images), names)]), (
        "Here nothing is sampled: the latents are parameters that learn, and the loss is "
        "½ ‖x0 - sg(predicted x0)‖², at another noise in each step (distillation_loss). This is "
        "all there is to score distillation; in 3D the latents come from a rendered field, and "
        "the gradient goes on into it."
    )


def new_distillation(scene, **changes):
    """An `sds.Distillation` of the scene's prompt, with a new field: a soft grey ball.

    changes: of the settings that `distill.py` has for this model.
    """
    _, settings = presets.settings_for("distill", scene.model.config)
    s = replace(sds.DistillSettings(scene.prompt), **{**settings, **changes})
    distillation = sds.Distillation(s, scene.model, scene.context)
    visit(distillation)
    return distillation


def visit(distillation):
    """Let the occupancy grid look at every cell of the field."""
    density, step = distillation.nerf.density, distillation.s.step_size
    distillation.occupancy.update(density, step, everywhere=True)


@torch.no_grad()
def one_ray(scene):
    """7. Rays, occupancy, and the weights along one ray."""
    distillation = new_distillation(scene)
    nerf, occupancy = distillation.nerf, distillation.occupancy
    step = distillation.s.step_size
    device = scene.x0.device
    c2w = cameras.orbit(0.0, 0.0, 3.0).to(device)  # on the x axis, 3 from the origin
    origins, directions = cameras.rays(c2w, 40.0, 1)  # of one pixel: one ray
    samples = render.sample_rays(
        occupancy,
        origins.view(1, 3),
        directions.view(1, 3),
        step=step,
        budget=128,
        jitter=torch.full((1,), 0.5, device=device),
        phase=torch.zeros((), device=device),
    )
    density, albedo = nerf(samples.position)
    weights, _, opacity, _ = render.composite(samples, density, albedo, 1)
    used = samples.width > 0
    x = samples.position[used, 0].cpu()
    lines = density[used].cpu(), weights[used].cpu()
    cells = occupancy.occupied(step).view(3 * [occupancy.size])
    return plot_ray(slice_of(nerf, cells), x, *lines), (
        "A ray from the left goes through a new field, a soft ball (grey); only where the "
        f"occupancy grid knows of matter (blue) does it ask for samples: {len(x)} dots. A sample "
        "weighs what light is left before it, times the share that it holds back (composite): "
        f"the weights are largest on the near side, and their sum is the opacity, "
        f"{opacity.item():.3f}."
    )


def slice_of(nerf, cells):
    """The box cut at y = 0, near x on the left: occupied cells and density, [3, 384, 512]."""
    place = (torch.arange(128, device=cells.device) + 0.5) / 64 - 1
    z, x = torch.meshgrid(-place[16:112], -place, indexing="ij")  # [96, 128]
    points = torch.stack([x, torch.zeros_like(x), z], -1)
    density = nerf.density(points.view(-1, 3)).view(1, 1, 96, 128).cpu()
    occupied = cells[:, len(cells) // 2].float().cpu()  # [x, z]
    occupied = occupied.flip(0, 1).T[None, None]
    skipped = len(cells) // 8
    occupied = occupied[:, :, skipped:-skipped]
    cut = torch.ones(1, 3, 384, 512)
    cut = painted(cut, 0.25 * occupied, BLUE)
    return painted(cut, 0.9 * density / density.max(), GREY)[0]


def plot_ray(cut, x, density, weights):
    """The ray in the picture `cut`, and below it what stands along it: [3, 544, 512]."""
    picture = Image.new("RGB", (512, 544), "white")
    picture.paste(to_pil(cut))
    draw = ImageDraw.Draw(picture)
    across = ((1 - x) * 256).tolist()
    draw.line([(0, 192), (512, 192)], fill="black")
    for place in across:
        draw.ellipse([place - 2, 190, place + 2, 194], fill="black")

    light = 1 - weights.cumsum(0) + weights
    for values, colour in ((density / density.max(), GREY), (light, BLUE)):
        heights = (540 - 130 * values).tolist()
        draw.line(list(zip(across, heights)), fill=rgb(colour), width=2)
    for place, height in zip(across, (540 - 130 * weights / weights.max()).tolist()):
        draw.line([(place, 540), (place, height)], fill=rgb(ORANGE), width=3)
    labels = (("density", GREY), ("light that is left", BLUE), ("weights", ORANGE))
    for i, (label, colour) in enumerate(labels):
        draw.text((6, 396 + 16 * i), label, fill=rgb(colour), font_size=12)
    return to_tensor(picture)


def rgb(colour):
    """A colour as Pillow has it."""
    return tuple(round(255 * part) for part in colour)


@torch.no_grad()
def belief(scene, t=700, guidance=5.0):
    """8. A field's pictures, the noise, and what the model makes of them."""
    distillation = new_distillation(scene)
    draws = distillation.draw()
    samples = distillation.find_samples(draws)
    images, _, _ = distillation.render_images(draws, samples)  # [1, V, 3, H, W] in [-1, 1]
    x0 = distillation.encode(images)
    t = torch.tensor([t], device=x0.device)
    added = torch.randn_like(x0)
    x_t = diffusion.q_sample(x0, t, added)
    camera = cameras.extrinsics(draws.c2w)
    _, x0_hat = sds.distillation_loss(
        scene.model.unet, x0, t, scene.context, camera, guidance=guidance, noise=added
    )
    V = x0.shape[1]
    picture = sheet([
        (images[0].cpu() / 2 + 0.5, ["rendered"] * V),
        (look(scene, x_t), [f"x_t, t = {t.item()}"] * V),
        (look(scene, x0_hat), ["predicted x0"] * V),
    ])
    return picture, (
        "A step of the 3D loop renders the field from four random sides, adds noise, and asks the "
        "network what should be there. Already for a ball it answers with one thing from four "
        "sides; the field takes a small step from the upper row towards the lower one."
    )


def distil_field(scene, steps=40, lr_grid=0.05, lr=0.01):
    """9. Forty steps of the whole loop."""
    distillation = new_distillation(scene, lr_grid=lr_grid, lr=lr)
    moments = [0, steps // 4, steps // 2, steps]
    rows = []
    for step in range(steps + 1):
        if step % 8 == 0:
            visit(distillation)
        if step in moments:
            names = [f"step {step}, {side}" for side in SIDES]
            rows.append((look_at_field(distillation), names))
        if step < steps:
            distillation.anneal(step / steps)
            distillation.step()
    return sheet(rows), (
        "The same again and again, from other sides and with less and less noise: colours come "
        "first, then the outline, and every side becomes another one. distill.py takes "
        f"{distillation.s.steps} steps with smaller learning rates, and there are eyes and a crown."
    )


def look_at_field(distillation):
    """The field from four sides: [4, 3, H, W] in [0, 1]."""
    s, model = distillation.s, distillation.model
    azimuths = torch.tensor(SAMPLED.azimuth)
    c2w = cameras.orbit(SAMPLED.elevation, azimuths, 2.5).to(model.device)
    pictures = render.render_views(
        distillation.nerf,
        distillation.occupancy,
        c2w,
        40.0,
        model.config.size,
        background=0.8,
        step=s.step_size,
    )
    return pictures.rgb.cpu()


# ---- the page --------------------------------------------------------------------------------

STEPS = (
    noise, prediction, sample, sample_without_cameras, attention, distil_image, one_ray, belief,
    distil_field,
)
STATUS = (
    "Every step is a function of mvd/tour.py, with its code below the picture: call it from "
    "Python, change it, look again."
)


def heading(step):
    """The first line of a step's docstring, without the full stop: "3. A sample, step by step"."""
    return inspect.getdoc(step).splitlines()[0].rstrip(".")


def section(step, picture, words):
    """HTML: a step's heading, its picture (path of a PNG file), what it shows, and its code."""
    title = html.escape(heading(step))
    source = page.data_uri(picture.read_bytes(), "png")
    code = html.escape(inspect.getsource(step))
    return (
        f'<h2>{title}</h2>\n<img src="{source}" alt="{title}">\n<p>{html.escape(words)}</p>\n'
        f'<details><summary>The code</summary><pre style="overflow: auto">{code}</pre></details>'
    )


def main(argv=None):
    """The command: take the steps, and write the page after each. Raises UserError."""
    s = cli.parse(TourSettings, argv, __doc__)
    scene = set_scene(device=choose_device(s.device))
    out = run.open_run(s.out, asdict(s), resume=False, default="runs/tour")
    steps = [STEPS[s.step - 1]] if s.step else STEPS
    title = f"A tour of MVDream: {scene.prompt}"
    sections = []
    with run.starting(out):
        bar = tqdm(steps, unit="step")
        for step in bar:
            bar.set_description(heading(step))
            begin = time.time()
            torch.manual_seed(s.seed)
            picture, words = step(scene)
            number = STEPS.index(step) + 1
            file = out / "progress" / f"{number}-{step.__name__}.png"
            save_png(file, picture)
            sections.append(section(step, file, words))
            live = len(sections) < len(steps)
            page.fill_page(out, title, STATUS, asdict(s), sections, live=live)
            run.log(out / "log.jsonl", step=number, seconds=time.time() - begin)
    print(f"open {out / 'index.html'}")


if __name__ == "__main__":
    cli.main(main)
