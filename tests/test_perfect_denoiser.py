"""The whole 3D loop with a denoiser that is always right: distillation must then rebuild the object that it has in mind.

In place of the UNet stands a function that knows the thing and the cameras, and returns exactly the noise that separates x_t from the
thing's own pictures. What comes out is compared with renders of the thing, from sides chosen here.
"""
import types

import torch
import torch.nn.functional as F

import distill
from mvd import cameras, diffusion, sds
from mvd.toyworld import tracer as sdf, world as toyworld

GREY, BOX = 0.8, 0.9 / 0.5                       # behind the pictures; how much larger the field's box shows things than the world


def pictures_of(shapes, palette, c2w, fov_deg, size, background):
    """Renders of the thing in the field's box: c2w [V, 4, 4], fov_deg a number -> [V, 3, H, W]."""
    c2w = torch.cat([c2w[..., :3], torch.cat([c2w[..., :3, 3:] / BOX, c2w[..., 3:, 3:]], -2)], -1)
    rgba = sdf.paint(sdf.render(shapes, c2w[None], fov_deg, size), palette)[0]
    return rgba[:, :3] * rgba[:, 3:] + background * (1 - rgba[:, 3:])


class World:
    """A model of one thing. Latents are the pixels themselves, sixteen to a latent pixel."""

    def __init__(self, monkeypatch):
        self.config = types.SimpleNamespace(size=32)
        self.device = torch.device("cpu")
        self.shapes, self.palette = toyworld.build("bulldog", "crown", [7]), toyworld.palette(["red"])
        self.unet = Denoiser(self)
        draw_cameras, render = sds.draw_cameras, distill.render.render

        def remember_cameras(*args, **kwargs):
            self.c2w, self.fov = draw_cameras(*args, **kwargs)
            return self.c2w, self.fov

        def remember_background(nerf, occupancy, origins, directions, background, *args, **kwargs):
            self.background = background[0, 0]
            return render(nerf, occupancy, origins, directions, background, *args, **kwargs)
        monkeypatch.setattr(sds, "draw_cameras", remember_cameras)
        monkeypatch.setattr(distill.render, "render", remember_background)

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def encode(self, images, sample=False):
        return 0.5 * F.pixel_unshuffle(images, 4)


class Denoiser:
    """In place of the UNet."""
    conv_out = torch.nn.Conv2d(1, 1, 1)                                          # its weight says the number format

    def __init__(self, world):
        self.world = world

    def __call__(self, x, t, context, camera):
        w = self.world
        truth = pictures_of(w.shapes, w.palette, w.c2w[0], w.fov, w.config.size, w.background)
        z = w.encode(2 * truth[None] - 1)
        abar = diffusion.alphas_cumprod()[t].view(-1, 1, 1, 1, 1)
        return (x - abar.sqrt() * z) / (1 - abar).sqrt()


def test_a_perfect_denoiser_rebuilds_its_object(monkeypatch, tmp_path):
    model = World(monkeypatch)
    (tmp_path / "progress").mkdir()
    s = distill.Settings(prompt="a red bulldog wearing a crown", steps=80, coarse_size=32, coarse_sets=1, fine_size=32, fine_sets=1,
                         coarse_budget=1 << 14, fine_budget=1 << 14, step_size=0.04, random_background=1.0, grey_background=True,
                         occupancy_cells=32, levels=6, log2_entries=14,
                         coarsest=8, finest=64, lr_grid=0.05, lr=0.01, occupancy_every=8)
    nerf, occupancy, _ = distill.distill(s, (s.prompt, s.negative), model, tmp_path)
    seen, where = distill.look(s, nerf, occupancy, [30.0, 120.0, 210.0, 300.0], 32)
    c2w = cameras.orbit(where["elevation"], where["azimuth"], where["distance"])
    truth = pictures_of(model.shapes, model.palette, c2w, torch.tensor([where["fov"]]), 32, GREY)
    error = (seen.rgb - truth).square().mean((1, 2, 3))
    turned = (seen.rgb - truth.roll(2, 0)).square().mean((1, 2, 3))              # the same thing seen from behind
    assert (-10 * torch.log10(error)).min() > 20                                 # PSNR of every view
    assert (error < 0.5 * turned).all()
    assert seen.opacity[..., 0, :].mean() < 0.02 and seen.opacity[..., 0].mean() < 0.02
