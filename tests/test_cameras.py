"""Cameras against the released ones, and rays against a pinhole written in numpy."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mvd.cameras import camera_numbers, orbit, rays

REFERENCE = load_file(Path(__file__).parent / "data" / "cameras.safetensors")


def test_orbit_agrees_with_the_released_cameras():
    elevation, azimuth = REFERENCE["elevation_azimuth_deg"].unbind(1)
    c2w = orbit(elevation, azimuth - 90)                            # the released azimuth is ours + 90 degrees
    assert torch.allclose(c2w, REFERENCE["blender_c2w"].float(), atol=1e-6)


def test_what_the_released_sampler_feeds_to_the_unet():
    numbers = camera_numbers(orbit(15, torch.tensor([0, 90, 180, 270])))        # it starts at its 90, our 0
    assert torch.allclose(numbers, REFERENCE["get_camera_4_elev15_az90"], atol=1e-6)


def test_numbers_normalise_the_translation_alone():
    numbers = camera_numbers(REFERENCE["normalize_in"])
    assert torch.allclose(numbers, REFERENCE["normalize_out"], atol=1e-6)


def test_conventions():
    assert torch.allclose(orbit(0, 0, 2.5)[:3, 3], torch.tensor([2.5, 0, 0]), atol=1e-6)        # azimuth 0: on +x
    assert torch.allclose(orbit(0, 90, 2.5)[:3, 3], torch.tensor([0, 2.5, 0]), atol=1e-6)       # 90: on +y
    c2w = orbit(torch.tensor([-40.0, 0.0, 75.0]), torch.tensor([10.0, 200.0, 321.0]), torch.tensor([1.0, 2.0, 3.0]))
    rotation, position = c2w[:, :3, :3], c2w[:, :3, 3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(3), atol=1e-6)
    assert torch.allclose(-rotation[:, :, 2] * torch.tensor([1.0, 2.0, 3.0])[:, None], -position, atol=1e-5)  # looks at 0
    assert (rotation[:, 2, 1] > 0).all() and torch.allclose(rotation[:, 2, 0], torch.zeros(3), atol=1e-6)     # up is up


@pytest.mark.parametrize("elevation, azimuth, distance, fov, size", [(0, 0, 1, 90, 2), (25, 130, 2.7, 33, 5)])
def test_rays_are_a_pinhole(elevation, azimuth, distance, fov, size):
    origins, directions = rays(orbit(elevation, azimuth, distance), fov, size)
    e, a, half = math.radians(elevation), math.radians(azimuth), math.tan(math.radians(fov) / 2)
    eye = distance * np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.cross([0, 0, 1], eye) / np.linalg.norm(np.cross([0, 0, 1], eye))
    up = np.cross(eye / distance, right)
    for row in range(size):
        for column in range(size):
            x, y = (column + 0.5) / size * 2 - 1, 1 - (row + 0.5) / size * 2
            ray = -eye / distance + half * (x * right + y * up)
            assert np.allclose(directions[row, column], ray / np.linalg.norm(ray), atol=1e-5)
            assert np.allclose(origins[row, column], eye, atol=1e-5)


def test_rays_of_many_cameras_at_once():
    c2w, fov = orbit(10, torch.arange(6.0).view(2, 3) * 60, 1.5), torch.tensor([[20.0, 40, 60], [30, 50, 70]])
    origins, directions = rays(c2w, fov, 4)
    assert origins.shape == directions.shape == (2, 3, 4, 4, 3)
    for b in range(2):
        for v in range(3):
            one = rays(c2w[b, v], fov[b, v], 4)
            assert torch.allclose(origins[b, v], one[0]) and torch.allclose(directions[b, v], one[1])
