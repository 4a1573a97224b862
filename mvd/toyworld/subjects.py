"""Vehicles, furniture, food and buildings of the toy world, and the table of all subjects.

animals.py says what a builder is and how to add a subject.
"""
from typing import Callable, NamedTuple

from . import animals
from .paints import (
    BLACK, BLUE, BODY, BRICK, CREAM, CYAN, DARK, GLASS, GOLD, GREEN, GREY, LAMP,
    LIGHT, MANE, ORANGE, RED, STONE, WHITE, WOOD,
)
from .solids import ball, box, cone, dome, limb, ring, roof


def wheels(x, y, radius, back=None):
    """Four wheels with hubs, at +x and at -x (or at `back`)."""
    axles = [(x, "xy")] if back is None else [(x, "y"), (back, "y")]
    parts = []
    for at, mirror in axles:
        tyre = cone(
            (at, y, radius), radius, radius, 0.07,
            BLACK, round=0.03, turn=(90, 0, 0), mirror=mirror)
        hub = cone(
            (at, y + 0.045, radius), 0.55 * radius, 0.5 * radius, 0.045,
            GREY, turn=(90, 0, 0), mirror=mirror)
        parts += [tyre, hub]
    return parts


def car(u):
    long = u(0.92, 1.1)
    high = u(0.92, 1.12)
    cabin = u(0.36, 0.44)
    parts = [
        # Body
        box((0, 0, 0.30), (0.78 * long, 0.36, 0.15), BODY, round=0.09),
        # Windows, roof, door posts
        box(
            (-0.12, 0, 0.48 + 0.06 * high), (cabin * long, 0.30, 0.17 * high),
            GLASS, round=0.12),
        box(
            (-0.12, 0, 0.52 + 0.19 * high), (cabin * long - 0.08, 0.27, 0.05),
            BODY, round=0.05),
        box(
            (-0.14, 0.29, 0.50), (0.035, 0.03, 0.20 * high),
            BODY, round=0.02, mirror="y"),
        # Wheels
        *wheels(0.47 * long, 0.34, 0.19),
        # Headlights and grille
        ball((0.76 * long, 0.23, 0.36), (0.07, 0.09, 0.085), LAMP, mirror="y"),
        box((0.78 * long, 0, 0.33), (0.03, 0.11, 0.06), BLACK, round=0.02),
        # Bumpers
        box((0.79 * long, 0, 0.19), (0.05, 0.34, 0.045), GREY, round=0.04),
        box((-0.79 * long, 0, 0.19), (0.05, 0.34, 0.045), GREY, round=0.04),
        # Tail lights and number plate
        box(
            (-0.77 * long, 0.25, 0.36), (0.04, 0.075, 0.06),
            RED, round=0.02, mirror="y"),
        box((-0.79 * long, 0, 0.33), (0.015, 0.11, 0.05), WHITE, round=0.01),
        # Mirrors
        ball((0.24 * long, 0.41, 0.50), (0.04, 0.06, 0.045), BODY, mirror="y"),
    ]
    hat = (-0.12, 0.57 + 0.19 * high, 0.22)
    return parts, hat


