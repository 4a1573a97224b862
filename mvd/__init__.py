"""MVDream (arXiv 2308.16512) in PyTorch: multi-view diffusion for 3D generation."""
from .tools.threads import choose_how_to_wait

choose_how_to_wait()  # before anything imports torch

from .model import MVDream  # noqa: E402

__all__ = ["MVDream"]
