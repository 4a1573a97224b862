"""What the things of the toy world wear, carry and stand on, each in its own fixed colours.

An accessory is a function of the hat's seat (x, z, radius) and of the corners (low, high), [N, 3] each, of the box
round the bare subject; it returns parts. It fits every subject, and shows from every side.
"""
import torch

from .animals import SLOT
from .solids import ball, box, cone, dome, limb


def crown(hat, low, high):
    x, z, r = hat
    gold = SLOT["gold"]
    return [
        cone((x, 0, z + 0.22 * r), 0.95 * r, 1.05 * r, 0.42 * r, gold, round=0.1 * r),
        cone((x, 0, z + 0.95 * r), 0.48 * r, 0.04 * r, 0.55 * r, gold, round=0.02 * r, spokes=(6, 0.84 * r)),
        ball((x, 0, z + 1.55 * r), 0.15 * r, gold, spokes=(6, 0.86 * r)),
        ball((x, 0, z + 0.25 * r), 0.19 * r, SLOT["red"], spokes=(6, r)),
    ]


def party_hat(hat, low, high):
    x, z, r = hat
    return [
        cone((x, 0, z + 1.1 * r), r, 0.06 * r, 1.3 * r, SLOT["magenta"], round=0.03 * r),
        cone((x, 0, z + 0.55 * r), 0.86 * r, 0.71 * r, 0.20 * r, SLOT["cyan"], round=0.02 * r),
        cone((x, 0, z + 1.35 * r), 0.56 * r, 0.41 * r, 0.20 * r, SLOT["cyan"], round=0.02 * r),
        ball((x, 0, z + 2.45 * r), 0.32 * r, SLOT["lamp"]),
    ]


def top_hat(hat, low, high):
    x, z, r = hat
    return [
        cone((x, 0, z + 0.05 * r), 1.5 * r, 1.5 * r, 0.12 * r, SLOT["black"], round=0.1 * r),
        cone((x, 0, z + 0.85 * r), 0.92 * r, 1.05 * r, 0.85 * r, SLOT["black"], round=0.05 * r),
        cone((x, 0, z + 0.35 * r), 0.97 * r, 1.00 * r, 0.22 * r, SLOT["red"], round=0.03 * r),
    ]


def wings(hat, low, high):
    size, x = (high - low).amax(1), low[:, 0] * 0.55 + high[:, 0] * 0.45
    y, z = 0.75 * high[:, 1], low[:, 2] * 0.35 + high[:, 2] * 0.65
    feathers = ((0.34, 0.40, 0.080, "white"), (0.42, 0.20, 0.075, "sky"),                  # out, up, radius
                (0.36, 0.03, 0.070, "white"), (0.24, -0.09, 0.065, "sky"))
    return [limb((x, y, z + 0.3 * up * size), (x - 0.75 * out * size, y + out * size, z + up * size), 0.07 * size,
                 r * size, SLOT[paint], mirror="y") for out, up, r, paint in feathers]


def umbrella(hat, low, high):
    size, x, top = (high - low).amax(1), (low[:, 0] + high[:, 0]) / 2, high[:, 2]
    r = 0.46 * size
    return [
        limb((x, 0, (low[:, 2] + top) / 2), (x, 0, top + 0.3 * size), 0.022 * size, 0.022 * size, SLOT["wood"]),
        dome((x, 0, top + 0.08 * size), (r, r, 0.26 * size), SLOT["violet"]),
        ball((x, 0, top + 0.07 * size), 0.035 * size, SLOT["white"], spokes=(12, 0.97 * r)),
        ball((x, 0, top + 0.35 * size), 0.045 * size, SLOT["gold"]),
    ]


def balloons(hat, low, high):
    size, x, top = (high - low).amax(1), (low[:, 0] * 0.6 + high[:, 0] * 0.4), high[:, 2]
    parts = []
    for dx, dy, dz, colour in ((0.06, -0.18, 0.24, "red"), (0.10, 0.18, 0.27, "blue"), (-0.12, 0.0, 0.38, "lamp")):
        bx, by, bz, string = x + dx * size, dy * size, top + dz * size, 0.012 * size
        parts += [
            limb((x, 0, top - 0.25 * size), (bx, by, bz - 0.16 * size), string, string, SLOT["white"]),
            ball((bx, by, bz), (0.145 * size, 0.145 * size, 0.175 * size), SLOT[colour]),
            cone((bx, by, bz - 0.185 * size), 0.04 * size, 0.01 * size, 0.025 * size, SLOT[colour], round=0.005 * size),
        ]
    return parts


