"""The animals of the toy world: one builder per animal, each a short table of parts.

A builder is a function of `u` that returns (parts, hat). u(low, high) draws one number per object
of a batch, [N], so that no two look alike; it may be called shapes.DRAWS times.
- parts: a list of solids (solids.py) in any units; shapes.build centres and scales them. The front
  looks to +x, z is up. mirror="y" repeats a part at -y, blend melts it into the parts before it.
  BODY is the caption's colour, DARK and LIGHT are shades of it, other paints are fixed (paints.py).
- hat: where a hat would sit, (x, z, radius).
To add an animal, write its builder here and append a row to SUBJECTS (subjects.py). A model knows
its name only after training on new data.
"""
from .paints import (
    BLACK, BODY, CREAM, DARK, GREEN, LIGHT, MANE, ORANGE, PINK, RED, WHITE, WOOD,
)
from .solids import ball, box, cone, dome, limb, ring, roof


def eyes(x, y, z, size, look=0.6):
    """A pair of white eyeballs, one at +y and one at -y, with black pupils that look forward."""
    pupil = (x + look * size, y + 0.1 * size, z + 0.05 * size)
    return [
        ball((x, y, z), size, WHITE, mirror="y"),
        ball(pupil, 0.66 * size, BLACK, mirror="y"),
    ]


def bulldog(u):
    wide = u(0.90, 1.12)
    head = u(0.92, 1.10)
    ear = u(0.8, 1.25)
    stump = u(0.60, 0.72)
    parts = [
        # Hips and chest
        ball((-0.34, 0, 0.44), (0.32, 0.25 * wide, 0.24), BODY),
        ball((0.12, 0, 0.48), (0.36, 0.36 * wide, 0.32), BODY, blend=0.1),
        # Bow legs
        limb(
            (0.20, 0.28 * wide, 0.42), (0.24, 0.37 * wide, 0.10),
            0.14, 0.10, BODY, blend=0.05, mirror="y"),
        limb(
            (-0.42, 0.16 * wide, 0.38), (-0.46, 0.20 * wide, 0.08),
            0.14, 0.09, BODY, blend=0.05, mirror="y"),
        # Stump of a tail
        limb((-0.60, 0, 0.54), (-0.72, 0, stump), 0.07, 0.05, BODY, blend=0.05),
        # Head
        ball(
            (0.48, 0, 0.84), (0.29 * head, 0.37 * head, 0.29 * head),
            BODY, blend=0.05),
        # Paws
        ball((0.29, 0.37 * wide, 0.06), (0.14, 0.12, 0.075), WHITE, mirror="y"),
        ball((-0.41, 0.20 * wide, 0.06), (0.14, 0.11, 0.07), WHITE, mirror="y"),
        # Bib
        ball((0.38, 0, 0.42), (0.13, 0.20, 0.22), WHITE),
        # Collar
        ring((0.34, 0, 0.66), 0.30, 0.055, RED, turn=(0, 35, 0)),
        # Underbite, jowls, lower teeth
        box((0.73, 0, 0.575), (0.14, 0.20, 0.055), LIGHT, round=0.05),
        ball(
            (0.70, 0.14, 0.72), (0.15, 0.16, 0.17),
            LIGHT, turn=(12, 0, 0), mirror="y"),
        cone((0.845, 0.11, 0.65), 0.042, 0.015, 0.06, WHITE, mirror="y"),
        # Nose and eyes
        ball((0.81, 0, 0.86), (0.08, 0.11, 0.075), BLACK),
        *eyes(0.69, 0.18, 0.98, 0.095),
        # Ears
        ball(
            (0.46, 0.32 * head, 1.05), (0.06, 0.13 * ear, 0.10 * ear),
            DARK, turn=(-50, 0, 15), mirror="y"),
    ]
    hat = (0.45, 0.84 + 0.26 * head, 0.27)
    return parts, hat


