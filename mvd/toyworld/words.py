"""What the captions of the toy world say, and which pairs of words a model is never shown.

A thing is a subject (subjects.py), perhaps with an accessory (accessories.py), and a colour:
"a red bulldog wearing a crown". Each (subject, accessory) pair belongs to one of three splits,
in all colours:
    "3d"     rendered from all sides (75%; every subject without an accessory is here)
    "image"  shown in single pictures only, mostly from the front, like photos (15%)
    "never"  not shown at all (10%)
So a model can be tested on pairs that it has seen in flat pictures only, or has never seen.
"""
from typing import NamedTuple

from .accessories import ACCESSORIES
from .subjects import SUBJECTS

# The colours that a caption may name, in RGB. To add one, append a line: one lower-case word, at
# least 0.2 from every other colour. (A paint of a part, such as a crown's gold, is in paints.py.)
COLOURS = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.98, 0.50, 0.08),
    "yellow": (0.98, 0.84, 0.15),
    "green": (0.22, 0.66, 0.24),
    "teal": (0.10, 0.62, 0.62),
    "blue": (0.16, 0.34, 0.86),
    "purple": (0.52, 0.22, 0.72),
    "pink": (0.98, 0.56, 0.74),
    "brown": (0.50, 0.30, 0.16),
    "black": (0.15, 0.15, 0.17),
    "white": (0.95, 0.95, 0.94),
    "grey": (0.56, 0.57, 0.60),
}

# The colour that a subject often has when its caption names none.
NATURAL = {name: subject.natural for name, subject in SUBJECTS.items()}


class Thing(NamedTuple):
    """What a caption describes.

    subject: a key of SUBJECTS. accessory: a key of ACCESSORIES, or None. colour: a key of COLOURS,
    or None if the caption names none.
    """
    subject: str
    accessory: str | None = None
    colour: str | None = None


def captions(thing):
    """Four different wordings of a Thing, in lower case; they name a colour only if it has one."""
    subject, accessory, colour = thing
    name = f"{colour} {subject}" if colour else subject
    article = "an" if name[0] in "aeiou" else "a"
    if accessory is None:
        if colour:
            # "a elephant, grey": wrong, but the shipped model was trained on these words.
            before = "an" if subject[0] == "a" else "a"
            last = f"{before} {subject}, {colour}"
        else:
            last = f"the {name}"
        return [f"{article} {name}", name, f"a photo of {article} {name}", last]

    phrase = ACCESSORIES[accessory].phrase
    other_phrase = ACCESSORIES[accessory].other_phrase
    if colour:
        second = f"{subject} {phrase}, {colour}"
    else:
        second = f"the {subject} {phrase}"
    return [
        f"{article} {name} {phrase}",
        second,
        f"{article} {name} {other_phrase}",
        f"a photo of {article} {name} {phrase}",
    ]


def split(subject, accessory):
    """The split of a pair: "3d", "image" or "never". A subject without an accessory is in "3d".

    With s and a the places of subject and accessory in their tables,
        k = (3 s + 2 a + 2) mod 20
    decides: "never" if k < 2, "image" if 2 <= k < 5, else "3d". With ten accessories each subject
    has one pair that is never shown and one or two that are only in images. A new row is best
    appended to its table, since a row in the middle moves the pairs behind it to other splits.
    """
    if accessory is None:
        return "3d"
    s = list(SUBJECTS).index(subject)
    a = list(ACCESSORIES).index(accessory)
    k = (3 * s + 2 * a + 2) % 20
    if k < 2:
        return "never"
    if k < 5:
        return "image"
    return "3d"


def pairs(which):
    """All (subject, accessory or None) of the split `which`, always in the same order."""
    found = []
    for subject in SUBJECTS:
        for accessory in (None, *ACCESSORIES):
            if split(subject, accessory) == which:
                found.append((subject, accessory))
    return found
