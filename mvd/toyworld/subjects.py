"""Vehicles, furniture, food and buildings of the toy world, and the table of all subjects.

animals.py says how to add one.
"""
from . import animals
from .animals import BLACK, BODY, DARK, LIGHT, SLOT, WHITE
from .solids import ball, box, cone, dome, limb, ring, roof


def wheels(x, y, radius, back=None):
    """Four wheels with hubs, at +x and at -x (or `back`)."""
    pairs = [(x, "xy")] if back is None else [(x, "y"), (back, "y")]
    return [part for at, mirror in pairs for part in (
        cone((at, y, radius), radius, radius, 0.07, BLACK, round=0.03, turn=(90, 0, 0), mirror=mirror),
        cone((at, y + 0.045, radius), 0.55 * radius, 0.5 * radius, 0.045, SLOT["grey"], turn=(90, 0, 0),
             mirror=mirror))]


def car(u):
    long, high, cabin = u(0.92, 1.1), u(0.92, 1.12), u(0.36, 0.44)
    parts = [
        box((0, 0, 0.30), (0.78 * long, 0.36, 0.15), BODY, round=0.09),
        box((-0.12, 0, 0.48 + 0.06 * high), (cabin * long, 0.30, 0.17 * high), SLOT["glass"], round=0.12, blend=0.0),
        box((-0.12, 0, 0.52 + 0.19 * high), (cabin * long - 0.08, 0.27, 0.05), BODY, round=0.05),   # top
        box((-0.14, 0.29, 0.50), (0.035, 0.03, 0.20 * high), BODY, round=0.02, mirror="y"),         # door posts
        *wheels(0.47 * long, 0.34, 0.19),
        ball((0.76 * long, 0.23, 0.36), (0.07, 0.09, 0.085), SLOT["lamp"], mirror="y"),             # headlights
        box((0.78 * long, 0, 0.33), (0.03, 0.11, 0.06), BLACK, round=0.02),                         # grille
        box((0.79 * long, 0, 0.19), (0.05, 0.34, 0.045), SLOT["grey"], round=0.04),                 # bumpers
        box((-0.79 * long, 0, 0.19), (0.05, 0.34, 0.045), SLOT["grey"], round=0.04),
        box((-0.77 * long, 0.25, 0.36), (0.04, 0.075, 0.06), SLOT["red"], round=0.02, mirror="y"),  # tail lights
        box((-0.79 * long, 0, 0.33), (0.015, 0.11, 0.05), WHITE, round=0.01),                       # number plate
        ball((0.24 * long, 0.41, 0.50), (0.04, 0.06, 0.045), BODY, mirror="y"),                     # mirrors
    ]
    return parts, (-0.12, 0.57 + 0.19 * high, 0.22)


def bus(u):
    long, high = u(0.92, 1.08), u(0.92, 1.1)
    top = 0.20 + 0.62 * high
    parts = [
        box((0, 0, 0.20 + 0.31 * high), (0.86 * long, 0.33, 0.31 * high), BODY, round=0.07),
        box((0, 0, top), (0.80 * long, 0.28, 0.035), WHITE, round=0.03),                            # roof
        *[box((x * long, 0.325, top - 0.20), (0.115 * long, 0.02, 0.11), SLOT["glass"], round=0.02, mirror="y")
          for x in (-0.66, -0.36, -0.06, 0.24)],
        box((0.60 * long, 0.325, top - 0.29), (0.10 * long, 0.025, 0.21), SLOT["glass"], round=0.02, mirror="y"), # door
        box((0, 0.33, 0.38), (0.82 * long, 0.012, 0.025), BLACK, round=0.01, mirror="y"),
        box((0.855 * long, 0, top - 0.20), (0.025, 0.28, 0.13), SLOT["glass"], round=0.02),         # windscreen
        box((0.865 * long, 0, top - 0.02), (0.03, 0.20, 0.045), BLACK, round=0.02),                 # sign
        box((0.885 * long, 0, top - 0.02), (0.02, 0.15, 0.02), SLOT["lamp"], round=0.01),
        ball((0.86 * long, 0.22, 0.36), (0.04, 0.075, 0.075), SLOT["lamp"], mirror="y"),
        box((0.86 * long, 0, 0.22), (0.05, 0.32, 0.04), SLOT["grey"], round=0.03),
        box((-0.86 * long, 0, 0.22), (0.05, 0.32, 0.04), SLOT["grey"], round=0.03),
        box((-0.855 * long, 0.25, 0.36), (0.02, 0.05, 0.09), SLOT["red"], round=0.015, mirror="y"),
        box((-0.855 * long, 0, top - 0.17), (0.02, 0.15, 0.08), SLOT["glass"], round=0.02),
        box((-0.855 * long, 0, 0.36), (0.02, 0.16, 0.08), BLACK, round=0.02),                       # engine
        *wheels(0.52 * long, 0.30, 0.16),
    ]
    return parts, (0.0, top + 0.03, 0.24)