def cat(u):
    fat = u(0.85, 1.1)
    head = u(0.92, 1.1)
    ear = u(0.85, 1.25)
    parts = [
        # Sitting body
        ball((-0.12, 0, 0.30), (0.34, 0.30 * fat, 0.30), BODY),
        limb((-0.05, 0, 0.42), (0.06, 0, 0.72), 0.25 * fat, 0.19, BODY, blend=0.08),
        # Front legs and paws
        limb(
            (0.16, 0.11, 0.50), (0.22, 0.12, 0.08),
            0.09, 0.075, BODY, blend=0.03, mirror="y"),
        ball((0.26, 0.12, 0.06), (0.11, 0.085, 0.065), WHITE, mirror="y"),
        # Haunches
        ball(
            (0.10, 0.27 * fat, 0.10), (0.22, 0.10, 0.10),
            BODY, blend=0.05, mirror="y"),
        # Chest
        ball((0.13, 0, 0.55), (0.13, 0.14, 0.20), LIGHT),
        # Tail with a white tip
        limb((-0.38, 0, 0.12), (-0.62, 0, 0.30), 0.08, 0.075, BODY, blend=0.05),
        limb((-0.62, 0, 0.30), (-0.66, 0, 0.72), 0.075, 0.07, BODY),
        ball((-0.65, 0, 0.74), (0.085, 0.085, 0.10), WHITE),
        # Head
        ball(
            (0.10, 0, 0.98), (0.27 * head, 0.33 * head, 0.26 * head),
            BODY, blend=0.03),
        # Ears, pink inside
        roof(
            (0.06, 0.22 * head, 0.98 + 0.15 * head), 0.05, 0.14, 0.27 * ear,
            BODY, turn=(-18, 0, 0), mirror="y"),
        roof(
            (0.105, 0.22 * head, 0.99 + 0.15 * head), 0.02, 0.09, 0.19 * ear,
            PINK, turn=(-18, 0, 0), mirror="y"),
        # Muzzle and nose
        ball((0.33, 0.065, 0.89), (0.08, 0.085, 0.07), WHITE, mirror="y"),
        ball((0.40, 0, 0.935), (0.035, 0.05, 0.035), PINK),
        # Whiskers
        limb((0.36, 0.10, 0.90), (0.33, 0.40, 0.95), 0.013, 0.010, BLACK, mirror="y"),
        limb((0.36, 0.10, 0.87), (0.33, 0.40, 0.84), 0.013, 0.010, BLACK, mirror="y"),
        # Eyes
        ball((0.28, 0.135, 1.04), 0.085, GREEN, mirror="y"),
        ball((0.345, 0.145, 1.04), (0.03, 0.03, 0.065), BLACK, mirror="y"),
        # Stripes
        ball((0.09, 0, 0.98 + 0.135 * head), (0.20, 0.035, 0.14), DARK),
        ball((0.09, 0.10, 0.98 + 0.115 * head), (0.18, 0.03, 0.14), DARK, mirror="y"),
        ball((-0.14, 0, 0.58), (0.17, 0.22 * fat, 0.035), DARK, turn=(0, 30, 0)),
        ball((-0.22, 0, 0.44), (0.21, 0.29 * fat, 0.035), DARK, turn=(0, 20, 0)),
        ball((-0.24, 0, 0.30), (0.24, 0.31 * fat, 0.035), DARK, turn=(0, 5, 0)),
    ]
    hat = (0.08, 0.98 + 0.24 * head, 0.22)
    return parts, hat