def bus(u):
    long = u(0.92, 1.08)
    high = u(0.92, 1.1)
    top = 0.20 + 0.62 * high
    windows = []
    for x in (-0.66, -0.36, -0.06, 0.24):
        centre = (x * long, 0.325, top - 0.20)
        half = (0.115 * long, 0.02, 0.11)
        windows.append(box(centre, half, GLASS, round=0.02, mirror="y"))
    parts = [
        # Body and roof
        box(
            (0, 0, 0.20 + 0.31 * high), (0.86 * long, 0.33, 0.31 * high),
            BODY, round=0.07),
        box((0, 0, top), (0.80 * long, 0.28, 0.035), WHITE, round=0.03),
        # Windows and door
        *windows,
        box(
            (0.60 * long, 0.325, top - 0.29), (0.10 * long, 0.025, 0.21),
            GLASS, round=0.02, mirror="y"),
        # Stripe
        box(
            (0, 0.33, 0.38), (0.82 * long, 0.012, 0.025),
            BLACK, round=0.01, mirror="y"),
        # Windscreen
        box((0.855 * long, 0, top - 0.20), (0.025, 0.28, 0.13), GLASS, round=0.02),
        # Sign
        box((0.865 * long, 0, top - 0.02), (0.03, 0.20, 0.045), BLACK, round=0.02),
        box((0.885 * long, 0, top - 0.02), (0.02, 0.15, 0.02), LAMP, round=0.01),
        # Headlights
        ball((0.86 * long, 0.22, 0.36), (0.04, 0.075, 0.075), LAMP, mirror="y"),
        # Bumpers
        box((0.86 * long, 0, 0.22), (0.05, 0.32, 0.04), GREY, round=0.03),
        box((-0.86 * long, 0, 0.22), (0.05, 0.32, 0.04), GREY, round=0.03),
        # Tail lights
        box(
            (-0.855 * long, 0.25, 0.36), (0.02, 0.05, 0.09),
            RED, round=0.015, mirror="y"),
        # Rear window and engine
        box((-0.855 * long, 0, top - 0.17), (0.02, 0.15, 0.08), GLASS, round=0.02),
        box((-0.855 * long, 0, 0.36), (0.02, 0.16, 0.08), BLACK, round=0.02),
        # Wheels
        *wheels(0.52 * long, 0.30, 0.16),
    ]
    hat = (0.0, top + 0.03, 0.24)
    return parts, hat


def train(u):
    long = u(0.92, 1.1)
    fat = u(0.92, 1.08)
    chimney = u(0.9, 1.25)
    parts = [
        # Frame
        box((-0.05, 0, 0.26), (0.74 * long, 0.24, 0.06), BLACK, round=0.02),
        # Boiler, its door and bands
        cone(
            (0.16, 0, 0.54), 0.24 * fat, 0.24 * fat, 0.46 * long,
            BODY, round=0.03, turn=(0, 90, 0)),
        cone(
            (0.18 + 0.44 * long, 0, 0.54), 0.20 * fat, 0.18 * fat, 0.05,
            BLACK, turn=(0, 90, 0)),
        ball((0.24 + 0.44 * long, 0, 0.54), 0.055, GOLD),
        ring((0.30 * long, 0, 0.54), 0.24 * fat, 0.03, GOLD, turn=(0, 90, 0)),
        ring((-0.02 * long, 0, 0.54), 0.24 * fat, 0.03, GOLD, turn=(0, 90, 0)),
        # Chimney and steam dome
        cone((0.36 * long, 0, 0.84), 0.075, 0.085, 0.14 * chimney, BLACK),
        cone((0.36 * long, 0, 0.86 + 0.14 * chimney), 0.09, 0.15, 0.07, BLACK),
        ball((0.09 * long, 0, 0.78), (0.09, 0.09, 0.10), GOLD),
        # Cab and its windows
        box((-0.50 * long, 0, 0.62), (0.24, 0.27, 0.34), BODY, round=0.03),
        box((-0.50 * long, 0, 0.98), (0.30, 0.32, 0.04), DARK, round=0.03),
        box(
            (-0.50 * long, 0.265, 0.74), (0.13, 0.02, 0.12),
            GLASS, round=0.02, mirror="y"),
        box(
            (-0.27 * long, 0.17, 0.84), (0.03, 0.06, 0.07),
            GLASS, round=0.02, mirror="y"),
        # Rear door
        box((-0.75 * long, 0, 0.60), (0.02, 0.15, 0.28), BLACK, round=0.02),
        # Cow catcher and lamp
        roof((0.72 * long, 0, 0.04), 0.26, 0.17, 0.22, RED, turn=(0, 0, 90)),
        ball((0.18 + 0.42 * long, 0, 0.55 + 0.25 * fat), 0.09, LAMP),
        # Wheels, larger at the back
        *wheels(0.40 * long, 0.24, 0.16, back=0.02),
        cone(
            (-0.48 * long, 0.25, 0.24), 0.24, 0.24, 0.06,
            RED, turn=(90, 0, 0), mirror="y"),
        cone(
            (-0.48 * long, 0.28, 0.24), 0.10, 0.10, 0.06,
            GOLD, turn=(90, 0, 0), mirror="y"),
    ]
    hat = (-0.50 * long, 1.02, 0.22)
    return parts, hat


