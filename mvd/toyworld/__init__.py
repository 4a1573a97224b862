"""A procedural world of captioned 3D things."""
from .world import *  # noqa: F401, F403