def rabbit(u):
    fat = u(0.88, 1.12)
    head = u(0.92, 1.08)
    ear = u(0.85, 1.3)
    parts = [
        # Body and belly
        ball((-0.08, 0, 0.34), (0.36, 0.30 * fat, 0.34), BODY),
        ball((0.12, 0, 0.36), (0.20, 0.20 * fat, 0.26), LIGHT),
        # Feet
        ball((0.14, 0.24, 0.08), (0.26, 0.10, 0.08), BODY, mirror="y"),
        # Paws
        limb(
            (0.16, 0.16, 0.50), (0.32, 0.13, 0.34),
            0.09, 0.08, BODY, blend=0.03, mirror="y"),
        # Tail
        ball((-0.44, 0, 0.26), 0.14, WHITE),
        # Head
        ball(
            (0.12, 0, 0.82), (0.27 * head, 0.28 * head, 0.26 * head),
            BODY, blend=0.05),
        # Ears, pink inside
        limb(
            (0.06, 0.12, 1.00), (-0.02, 0.20, 1.10 + 0.38 * ear),
            0.075, 0.09, BODY, mirror="y"),
        limb(
            (0.11, 0.125, 1.05), (0.055, 0.20, 1.08 + 0.36 * ear),
            0.035, 0.055, PINK, mirror="y"),
        # Muzzle, teeth, nose, eyes
        ball((0.33, 0.065, 0.74), (0.09, 0.085, 0.075), WHITE, mirror="y"),
        box((0.385, 0, 0.665), (0.025, 0.045, 0.055), WHITE, round=0.015),
        ball((0.41, 0, 0.79), (0.04, 0.05, 0.035), PINK),
        *eyes(0.31, 0.14, 0.89, 0.075),
    ]
    hat = (0.10, 0.82 + 0.25 * head, 0.18)
    return parts, hat


def elephant(u):
    fat = u(0.9, 1.1)
    ear = u(0.88, 1.18)
    trunk = u(0.0, 0.12)
    parts = [
        # Body
        ball((-0.16, 0, 0.60), (0.48, 0.36 * fat, 0.36), BODY),
        # Legs and toes
        cone(
            (-0.42, 0.20 * fat, 0.22), 0.135, 0.14, 0.24,
            BODY, round=0.04, mirror="y", blend=0.04),
        cone(
            (0.10, 0.20 * fat, 0.22), 0.135, 0.14, 0.24,
            BODY, round=0.04, mirror="y", blend=0.04),
        ball((0.21, 0.20 * fat, 0.05), (0.05, 0.11, 0.05), WHITE, mirror="y"),
        # Tail with a tuft
        limb((-0.62, 0, 0.68), (-0.70, 0, 0.38), 0.035, 0.03, BODY),
        ball((-0.705, 0, 0.34), (0.05, 0.05, 0.08), DARK),
        # Head
        ball((0.36, 0, 0.86), (0.27, 0.27, 0.29), BODY, blend=0.06),
        # Ears, pink inside
        ball(
            (0.26, 0.42 * ear, 0.86), (0.06, 0.27 * ear, 0.33 * ear),
            BODY, turn=(0, 0, 22), mirror="y"),
        ball(
            (0.305, 0.43 * ear, 0.86), (0.035, 0.20 * ear, 0.25 * ear),
            PINK, turn=(0, 0, 22), mirror="y"),
        # Trunk
        limb((0.52, 0, 0.82), (0.70, 0, 0.46), 0.14, 0.095, BODY, blend=0.06),
        limb((0.70, 0, 0.46), (0.78, 0, 0.20), 0.095, 0.08, BODY, blend=0.02),
        limb((0.78, 0, 0.20), (0.98, 0, 0.16 + trunk), 0.08, 0.07, BODY, blend=0.02),
        # Tusks and eyes
        limb((0.56, 0.14, 0.70), (0.84, 0.19, 0.56), 0.05, 0.022, WHITE, mirror="y"),
        *eyes(0.57, 0.17, 0.98, 0.062),
    ]
    hat = (0.34, 1.13, 0.20)
    return parts, hat


def pig(u):
    fat = u(0.9, 1.12)
    head = u(0.92, 1.1)
    ear = u(0.85, 1.2)
    parts = [
        # Body
        ball((-0.12, 0, 0.48), (0.50, 0.36 * fat, 0.35 * fat), BODY),
        # Legs and hooves
        cone((0.16, 0.20, 0.16), 0.085, 0.11, 0.14, BODY, mirror="y", blend=0.03),
        cone((-0.38, 0.20, 0.16), 0.085, 0.11, 0.14, BODY, mirror="y", blend=0.03),
        cone((0.16, 0.20, 0.04), 0.09, 0.09, 0.045, WOOD, mirror="y"),
        cone((-0.38, 0.20, 0.04), 0.09, 0.09, 0.045, WOOD, mirror="y"),
        # Curly tail
        ring((-0.66, 0, 0.60), 0.075, 0.03, PINK, turn=(60, 0, 30)),
        # Head
        ball(
            (0.36, 0, 0.68), (0.29 * head, 0.31 * head, 0.29 * head),
            BODY, blend=0.05),
        # Snout and nostrils
        cone(
            (0.63 * head + 0.02, 0, 0.64), 0.15, 0.145, 0.09,
            PINK, round=0.03, turn=(0, 90, 0)),
        ball((0.72 * head + 0.02, 0.055, 0.65), (0.03, 0.032, 0.05), BLACK, mirror="y"),
        # Ears and eyes
        ball(
            (0.34, 0.23 * head, 0.92), (0.05, 0.11 * ear, 0.16 * ear),
            PINK, turn=(-35, 25, 0), mirror="y"),
        *eyes(0.58, 0.15, 0.82, 0.07),
    ]
    hat = (0.32, 0.68 + 0.28 * head, 0.20)
    return parts, hat


