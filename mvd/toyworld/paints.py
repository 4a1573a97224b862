"""The paints that parts of things are made of; a part's slot is the place of its paint here.

BODY is the colour that the caption names, DARK and LIGHT are shades of it (shapes.palette computes
them); all other paints always look the same. To add one, append it to PAINTS and name its slot.
"""
PAINTS = {
    "body": None,
    "dark": None,
    "light": None,
    "white": (0.97, 0.97, 0.95),
    "black": (0.07, 0.07, 0.08),
    "grey": (0.55, 0.57, 0.60),
    "pink": (0.98, 0.55, 0.62),
    "orange": (1.00, 0.55, 0.08),
    "red": (0.85, 0.10, 0.12),
    "green": (0.25, 0.65, 0.20),
    "glass": (0.55, 0.80, 0.95),
    "wood": (0.52, 0.32, 0.16),
    "cream": (0.98, 0.90, 0.72),
    "mane": (0.50, 0.24, 0.06),
    "lamp": (1.00, 0.92, 0.45),
    "gold": (1.00, 0.76, 0.12),
    "magenta": (0.92, 0.16, 0.62),
    "cyan": (0.15, 0.80, 0.88),
    "violet": (0.45, 0.25, 0.80),
    "stone": (0.80, 0.79, 0.75),
    "sky": (0.80, 0.90, 1.00),
    "blue": (0.12, 0.35, 0.90),
    "brick": (0.62, 0.22, 0.14),
}
SLOT = {name: slot for slot, name in enumerate(PAINTS)}

BODY = SLOT["body"]
DARK = SLOT["dark"]
LIGHT = SLOT["light"]
WHITE = SLOT["white"]
BLACK = SLOT["black"]
GREY = SLOT["grey"]
PINK = SLOT["pink"]
ORANGE = SLOT["orange"]
RED = SLOT["red"]
GREEN = SLOT["green"]
GLASS = SLOT["glass"]
WOOD = SLOT["wood"]
CREAM = SLOT["cream"]
MANE = SLOT["mane"]
LAMP = SLOT["lamp"]
GOLD = SLOT["gold"]
MAGENTA = SLOT["magenta"]
CYAN = SLOT["cyan"]
VIOLET = SLOT["violet"]
STONE = SLOT["stone"]
SKY = SLOT["sky"]
BLUE = SLOT["blue"]
BRICK = SLOT["brick"]
