"""Does it show what was asked for, from every side? `judge` by the toy world, `clip` by CLIP; `identity`: is it this subject?"""
from .judge import *  # noqa: F401, F403