def train(u):
    long, fat, chimney = u(0.92, 1.1), u(0.92, 1.08), u(0.9, 1.25)
    parts = [
        box((-0.05, 0, 0.26), (0.74 * long, 0.24, 0.06), BLACK, round=0.02),                        # frame
        cone((0.16, 0, 0.54), 0.24 * fat, 0.24 * fat, 0.46 * long, BODY, round=0.03, turn=(0, 90, 0)),  # boiler
        cone((0.18 + 0.44 * long, 0, 0.54), 0.20 * fat, 0.18 * fat, 0.05, BLACK, turn=(0, 90, 0)),  # its door
        ball((0.24 + 0.44 * long, 0, 0.54), 0.055, SLOT["gold"]),
        ring((0.30 * long, 0, 0.54), 0.24 * fat, 0.03, SLOT["gold"], turn=(0, 90, 0)),
        ring((-0.02 * long, 0, 0.54), 0.24 * fat, 0.03, SLOT["gold"], turn=(0, 90, 0)),
        cone((0.36 * long, 0, 0.84), 0.075, 0.085, 0.14 * chimney, BLACK),
        cone((0.36 * long, 0, 0.86 + 0.14 * chimney), 0.09, 0.15, 0.07, BLACK),
        ball((0.09 * long, 0, 0.78), (0.09, 0.09, 0.10), SLOT["gold"]),                                    # steam dome
        box((-0.50 * long, 0, 0.62), (0.24, 0.27, 0.34), BODY, round=0.03),                         # cab
        box((-0.50 * long, 0, 0.98), (0.30, 0.32, 0.04), DARK, round=0.03),
        box((-0.50 * long, 0.265, 0.74), (0.13, 0.02, 0.12), SLOT["glass"], round=0.02, mirror="y"),
        box((-0.27 * long, 0.17, 0.84), (0.03, 0.06, 0.07), SLOT["glass"], round=0.02, mirror="y"),
        box((-0.75 * long, 0, 0.60), (0.02, 0.15, 0.28), BLACK, round=0.02),                        # rear door
        roof((0.72 * long, 0, 0.04), 0.26, 0.17, 0.22, SLOT["red"], turn=(0, 0, 90)),               # cow catcher
        ball((0.18 + 0.42 * long, 0, 0.55 + 0.25 * fat), 0.09, SLOT["lamp"]),                                     # lamp
        *wheels(0.40 * long, 0.24, 0.16, back=0.02),
        cone((-0.48 * long, 0.25, 0.24), 0.24, 0.24, 0.06, SLOT["red"], turn=(90, 0, 0), mirror="y"),
        cone((-0.48 * long, 0.28, 0.24), 0.10, 0.10, 0.06, SLOT["gold"], turn=(90, 0, 0), mirror="y"),
    ]
    return parts, (-0.50 * long, 1.02, 0.22)