def lion(u):
    fat = u(0.9, 1.1)
    mane = u(0.92, 1.12)
    head = u(0.95, 1.06)
    parts = [
        # Body
        ball((-0.22, 0, 0.52), (0.46, 0.25 * fat, 0.26), BODY),
        # Legs and paws
        limb(
            (0.10, 0.15, 0.48), (0.12, 0.17, 0.08),
            0.12, 0.09, BODY, blend=0.05, mirror="y"),
        limb(
            (-0.48, 0.14, 0.48), (-0.52, 0.16, 0.08),
            0.13, 0.09, BODY, blend=0.05, mirror="y"),
        ball((0.17, 0.17, 0.06), (0.12, 0.10, 0.065), LIGHT, mirror="y"),
        ball((-0.47, 0.16, 0.06), (0.12, 0.10, 0.065), LIGHT, mirror="y"),
        # Tail with a tuft
        limb((-0.64, 0, 0.60), (-0.92, 0, 0.52), 0.045, 0.035, BODY, blend=0.03),
        limb((-0.92, 0, 0.52), (-1.00, 0, 0.78), 0.035, 0.03, BODY),
        ball((-1.01, 0, 0.84), (0.09, 0.09, 0.12), MANE),
        # Mane
        ball((0.20, 0, 0.82), (0.24, 0.36 * mane, 0.36 * mane), MANE),
        ball((0.26, 0, 0.82), 0.13, MANE, turn=(0, 90, 0), spokes=(10, 0.33 * mane)),
        # Face
        ball((0.36, 0, 0.82), (0.24, 0.27 * head, 0.27 * head), BODY),
        # Ears
        ball((0.26, 0.23, 1.08), (0.06, 0.10, 0.10), BODY, mirror="y"),
        # Muzzle, chin, nose, eyes
        ball((0.56, 0.075, 0.72), (0.11, 0.10, 0.09), CREAM, mirror="y"),
        ball((0.56, 0, 0.64), (0.08, 0.09, 0.06), CREAM),
        ball((0.66, 0, 0.79), (0.05, 0.075, 0.05), BLACK),
        *eyes(0.54, 0.125, 0.91, 0.068),
    ]
    hat = (0.26, 0.82 + 0.40 * mane, 0.20)
    return parts, hat