def airplane(u):
    fat = u(0.9, 1.15)
    span = u(0.9, 1.1)
    tail = u(0.9, 1.15)
    windows = []
    for x in (-0.26, -0.10, 0.06, 0.22):
        windows.append(ball((x, 0.175 * fat, 0.44), 0.04, GLASS, mirror="y"))
    parts = [
        # Fuselage
        ball((0.05, 0, 0.40), (0.80, 0.19 * fat, 0.20 * fat), BODY),
        limb((-0.30, 0, 0.42), (-0.86, 0, 0.50), 0.14, 0.07, BODY, blend=0.08),
        # Cockpit
        ball((0.52, 0, 0.52), (0.16, 0.13 * fat, 0.10 * fat), GLASS),
        # Wings
        box(
            (0.06, 0.46 * span, 0.36), (0.16, 0.46 * span, 0.035),
            BODY, round=0.03, turn=(4, 0, -16), mirror="y"),
        box(
            (-0.04, 0.84 * span, 0.40), (0.13, 0.09, 0.04),
            RED, round=0.03, turn=(4, 0, -16), mirror="y"),
        # Engines
        cone(
            (0.18, 0.44 * span, 0.27), 0.085, 0.10, 0.15,
            GREY, turn=(0, 90, 0), mirror="y"),
        cone(
            (0.33, 0.44 * span, 0.27), 0.07, 0.07, 0.02,
            BLACK, turn=(0, 90, 0), mirror="y"),
        # Fin and tailplane
        box(
            (-0.84, 0, 0.68), (0.13, 0.025, 0.20 * tail),
            BODY, round=0.02, turn=(0, -22, 0)),
        box(
            (-0.93, 0, 0.66 + 0.18 * tail), (0.11, 0.03, 0.06),
            RED, round=0.02, turn=(0, -22, 0)),
        box(
            (-0.84, 0.20, 0.52), (0.10, 0.20, 0.025),
            BODY, round=0.02, turn=(0, 0, -16), mirror="y"),
        # Windows and nose
        *windows,
        ball((0.83, 0, 0.39), (0.06, 0.07, 0.07), WHITE),
        # Wheels
        limb((0.50, 0, 0.30), (0.50, 0, 0.08), 0.03, 0.03, GREY),
        ball((0.50, 0, 0.07), (0.08, 0.05, 0.08), BLACK),
        limb((-0.04, 0.18, 0.34), (-0.04, 0.20, 0.08), 0.03, 0.03, GREY, mirror="y"),
        ball((-0.04, 0.20, 0.07), (0.08, 0.05, 0.08), BLACK, mirror="y"),
    ]
    hat = (0.12, 0.40 + 0.19 * fat, 0.17)
    return parts, hat


def armchair(u):
    wide = u(0.9, 1.12)
    high = u(0.88, 1.15)
    arm = u(0.9, 1.15)
    buttons = []
    for z in (0.2, 0.45):
        buttons.append(ball((-0.50, 0.0, 0.36 + z * high), (0.05, 0.05, 0.05), GOLD))
    parts = [
        # Seat and cushion
        box((0, 0, 0.26), (0.40, 0.42 * wide, 0.14), BODY, round=0.06),
        box((0.05, 0, 0.42), (0.36, 0.30 * wide, 0.09), LIGHT, round=0.08),
        # Back and its cushion
        box(
            (-0.34, 0, 0.36 + 0.34 * high), (0.13, 0.42 * wide, 0.36 * high),
            BODY, round=0.11, turn=(0, -8, 0)),
        box(
            (-0.22, 0, 0.46 + 0.30 * high), (0.07, 0.28 * wide, 0.22 * high),
            LIGHT, round=0.06, turn=(0, -8, 0)),
        # Armrests
        box(
            (0, 0.42 * wide, 0.36 * arm), (0.42, 0.10, 0.24 * arm),
            BODY, round=0.09, mirror="y"),
        # Feet
        cone((0.34, 0.38 * wide, 0.06), 0.04, 0.06, 0.07, WOOD, mirror="y"),
        cone((-0.34, 0.38 * wide, 0.06), 0.04, 0.06, 0.07, WOOD, mirror="y"),
        # Buttons at the back
        *buttons,
    ]
    hat = (-0.36, 0.36 + 0.70 * high, 0.16)
    return parts, hat


