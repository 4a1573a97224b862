"""Worker processes that read and decode: batches for training, or everything once.

Which item stands at which place of the endless sequence, which of its wordings is taken, and where
its first view stands are functions of the seed and the place (`order.py`). So the batches are the
same for any number of workers, and a run goes on anywhere. Members that cannot be used are left
out and reported with each batch; another item takes the place, chosen by the same rule.

The processes are those of PyTorch's DataLoader.
"""
import atexit
import contextlib
import signal
import sys
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .. import cameras
from ..tools.cli import handlers
from ..tools.errors import BadMember, UserError
from .found import MOST_BAD
from .order import Dice, hashed, items_at
from .poses import view_sets

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# How many items are tried for one place before the run stops.
ATTEMPTS = 100
# Batches that wait for each worker's turn: one that takes long does not hold up the others.
PREFETCH = 3
# Images that are read at a time where everything is read.
AT_ONCE = 64
# How many names an error lists.
MOST_NAMES = 10


# ---- worker processes ------------------------------------------------------------------------

class Answers(Dataset):
    """The results of a function as a data set: its "indices" are the function's arguments.

    A UserError is returned, not raised: the DataLoader would add a traceback to its text.
    """

    def __init__(self, function):
        self.function = function

    def __getitem__(self, request):
        try:
            return self.function(request)
        except UserError as error:
            return error


def ignore_signals(_):
    """Ctrl-C and torchrun's SIGTERM reach the whole group: only the parent decides what ends.

    Workers end when it tells them to, or when it is gone. (The DataLoader sees to the latter, and
    lets each of them use one thread.)
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = silent_if_left


def silent_if_left(kind, error, trace):
    """Print an exception of a thread, but not that the parent has ended while it was served."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def unchanged(answer):
    return answer


def in_workers(function, requests, workers, *, context=None, pin=False):
    """The function's results for each of the requests, in their order: an iterator.

    workers: processes, which start at once and work ahead; 0: all is done here, when asked for.
    context: how processes start, "fork", "spawn" …; None: forked on Linux, where it is safe and
    quick, else the system's usual way. pin: put tensors where a GPU can fetch them.
    Raises UserError: the function's, or for a dead worker.
    """
    # A fork server, which newer Pythons on Linux use, would die of a SIGTERM to the whole group.
    context = context or ("fork" if sys.platform == "linux" else None)
    processes = {
        "worker_init_fn": ignore_signals,
        "multiprocessing_context": context,
        "prefetch_factor": PREFETCH,
    }
    loader = DataLoader(
        Answers(function), batch_size=None, sampler=requests, collate_fn=unchanged,
        num_workers=workers, pin_memory=pin,
        # Its own generator: the random numbers of the caller stay as they are.
        generator=torch.Generator(), **(processes if workers else {}),
    )
    with signals_wait():
        results = iter(loader)
        answers = watched(results)
        if workers:
            # Workers that ignore SIGTERM end only if they are told. Left to itself the DataLoader
            # does not tell them where the garbage collector has taken its queues first, nor at
            # exit before multiprocessing waits for them.
            end = weakref.finalize(answers, results._shutdown_workers)
            atexit.register(end)
    return answers


@contextlib.contextmanager
def signals_wait():
    """Within this context Ctrl-C and SIGTERM wait; processes that start in it never get them.

    Where a process forks, Python would swallow the exceptions that they raise. This thread blocks
    them, as its children then do; other threads still let them in, so they are noted, too.
    """
    came = []
    note = {number: lambda number, _: came.append(number) for number in SIGNALS}
    mask = getattr(signal, "pthread_sigmask", lambda *_: ())  # Windows has none
    with handlers(note):
        before = mask(getattr(signal, "SIG_BLOCK", 0), SIGNALS)
        try:
            yield
        finally:
            mask(getattr(signal, "SIG_SETMASK", 0), before)
    for number in came:
        signal.raise_signal(number)


def watched(results):
    """The results, with UserErrors raised; also one where a worker process has died."""
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise UserError(
                f"a process that reads data has died ({error}); most often memory ran out: use "
                "fewer workers or enlarge /dev/shm (docker run --shm-size)") from error
        if isinstance(result, UserError):
            raise result
        yield result


# ---- batches ---------------------------------------------------------------------------------

class Request(NamedTuple):
    """Examples that are wanted as one batch."""
    kind: str         # "objects" or "images"
    positions: tuple  # their places in that kind's endless sequence


