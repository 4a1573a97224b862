"""MVDream (arXiv 2308.16512) in PyTorch: multi-view diffusion for 3D generation."""
import sys

from .tools.threads import sleep_while_waiting

sleep_while_waiting()  # before anything imports torch

try:
    from .model import MVDream  # noqa: E402
except KeyboardInterrupt:
    # Importing torch takes seconds: Ctrl-C ends a script here as it does later, in cli.main.
    sys.exit(130)

__all__ = ["MVDream"]