def bed(u):
    long = u(0.92, 1.08)
    head = u(0.9, 1.2)
    soft = u(0.9, 1.1)
    parts = [
        # Frame and mattress
        box((0, 0, 0.20), (0.74 * long, 0.44, 0.07), WOOD, round=0.03),
        box((0, 0, 0.33), (0.71 * long, 0.41, 0.10), WHITE, round=0.06),
        # Blanket and pillows
        box((0.17 * long, 0, 0.35), (0.56 * long, 0.445, 0.125), BODY, round=0.06),
        box((-0.36 * long, 0, 0.40), (0.07, 0.45, 0.085), LIGHT, round=0.05),
        box(
            (-0.56 * long, 0.20, 0.47), (0.13, 0.17, 0.075 * soft),
            WHITE, round=0.07, mirror="y"),
        # Headboard
        box(
            (-0.76 * long, 0, 0.46 * head), (0.05, 0.47, 0.40 * head),
            WOOD, round=0.04),
        ball((-0.76 * long, 0.44, 0.88 * head), 0.08, GOLD, mirror="y"),
        # Footboard
        box((0.76 * long, 0, 0.28), (0.045, 0.47, 0.20), WOOD, round=0.04),
        ball((0.76 * long, 0.44, 0.50), 0.07, GOLD, mirror="y"),
        # Feet
        cone((0.74 * long, 0.42, 0.07), 0.05, 0.05, 0.08, WOOD, mirror="xy"),
    ]
    hat = (-0.76 * long, 0.86 * head, 0.16)
    return parts, hat


def lamp(u):
    wide = u(0.88, 1.15)
    high = u(0.9, 1.12)
    top = u(0.55, 0.75)
    parts = [
        # Foot and stand
        cone((0, 0, 0.05), 0.30, 0.24, 0.05, GOLD),
        cone((0, 0, 0.34 * high), 0.035, 0.035, 0.32 * high, GOLD),
        ball((0, 0, 0.24 * high), (0.11, 0.11, 0.13), GOLD),
        # Shade
        cone((0, 0, 0.36 + 0.52 * high), 0.44 * wide, 0.44 * wide * top, 0.24, BODY),
        # Bulb
        ball((0, 0, 0.15 + 0.50 * high), (0.20, 0.20, 0.12), LAMP),
        # Rims of the shade
        ring((0, 0, 0.12 + 0.52 * high), 0.43 * wide, 0.025, WHITE),
        ring((0, 0, 0.60 + 0.52 * high), 0.43 * wide * top, 0.025, WHITE),
    ]
    hat = (0, 0.61 + 0.52 * high, 0.22)
    return parts, hat