@dataclass
class Batch:
    """n examples: V views of an object each, or one image each (V = 1)."""
    kind: str             # "objects" or "images"
    rgba: torch.Tensor    # uint8 [n, V, 4, H, W], straight alpha
    camera: torch.Tensor  # what the UNet is given: float32 [n, V, 16]; None for images
    captions: list        # n texts
    items: list           # n numbers: which objects or images they are
    left_out: list        # (name, reason, pictures) of what was tried but cannot be used
    tried: float          # pictures that were tried, those left out included

    def pin_memory(self):
        """The batch in memory that a GPU can copy from in the background (DataLoader calls it)."""
        self.rgba = self.rgba.pin_memory()
        if self.camera is not None:
            self.camera = self.camera.pin_memory()
        return self


class Examples(Dataset):
    """The examples of two endless sequences: `examples[Request(kind, positions)]` is a Batch.

    objects, images: from `find_objects` and `find_images`; None: there are none. size: of the
    square pictures, in pixels. views: V. bound: how many degrees a view may be from where an even
    set has it. chosen: {"objects": int64 tensor, "images": …}, the items that are used; all, where
    it says nothing.
    """

    def __init__(self, objects, images, *, size, views, bound, seed, chosen=None):
        self.objects, self.images = objects, images
        self.size, self.views, self.bound, self.seed = size, views, bound, seed
        counts = {"objects": len(objects or ()), "images": len(images or ())}
        every = {kind: torch.arange(count) for kind, count in counts.items()}
        self.chosen = every | (chosen or {})

    def __getitem__(self, request):
        kind, positions = request
        views = self.views if kind == "objects" else 1
        n = len(positions)
        rgba = torch.empty(n, views, 4, self.size, self.size, dtype=torch.uint8)
        camera = torch.empty(n, views, 16) if kind == "objects" else None
        batch = Batch(kind, rgba, camera, captions=[], items=[], left_out=[], tried=0)
        fill = self.fill_object if kind == "objects" else self.fill_image
        for k, (item, wording, first) in enumerate(self.draw(kind, torch.tensor(positions))):
            items = chain([item], self.others(kind, positions[k]))
            item, captions = self.take_usable(fill, items, batch, k, first)
            batch.items.append(item)
            batch.captions.append(captions[int(wording * len(captions))])
        return batch

    def draw(self, kind, positions):
        """What is random, for each place: (the item, two numbers in [0, 1))."""
        chosen = self.chosen[kind]
        dice = Dice(self.seed, kind, positions)
        items = chosen[items_at(len(chosen), hashed(self.seed, kind), positions)]
        drawn = items, dice.uniform("wording"), dice.uniform("first view")
        return zip(*(values.tolist() for values in drawn))

    def others(self, kind, position):
        """The items to try in turn at a place whose own one cannot be used."""
        chosen = self.chosen[kind]
        dice = Dice(self.seed, kind, torch.tensor([position]))
        places = dice.uniform("others", (ATTEMPTS - 1,))[0].double() * len(chosen)
        yield from chosen[places.long()].tolist()

    def take_usable(self, fill, items, batch, k, first):
        """Fill example k with the first of the items that can be used: (item, its captions).

        Raises UserError if none of them can.
        """
        known = len(batch.left_out)
        for item in items:
            captions = fill(item, batch, k, first)
            if captions:
                return item, captions
        raise UserError(
            f"of the {batch.kind}, {ATTEMPTS} in a row cannot be used: "
            f"{listed(batch.left_out[known:])}; look at them with `python -m mvd.data`")

    def fill_image(self, item, batch, k, _):
        """Read an image into example k: its captions, or [] if it cannot be used."""
        batch.tried += 1
        try:
            batch.rgba[k, 0] = torch.from_numpy(self.images.picture(item, self.size))
            return self.images.captions(item)
        except BadMember as error:
            batch.left_out.append((self.images.name(item), str(error), 1))
            return []

    def fill_object(self, item, batch, k, first):
        """Read V views of an object into example k: its captions, or [] if it cannot be used."""
        objects, views = self.objects, self.views
        try:
            rendered, captions = read_cameras(objects, item)
        except BadMember as error:
            batch.left_out.append((objects.name(item), str(error), views))
            batch.tried += views
            return []
        sets = view_sets(rendered.azimuth, rendered.elevation, views, self.bound)
        if not len(sets):
            batch.left_out.append(without_set(rendered, views, self.bound))
            return []
        which = sets[int(first * len(sets))]
        # V of its views are tried, so the bad ones among all are counted in that proportion.
        share = views / len(rendered.c2w)
        missing = missing_views(rendered, share)
        bad = read_views(objects, rendered, which.tolist(), batch.rgba[k])
        batch.left_out += missing + list(bad.values())
        batch.tried += views + share * len(missing)
        batch.camera[k] = cameras.extrinsics(rendered.c2w[which])
        return [] if bad else captions


def batches(examples, requests, workers, context=None):
    """A Batch for each of the requests, which may be endless, in their order. See `in_workers`."""
    pin = torch.cuda.is_available()
    return in_workers(examples.__getitem__, requests, workers, context=context, pin=pin)


