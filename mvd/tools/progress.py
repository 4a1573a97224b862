"""What a training's log says of the steps since its last line: losses, speed, memory.

All is summed on the device, and read only when a line is written.
"""
import contextlib
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..unet import MultiViewUNet
from ..vae import VAE

# The losses are also told apart by the quarter of the time steps, from little noise to much.
QUARTERS = 4


class Progress:
    """Sums over steps; `take` gives them as a row of the log, and begins anew."""

    def __init__(self, names, device, share=None):
        """names: {kind: its name in the log}. share(views per second) -> of the device's speed."""
        self.names, self.device, self.share = names, device, share
        # Per kind: errors and examples by quarter, the gradient's norm, steps that were skipped.
        self.sums = {kind: torch.zeros(2 * QUARTERS + 2, device=device) for kind in names}
        self.steps = dict.fromkeys(names, 0)
        self.views = 0
        self.begin = time.perf_counter()

    def add(self, kind, measured, views):
        """Count a step. measured: [2 · QUARTERS + 2], as in `sums`; views: of all processes."""
        self.sums[kind] += measured
        self.steps[kind] += 1
        self.views += views

    @contextlib.contextmanager
    def pause(self):
        """The time within this context does not count: pictures and checkpoints are no steps."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def take(self):
        """A row: mean losses by name, by quarter (None: it did not occur), and the rest."""
        row, norm, skipped = {}, 0.0, 0
        for kind, name in self.names.items():
            *numbers, norms, skips = self.sums[kind].tolist()
            self.sums[kind].zero_()
            errors, counts = numbers[:QUARTERS], numbers[QUARTERS:]
            norm, skipped = norm + norms, skipped + skips
            if not sum(counts):
                continue  # no step of this kind, or all were skipped
            row[name] = sum(errors) / sum(counts)
            if sum(counts) > counts[0]:
                row[f"{name}_by_noise"] = [e / n if n else None for e, n in zip(errors, counts)]
        steps = sum(self.steps.values())
        self.steps = dict.fromkeys(self.steps, 0)
        if steps > skipped:
            row["gradient_norm"] = norm / (steps - skipped)
        if skipped:
            row["skipped"] = int(skipped)
        row["views_per_s"] = self.views / (time.perf_counter() - self.begin)
        if self.share:
            row["share_of_speed"] = self.share(row["views_per_s"])
        if self.device.type == "cuda":
            row["memory_gib"] = used_memory(self.device) / 2**30
        self.views, self.begin = 0, time.perf_counter()
        return row


def used_memory(device):
    """Bytes of the card that are in use, by its driver: all that runs there."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def operations_per_view(config, views, encoding):
    """Floating point operations to learn from one of V views; counted without computing.

    encoding: with those of encoding the picture.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = MultiViewUNet(config.unet)
        side = config.size // 2 ** (len(config.vae.channel_mult) - 1)
        x = torch.empty(1, views, config.unet.in_channels, side, side)
        t = torch.empty(1, dtype=torch.int64)
        context = torch.empty(1, config.text.context_length, config.unet.context_dim)
        unet(x, t, context, torch.empty(1, views, config.unet.camera_dim)).sum().backward()
        if encoding:
            with torch.no_grad():
                VAE(config.vae).encode(torch.empty(views, 3, config.size, config.size))
    return counter.get_total_flops() / views
