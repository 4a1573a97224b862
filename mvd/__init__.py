"""MVDream (arXiv 2308.16512) in PyTorch: multi-view diffusion for 3D generation."""
from .model import MVDream

__all__ = ["MVDream"]
