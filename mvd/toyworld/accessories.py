"""What the things of the toy world wear, carry and stand on, each in its own fixed colours.

The builder of an accessory is a function of hat (x, z, radius), where a hat sits on the subject,
and of low and high, [N, 3] each, the corners of the box around the bare subject. It returns a list
of parts that fits every subject and can be seen from every side.
To add one, write its builder and a row of ACCESSORIES. As with animals, a model knows its name only
after training on new data.
"""
from typing import Callable, NamedTuple

import torch

from .paints import (
    BLACK, BLUE, CYAN, GOLD, GREEN, GREY, LAMP, MAGENTA, RED, SKY, STONE, VIOLET, WHITE, WOOD,
)
from .solids import ball, box, cone, dome, limb


# ---- on the head -----------------------------------------------------------------------------

def crown(hat, low, high):
    x, z, r = hat
    return [
        # Band
        cone((x, 0, z + 0.22 * r), 0.95 * r, 1.05 * r, 0.42 * r, GOLD, round=0.1 * r),
        # Points, and balls on them
        cone(
            (x, 0, z + 0.95 * r), 0.48 * r, 0.04 * r, 0.55 * r,
            GOLD, round=0.02 * r, spokes=(6, 0.84 * r)),
        ball((x, 0, z + 1.55 * r), 0.15 * r, GOLD, spokes=(6, 0.86 * r)),
        # Rubies
        ball((x, 0, z + 0.25 * r), 0.19 * r, RED, spokes=(6, r)),
    ]


def party_hat(hat, low, high):
    x, z, r = hat
    return [
        cone((x, 0, z + 1.1 * r), r, 0.06 * r, 1.3 * r, MAGENTA, round=0.03 * r),
        # Stripes
        cone((x, 0, z + 0.55 * r), 0.86 * r, 0.71 * r, 0.20 * r, CYAN, round=0.02 * r),
        cone((x, 0, z + 1.35 * r), 0.56 * r, 0.41 * r, 0.20 * r, CYAN, round=0.02 * r),
        # Bobble
        ball((x, 0, z + 2.45 * r), 0.32 * r, LAMP),
    ]


def top_hat(hat, low, high):
    x, z, r = hat
    return [
        # Brim
        cone((x, 0, z + 0.05 * r), 1.5 * r, 1.5 * r, 0.12 * r, BLACK, round=0.1 * r),
        # Crown and ribbon
        cone((x, 0, z + 0.85 * r), 0.92 * r, 1.05 * r, 0.85 * r, BLACK, round=0.05 * r),
        cone((x, 0, z + 0.35 * r), 0.97 * r, 1.00 * r, 0.22 * r, RED, round=0.03 * r),
    ]


# ---- around the subject ----------------------------------------------------------------------

def largest_edge(low, high):
    """The largest edge [N] of the box around the subject: the unit of what follows."""
    return (high - low).amax(1)


def wings(hat, low, high):
    size = largest_edge(low, high)
    x = low[:, 0] * 0.55 + high[:, 0] * 0.45
    y = 0.75 * high[:, 1]
    z = low[:, 2] * 0.35 + high[:, 2] * 0.65
    # How far a feather goes out and up, its radius, its paint.
    feathers = [
        (0.34, 0.40, 0.080, WHITE),
        (0.42, 0.20, 0.075, SKY),
        (0.36, 0.03, 0.070, WHITE),
        (0.24, -0.09, 0.065, SKY),
    ]
    parts = []
    for out, up, radius, paint in feathers:
        start = (x, y, z + 0.3 * up * size)
        end = (x - 0.75 * out * size, y + out * size, z + up * size)
        parts.append(limb(start, end, 0.07 * size, radius * size, paint, mirror="y"))
    return parts


def umbrella(hat, low, high):
    size = largest_edge(low, high)
    x = (low[:, 0] + high[:, 0]) / 2
    top = high[:, 2]
    middle = (low[:, 2] + top) / 2
    r = 0.46 * size
    thin = 0.022 * size
    return [
        # Stick
        limb((x, 0, middle), (x, 0, top + 0.3 * size), thin, thin, WOOD),
        # Canopy, balls along its rim, tip
        dome((x, 0, top + 0.08 * size), (r, r, 0.26 * size), VIOLET),
        ball((x, 0, top + 0.07 * size), 0.035 * size, WHITE, spokes=(12, 0.97 * r)),
        ball((x, 0, top + 0.35 * size), 0.045 * size, GOLD),
    ]


def balloons(hat, low, high):
    size = largest_edge(low, high)
    x = low[:, 0] * 0.6 + high[:, 0] * 0.4
    top = high[:, 2]
    thin = 0.012 * size
    # Where the balloons float, as seen from the hand that holds them, and their paint.
    places = [
        (0.06, -0.18, 0.24, RED),
        (0.10, 0.18, 0.27, BLUE),
        (-0.12, 0.0, 0.38, LAMP),
    ]
    parts = []
    for dx, dy, dz, paint in places:
        bx = x + dx * size
        by = dy * size
        bz = top + dz * size
        hand = (x, 0, top - 0.25 * size)
        string = limb(hand, (bx, by, bz - 0.16 * size), thin, thin, WHITE)
        radii = (0.145 * size, 0.145 * size, 0.175 * size)
        balloon = ball((bx, by, bz), radii, paint)
        knot = cone(
            (bx, by, bz - 0.185 * size), 0.04 * size, 0.01 * size, 0.025 * size,
            paint, round=0.005 * size)
        parts += [string, balloon, knot]
    return parts


