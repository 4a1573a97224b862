"""Cameras against the released ones, and rays against a pinhole written in numpy."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mvd.cameras import extrinsics, orbit, rays

REFERENCE = load_file(Path(__file__).parent / "data" / "cameras.safetensors")


def close(found, expected, atol=1e-6):
    return torch.allclose(found, torch.as_tensor(expected), atol=atol)


def test_orbit_agrees_with_the_released_cameras():
    elevation, azimuth = REFERENCE["elevation_azimuth_deg"].unbind(1)
    # The released azimuth is ours + 90 degrees.
    c2w = orbit(elevation, azimuth - 90)
    assert close(c2w, REFERENCE["blender_c2w"].float())


def test_what_the_released_sampler_feeds_to_the_unet():
    # It starts at its 90, our 0.
    numbers = extrinsics(orbit(15, torch.tensor([0, 90, 180, 270])))
    assert close(numbers, REFERENCE["get_camera_4_elev15_az90"])


def test_extrinsics_normalise_the_translation_alone():
    numbers = extrinsics(REFERENCE["normalize_in"])
    assert close(numbers, REFERENCE["normalize_out"])


def test_conventions():
    assert close(orbit(0, 0, 2.5)[:3, 3], [2.5, 0, 0]), "azimuth 0 is not on +x"
    assert close(orbit(0, 90, 2.5)[:3, 3], [0, 2.5, 0]), "azimuth 90 is not on +y"

    distance = torch.tensor([1.0, 2.0, 3.0])
    elevation = torch.tensor([-40.0, 0.0, 75.0])
    azimuth = torch.tensor([10.0, 200.0, 321.0])
    c2w = orbit(elevation, azimuth, distance)
    rotation = c2w[:, :3, :3]
    position = c2w[:, :3, 3]
    identity = torch.eye(3).expand(3, 3, 3)
    assert close(rotation @ rotation.mT, identity), "the axes are not orthonormal"
    assert close(torch.linalg.det(rotation), torch.ones(3)), "the axes are left-handed"
    forward = -rotation[:, :, 2]
    towards_origin = -position
    assert close(forward * distance[:, None], towards_origin, atol=1e-5), "does not look at 0"
    assert (rotation[:, 2, 1] > 0).all(), "up points down"
    assert close(rotation[:, 2, 0], torch.zeros(3)), "right is not level"


PINHOLES = [(0, 0, 1, 90, 2), (25, 130, 2.7, 33, 5)]


@pytest.mark.parametrize("elevation, azimuth, distance, fov, size", PINHOLES)
def test_rays_are_a_pinhole(elevation, azimuth, distance, fov, size):
    origins, directions = rays(orbit(elevation, azimuth, distance), fov, size)
    e = math.radians(elevation)
    a = math.radians(azimuth)
    half = math.tan(math.radians(fov) / 2)
    on_plane = math.cos(e)
    away = np.array([on_plane * math.cos(a), on_plane * math.sin(a), math.sin(e)])
    eye = distance * away
    right = np.cross([0, 0, 1], eye)
    right = right / np.linalg.norm(right)
    up = np.cross(away, right)
    for row in range(size):
        for column in range(size):
            x = (column + 0.5) / size * 2 - 1
            y = 1 - (row + 0.5) / size * 2
            ray = -away + half * (x * right + y * up)
            ray = ray / np.linalg.norm(ray)
            assert np.allclose(directions[row, column], ray, atol=1e-5), (row, column)
            assert np.allclose(origins[row, column], eye, atol=1e-5), (row, column)


def test_rays_of_many_cameras_at_once():
    azimuth = torch.arange(6.0).view(2, 3) * 60
    c2w = orbit(10, azimuth, 1.5)
    fov = torch.tensor([[20.0, 40, 60], [30, 50, 70]])
    origins, directions = rays(c2w, fov, 4)
    assert origins.shape == directions.shape == (2, 3, 4, 4, 3)
    for b in range(2):
        for v in range(3):
            alone = rays(c2w[b, v], fov[b, v], 4)
            assert torch.allclose(origins[b, v], alone[0]), (b, v)
            assert torch.allclose(directions[b, v], alone[1]), (b, v)