# ---- the views of one object -----------------------------------------------------------------

def read_cameras(objects, item):
    """(Rendered, captions, at least one). Raises BadMember."""
    captions = objects.captions(item)
    if not captions:
        raise BadMember("no caption")
    return objects.read(item), captions


def read_views(objects, rendered, which, rgba):
    """Read the views `which` into rgba, uint8 [len(which), 4, H, W].

    Those that cannot be read come back as {place in `which`: (name, reason, 1)}.
    """
    bad = {}
    for place, view in enumerate(which):
        try:
            picture = objects.pictures(rendered, [view], rgba.shape[-1])
            rgba[place] = torch.as_tensor(picture[0])
        except BadMember as error:
            bad[place] = view_name(rendered, rendered.names[view]), str(error), 1
    return bad


def view_name(rendered, view):
    return f"{rendered.name}/{view}"


def missing_views(rendered, pictures=1):
    """The views that the object's own files rule out: [(name, reason, pictures)]."""
    return [(view_name(rendered, view), reason, pictures) for view, reason in rendered.left_out]


def without_set(rendered, views, bound):
    """What is said of an object that is not used, though its pictures are not bad: 0 of them."""
    reason = f"no {views} views within {bound:g}° of an even set"
    return rendered.name, reason, 0


# ---- everything in memory --------------------------------------------------------------------

@dataclass
class Held:
    """All pictures of a data set, for what fits into memory."""
    views: torch.Tensor      # of all objects, one after the other: uint8 [P, 4, H, W]
    camera: torch.Tensor     # what the UNet is given of each view: float32 [P, 16]
    sets: torch.Tensor       # which views make a set, as numbers of `views`: int64 [S, V]
    first_set: torch.Tensor  # object i has sets[first_set[i] : first_set[i + 1]]: int64 [N + 1]
    object_names: list       # N texts
    object_captions: list    # N lists of texts
    images: torch.Tensor     # uint8 [M, 4, H, W]
    image_names: list        # M texts
    image_captions: list     # M lists of texts
    left_out: list           # (name, reason, pictures): of views, objects and images


class Part(NamedTuple):
    """An object with the views that can be read, or some images: a part of a `Held`, or all."""
    rgba: torch.Tensor    # uint8 [n, 4, H, W]
    camera: torch.Tensor  # float32 [n, 16]; of images [0, 16]
    sets: torch.Tensor    # which views make a set, as numbers of rgba: int64 [S, V]
    names: list           # of the object or of the images; none if it cannot be used
    captions: list        # a list of texts for each name
    left_out: list        # (name, reason, pictures); of an object whose views are unknown None
    tried: int            # pictures that were to be read