def airplane(u):
    fat, span, tail = u(0.9, 1.15), u(0.9, 1.1), u(0.9, 1.15)
    parts = [
        ball((0.05, 0, 0.40), (0.80, 0.19 * fat, 0.20 * fat), BODY),
        limb((-0.30, 0, 0.42), (-0.86, 0, 0.50), 0.14, 0.07, BODY, blend=0.08),
        ball((0.52, 0, 0.52), (0.16, 0.13 * fat, 0.10 * fat), SLOT["glass"]),                       # cockpit
        box((0.06, 0.46 * span, 0.36), (0.16, 0.46 * span, 0.035), BODY, round=0.03, turn=(4, 0, -16), mirror="y"),
        box((-0.04, 0.84 * span, 0.40), (0.13, 0.09, 0.04), SLOT["red"], round=0.03, turn=(4, 0, -16), mirror="y"),
        cone((0.18, 0.44 * span, 0.27), 0.085, 0.10, 0.15, SLOT["grey"], turn=(0, 90, 0), mirror="y"),   # engines
        cone((0.33, 0.44 * span, 0.27), 0.07, 0.07, 0.02, BLACK, turn=(0, 90, 0), mirror="y"),
        box((-0.84, 0, 0.68), (0.13, 0.025, 0.20 * tail), BODY, round=0.02, turn=(0, -22, 0)),      # fin
        box((-0.93, 0, 0.66 + 0.18 * tail), (0.11, 0.03, 0.06), SLOT["red"], round=0.02, turn=(0, -22, 0)),
        box((-0.84, 0.20, 0.52), (0.10, 0.20, 0.025), BODY, round=0.02, turn=(0, 0, -16), mirror="y"),
        *[ball((x, 0.175 * fat, 0.44), 0.04, SLOT["glass"], mirror="y") for x in (-0.26, -0.10, 0.06, 0.22)],
        ball((0.83, 0, 0.39), (0.06, 0.07, 0.07), WHITE),                                           # nose
        limb((0.50, 0, 0.30), (0.50, 0, 0.08), 0.03, 0.03, SLOT["grey"]),                           # wheels
        ball((0.50, 0, 0.07), (0.08, 0.05, 0.08), BLACK),
        limb((-0.04, 0.18, 0.34), (-0.04, 0.20, 0.08), 0.03, 0.03, SLOT["grey"], mirror="y"),
        ball((-0.04, 0.20, 0.07), (0.08, 0.05, 0.08), BLACK, mirror="y"),
    ]
    return parts, (0.12, 0.40 + 0.19 * fat, 0.17)


def armchair(u):
    wide, high, arm = u(0.9, 1.12), u(0.88, 1.15), u(0.9, 1.15)
    parts = [
        box((0, 0, 0.26), (0.40, 0.42 * wide, 0.14), BODY, round=0.06),
        box((0.05, 0, 0.42), (0.36, 0.30 * wide, 0.09), LIGHT, round=0.08),                         # cushion
        box((-0.34, 0, 0.36 + 0.34 * high), (0.13, 0.42 * wide, 0.36 * high), BODY, round=0.11, turn=(0, -8, 0)),
        box((-0.22, 0, 0.46 + 0.30 * high), (0.07, 0.28 * wide, 0.22 * high), LIGHT, round=0.06, turn=(0, -8, 0)),
        box((0, 0.42 * wide, 0.36 * arm), (0.42, 0.10, 0.24 * arm), BODY, round=0.09, mirror="y"),
        cone((0.34, 0.38 * wide, 0.06), 0.04, 0.06, 0.07, SLOT["wood"], mirror="y"),
        cone((-0.34, 0.38 * wide, 0.06), 0.04, 0.06, 0.07, SLOT["wood"], mirror="y"),
        *[ball((-0.50, 0.0, 0.36 + z * high), (0.05, 0.05, 0.05), SLOT["gold"], turn=(0, 0, 0)) for z in (0.2, 0.45)],
    ]
    return parts, (-0.36, 0.36 + 0.70 * high, 0.16)


def bed(u):
    long, head, soft = u(0.92, 1.08), u(0.9, 1.2), u(0.9, 1.1)
    parts = [
        box((0, 0, 0.20), (0.74 * long, 0.44, 0.07), SLOT["wood"], round=0.03),
        box((0, 0, 0.33), (0.71 * long, 0.41, 0.10), WHITE, round=0.06),                            # mattress
        box((0.17 * long, 0, 0.35), (0.56 * long, 0.445, 0.125), BODY, round=0.06),                 # blanket
        box((-0.36 * long, 0, 0.40), (0.07, 0.45, 0.085), LIGHT, round=0.05),
        box((-0.56 * long, 0.20, 0.47), (0.13, 0.17, 0.075 * soft), WHITE, round=0.07, mirror="y"), # pillows
        box((-0.76 * long, 0, 0.46 * head), (0.05, 0.47, 0.40 * head), SLOT["wood"], round=0.04),
        ball((-0.76 * long, 0.44, 0.88 * head), 0.08, SLOT["gold"], mirror="y"),
        box((0.76 * long, 0, 0.28), (0.045, 0.47, 0.20), SLOT["wood"], round=0.04),
        ball((0.76 * long, 0.44, 0.50), 0.07, SLOT["gold"], mirror="y"),
        cone((0.74 * long, 0.42, 0.07), 0.05, 0.05, 0.08, SLOT["wood"], mirror="xy"),
    ]
    return parts, (-0.76 * long, 0.86 * head, 0.16)


