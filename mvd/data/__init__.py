"""Training data: rendered objects and captioned images, as they lie on people's disks.

    python -m mvd.data PATH...        what is there, before anybody trains

Read in this order: `objects.py` finds rendered objects in many layouts (`layouts.py`,
`captions.py`), whose matrices `poses.py` understands and `transforms.py` reads and writes;
`images.py` finds captioned images, also in tar files (`shards.py`); `decode.py` makes pictures of
files; `loader.py` reads them in worker processes; `order.py` says which comes when; `latents.py`
and `feed.py` make batches of them.
"""
from .feed import FromFiles, FromMemory, Plan
from .images import find_images
from .latents import (
    draw_indices, encode_posteriors, on_grey, posteriors_of, recolour, sample_posterior,
    token_table,
)
from .loader import Examples, Request, Tally, read_everything
from .objects import find_objects
from .order import Dice, hashed, items_at

__all__ = [
    "Dice", "Examples", "FromFiles", "FromMemory", "Plan", "Request", "Tally", "draw_indices",
    "encode_posteriors", "find_images", "find_objects", "hashed", "items_at", "on_grey",
    "posteriors_of", "read_everything", "recolour", "sample_posterior", "token_table",
]