def cake(u):
    wide = u(0.92, 1.1)
    low = u(0.9, 1.15)
    high = u(0.9, 1.15)
    rim = 0.10 + 0.32 * low
    top = 0.10 + 0.32 * low + 0.26 * high
    parts = [
        # Plate
        cone((0, 0, 0.04), 0.58, 0.62, 0.03, STONE),
        # Lower layer, with cream running down
        cone(
            (0, 0, 0.07 + 0.16 * low), 0.48 * wide, 0.48 * wide, 0.17 * low,
            BODY, round=0.04),
        ring((0, 0, rim - 0.02), 0.45 * wide, 0.065, WHITE),
        limb(
            (0, 0, rim), (0.0, 0, rim - 0.14),
            0.06, 0.06, WHITE, spokes=(9, 0.45 * wide)),
        # Upper layer, with cream
        cone(
            (0, 0, rim + 0.12 * high), 0.30 * wide, 0.30 * wide, 0.14 * high,
            BODY, round=0.04),
        ring((0, 0, top - 0.03), 0.27 * wide, 0.055, WHITE),
        cone((0, 0, top - 0.01), 0.28 * wide, 0.28 * wide, 0.035, WHITE),
        # Cherries
        ball((0, 0, rim + 0.06), 0.065, RED, spokes=(7, 0.40 * wide)),
        # Candles
        cone((0, 0, top + 0.11), 0.028, 0.028, 0.11, CYAN, spokes=(5, 0.19 * wide)),
        ball((0, 0, top + 0.26), (0.03, 0.03, 0.05), ORANGE, spokes=(5, 0.19 * wide)),
    ]
    hat = (0, top + 0.02, 0.18)
    return parts, hat


def hamburger(u):
    wide = u(0.94, 1.08)
    bun = u(0.85, 1.2)
    patty = u(0.85, 1.2)
    top = 0.34 + 0.10 * patty
    parts = [
        # Lower bun
        cone((0, 0, 0.11), 0.44 * wide, 0.50 * wide, 0.10, BODY, round=0.08),
        # Meat, salad, cheese, tomato
        cone((0, 0, 0.28), 0.53 * wide, 0.53 * wide, 0.07 * patty, MANE, round=0.06),
        ball((0, 0, 0.24), (0.12, 0.16, 0.035), GREEN, spokes=(11, 0.46 * wide)),
        box(
            (0, 0, 0.30 + 0.07 * patty), (0.44 * wide, 0.44 * wide, 0.022),
            GOLD, round=0.02, turn=(0, 0, 30)),
        cone((0, 0, top - 0.02), 0.50 * wide, 0.50 * wide, 0.03, RED, round=0.03),
        # Upper bun with sesame
        dome((0, 0, top), (0.53 * wide, 0.53 * wide, 0.34 * bun), BODY),
        ball((0, 0, top + 0.315 * bun), (0.045, 0.03, 0.025), WHITE, spokes=(4, 0.14)),
        ball(
            (0, 0, top + 0.225 * bun), (0.035, 0.03, 0.035),
            WHITE, spokes=(9, 0.385 * wide)),
    ]
    hat = (0, top + 0.34 * bun, 0.22)
    return parts, hat


def ice_cream(u):
    scoop = u(0.9, 1.12)
    wide = u(0.92, 1.1)
    long = u(0.9, 1.1)
    rim = 0.74 * long
    parts = [
        # Waffle
        cone((0, 0, rim / 2), 0.03, 0.27 * wide, rim / 2, CREAM, round=0.02),
        ring((0, 0, rim * 0.40), 0.115 * wide, 0.018, WOOD),
        ring((0, 0, rim * 0.66), 0.185 * wide, 0.018, WOOD),
        limb(
            (0, 0, 0.06), (0.235 * wide, 0, rim - 0.03),
            0.014, 0.014, WOOD, spokes=(8, 0.03)),
        cone((0, 0, rim), 0.30 * wide, 0.31 * wide, 0.05, CREAM, round=0.03),
        # Lower scoop
        ball((0, 0.0, rim + 0.20), 0.31 * scoop, BODY),
        ball((0, 0, rim + 0.06), 0.09, BODY, spokes=(9, 0.27 * scoop), blend=0.04),
        # Upper scoop
        ball((0, 0, rim + 0.20 + 0.34 * scoop), 0.23 * scoop, LIGHT),
        ball(
            (0, 0, rim + 0.12 + 0.30 * scoop), 0.06,
            LIGHT, spokes=(7, 0.20 * scoop), blend=0.04),
        # Cherry
        ball((0, 0, rim + 0.24 + 0.57 * scoop), 0.085, RED),
        limb(
            (0, 0, rim + 0.30 + 0.57 * scoop), (0.03, 0.04, rim + 0.42 + 0.57 * scoop),
            0.015, 0.012, GREEN),
    ]
    hat = (0, rim + 0.18 + 0.57 * scoop, 0.17)
    return parts, hat