def lamp(u):
    wide, high, top = u(0.88, 1.15), u(0.9, 1.12), u(0.55, 0.75)
    parts = [
        cone((0, 0, 0.05), 0.30, 0.24, 0.05, SLOT["gold"]),
        cone((0, 0, 0.34 * high), 0.035, 0.035, 0.32 * high, SLOT["gold"]),
        ball((0, 0, 0.24 * high), (0.11, 0.11, 0.13), SLOT["gold"]),
        cone((0, 0, 0.36 + 0.52 * high), 0.44 * wide, 0.44 * wide * top, 0.24, BODY),
        ball((0, 0, 0.15 + 0.50 * high), (0.20, 0.20, 0.12), SLOT["lamp"]),                         # the bulb
        ring((0, 0, 0.12 + 0.52 * high), 0.43 * wide, 0.025, WHITE),
        ring((0, 0, 0.60 + 0.52 * high), 0.43 * wide * top, 0.025, WHITE),
    ]
    return parts, (0, 0.61 + 0.52 * high, 0.22)


def cake(u):
    wide, low, high = u(0.92, 1.1), u(0.9, 1.15), u(0.9, 1.15)
    rim, top = 0.10 + 0.32 * low, 0.10 + 0.32 * low + 0.26 * high
    parts = [
        cone((0, 0, 0.04), 0.58, 0.62, 0.03, SLOT["stone"]),                                        # plate
        cone((0, 0, 0.07 + 0.16 * low), 0.48 * wide, 0.48 * wide, 0.17 * low, BODY, round=0.04),
        ring((0, 0, rim - 0.02), 0.45 * wide, 0.065, WHITE),                                       # cream, running down
        limb((0, 0, rim), (0.0, 0, rim - 0.14), 0.06, 0.06, WHITE, spokes=(9, 0.45 * wide)),
        cone((0, 0, rim + 0.12 * high), 0.30 * wide, 0.30 * wide, 0.14 * high, BODY, round=0.04),
        ring((0, 0, top - 0.03), 0.27 * wide, 0.055, WHITE),
        cone((0, 0, top - 0.01), 0.28 * wide, 0.28 * wide, 0.035, WHITE),
        ball((0, 0, rim + 0.06), 0.065, SLOT["red"], spokes=(7, 0.40 * wide)),                      # cherries
        cone((0, 0, top + 0.11), 0.028, 0.028, 0.11, SLOT["cyan"], spokes=(5, 0.19 * wide)),        # candles
        ball((0, 0, top + 0.26), (0.03, 0.03, 0.05), SLOT["orange"], spokes=(5, 0.19 * wide)),
    ]
    return parts, (0, top + 0.02, 0.18)


def hamburger(u):
    wide, bun, patty = u(0.94, 1.08), u(0.85, 1.2), u(0.85, 1.2)
    top = 0.34 + 0.10 * patty
    parts = [
        cone((0, 0, 0.11), 0.44 * wide, 0.50 * wide, 0.10, BODY, round=0.08),
        cone((0, 0, 0.28), 0.53 * wide, 0.53 * wide, 0.07 * patty, SLOT["mane"], round=0.06),       # meat
        ball((0, 0, 0.24), (0.12, 0.16, 0.035), SLOT["green"], spokes=(11, 0.46 * wide)),           # salad
        box((0, 0, 0.30 + 0.07 * patty), (0.44 * wide, 0.44 * wide, 0.022), SLOT["gold"], round=0.02, turn=(0, 0, 30)),
        cone((0, 0, top - 0.02), 0.50 * wide, 0.50 * wide, 0.03, SLOT["red"], round=0.03),          # tomato
        dome((0, 0, top), (0.53 * wide, 0.53 * wide, 0.34 * bun), BODY),
        ball((0, 0, top + 0.315 * bun), (0.045, 0.03, 0.025), WHITE, spokes=(4, 0.14)),             # sesame
        ball((0, 0, top + 0.225 * bun), (0.035, 0.03, 0.035), WHITE, spokes=(9, 0.385 * wide)),
    ]
    return parts, (0, top + 0.34 * bun, 0.22)


