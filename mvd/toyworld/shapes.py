"""From a subject and an accessory to solids that can be drawn, and from colour names to a palette.

A seed decides the proportions and nothing else; the colour is the palette's. So one shape can be
painted in every colour, and one colour can be compared across shapes.
"""
import torch

from ..tools.errors import UserError
from .accessories import ACCESSORIES
from .paints import PAINTS
from .solids import extent, pack, reach
from .subjects import SUBJECTS
from .words import COLOURS

# A builder may draw this many numbers per object.
DRAWS = 8
# Every object fits into a ball of this radius, so that a picture's edge hardly ever cuts it off.
RADIUS = 0.46


def dice(seeds):
    """A function u(low, high) that returns one uniform random number per seed, [N].

    The first, second, ... call gives each seed always the same numbers, whatever the other seeds
    of the batch are. It may be called DRAWS times.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(torch.rand(DRAWS, generator=generator))
    columns = iter(torch.stack(rows).unbind(1))

    def u(low, high):
        return low + (high - low) * next(columns)

    return u


def build(subject, accessory, seeds, device="cpu", accessory_slots=0):
    """N objects of one pair, one per seed: Shapes inside [-0.5, 0.5]^3, with the front to +x.

    subject is a key of SUBJECTS, accessory a key of ACCESSORIES or None. accessory_slots is added
    to the slots of the accessory's parts, so that a palette can colour them apart from the subject.
    Raises UserError if the world does not have the pair.
    """
    if subject not in SUBJECTS or accessory not in (None, *ACCESSORIES):
        raise UserError(
            f"the toy world has no {subject!r} with {accessory!r}; "
            f"subjects: {', '.join(SUBJECTS)}; accessories: {', '.join(ACCESSORIES)}")
    n = len(seeds)
    parts, hat = SUBJECTS[subject].build(dice(seeds))
    if accessory:
        low, high = extent(parts, n)
        worn = ACCESSORIES[accessory].build(hat, low, high)
        for part in worn:
            parts.append(part._replace(slot=part.slot + accessory_slots))
    low, high = extent(parts, n)
    middle = (low + high) / 2
    scale = RADIUS / reach(parts, n, middle)
    return pack(parts, n, offset=-scale[:, None] * middle, scale=scale, device=device)


def palette(colours, device="cpu"):
    """What each slot of N objects looks like: [N, slots, 3] in [0, 1]. colours: N keys of COLOURS.

    The first three slots are the object's colour, a darker and a lighter shade of it; the others
    are the fixed paints of PAINTS.
    """
    body = torch.tensor([COLOURS[colour] for colour in colours])
    cream = torch.tensor([1.0, 0.95, 0.86])
    dark = 0.62 * body
    light = 0.45 * body + 0.55 * cream
    fixed = torch.tensor([rgb for rgb in PAINTS.values() if rgb is not None])
    fixed = fixed.expand(len(colours), -1, 3)
    return torch.cat([torch.stack([body, dark, light], 1), fixed], 1).to(device)
