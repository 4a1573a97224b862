"""Cameras on an orbit, the rays through their pixels, and the 16 numbers a view that the UNet sees (MVDream §3.1).

World: z up, front +x. Camera axes as in OpenGL: x right, y up, looking along -z. Azimuth 0 is a camera on +x that looks at
the front; it grows counter-clockwise seen from above, so 90 is a camera on +y. (The released sampler counts from -y: its
azimuth is ours + 90 degrees.)
"""
import torch


def orbit(elevation_deg, azimuth_deg, distance=1.0):
    """Cameras on a sphere round the origin, looking at it.

    elevation_deg, azimuth_deg, distance: numbers or tensors that broadcast to [...]. Returns camera-to-world [..., 4, 4].
    At an elevation of exactly +-90 degrees the up direction is undefined and the matrix is not a rotation.
    """
    elevation, azimuth, distance = torch.broadcast_tensors(
        *(torch.as_tensor(a, dtype=torch.float32) for a in (elevation_deg, azimuth_deg, distance)))
    elevation, azimuth = torch.deg2rad(elevation), torch.deg2rad(azimuth)
    backward = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], -1)
    right = torch.stack([-azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)], -1)
    up = torch.linalg.cross(backward, right)
    position = backward * distance[..., None]
    c2w = torch.stack([right, up, backward, position], -1)                       # [..., 3, 4]
    bottom = torch.eye(4, device=c2w.device)[3:].expand(*c2w.shape[:-2], 1, 4)
    return torch.cat([c2w, bottom], -2)


def camera_numbers(c2w):
    """What the camera MLP is given: the matrix [..., 4, 4], translation divided by its norm, row by row: [..., 16]."""
    rotation, position = c2w[..., :3], c2w[..., 3:]                              # [..., 4, 3] [..., 4, 1]
    norm = torch.linalg.vector_norm(position[..., :3, :], dim=-2, keepdim=True)
    position = torch.cat([position[..., :3, :] / norm, position[..., 3:, :]], -2)
    return torch.cat([rotation, position], -1).flatten(-2)


def rays(c2w, fov_deg, size):
    """One ray through the centre of each pixel of a square picture.

    c2w [..., 4, 4]; fov_deg [...] or a number, the vertical (and horizontal) field of view; size in pixels.
    Returns origins and unit directions, each [..., size, size, 3], the top row first.
    """
    half = torch.tan(torch.deg2rad(torch.as_tensor(fov_deg, dtype=torch.float32, device=c2w.device)) / 2)  # [...]
    centre = (torch.arange(size, device=c2w.device) + 0.5) / size * 2 - 1                                  # [size]
    y, x = torch.meshgrid(-centre, centre, indexing="ij")
    grid = torch.stack([x, y, -torch.ones_like(x)], -1)                                                    # [size, size, 3]
    scale = torch.stack([half, half, torch.ones_like(half)], -1)[..., None, None, :]
    directions = torch.einsum("...ij,...hwj->...hwi", c2w[..., :3, :3], (grid * scale).expand(*c2w.shape[:-2], size, size, 3))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    origins = c2w[..., None, None, :3, 3].expand_as(directions)
    return origins, directions