def flag(hat, low, high):
    size, x, top = (high - low).amax(1), (low[:, 0] * 0.75 + high[:, 0] * 0.25), high[:, 2]
    bottom = low[:, 2] * 0.5 + high[:, 2] * 0.5
    return [
        limb((x, 0, bottom), (x, 0, top + 0.46 * size), 0.025 * size, 0.025 * size, SLOT["wood"]),
        ball((x, 0, top + 0.48 * size), 0.045 * size, SLOT["gold"]),
        box((x + 0.18 * size, 0.15 * size, top + 0.35 * size), (0.24 * size, 0.03 * size, 0.08 * size), SLOT["green"],
            round=0.015 * size, turn=(0, 0, 40)),
        box((x + 0.18 * size, 0.15 * size, top + 0.19 * size), (0.24 * size, 0.03 * size, 0.08 * size), SLOT["white"],
            round=0.015 * size, turn=(0, 0, 40)),
    ]


def footprint(low, high):
    """Middle x, half length, half width of what stands on the ground, and the height of the ground."""
    return (low[:, 0] + high[:, 0]) / 2, (high[:, 0] - low[:, 0]) / 2, high[:, 1], low[:, 2]


def pedestal(hat, low, high):
    x, length, width, ground = footprint(low, high)
    size, r = (high - low).amax(1), torch.maximum(length, width) * 0.9
    stone = SLOT["stone"]
    return [
        cone((x, 0, ground - 0.05 * size), r, r, 0.05 * size, stone, round=0.02 * size),
        cone((x, 0, ground - 0.24 * size), 0.72 * r, 0.72 * r, 0.18 * size, stone, round=0.01 * size),
        cone((x, 0, ground - 0.24 * size), 0.05 * size, 0.05 * size, 0.16 * size, SLOT["grey"], round=0.01,
             spokes=(12, 0.72 * r)),
        cone((x, 0, ground - 0.45 * size), 1.0 * r, 0.9 * r, 0.06 * size, stone, round=0.02 * size),
    ]


def skateboard(hat, low, high):
    x, length, width, ground = footprint(low, high)
    size = (high - low).amax(1)
    r, broad, thick, cyan = 0.085 * size, 0.75 * width + 0.05 * size, 0.04 * size, SLOT["cyan"]
    parts = [box((x, 0, ground - 0.04 * size), (length, broad, thick), cyan, round=0.035 * size)]
    for side in (-1, 1):
        end, axle = x + side * (length + 0.07 * size), x + side * 0.65 * length
        parts += [
            box((end, 0, ground), (0.13 * size, broad, thick), cyan, round=0.035 * size, turn=(0, -25 * side, 0)),
            box((axle, 0, ground - 0.12 * size), (0.05 * size, 0.6 * width, 0.05 * size), SLOT["grey"],
                round=0.01 * size),
            cone((axle, 0.7 * width, ground - 0.08 * size - r), r, r, 0.05 * size, SLOT["magenta"], round=0.02 * size,
                 turn=(90, 0, 0), mirror="y"),
        ]
    return parts


def cloud(hat, low, high):
    x, length, width, ground = footprint(low, high)
    size = (high - low).amax(1)

    def puff(along, across, drop, radii, **how):
        centre = x + along * length, across * width, ground - drop * size
        return ball(centre, tuple(r * size for r in radii), SLOT["sky"], blend=0.03, **how)

    return [
        ball((x, 0, ground - 0.08 * size), (length + 0.10 * size, width + 0.12 * size, 0.12 * size), SLOT["sky"]),
        puff(0.55, 0.75, 0.07, (0.24, 0.22, 0.17), mirror="y"),
        puff(-0.45, 0.85, 0.09, (0.26, 0.22, 0.18), mirror="y"),
        puff(1, 0, 0.10, (0.20, 0.22, 0.14)),
        puff(-1, 0, 0.08, (0.22, 0.24, 0.16)),
    ]


ACCESSORIES = {                              # name -> (its parts, "wearing a crown", "with a crown on")
    "crown": (crown, "wearing a crown", "with a crown"),
    "party hat": (party_hat, "wearing a party hat", "with a party hat"),
    "top hat": (top_hat, "wearing a top hat", "with a top hat"),
    "wings": (wings, "with wings", "that has wings"),
    "umbrella": (umbrella, "under an umbrella", "with an umbrella"),
    "balloons": (balloons, "with balloons", "carrying balloons"),
    "flag": (flag, "with a flag", "carrying a flag"),
    "pedestal": (pedestal, "on a pedestal", "standing on a pedestal"),
    "skateboard": (skateboard, "on a skateboard", "riding a skateboard"),
    "cloud": (cloud, "on a cloud", "sitting on a cloud"),
}
