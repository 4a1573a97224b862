"""A procedural world of captioned 3D things: what the tiny model is trained on and judged by.

    solids.py       the parts that things are made of: signed distance functions
    paints.py       what colour a part has
    animals.py      the animals, and how to add one
    subjects.py     other subjects, and the table of all
    accessories.py  what subjects wear, carry and stand on
    words.py        things, captions, colours, and which pairs a model is never shown
    shapes.py       from words to solids and palettes
    tracer.py       from solids and cameras to pictures
    dataset.py      python -m mvd.toyworld: writes a data folder
"""
from .accessories import ACCESSORIES
from .dataset import RENDERED_VIEWS, Item, draw_views, plan, save, write
from .paints import PAINTS, SLOT
from .shapes import build, palette
from .subjects import ORIENTED, SUBJECTS
from .words import COLOURS, NATURAL, Thing, captions, pairs, split

__all__ = [
    "ACCESSORIES", "COLOURS", "NATURAL", "ORIENTED", "PAINTS", "RENDERED_VIEWS", "SLOT", "SUBJECTS",
    "Item", "Thing", "build", "captions", "draw_views", "pairs", "palette", "plan", "save",
    "split", "write",
]