def ice_cream(u):
    scoop, wide, long = u(0.9, 1.12), u(0.92, 1.1), u(0.9, 1.1)
    rim = 0.74 * long
    parts = [
        cone((0, 0, rim / 2), 0.03, 0.27 * wide, rim / 2, SLOT["cream"], round=0.02),               # waffle
        ring((0, 0, rim * 0.40), 0.115 * wide, 0.018, SLOT["wood"]),
        ring((0, 0, rim * 0.66), 0.185 * wide, 0.018, SLOT["wood"]),
        limb((0, 0, 0.06), (0.235 * wide, 0, rim - 0.03), 0.014, 0.014, SLOT["wood"], spokes=(8, 0.03)),
        cone((0, 0, rim), 0.30 * wide, 0.31 * wide, 0.05, SLOT["cream"], round=0.03),
        ball((0, 0.0, rim + 0.20), 0.31 * scoop, BODY),
        ball((0, 0, rim + 0.06), 0.09, BODY, spokes=(9, 0.27 * scoop), blend=0.04),
        ball((0, 0, rim + 0.20 + 0.34 * scoop), 0.23 * scoop, LIGHT),
        ball((0, 0, rim + 0.12 + 0.30 * scoop), 0.06, LIGHT, spokes=(7, 0.20 * scoop), blend=0.04),
        ball((0, 0, rim + 0.24 + 0.57 * scoop), 0.085, SLOT["red"]),                                # cherry
        limb((0, 0, rim + 0.30 + 0.57 * scoop), (0.03, 0.04, rim + 0.42 + 0.57 * scoop), 0.015, 0.012, SLOT["green"]),
    ]
    return parts, (0, rim + 0.18 + 0.57 * scoop, 0.17)


def house(u):
    wide, high, pitch = u(0.9, 1.12), u(0.88, 1.15), u(0.85, 1.2)
    wall = 0.56 * high
    parts = [
        box((0, 0, wall / 2), (0.40, 0.48 * wide, wall / 2), BODY, round=0.01),
        roof((0, 0, wall - 0.02), 0.39, 0.47 * wide, 0.40 * pitch, BODY),                           # gable wall
        box((0, 0.27 * wide, wall + 0.20 * pitch), (0.47, 0.37, 0.035), SLOT["brick"], round=0.02, turn=(-40, 0, 0),
            mirror="y"),
        box((-0.18, 0.26, wall + 0.34 * pitch), (0.075, 0.075, 0.20), SLOT["stone"], round=0.01),   # chimney
        box((0.40, 0, 0.19), (0.025, 0.115, 0.19), SLOT["wood"], round=0.01),                       # door
        ball((0.435, 0.07, 0.18), 0.025, SLOT["gold"]),
        box((0.41, 0.30 * wide, 0.33), (0.02, 0.10, 0.11), WHITE, round=0.01, mirror="y"),          # windows
        box((0.42, 0.30 * wide, 0.33), (0.025, 0.075, 0.085), SLOT["glass"], round=0.01, mirror="y"),
        cone((0.40, 0, wall + 0.13), 0.09, 0.09, 0.02, SLOT["glass"], turn=(0, 90, 0)),
        box((0, 0.48 * wide, 0.33), (0.12, 0.02, 0.10), SLOT["glass"], round=0.01, mirror="y"),     # side windows
        box((0.50, 0, 0.02), (0.10, 0.16, 0.03), SLOT["stone"], round=0.01),                        # step
    ]
    return parts, (0, wall + 0.40 * pitch, 0.20)


