"""Batches for training: from what is held in memory, or from files at every step.

Both ways have the same methods, of which three count. `stream` yields, for every batch of the
plan, the tensors that change from batch to batch; `pictures` makes of them what the autoencoder is
trained on, and `latents` what the UNet is trained on. The last two are called inside a CUDA graph,
so whatever is random in them comes from the batch's Dice.

kind is "objects" (V views of one object, 3D mode) or "images" (single pictures, 2D mode).
"""
import copy
from dataclasses import dataclass

import torch

from ..model import compile_network
from .latents import encode_posteriors, posteriors_of, sample_posterior, token_table
from .loader import Request, batches
from .order import Dice, hashed, items_at, uniform


# ---- which batch comes when ------------------------------------------------------------------

@dataclass
class Plan:
    """The batches of all steps of a phase, and this process's part of them.

    A step's batch is made of ranks · accumulate parts, and this process makes `accumulate` of
    these. Part p holds the examples p · size .. (p + 1) · size - 1 of the step's batch.
    """
    seed: int
    shares: dict       # {kind: the probability that a step has it}
    sizes: dict        # {kind: examples in a part}
    steps: int
    pictures: dict     # {kind: pictures of an example}
    accumulate: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self):
        """kinds[step]; before[step]: how many earlier steps had the same kind; views[kind]."""
        names = list(self.shares)
        u = uniform(self.seed, "kind", torch.arange(self.steps))
        ends = torch.tensor(list(self.shares.values()), dtype=torch.float64).cumsum(0)
        drawn = torch.bucketize(u * ends[-1], ends[:-1], right=True)
        self.kinds = [names[i] for i in drawn.tolist()]
        so_far = torch.nn.functional.one_hot(drawn, len(names)).cumsum(0)
        self.before = (so_far.gather(1, drawn[:, None])[:, 0] - 1).tolist()
        # Pictures of a whole step.
        parts = self.ranks * self.accumulate
        self.views = {kind: parts * self.sizes[kind] * self.pictures[kind] for kind in names}

    def examples(self, kind, part):
        """The examples of one of this process's parts, as places in the step's batch: int64 [n]."""
        first = (self.rank * self.accumulate + part) * self.sizes[kind]
        return first + torch.arange(self.sizes[kind])

    def places(self, step, part):
        """The same as places in the endless sequence of the step's kind: int64 [n]."""
        kind = self.kinds[step]
        whole = self.ranks * self.accumulate * self.sizes[kind]
        return self.before[step] * whole + self.examples(kind, part)

    def parts(self, start):
        """(step, part) of all that this process makes from step `start` on."""
        for step in range(start, self.steps):
            for part in range(self.accumulate):
                yield step, part


# ---- from memory -----------------------------------------------------------------------------