def flag(hat, low, high):
    size = largest_edge(low, high)
    x = low[:, 0] * 0.75 + high[:, 0] * 0.25
    top = high[:, 2]
    bottom = low[:, 2] * 0.5 + high[:, 2] * 0.5
    thin = 0.025 * size
    cloth_x = x + 0.18 * size
    cloth_y = 0.15 * size
    half = (0.24 * size, 0.03 * size, 0.08 * size)
    how = {"round": 0.015 * size, "turn": (0, 0, 40)}
    return [
        # Pole
        limb((x, 0, bottom), (x, 0, top + 0.46 * size), thin, thin, WOOD),
        ball((x, 0, top + 0.48 * size), 0.045 * size, GOLD),
        # Upper and lower half of the cloth
        box((cloth_x, cloth_y, top + 0.35 * size), half, GREEN, **how),
        box((cloth_x, cloth_y, top + 0.19 * size), half, WHITE, **how),
    ]


# ---- under the subject -----------------------------------------------------------------------

def footprint(low, high):
    """The subject's middle x, half length, half width, and the height of the ground, [N] each."""
    x = (low[:, 0] + high[:, 0]) / 2
    length = (high[:, 0] - low[:, 0]) / 2
    width = high[:, 1]
    ground = low[:, 2]
    return x, length, width, ground


def pedestal(hat, low, high):
    x, length, width, ground = footprint(low, high)
    size = largest_edge(low, high)
    r = torch.maximum(length, width) * 0.9
    return [
        # Top
        cone((x, 0, ground - 0.05 * size), r, r, 0.05 * size, STONE, round=0.02 * size),
        # Column and its ribs
        cone(
            (x, 0, ground - 0.24 * size), 0.72 * r, 0.72 * r, 0.18 * size,
            STONE, round=0.01 * size),
        cone(
            (x, 0, ground - 0.24 * size), 0.05 * size, 0.05 * size, 0.16 * size,
            GREY, round=0.01, spokes=(12, 0.72 * r)),
        # Base
        cone(
            (x, 0, ground - 0.45 * size), 1.0 * r, 0.9 * r, 0.06 * size,
            STONE, round=0.02 * size),
    ]


def skateboard(hat, low, high):
    x, length, width, ground = footprint(low, high)
    size = largest_edge(low, high)
    r = 0.085 * size
    broad = 0.75 * width + 0.05 * size
    thick = 0.04 * size
    edge = 0.035 * size
    deck = (x, 0, ground - 0.04 * size)
    parts = [box(deck, (length, broad, thick), CYAN, round=edge)]
    for side in (-1, 1):
        end_x = x + side * (length + 0.07 * size)
        end = box(
            (end_x, 0, ground), (0.13 * size, broad, thick),
            CYAN, round=edge, turn=(0, -25 * side, 0))
        axle_x = x + side * 0.65 * length
        axle = box(
            (axle_x, 0, ground - 0.12 * size), (0.05 * size, 0.6 * width, 0.05 * size),
            GREY, round=0.01 * size)
        wheel = cone(
            (axle_x, 0.7 * width, ground - 0.08 * size - r), r, r, 0.05 * size,
            MAGENTA, round=0.02 * size, turn=(90, 0, 0), mirror="y")
        parts += [end, axle, wheel]
    return parts


def cloud(hat, low, high):
    x, length, width, ground = footprint(low, high)
    size = largest_edge(low, high)

    def puff(along, across, drop, radii, **how):
        centre = (x + along * length, across * width, ground - drop * size)
        radii = tuple(r * size for r in radii)
        return ball(centre, radii, SKY, blend=0.03, **how)

    radii = (length + 0.10 * size, width + 0.12 * size, 0.12 * size)
    return [
        ball((x, 0, ground - 0.08 * size), radii, SKY),
        puff(0.55, 0.75, 0.07, (0.24, 0.22, 0.17), mirror="y"),
        puff(-0.45, 0.85, 0.09, (0.26, 0.22, 0.18), mirror="y"),
        puff(1, 0, 0.10, (0.20, 0.22, 0.14)),
        puff(-1, 0, 0.08, (0.22, 0.24, 0.16)),
    ]


# ---- all accessories -------------------------------------------------------------------------

class Accessory(NamedTuple):
    """A row of the table of accessories: its builder, and two phrases that captions use for it."""
    build: Callable
    phrase: str
    other_phrase: str


# A new row is best appended: words.split counts the rows.
ACCESSORIES = {
    "crown": Accessory(crown, "wearing a crown", "with a crown"),
    "party hat": Accessory(party_hat, "wearing a party hat", "with a party hat"),
    "top hat": Accessory(top_hat, "wearing a top hat", "with a top hat"),
    "wings": Accessory(wings, "with wings", "that has wings"),
    "umbrella": Accessory(umbrella, "under an umbrella", "with an umbrella"),
    "balloons": Accessory(balloons, "with balloons", "carrying balloons"),
    "flag": Accessory(flag, "with a flag", "carrying a flag"),
    "pedestal": Accessory(pedestal, "on a pedestal", "standing on a pedestal"),
    "skateboard": Accessory(skateboard, "on a skateboard", "riding a skateboard"),
    "cloud": Accessory(cloud, "on a cloud", "sitting on a cloud"),
}