def castle(u):
    tower, high, keep = u(0.9, 1.1), u(0.9, 1.12), u(0.9, 1.15)
    wall = 0.42 * high
    parts = [
        box((0, 0, wall / 2), (0.42, 0.42, wall / 2), BODY, round=0.01),
        box((0.0, 0.42, wall), (0.36, 0.035, 0.05), BODY, round=0.01, mirror="y"),
        box((0.42, 0.26, wall), (0.035, 0.06, 0.06), BODY, round=0.01, mirror="xy"),                # battlements
        box((0.42, 0.09, wall), (0.035, 0.05, 0.06), BODY, round=0.01, mirror="xy"),
        box((-0.44, 0, 0.22), (0.03, 0.06, 0.10), BLACK, round=0.02),                             # a window at the back
        cone((0.42, 0.42, 0.31 * high), 0.15 * tower, 0.14 * tower, 0.31 * high, BODY, mirror="xy"),
        cone((0.42, 0.42, 0.62 * high + 0.14), 0.20 * tower, 0.005, 0.15, SLOT["blue"], mirror="xy"),
        box((-0.06, 0, 0.36 * keep + 0.1), (0.20, 0.20, 0.36 * keep), LIGHT, round=0.01),           # keep
        cone((-0.06, 0, 0.72 * keep + 0.24), 0.29, 0.005, 0.16, SLOT["blue"]),
        box((0.145, 0, 0.62 * keep), (0.02, 0.05, 0.08), BLACK, round=0.01),
        box((0.42, 0, 0.11), (0.03, 0.12, 0.12), SLOT["wood"], round=0.01),                         # gate
        cone((0.42, 0, 0.22), 0.12, 0.12, 0.03, SLOT["wood"], turn=(0, 90, 0)),
        box((0.445, 0, 0.16), (0.02, 0.012, 0.17), BLACK, round=0.008),
        box((0.565, 0.42, 0.40 * high), (0.03, 0.03, 0.065), BLACK, round=0.01, mirror="y"),        # loopholes
        box((0.60, 0, 0.015), (0.18, 0.12, 0.02), SLOT["wood"], round=0.01),                        # bridge
    ]
    return parts, (-0.06, 0.72 * keep + 0.20, 0.18)


def windmill(u):
    wide, high, sail, angle = u(0.9, 1.12), u(0.92, 1.1), u(0.9, 1.08), u(5, 40)
    hub = 0.80 * high
    parts = [
        cone((0, 0, 0.40 * high), 0.34 * wide, 0.22 * wide, 0.40 * high, BODY),
        ring((0, 0, 0.05), 0.345 * wide, 0.04, SLOT["stone"]),
        dome((0, 0, 0.79 * high), (0.26 * wide, 0.26 * wide, 0.26), SLOT["brick"]),
        limb((0.10, 0, hub), (0.40, 0, hub), 0.045, 0.045, SLOT["wood"]),
        ball((0.42, 0, hub), 0.075, SLOT["wood"]),
        box((0.37, 0, hub), (0.018, 0.56 * sail, 0.09), WHITE, round=0.01, turn=(angle, 0, 0)),     # sails
        box((0.37, 0, hub), (0.018, 0.09, 0.56 * sail), WHITE, round=0.01, turn=(angle, 0, 0)),
        box((0.39, 0, hub), (0.022, 0.57 * sail, 0.022), SLOT["wood"], round=0.01, turn=(angle, 0, 0)),
        box((0.39, 0, hub), (0.022, 0.022, 0.57 * sail), SLOT["wood"], round=0.01, turn=(angle, 0, 0)),
        box((0.31 * wide, 0, 0.16), (0.05, 0.09, 0.16), SLOT["wood"], round=0.01),                  # door
        ring((0, 0, 0.60 * high), 0.265 * wide, 0.03, DARK),                                        # gallery
        box((0.26 * wide, 0, 0.48 * high), (0.05, 0.065, 0.07), SLOT["glass"], round=0.01),
        box((0, 0.27 * wide, 0.46 * high), (0.06, 0.05, 0.07), SLOT["glass"], round=0.01, mirror="y"),
    ]
    return parts, (0, 0.79 * high + 0.25, 0.20)


SUBJECTS = {f.__name__.replace("_", " "): f for f in (
    animals.bulldog, animals.cat, animals.rabbit, animals.elephant, animals.pig, animals.lion, animals.giraffe,
    animals.penguin, animals.duck, animals.frog, animals.turtle, car, bus, train, airplane, armchair, bed, lamp, cake,
    hamburger, ice_cream, house, castle, windmill)}
ORIENTED = frozenset(SUBJECTS) - {"lamp", "cake", "hamburger", "ice cream"}           # a front and a back that differ