def giraffe(u):
    neck = u(0.9, 1.12)
    fat = u(0.9, 1.1)
    leg = u(0.9, 1.1)
    top = 0.62 * leg + 0.80 * neck
    chest = 0.62 * leg
    parts = [
        # Body
        ball((-0.10, 0, chest), (0.38, 0.20 * fat, 0.21), BODY),
        # Legs and hooves
        limb(
            (0.12, 0.11, chest), (0.14, 0.12, 0.05),
            0.085, 0.055, BODY, mirror="y", blend=0.04),
        limb(
            (-0.34, 0.11, chest), (-0.36, 0.12, 0.05),
            0.085, 0.055, BODY, mirror="y", blend=0.04),
        cone((0.14, 0.12, 0.045), 0.075, 0.065, 0.045, WOOD, mirror="y"),
        cone((-0.36, 0.12, 0.045), 0.075, 0.065, 0.045, WOOD, mirror="y"),
        # Neck
        limb((0.16, 0, chest + 0.04), (0.38, 0, top), 0.15, 0.095, BODY, blend=0.08),
        # Tail with a tuft
        limb((-0.46, 0, chest + 0.05), (-0.54, 0, chest - 0.24), 0.03, 0.03, BODY),
        ball((-0.545, 0, chest - 0.27), (0.045, 0.045, 0.08), MANE),
        # Mane
        limb((0.06, 0, chest + 0.20), (0.27, 0, top + 0.06), 0.04, 0.04, MANE),
        # Head, muzzle, nostrils
        limb(
            (0.40, 0, top + 0.04), (0.62, 0, top - 0.04),
            0.13, 0.09, BODY, blend=0.04),
        ball((0.66, 0, top - 0.05), (0.10, 0.105, 0.085), CREAM),
        ball((0.74, 0.045, top - 0.02), 0.02, BLACK, mirror="y"),
        # Horns
        limb(
            (0.36, 0.06, top + 0.12), (0.34, 0.08, top + 0.25),
            0.025, 0.025, MANE, mirror="y"),
        ball((0.34, 0.08, top + 0.27), 0.045, MANE, mirror="y"),
        # Ears and eyes
        ball(
            (0.32, 0.18, top + 0.06), (0.04, 0.10, 0.05),
            BODY, turn=(15, 0, 0), mirror="y"),
        *eyes(0.47, 0.10, top + 0.07, 0.055),
        # Spots
        ball((-0.02, 0.145 * fat, chest + 0.08), (0.09, 0.06, 0.07), DARK, mirror="y"),
        ball((-0.24, 0.145 * fat, chest + 0.04), (0.09, 0.06, 0.08), DARK, mirror="y"),
        ball((-0.14, 0.165 * fat, chest - 0.09), (0.07, 0.05, 0.06), DARK, mirror="y"),
        ball((-0.20, 0, chest + 0.17), (0.10, 0.08, 0.05), DARK),
        ball((0.22, 0.10, chest + 0.16 * neck), (0.07, 0.05, 0.08), DARK, mirror="y"),
        ball((0.27, 0.085, chest + 0.38 * neck), (0.06, 0.045, 0.07), DARK, mirror="y"),
        ball((0.33, 0.07, chest + 0.60 * neck), (0.055, 0.04, 0.06), DARK, mirror="y"),
    ]
    hat = (0.40, top + 0.13, 0.14)
    return parts, hat


def penguin(u):
    fat = u(0.9, 1.15)
    head = u(0.92, 1.1)
    wing = u(0.0, 0.12)
    parts = [
        # Body and belly
        ball((0, 0, 0.48), (0.32 * fat, 0.36 * fat, 0.46), BODY),
        ball((0.10 * fat, 0, 0.44), (0.26 * fat, 0.28 * fat, 0.37), WHITE),
        # Head and mask
        ball((0, 0, 1.00), (0.26 * head, 0.27 * head, 0.26 * head), BODY, blend=0.10),
        ball((0.10, 0.10, 1.01), (0.18, 0.13, 0.16), WHITE, mirror="y"),
        # Bill and eyes
        cone((0.36, 0, 0.94), 0.085, 0.01, 0.10, ORANGE, turn=(0, 100, 0)),
        ball((0.25, 0.12, 1.06), 0.055, BLACK, mirror="y"),
        # Flippers
        limb(
            (-0.02, 0.33 * fat, 0.72), (0.0, 0.46 * fat + wing, 0.34),
            0.075, 0.06, DARK, mirror="y"),
        # Feet
        ball((0.16, 0.16, 0.05), (0.20, 0.13, 0.06), ORANGE, mirror="y"),
        # Tail
        limb((-0.26, 0, 0.16), (-0.42, 0, 0.06), 0.09, 0.04, DARK, blend=0.04),
    ]
    hat = (0, 1.00 + 0.25 * head, 0.20)
    return parts, hat