def read_everything(objects, images, *, size, views, bound, workers, progress=None):
    """Read every view and every image once, in their order: Held. Arguments as for `Examples`.

    workers: as for `in_workers`. progress: a function, called with how many more pictures are done.
    Views that cannot be read are left out; their object stays as long as it has a set. Raises
    UserError if more than MOST_BAD of all pictures cannot be used.
    """
    objects, images = objects or (), images or ()
    read = partial(read_part, objects=objects, images=images, size=size, views=views, bound=bound)
    parts = in_workers(read, everything(len(objects), len(images)), workers)
    # How many views there are must be known before: what is held would else be copied once more.
    counts = [count for part in islice(parts, -(-len(objects) // AT_ONCE)) for count in part]
    rendered, first_set = collect(islice(parts, len(objects)), sum(counts), size, views, progress)
    single, _ = collect(parts, len(images), size, views, progress)

    # An object whose views nobody has seen counts as many as the others have.
    seen = [count for count in counts if count]
    usual = round(sum(seen) / len(seen)) if seen else views
    left_out = [(name, reason, usual if pictures is None else pictures)
                for name, reason, pictures in rendered.left_out + single.left_out]
    bad = sum(pictures for _, _, pictures in left_out)
    Tally(bad + len(rendered.rgba) + len(single.rgba)).add(left_out, tried=0)
    return Held(
        rendered.rgba, rendered.camera, rendered.sets, first_set, rendered.names,
        rendered.captions, single.rgba, single.names, single.captions, left_out,
    )


def everything(objects, images):
    """The requests for so many objects and images: how many views they have, then all else."""
    for kind, count, step in (
        ("counts", objects, AT_ONCE), ("objects", objects, 1), ("images", images, AT_ONCE)
    ):
        for start in range(0, count, step):
            yield Request(kind, tuple(range(start, min(start + step, count))))


def read_part(request, *, objects, images, size, views, bound):
    """The answer to a request of `everything`: a list of counts, or a Part."""
    kind, items = request
    if kind == "counts":
        return [count_views(objects, item) for item in items]
    if kind == "objects":
        return read_object(objects, items[0], size, views, bound)
    return read_images(images, items, size, views)


def count_views(objects, item):
    """How many views the object has; 0 if it cannot be used."""
    try:
        return len(objects.read(item).c2w)
    except BadMember:
        return 0


def read_object(objects, item, size, views, bound):
    """All views of an object that can be read, as a Part; an empty one if that has no set."""
    nothing = empty_part(0, size, views)
    try:
        rendered, captions = read_cameras(objects, item)
    except BadMember as error:
        return nothing._replace(left_out=[(objects.name(item), str(error), None)])
    count = len(rendered.c2w)
    rgba = torch.empty(count, 4, size, size, dtype=torch.uint8)
    bad = read_views(objects, rendered, range(count), rgba)
    left_out = missing_views(rendered) + list(bad.values())
    good = [view for view in range(count) if view not in bad]
    sets = view_sets(rendered.azimuth[good], rendered.elevation[good], views, bound)
    if not len(sets):
        left_out.append(without_set(rendered, views, bound))
        return nothing._replace(left_out=left_out, tried=count)
    camera = cameras.extrinsics(rendered.c2w[good])
    sets = torch.from_numpy(sets)
    return Part(rgba[good], camera, sets, [rendered.name], [captions], left_out, count)


def read_images(images, items, size, views):
    """The images that can be read, as a Part."""
    part = empty_part(len(items), size, views)
    for item in items:
        try:
            picture = images.picture(item, size)
            part.captions.append(images.captions(item))
        except BadMember as error:
            part.left_out.append((images.name(item), str(error), 1))
            continue
        part.rgba[len(part.names)] = torch.from_numpy(picture)
        part.names.append(images.name(item))
    return part._replace(rgba=part.rgba[:len(part.names)])


def empty_part(count, size, views):
    """A Part without names, with memory for `count` pictures."""
    rgba = torch.empty(count, 4, size, size, dtype=torch.uint8)
    sets = torch.empty(0, views, dtype=torch.int64)
    camera = torch.empty(0, 16)
    return Part(rgba, camera, sets, names=[], captions=[], left_out=[], tried=count)


def collect(parts, count, size, views, progress):
    """Parts, which have at most `count` pictures, as one: (Part, int64 [parts with names + 1]).

    The second says where each object's sets begin and end.
    """
    whole = empty_part(count, size, views)
    camera, sets, ends = [whole.camera], [whole.sets], [0]
    place = 0
    for part in parts:
        end = place + len(part.rgba)
        # What comes from a worker lies in shared memory, which is scarce: all of it is copied.
        whole.rgba[place:end] = part.rgba
        camera.append(part.camera.clone())
        sets.append(part.sets + place)
        ends += [ends[-1] + len(part.sets)] * len(part.names)
        whole.names.extend(part.names)
        whole.captions.extend(part.captions)
        whole.left_out.extend(part.left_out)
        place = end
        if progress:
            progress(part.tried)
    rgba = whole.rgba[:place]
    whole = whole._replace(rgba=rgba, camera=torch.cat(camera), sets=torch.cat(sets))
    return whole, torch.tensor(ends)


# ---- what was left out -----------------------------------------------------------------------

def listed(left_out):
    """Names with reasons, the first ten of them, in one line."""
    texts = [f"{name} ({reason})" for name, reason, _ in left_out[:MOST_NAMES]]
    more = len(left_out) - len(texts)
    return "; ".join(texts) + (f"; and {more} more" if more else "")


class Tally:
    """What was left out so far, each name once, and when that is too much.

    total: pictures of the whole data set.
    """

    def __init__(self, total):
        self.total = total
        self.tried = self.bad = 0  # pictures
        self.left_out = {}         # name: (name, reason, pictures)

    def add(self, left_out, tried):
        """Count what a Batch or a Held reports. Returns the entries with new names.

        Raises UserError if more than MOST_BAD of the pictures tried are bad. Of a large data set
        at least 1,000 count as tried: the first few prove nothing.
        """
        new = {entry[0]: entry for entry in left_out if entry[0] not in self.left_out}
        self.left_out |= new
        self.bad += sum(pictures for _, _, pictures in new.values())
        self.tried += tried
        # Bad ones count once, so what was tried again does not count, either.
        tried = min(self.total, max(self.tried, 1000))
        if self.bad > MOST_BAD * tried:
            entries = [entry for entry in self.left_out.values() if entry[2]]
            raise UserError(
                f"{self.bad:.0f} of {tried:.0f} pictures cannot be used, more than {MOST_BAD:.0%}: "
                f"{listed(entries)}; mend or remove them")
        return list(new.values())
