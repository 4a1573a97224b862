"""Do pictures show what was asked for, from every side?

    things.py       the captions that are asked for, and those they could be confused with
    candidates.py   renders of what pictures could show, and how far pictures are from them
    judge.py        R-precision, view accuracy, Janus rate, variety
    shape.py        is a surface as smooth as real ones, and is it the right one?
    meshes.py       is a mesh whole, and as thick as the real thing?
    consistency.py  do the views of a set show one and the same thing?
    command.py      python -m mvd.metrics: judges samples and runs
    clip.py         the same question for any prompt, asked of CLIP
    identity.py     python -m mvd.metrics.identity: does DreamBooth's result show its subject?
"""
from .candidates import SAMPLED, Cameras, cut_out, real_views, squared_error
from .command import main, read_run
from .judge import (
    judge_sets,
    name_colours,
    report_line,
    sides_and_janus,
    summary,
    variety,
)
from .shape import Maps, judge_shapes, roughness, shape_report
from .things import distractors, draw_things, read_prompt

__all__ = [
    "SAMPLED",
    "Cameras",
    "Maps",
    "cut_out",
    "distractors",
    "draw_things",
    "judge_sets",
    "judge_shapes",
    "main",
    "name_colours",
    "read_prompt",
    "read_run",
    "real_views",
    "report_line",
    "roughness",
    "shape_report",
    "sides_and_janus",
    "squared_error",
    "summary",
    "variety",
]