def duck(u):
    fat = u(0.9, 1.12)
    head = u(0.92, 1.12)
    tail = u(0.0, 0.12)
    parts = [
        # Body and tail
        ball((0, 0, 0.30), (0.48, 0.35 * fat, 0.30), BODY),
        limb((-0.30, 0, 0.36), (-0.58, 0, 0.54 + tail), 0.20, 0.05, BODY, blend=0.10),
        # Head
        ball((0.28, 0, 0.74), 0.27 * head, BODY, blend=0.10),
        # Wings
        ball(
            (-0.06, 0.31 * fat, 0.36), (0.28, 0.08, 0.17),
            DARK, turn=(0, 15, 8), mirror="y"),
        # Bill and eyes
        ball((0.57, 0, 0.73), (0.17, 0.15, 0.045), ORANGE, turn=(0, -8, 0)),
        ball((0.55, 0, 0.665), (0.13, 0.12, 0.04), ORANGE, turn=(0, 6, 0)),
        *eyes(0.44, 0.14, 0.84, 0.075),
    ]
    hat = (0.26, 0.74 + 0.25 * head, 0.20)
    return parts, hat


def frog(u):
    fat = u(0.9, 1.12)
    eye = u(0.88, 1.18)
    mouth = u(-0.04, 0.02)
    parts = [
        # Body, head, belly
        ball((-0.05, 0, 0.34), (0.40, 0.38 * fat, 0.31), BODY),
        ball((0.20, 0, 0.46), (0.27, 0.36, 0.23), BODY, blend=0.08),
        ball((0.17, 0, 0.24), (0.26, 0.28, 0.20), CREAM),
        # Mouth
        ball((0.21, 0, 0.44 + mouth), (0.285, 0.37, 0.028), BLACK, turn=(0, -5, 0)),
        # Hind legs and feet
        limb(
            (-0.18, 0.36 * fat, 0.26), (0.12, 0.48 * fat, 0.14),
            0.16, 0.10, BODY, mirror="y"),
        ball((0.18, 0.50 * fat, 0.045), (0.22, 0.13, 0.05), DARK, mirror="y"),
        # Front legs and feet
        limb((0.26, 0.26, 0.28), (0.38, 0.26, 0.06), 0.07, 0.06, BODY, mirror="y"),
        ball((0.43, 0.26, 0.04), (0.12, 0.10, 0.045), DARK, mirror="y"),
        # Eyes
        ball((0.20, 0.20, 0.70), 0.13 * eye, BODY, blend=0.03, mirror="y"),
        *eyes(0.28, 0.20, 0.72, 0.105 * eye, look=0.5),
    ]
    hat = (0.08, 0.68, 0.22)
    return parts, hat


def turtle(u):
    shell = u(0.92, 1.1)
    high = u(0.85, 1.15)
    neck = u(0.0, 0.12)
    parts = [
        # Shell and its rim
        dome((0, 0, 0.20), (0.52 * shell, 0.44 * shell, 0.42 * high), BODY),
        ball((0, 0, 0.20), (0.56 * shell, 0.48 * shell, 0.075), CREAM),
        # Plates of the shell
        ball((0, 0, 0.20 + 0.385 * high), (0.15, 0.14, 0.06), DARK),
        ball(
            (0, 0, 0.20 + 0.24 * high), (0.09, 0.10, 0.11),
            DARK, spokes=(6, 0.36 * shell)),
        # Flippers
        ball(
            (0.40, 0.34, 0.11), (0.22, 0.12, 0.085),
            GREEN, turn=(0, 12, 35), mirror="y"),
        ball(
            (-0.40, 0.32, 0.10), (0.17, 0.10, 0.08),
            GREEN, turn=(0, 8, -35), mirror="y"),
        # Tail, neck, head
        limb((-0.50, 0, 0.16), (-0.72, 0, 0.10), 0.06, 0.02, GREEN),
        limb((0.44, 0, 0.22), (0.66 + neck, 0, 0.40), 0.12, 0.13, GREEN),
        ball((0.72 + neck, 0, 0.44), (0.20, 0.18, 0.17), GREEN),
        # Mouth and eyes
        ball((0.86 + neck, 0, 0.385), (0.075, 0.12, 0.02), BLACK),
        *eyes(0.82 + neck, 0.11, 0.53, 0.07),
    ]
    hat = (0.0, 0.20 + 0.42 * high, 0.22)
    return parts, hat
