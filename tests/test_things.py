"""The captions that the judge chooses from, and the way back from a prompt to its Thing."""
import pytest

from mvd import toyworld
from mvd.metrics.things import differences, distractors, draw_things, read_prompt
from mvd.tools.errors import UserError
from mvd.toyworld import ACCESSORIES, COLOURS, SUBJECTS, Thing
from small_judge import THINGS


def test_distractors():
    for thing in (THINGS[0], Thing("cake", None, "pink")):
        others = distractors(thing)
        assert len(others) == len(set(others)) == 63, "all 63 are different"
        assert thing not in others
        for seed in range(20):
            apart = [differences(other, thing) for other in distractors(thing, seed)]
            assert apart.count(1) == 32, "half differ in exactly one word"
        for other in others:
            assert other.subject in SUBJECTS and other.colour in COLOURS
            # All name an accessory, or having none is no difference.
            assert other.accessory in (thing.accessory, *ACCESSORIES)
        assert others == distractors(thing), "always the same ones"
        assert others != distractors(thing, seed=1)


@pytest.mark.parametrize("split", ["3d", "image", "never"])
def test_captions_to_judge(split):
    things = draw_things(split, 24)
    assert len(set(things)) == 24, "all are different"
    for thing in things:
        assert toyworld.split(thing.subject, thing.accessory) == split
        assert thing.accessory and thing.colour
    assert len({thing.subject for thing in things}) >= 20, "not 24 bulldogs"
    assert draw_things(split, 8) == things[:8], "a smaller count is the beginning of the list"
    assert things[:8] != draw_things(split, 8, seed=1)


@pytest.mark.parametrize("count", [0, 10_000])
def test_a_split_has_so_many_captions_only(count):
    with pytest.raises(UserError, match="captions"):
        draw_things("never", count)


def test_prompts_are_read_back():
    things = [
        *THINGS,
        Thing("house"),
        Thing("ice cream", "umbrella"),
        Thing("elephant", None, "orange"),
    ]
    for thing in things:
        for caption in toyworld.captions(thing):
            assert read_prompt(f" {caption.capitalize()} ") == thing
            assert read_prompt(f"{caption.upper()}.".replace(" ", "  ")) == thing
    with pytest.raises(UserError, match="a corgi"):
        read_prompt("a corgi")