def house(u):
    wide = u(0.9, 1.12)
    high = u(0.88, 1.15)
    pitch = u(0.85, 1.2)
    wall = 0.56 * high
    parts = [
        # Walls and gables
        box((0, 0, wall / 2), (0.40, 0.48 * wide, wall / 2), BODY, round=0.01),
        roof((0, 0, wall - 0.02), 0.39, 0.47 * wide, 0.40 * pitch, BODY),
        # Roof and chimney
        box(
            (0, 0.27 * wide, wall + 0.20 * pitch), (0.47, 0.37, 0.035),
            BRICK, round=0.02, turn=(-40, 0, 0), mirror="y"),
        box(
            (-0.18, 0.26, wall + 0.34 * pitch), (0.075, 0.075, 0.20),
            STONE, round=0.01),
        # Door
        box((0.40, 0, 0.19), (0.025, 0.115, 0.19), WOOD, round=0.01),
        ball((0.435, 0.07, 0.18), 0.025, GOLD),
        # Windows
        box(
            (0.41, 0.30 * wide, 0.33), (0.02, 0.10, 0.11),
            WHITE, round=0.01, mirror="y"),
        box(
            (0.42, 0.30 * wide, 0.33), (0.025, 0.075, 0.085),
            GLASS, round=0.01, mirror="y"),
        cone((0.40, 0, wall + 0.13), 0.09, 0.09, 0.02, GLASS, turn=(0, 90, 0)),
        box((0, 0.48 * wide, 0.33), (0.12, 0.02, 0.10), GLASS, round=0.01, mirror="y"),
        # Step
        box((0.50, 0, 0.02), (0.10, 0.16, 0.03), STONE, round=0.01),
    ]
    hat = (0, wall + 0.40 * pitch, 0.20)
    return parts, hat


def castle(u):
    tower = u(0.9, 1.1)
    high = u(0.9, 1.12)
    keep = u(0.9, 1.15)
    wall = 0.42 * high
    parts = [
        # Walls and battlements
        box((0, 0, wall / 2), (0.42, 0.42, wall / 2), BODY, round=0.01),
        box((0.0, 0.42, wall), (0.36, 0.035, 0.05), BODY, round=0.01, mirror="y"),
        box((0.42, 0.26, wall), (0.035, 0.06, 0.06), BODY, round=0.01, mirror="xy"),
        box((0.42, 0.09, wall), (0.035, 0.05, 0.06), BODY, round=0.01, mirror="xy"),
        # A window at the back
        box((-0.44, 0, 0.22), (0.03, 0.06, 0.10), BLACK, round=0.02),
        # Towers
        cone(
            (0.42, 0.42, 0.31 * high), 0.15 * tower, 0.14 * tower, 0.31 * high,
            BODY, mirror="xy"),
        cone(
            (0.42, 0.42, 0.62 * high + 0.14), 0.20 * tower, 0.005, 0.15,
            BLUE, mirror="xy"),
        # Keep
        box(
            (-0.06, 0, 0.36 * keep + 0.1), (0.20, 0.20, 0.36 * keep),
            LIGHT, round=0.01),
        cone((-0.06, 0, 0.72 * keep + 0.24), 0.29, 0.005, 0.16, BLUE),
        box((0.145, 0, 0.62 * keep), (0.02, 0.05, 0.08), BLACK, round=0.01),
        # Gate
        box((0.42, 0, 0.11), (0.03, 0.12, 0.12), WOOD, round=0.01),
        cone((0.42, 0, 0.22), 0.12, 0.12, 0.03, WOOD, turn=(0, 90, 0)),
        box((0.445, 0, 0.16), (0.02, 0.012, 0.17), BLACK, round=0.008),
        # Loopholes
        box(
            (0.565, 0.42, 0.40 * high), (0.03, 0.03, 0.065),
            BLACK, round=0.01, mirror="y"),
        # Bridge
        box((0.60, 0, 0.015), (0.18, 0.12, 0.02), WOOD, round=0.01),
    ]
    hat = (-0.06, 0.72 * keep + 0.20, 0.18)
    return parts, hat


