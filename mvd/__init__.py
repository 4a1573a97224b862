"""MVDream (arXiv 2308.16512) in PyTorch: multi-view diffusion for 3D generation."""
import os
import sys

from .tools.threads import spin_then_sleep

# Before anything imports torch: how its threads wait; and on a GPU, memory in pieces that grow,
# since a run's stages want pieces of different sizes.
spin_then_sleep()
if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

try:
    import torch  # noqa: E402, F401
except KeyboardInterrupt:
    if hasattr(sys, "ps1"):
        raise  # at a prompt
    # Importing torch takes seconds: Ctrl-C ends a script here as it does later, in cli.main.
    sys.exit(130)

__all__ = ["MVDream"]


def __getattr__(name):
    """`from mvd import MVDream` imports the model only then.

    So `python -m mvd.exercises` works while a module of the model is half rewritten.
    """
    if name != "MVDream":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .model import MVDream
    except AttributeError as error:  # which Python would take for a name that is not here
        raise ImportError(f"mvd.model cannot be imported: {error}") from error
    return MVDream
