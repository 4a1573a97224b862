"""Cameras on an orbit, the rays through their pixels, and the extrinsics that the UNet is given.

World                              Camera (as in OpenGL)

      z  up                          y  up
      |                              |
      |       azimuth 90             |
      +----- y                       +----- x  right
     /                              /
    x  front, azimuth 0            z  backward: the camera looks along -z

At azimuth 0 a camera stands on +x and sees the front of the object. The azimuth grows
counter-clockwise as seen from above; the elevation is the angle above the xy-plane. A matrix
`c2w` [4, 4] turns camera coordinates into world coordinates: its columns are the camera's right,
up and backward axes and its position. Function arguments are in degrees.

Source: MVDream §3.1. The released sampler counts azimuths from -y: its azimuth is ours + 90.
"""
import torch
import torch.nn.functional as F

# The views of a set, MVDream's four. Everything takes the number as an argument; this is the
# default.
VIEWS = 4


def orbit(elevation_deg, azimuth_deg, distance=1.0):
    """Cameras on a sphere around the origin, looking at it: camera-to-world [..., 4, 4], float32.

    The three arguments are numbers or tensors that broadcast to [...]. At an elevation of exactly
    ±90 degrees the up direction is that of the azimuth.
    """
    elevation = torch.as_tensor(elevation_deg, dtype=torch.float32)
    azimuth = torch.as_tensor(azimuth_deg, dtype=torch.float32)
    distance = torch.as_tensor(distance, dtype=torch.float32)
    elevation, azimuth, distance = torch.broadcast_tensors(elevation, azimuth, distance)
    elevation = torch.deg2rad(elevation)
    azimuth = torch.deg2rad(azimuth)

    x = elevation.cos() * azimuth.cos()
    y = elevation.cos() * azimuth.sin()
    z = elevation.sin()
    backward = torch.stack([x, y, z], -1)
    flat = torch.zeros_like(azimuth)
    right = torch.stack([-azimuth.sin(), azimuth.cos(), flat], -1)
    up = torch.linalg.cross(backward, right)
    position = backward * distance[..., None]

    c2w = torch.stack([right, up, backward, position], -1)  # [..., 3, 4]
    last_row = torch.eye(4, device=c2w.device)[3:]
    last_row = last_row.expand(c2w.shape[:-2] + (1, 4))
    return torch.cat([c2w, last_row], -2)


def extrinsics(c2w):
    """The 16 numbers per view that the camera MLP is given: c2w [..., 4, 4] -> [..., 16].

    They are the matrix row by row, with the position divided by its length: the network knows
    from which side the object is seen, not from how far.
    """
    axes = c2w[..., :3]  # [..., 4, 3]
    position = c2w[..., :3, 3:]  # [..., 3, 1]
    last = c2w[..., 3:, 3:]
    distance = torch.linalg.vector_norm(position, dim=-2, keepdim=True)
    column = torch.cat([position / distance, last], -2)  # [..., 4, 1]
    return torch.cat([axes, column], -1).flatten(-2)


def rays(c2w, fov_deg, size):
    """One ray through the centre of each pixel of a square picture.

    c2w [..., 4, 4]; fov_deg, a number or [...]: the vertical field of view, which is the horizontal
    one too; size: pixels per side. Returns origins and unit directions, each [..., size, size, 3],
    the top row first.
    """
    fov = torch.as_tensor(fov_deg, dtype=torch.float32, device=c2w.device)
    half = torch.tan(torch.deg2rad(fov) / 2)  # [...]

    # Points of the plane z = -1, of a camera that sees from -1 to 1 along each side.
    centre = torch.arange(size, device=c2w.device) + 0.5
    centre = centre / size * 2 - 1  # [size]
    y, x = torch.meshgrid(-centre, centre, indexing="ij")
    plane = torch.stack([x, y, -torch.ones_like(x)], -1)  # [size, size, 3]

    scale = torch.stack([half, half, torch.ones_like(half)], -1)
    plane = plane * scale[..., None, None, :]
    plane = plane.expand(c2w.shape[:-2] + (size, size, 3))
    rotation = c2w[..., :3, :3]
    directions = torch.einsum("...ij,...hwj->...hwi", rotation, plane)
    directions = F.normalize(directions, dim=-1)
    origins = c2w[..., None, None, :3, 3].expand_as(directions)
    return origins, directions