def windmill(u):
    wide = u(0.9, 1.12)
    high = u(0.92, 1.1)
    sail = u(0.9, 1.08)
    angle = u(5, 40)
    hub = 0.80 * high
    parts = [
        # Tower and cap
        cone((0, 0, 0.40 * high), 0.34 * wide, 0.22 * wide, 0.40 * high, BODY),
        ring((0, 0, 0.05), 0.345 * wide, 0.04, STONE),
        dome((0, 0, 0.79 * high), (0.26 * wide, 0.26 * wide, 0.26), BRICK),
        # Axle
        limb((0.10, 0, hub), (0.40, 0, hub), 0.045, 0.045, WOOD),
        ball((0.42, 0, hub), 0.075, WOOD),
        # Sails and their spars
        box(
            (0.37, 0, hub), (0.018, 0.56 * sail, 0.09),
            WHITE, round=0.01, turn=(angle, 0, 0)),
        box(
            (0.37, 0, hub), (0.018, 0.09, 0.56 * sail),
            WHITE, round=0.01, turn=(angle, 0, 0)),
        box(
            (0.39, 0, hub), (0.022, 0.57 * sail, 0.022),
            WOOD, round=0.01, turn=(angle, 0, 0)),
        box(
            (0.39, 0, hub), (0.022, 0.022, 0.57 * sail),
            WOOD, round=0.01, turn=(angle, 0, 0)),
        # Door
        box((0.31 * wide, 0, 0.16), (0.05, 0.09, 0.16), WOOD, round=0.01),
        # Gallery
        ring((0, 0, 0.60 * high), 0.265 * wide, 0.03, DARK),
        # Windows
        box((0.26 * wide, 0, 0.48 * high), (0.05, 0.065, 0.07), GLASS, round=0.01),
        box(
            (0, 0.27 * wide, 0.46 * high), (0.06, 0.05, 0.07),
            GLASS, round=0.01, mirror="y"),
    ]
    hat = (0, 0.79 * high + 0.25, 0.20)
    return parts, hat


# ---- all subjects ----------------------------------------------------------------------------

class Subject(NamedTuple):
    """A row of the table of subjects.

    build: its builder (animals.py says what that is). natural: the colour, a key of words.COLOURS,
    that it often has if the caption names none. has_front: whether front and back look different.
    """
    build: Callable
    natural: str
    has_front: bool = True


# The key is the word in captions. A new row is best appended: words.split counts the rows.
SUBJECTS = {
    "bulldog": Subject(animals.bulldog, "brown"),
    "cat": Subject(animals.cat, "orange"),
    "rabbit": Subject(animals.rabbit, "white"),
    "elephant": Subject(animals.elephant, "grey"),
    "pig": Subject(animals.pig, "pink"),
    "lion": Subject(animals.lion, "yellow"),
    "giraffe": Subject(animals.giraffe, "yellow"),
    "penguin": Subject(animals.penguin, "black"),
    "duck": Subject(animals.duck, "yellow"),
    "frog": Subject(animals.frog, "green"),
    "turtle": Subject(animals.turtle, "brown"),
    "car": Subject(car, "red"),
    "bus": Subject(bus, "yellow"),
    "train": Subject(train, "blue"),
    "airplane": Subject(airplane, "white"),
    "armchair": Subject(armchair, "red"),
    "bed": Subject(bed, "blue"),
    "lamp": Subject(lamp, "yellow", has_front=False),
    "cake": Subject(cake, "pink", has_front=False),
    "hamburger": Subject(hamburger, "brown", has_front=False),
    "ice cream": Subject(ice_cream, "pink", has_front=False),
    "house": Subject(house, "white"),
    "castle": Subject(castle, "grey"),
    "windmill": Subject(windmill, "white"),
}

# The subjects whose front and back look different: views of these can be told apart.
ORIENTED = frozenset(name for name, subject in SUBJECTS.items() if subject.has_front)
