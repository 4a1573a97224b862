"""The whole 3D loop with a denoiser that is always right: distillation must rebuild its object.

In place of the UNet stands a function that knows the object and the cameras. It returns exactly
the noise that separates x_t from the object's own pictures. The result is compared with renders
of the object, from sides chosen here.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import distill
from mvd import cameras, diffusion, render, sds
from mvd.presets import ModelConfig
from mvd.toyworld import shapes, tracer

SIZE = 32
# Behind the pictures.
GREY = 0.8
# So much larger does the field's box show things than the world.
SCALE = 0.9 / 0.5


def pictures_of(solids, palette, c2w, fov_deg, background):
    """Renders of the object in the field's box: c2w [V, 4, 4], fov_deg [1] -> [V, 3, H, W]."""
    c2w = c2w.clone()
    c2w[:, :3, 3] /= SCALE
    buffers = tracer.trace(solids, c2w[None], fov_deg, SIZE)
    rgba = tracer.paint(buffers, palette)[0]
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    return colour * alpha + background * (1 - alpha)


class PerfectModel:
    """A model of one object. Its latents are the pixels themselves, sixteen per latent pixel.

    From `watch` on, it knows the cameras and the background of the step under way.
    """

    def __init__(self):
        self.config = ModelConfig(size=SIZE, preset="tiny")
        self.device = torch.device("cpu")
        self.solids = shapes.build("bulldog", "crown", [7])
        self.palette = shapes.palette(["red"])
        self.c2w = self.fov = self.background = None
        self.vae = SimpleNamespace(light=None, encoder=None)

    def watch(self, monkeypatch):
        """Look over the shoulder of whoever draws cameras and renders the field."""
        draw_cameras, shade_samples = sds.draw_cameras, render.shade_samples

        def remember_cameras(*args, **kwargs):
            self.c2w, self.fov = draw_cameras(*args, **kwargs)
            return self.c2w, self.fov

        def remember_background(nerf, samples, origins, directions, background, **more):
            if torch.is_tensor(background):  # else it is no step, but the results
                self.background = background[0, 0]
            return shade_samples(nerf, samples, origins, directions, background, **more)

        monkeypatch.setattr(sds, "draw_cameras", remember_cameras)
        monkeypatch.setattr(render, "shade_samples", remember_background)

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def encode(self, images, sample=False, encoder=None):
        return 0.5 * F.pixel_unshuffle(images, 4)

    def decode(self, latents):
        return F.pixel_shuffle(2 * latents, 4)

    def unet(self, x_t, t, context, camera):
        """The noise in x_t, for both halves of guidance."""
        truth = pictures_of(self.solids, self.palette, self.c2w[0], self.fov, self.background)
        x0 = self.encode(2 * truth[None] - 1)
        abar = diffusion.alpha_bar(t, x_t)
        return (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()


def test_a_perfect_denoiser_rebuilds_its_object(monkeypatch, tmp_path):
    model = PerfectModel()
    model.watch(monkeypatch)
    (tmp_path / "progress").mkdir()
    s = sds.DistillSettings(
        prompt="a red bulldog wearing a crown",
        steps=80,
        coarse_size=SIZE,
        coarse_sets=1,
        fine_size=SIZE,
        fine_sets=1,
        coarse_budget=1 << 14,
        fine_budget=1 << 14,
        step_size=0.04,
        random_background=1.0,
        grey_background=True,
        occupancy_cells=32,
        levels=6,
        log2_entries=14,
        coarsest=8,
        finest=64,
        lr_grid=0.05,
        lr=0.01,
        occupancy_every=8,
    )
    context = model.embed([s.prompt, s.negative])
    distillation, done, _ = distill.distill(s, context, model, tmp_path)
    assert done == 80
    azimuths = [30.0, 120.0, 210.0, 300.0]
    seen, camera = distill.view_from(distillation, azimuths, SIZE)
    c2w = cameras.orbit(camera["elevation"], camera["azimuth"], camera["distance"])
    fov = torch.tensor([camera["fov"]])
    truth = pictures_of(model.solids, model.palette, c2w, fov, GREY)
    from_behind = truth.roll(2, 0)
    error = (seen.rgb - truth).square().mean((1, 2, 3))
    turned = (seen.rgb - from_behind).square().mean((1, 2, 3))
    psnr = -10 * torch.log10(error)
    assert psnr.min() > 20, f"the PSNR of the views is {psnr.tolist()}"
    assert (error < 0.5 * turned).all(), "a view looks like the object's other side"
    top, left = seen.opacity[..., 0, :], seen.opacity[..., 0]
    assert top.mean() < 0.02 and left.mean() < 0.02, "there is haze round the object"
