"""Which captions are asked for, and which others could be confused with them.

A Thing (toyworld/words.py) is what a caption says: a subject, perhaps an accessory, and a colour.
Here are the Things that a model is asked for, the distractors that the judge compares them with,
and the way back from a prompt to its Thing. As in DreamFusion §4, R-precision is the share of
pictures that fit their own caption better than all others.
"""
import itertools
import random

from .. import toyworld
from ..tools.errors import UserError
from ..toyworld import ACCESSORIES, COLOURS, SUBJECTS, Thing

# How many captions the judge chooses from, the true one included. An even number.
CAPTIONS = 64


def distractors(thing, seed=0, colours=tuple(COLOURS)):
    """The CAPTIONS - 1 other Things of the choice: always the same ones for a Thing and a seed.

    Half of CAPTIONS (32) differ from the Thing in exactly one of subject, accessory and colour,
    the others (31) in two or three. They always have an accessory, except that those with another
    subject or colour keep the Thing's own, which may be None.
    colours: those that they may have. With (None,), and a Thing without a colour, every one of
    them has another shape: 32 differ in one of subject and accessory, 31 in both.
    """
    near = []
    for subject in SUBJECTS:
        if subject != thing.subject:
            near.append(thing._replace(subject=subject))
    for accessory in ACCESSORIES:
        if accessory != thing.accessory:
            near.append(thing._replace(accessory=accessory))
    for colour in colours:
        if colour != thing.colour:
            near.append(thing._replace(colour=colour))

    far = []
    for names in itertools.product(SUBJECTS, ACCESSORIES, colours):
        other = Thing(*names)
        if differences(other, thing) > 1:
            far.append(other)

    rng = random.Random(f"{seed} {thing}")
    chosen_near = rng.sample(near, CAPTIONS // 2)
    chosen_far = rng.sample(far, CAPTIONS // 2 - 1)
    return chosen_near + chosen_far


def differences(a, b):
    """In how many of subject, accessory and colour two Things differ: 0 to 3."""
    return sum(x != y for x, y in zip(a, b))


def draw_things(split, count, seed=0):
    """`count` different Things of a split ("3d", "image" or "never"), to ask a model for.

    All have an accessory and a colour. The subjects take turns, as long as they last. A smaller
    count gives the beginning of the same list. Raises UserError if the split has fewer Things.
    """
    by_subject = {}
    for subject, accessory in toyworld.pairs(split):
        if accessory is None:
            continue
        things = by_subject.setdefault(subject, [])
        for colour in COLOURS:
            things.append(Thing(subject, accessory, colour))

    rng = random.Random(f"{seed} {split}")
    rows = rng.sample(list(by_subject.values()), len(by_subject))
    rows = [rng.sample(row, len(row)) for row in rows]
    in_turns = []
    for turn in itertools.zip_longest(*rows):
        in_turns.extend(thing for thing in turn if thing is not None)
    if not 1 <= count <= len(in_turns):
        raise UserError(f"the split {split!r} has 1 to {len(in_turns)} captions, not {count}")
    return in_turns[:count]


def read_prompt(prompt):
    """The Thing whose caption a prompt is; its colour is None if none is named.

    Capitals, a full stop at the end and the number of spaces do not matter.

    Raises UserError if the toy world has no such caption.
    """
    wanted = " ".join(prompt.casefold().split()).rstrip(" .!")
    accessories = (None, *ACCESSORIES)
    colours = (None, *COLOURS)
    for names in itertools.product(SUBJECTS, accessories, colours):
        thing = Thing(*names)
        if wanted in toyworld.captions(thing):
            return thing
    raise UserError(
        f'"{prompt}" is no caption of the toy world, so there is nothing to judge it by')
