"""Cameras against the released ones, and rays against a pinhole written in numpy."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agree import agree
from mvd.cameras import extrinsics, orbit, rays

REFERENCE = load_file(Path(__file__).parent / "data" / "cameras.safetensors")


@pytest.mark.exercise(6)
def test_orbit_agrees_with_the_released_cameras():
    elevation, azimuth = REFERENCE["elevation_azimuth_deg"].unbind(1)
    # The released azimuth is ours + 90 degrees.
    c2w = orbit(elevation, azimuth - 90)
    hint = "Are the columns right, up, backward, position, and the last row 0 0 0 1?"
    agree(c2w, REFERENCE["blender_c2w"], "c2w of the released cameras", hint, atol=1e-6)


@pytest.mark.exercise(7)
def test_what_the_released_sampler_feeds_to_the_unet():
    # It starts at its 90, our 0.
    numbers = extrinsics(orbit(15, torch.tensor([0, 90, 180, 270])))
    hint = "Are they the matrix row by row?"
    agree(numbers, REFERENCE["get_camera_4_elev15_az90"], "the 16 numbers", hint, atol=1e-6)


@pytest.mark.exercise(7)
def test_extrinsics_normalise_the_translation_alone():
    numbers = extrinsics(REFERENCE["normalize_in"])
    hint = "Is the position, and nothing else, divided by its length?"
    agree(numbers, REFERENCE["normalize_out"], "the 16 numbers of any distance", hint, atol=1e-6)


@pytest.mark.exercise(6)
def test_conventions():
    agree(orbit(0, 0, 2.5)[:3, 3], [2.5, 0, 0], "the position at azimuth 0, on +x")
    agree(orbit(0, 90, 2.5)[:3, 3], [0, 2.5, 0], "the position at azimuth 90, on +y")
    agree(orbit(90, 0, 2.5)[:3, 3], [0, 0, 2.5], "the position at elevation 90, on +z")

    distance = torch.tensor([1.0, 2.0, 3.0])
    elevation = torch.tensor([-40.0, 0.0, 75.0])
    azimuth = torch.tensor([10.0, 200.0, 321.0])
    c2w = orbit(elevation, azimuth, distance)
    rotation = c2w[:, :3, :3]
    position = c2w[:, :3, 3]
    right, up, backward = rotation.unbind(-1)
    hint = "Are all three of length 1 and at right angles?"
    agree(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), "axes · axesᵀ", hint)
    hint = "-1 means that they are left-handed: is up backward × right, not right × backward?"
    agree(torch.linalg.det(rotation), torch.ones(3), "the determinant of the axes", hint)
    hint = "A camera looks along -z, so backward points from the origin to the camera."
    agree(backward * distance[:, None], position, "backward, times the distance", hint)
    assert (up[:, 2] > 0).all(), "up points down"
    agree(right[:, 2], torch.zeros(3), "the height of right, which is level")


PINHOLES = [(0, 0, 1, 90, 2), (25, 130, 2.7, 33, 5)]


@pytest.mark.exercise(6)
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
    expected = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            x = (column + 0.5) / size * 2 - 1
            y = 1 - (row + 0.5) / size * 2
            ray = -away + half * (x * right + y * up)
            ray = ray / np.linalg.norm(ray)
            expected[row, column] = ray
    hint = "[row, column, axis]: row 0 is the top, x grows to the right, rays hit pixel centres."
    agree(directions, expected, "the directions of the rays", hint)
    hint = "All rays of a camera start at its position."
    agree(origins, np.broadcast_to(eye, expected.shape), "the origins of the rays", hint)


@pytest.mark.exercise(6)
def test_rays_of_many_cameras_at_once():
    azimuth = torch.arange(6.0).view(2, 3) * 60
    c2w = orbit(10, azimuth, 1.5)
    fov = torch.tensor([[20.0, 40, 60], [30, 50, 70]])
    origins, directions = rays(c2w, fov, 4)
    for b in range(2):
        for v in range(3):
            alone = rays(c2w[b, v], fov[b, v], 4)
            words = f"of camera [{b}, {v}] among six, compared with it alone"
            agree(origins[b, v], alone[0], f"the origins {words}", atol=1e-6)
            hint = "Each camera has its own field of view."
            agree(directions[b, v], alone[1], f"the directions {words}", hint, atol=1e-6)