class FromMemory:
    """All pictures lie on the device, and later, in their place, the latents."""

    def __init__(self, held, model, seed, learned):
        """held: loader.Held; learned: {kind: int64 tensor, the items that are learned from}."""
        device, text = model.device, model.text
        self.model, self.seed, self.learned = model, seed, learned
        self.rgba = {"objects": held.views.to(device), "images": held.images.to(device)}
        self.camera = held.camera.to(device)
        self.sets = held.sets.to(device)  # [S, V]
        self.first_set = held.first_set.to(device)  # [N + 1]
        # Which object each view belongs to, [P]; an image is alone.
        owner = torch.zeros(len(held.views), dtype=torch.int64, device=device)
        counts = self.first_set.diff()
        numbers = torch.arange(len(counts), device=device)
        owner[self.sets] = numbers.repeat_interleave(counts)[:, None]
        self.owner = {"objects": owner, "images": torch.arange(len(held.images), device=device)}
        suffix = model.config.suffix
        self.tokens = {}
        if len(counts):
            self.tokens["objects"] = token_table(text, held.object_captions, suffix).to(device)
        if len(held.images):
            self.tokens["images"] = token_table(text, held.image_captions).to(device)

    def stream(self, plan, phase, start):
        """The items of each part, (int64 [n],): views or images for the autoencoder, else items."""
        learned = self.learned
        if phase == "vae":
            learned = {kind: torch.arange(len(rgba)) for kind, rgba in self.rgba.items()}
        seeds = {kind: hashed(self.seed, kind) for kind in learned}
        for step, part in plan.parts(start):
            kind = plan.kinds[step]
            items = learned[kind]
            yield (items[items_at(len(items), seeds[kind], plan.places(step, part))],)

    def batch_of(self, items):
        """What `stream` yields for these objects."""
        return (items,)

    def some_pictures(self, count):
        """Pictures to show, three quarters of them rendered: uint8 [count, 4, H, W]."""
        shown = []
        for kind, wanted in shown_of(count).items():
            rgba = self.rgba[kind]
            if len(rgba):
                shown.append(rgba[torch.arange(wanted) * len(rgba) // wanted])
        return torch.cat(shown)

    def pictures(self, kind, items):
        """uint8 [n, 4, H, W]."""
        return self.rgba[kind][items]

    def compile_encoder(self):
        """Nothing to do: it runs once."""

    def encode(self, copies):
        """Put latents in the place of the pictures.

        posteriors[kind]: [copies, P, 2c, h, w] in half precision. In each copy, each object has
        another random grey behind all of its views.
        """
        self.posteriors = {}
        for kind, rgba in self.rgba.items():
            parts = []
            for turn in range(copies):
                dice = Dice(self.seed, torch.tensor(turn, device=rgba.device), self.owner[kind])
                grey = dice.uniform(f"grey of {kind}")
                parts.append(encode_posteriors(self.model.vae, rgba, grey))
            self.posteriors[kind] = torch.stack(parts) if len(rgba) else None
        self.rgba = None

    def deviation(self):
        """The standard deviation of the latents, of the objects if there are any."""
        means = [p.chunk(2, dim=2)[0] for p in self.posteriors.values() if p is not None]
        return means[0].float().std().item()

    def latents(self, kind, dice, items):
        """z [B, V, c, h, w] unscaled, tokens [B, L], camera [B, V, 16] or None."""
        which, camera = items[:, None], None
        if kind == "objects":
            # Where the first view stands is random; the others are 360/V degrees apart.
            begin, end = self.first_set[items], self.first_set[items + 1]
            which = self.sets[begin + dice.below("first view", end - begin)]  # [B, V]
            camera = self.camera[which]
        posteriors = self.posteriors[kind]
        turn = dice.below("copy", len(posteriors))[:, None]
        posterior = posteriors[turn, which]  # [B, V, 2c, h, w]
        tokens = self.tokens[kind]
        wording = dice.below("wording", tokens.shape[1])
        noise = dice.normal("posterior", (*which.shape[1:], *noise_shape(posterior)))
        return sample_posterior(posterior, noise), tokens[items, wording], camera


def shown_of(count):
    """How many pictures of each kind are shown, of so many in all."""
    rendered = count * 3 // 4
    return {"objects": rendered, "images": count - rendered}


def noise_shape(posterior):
    """(c, h, w) of a posterior [..., 2c, h, w]."""
    channels, height, width = posterior.shape[-3:]
    return channels // 2, height, width


# ---- from files ------------------------------------------------------------------------------

class FromFiles:
    """Worker processes read and decode the pictures of every batch; the device encodes them."""

    def __init__(self, examples, model, workers, report):
        """examples: loader.Examples; report(batch) is told what was left out."""
        self.examples, self.model, self.workers = examples, model, workers
        self.report = report

    def compile_encoder(self):
        """See `model.compile_network`."""
        compile_network(self.model.vae.encoder)

    def stream(self, plan, phase, start):
        """rgba uint8 and, for the UNet, tokens [n, L] and of objects the camera [n, V, 16].

        For the autoencoder rgba is [n, 4, H, W]: V views of each object.
        """
        V = self.examples.views

        def wanted():
            for step, part in plan.parts(start):
                kind, places = plan.kinds[step], plan.places(step, part)
                if phase == "vae" and kind == "objects":
                    places = places[::V] // V
                yield Request(kind, tuple(places.tolist()))

        for batch in batches(self.examples, wanted(), self.workers):
            self.report(batch)
            yield self.tensors(batch, phase)

    def tensors(self, batch, phase):
        """What `stream` yields for a Batch."""
        if phase == "vae":
            return (batch.rgba.flatten(0, 1),)
        suffix = self.model.config.suffix if batch.kind == "objects" else ""
        tokens = self.model.text.tokenize([text + suffix for text in batch.captions])
        if batch.camera is None:
            return batch.rgba, tokens
        return batch.rgba, tokens, batch.camera

    def batch_of(self, items):
        """What `stream` yields for these objects."""
        examples = copy.copy(self.examples)
        examples.chosen = {"objects": items}
        return self.tensors(examples[Request("objects", tuple(range(len(items))))], "unet")

    def some_pictures(self, count):
        """Pictures to show, three quarters of them rendered: uint8 [count, 4, H, W]."""
        shown = []
        for kind, wanted in shown_of(count).items():
            if kind == "objects":
                wanted = -(-wanted // self.examples.views)  # whole sets
            if len(self.examples.chosen[kind]):
                batch = self.examples[Request(kind, tuple(range(wanted)))]
                shown.append(batch.rgba.flatten(0, 1))
        return torch.cat(shown)

    def deviation(self):
        """The standard deviation of some pictures' latents."""
        rgba = self.some_pictures(256).to(self.model.device)
        grey = torch.full((len(rgba),), 0.5, device=rgba.device)
        mean, _ = encode_posteriors(self.model.vae, rgba, grey).chunk(2, dim=1)
        return mean.float().std().item()

    def pictures(self, kind, rgba):
        """uint8 [n, 4, H, W]."""
        return rgba

    @torch.no_grad()
    def latents(self, kind, dice, rgba, tokens, camera=None):
        """z [B, V, c, h, w] unscaled, tokens [B, L], camera [B, V, 16] or None."""
        B, V = rgba.shape[:2]
        grey = dice.uniform("grey")[:, None].expand(B, V)
        posterior = posteriors_of(self.model.vae, rgba.flatten(0, 1), grey.flatten())
        posterior = posterior.unflatten(0, (B, V))
        noise = dice.normal("posterior", (V, *noise_shape(posterior)))
        return sample_posterior(posterior, noise), tokens, camera
