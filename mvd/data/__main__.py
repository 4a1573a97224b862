"""python -m mvd.data PATH...: what lies there, before anybody trains.

    python -m mvd.data data/toy             # what mvd.toyworld wrote
    python -m mvd.data renders photos.tar   # objects or images: which it is is found out
    python -m mvd.data renders --json       # a JSON object on one line for each path

Cameras and pictures are read as training reads them, so what is printed as left out is what
training will leave out.
"""
import argparse
import json
import os
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .. import cameras
from ..tools import cli
from ..tools.errors import BadMember, UserError
from .images import find_images
from .loader import in_workers
from .objects import NoObjects, convention_of, find_objects, reach_of, spread
from .poses import view_sets
from .shards import printable

# Of more pictures so many are looked at, evenly spread.
MOST_PICTURES = 20_000
# With fewer pictures, starting processes takes longer than decoding.
FEW_PICTURES = 500
# How many names are printed for each reason why something is left out.
MOST_NAMES = 5
# Bounds that are tried for objects without a set of views, in degrees.
BOUNDS = range(5, 181, 5)


# ---- looking ---------------------------------------------------------------------------------

class Seen(NamedTuple):
    """What is worth telling about one object."""
    views: int             # that can be used
    numbers: dict          # {"fov": [n], "elevations": [n], "distance": [n]}
    assumed: bool          # whether the field of view is the usual one, which no file says
    needed: float | None   # degrees within which it has a set of views; None: it has too few views
    reach: list            # how far what is seen reaches from the middle, of each view
    left_out: list         # (name, reason)


class Look:
    """look(i): an object as Seen, or an image as what is left out of it, [(name, reason)]."""

    def __init__(self, items, settings):
        self.items, self.settings = items, settings

    def object(self, i):
        """An object, all of whose pictures are decoded."""
        try:
            rendered = self.items.read(i)
        except BadMember as problem:
            return Seen(0, {}, False, None, [], [(self.items.name(i), str(problem))])
        left_out, good, reach = list(rendered.left_out), [], []
        for k, name in enumerate(rendered.names):
            try:
                picture, = self.items.pictures(rendered, [k], self.settings.size)
                reach.append(reach_of(picture))
                good.append(k)
            except BadMember as problem:
                left_out.append((name, str(problem)))
        numbers = {"fov": rendered.fov, "elevations": rendered.elevation,
                   "distance": rendered.distance}
        return Seen(
            len(good), {name: value[good].tolist() for name, value in numbers.items()},
            any(view.assumed for view in rendered.views),
            self.bound_for(rendered.azimuth[good], rendered.elevation[good]), reach,
            [(f"{rendered.name}/{name}", reason) for name, reason in left_out])

    def bound_for(self, azimuth, elevation):
        """The bound asked for, if there is a set of views within it; else the least that has one.

        None if there are too few views for any.
        """
        for bound in (self.settings.bound, *(b for b in BOUNDS if b > self.settings.bound)):
            if len(view_sets(azimuth, elevation, self.settings.views, bound)):
                return bound
        return None

    def image(self, i):
        """Whether an image and its captions can be read: [] or [(name, reason)]."""
        try:
            self.items.captions(i)
            self.items.picture(i, self.settings.size)
            return []
        except BadMember as problem:
            return [(self.items.name(i), str(problem))]


def look_at(function, items, pictures, name):
    """function(i) for each of the items, by all cores if there are many pictures."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = cores if pictures > FEW_PICTURES else 0
    results = in_workers(function, items, workers)
    return list(tqdm(results, total=len(items), desc=name, disable=None))


# ---- reports ---------------------------------------------------------------------------------

def report_on(path, settings):
    """What lies under a path: a dict, as --json prints it. Raises UserError."""
    try:
        objects, (found,) = find_objects(
            [path], captions=settings.captions, background=settings.background)
    except NoObjects as problem:
        return images_report(path, settings, problem)
    return objects_report(objects, found, settings)


def objects_report(objects, found, settings):
    """The report on rendered objects."""
    count = len(objects)
    some = spread(count, max(1, int(MOST_PICTURES / found.views)))
    seen = look_at(Look(objects, settings).object, some, len(some) * found.views, found.path)
    convention = convention_of(objects.settings[0])
    captions = [captions_of(objects, i) for i in some]
    within = [s.needed is not None and s.needed <= settings.bound for s in seen]
    bad = [entry for s in seen for entry in s.left_out]
    return {
        "path": found.path,
        "kind": "objects",
        "layout": found.layout,
        "convention": {
            "matrix": "world-to-camera" if convention.inverse else "camera-to-world",
            "axes": "opencv" if convention.opencv else "opengl",
        },
        "up": found.up,
        "objects": count,
        "images": 0,
        "looked_at": len(some),
        "pictures": sum(s.views for s in seen),
        "views": extremes([s.views for s in seen if s.views]),
        "fov": extremes([x for s in seen for x in s.numbers.get("fov", [])]),
        "fov_assumed": any(s.assumed for s in seen),
        "elevations": extremes([x for s in seen for x in s.numbers.get("elevations", [])]),
        "distance": extremes([x for s in seen for x in s.numbers.get("distance", [])]),
        "fill": median([x for s in seen for x in s.reach]),
        "fill_before": found.fill if found.cut else None,
        "captions": summary_of(captions),
        "usable_objects": sum(1 for texts, near in zip(captions, within) if texts and near),
        "within_bound": sum(within),
        "bounds": bounds_of(seen, settings.bound),
        "left_out": entries(found.path, [found], bad),
        "camera": first_camera(objects, some),
    }


def entries(path, founds, bad):
    """What is left out, for a report: at first sight, and (name, reason) when it was read.

    The names are below the path.
    """
    early = [entry[:2] for found in founds for entry in found.left_out]
    return [{"name": str(name).removeprefix(f"{path}/"), "reason": reason}
            for name, reason in (*early, *bad)]


def first_camera(objects, some):
    """The 16 numbers that the UNet is given of each view, of the first object that can be read."""
    for i in some:
        try:
            return cameras.extrinsics(objects.read(i).c2w).tolist()
        except BadMember:
            continue
    return None


def captions_of(objects, i):
    """The wordings of object i, [] if they cannot be read, which `find_objects` has reported."""
    try:
        return objects.captions(i)
    except BadMember:
        return []


def summary_of(captions):
    """Lists of wordings in figures, and the first as an example."""
    texts = [text for wordings in captions for text in wordings]
    return {"items": sum(map(bool, captions)), "wordings": len(texts),
            "example": texts[0] if texts else None}


def extremes(values):
    """[least, largest], or None of nothing."""
    return [min(values), max(values)] if values else None


def median(values):
    return float(np.median(values)) if values else None


def bounds_of(seen, bound):
    """{bound in degrees: how many more objects have a set within it} of larger bounds than this."""
    needed = sorted(s.needed for s in seen if s.needed is not None and s.needed > bound)
    return {str(b): sum(1 for n in needed if n <= b) for b in dict.fromkeys(needed)}


def images_report(path, settings, problem):
    """The report on captioned images. Raises UserError if there are none, either.

    problem: why the path holds no objects.
    """
    try:
        images, founds = find_images([path])
    except UserError as error:
        if "holds no rendered objects" not in str(problem):
            raise problem from None
        raise error from None
    some = spread(len(images), MOST_PICTURES)
    bad = look_at(Look(images, settings).image, some, len(some), str(path))
    good = [i for i, reasons in zip(some, bad) if not reasons]
    return {
        "path": str(path),
        "kind": "images",
        "layout": ", ".join(dict.fromkeys(found.layout for found in founds)),
        "convention": None,
        "up": None,
        "objects": 0,
        "images": len(images),
        "looked_at": len(some),
        "pictures": len(good),
        "views": None,
        "fov": None,
        "elevations": None,
        "captions": summary_of([images.captions(i) for i in good]),
        "left_out": entries(founds[0].path, founds, chain.from_iterable(bad)),
        "camera": None,
        "usable_objects": 0,
    }


# ---- for people ------------------------------------------------------------------------------

def print_report(report, settings):
    """Print a report as a table of a few lines."""
    print(f"{report['path']}: {report.get('kind', 'an error')}")
    lines = {"error": error_lines, "objects": object_lines, "images": image_lines}
    kind = "error" if "error" in report else report["kind"]
    for name, text in lines[kind](report, settings):
        print(printable(f"  {name:15}{text}"))
    for reason, names in reasons_of(report).items():
        more = f", … ({len(names)} in all)" if len(names) > MOST_NAMES else ""
        print(printable(f"    {reason}: {', '.join(names[:MOST_NAMES])}{more}"))


def error_lines(report, _):
    yield "error", report["error"]


def object_lines(report, settings):
    """(what, text) of a report on objects."""
    count, looked = report["objects"], report["looked_at"]
    axes = {"opengl": "OpenGL axes (x right, y up, looks along -z)",
            "opencv": "OpenCV axes (x right, y down, looks along +z)"}
    convention = report["convention"]
    yield "layout", report["layout"]
    yield "matrices", f"{convention['matrix']}, {axes[convention['axes']]}"
    yield "world", f"{report['up']} is up"
    some = f"; {looked} of them were looked at" if looked < count else ""
    yield "objects", f"{count}{some}; {report['usable_objects']} can be used"
    yield "views", between(report["views"], "", 0)
    assumed = ", assumed: no file says it" if report["fov_assumed"] else ""
    yield "field of view", between(report["fov"], "°", 1) + assumed
    yield "elevations", between(report["elevations"], "°", 1)
    yield "distance", between(report["distance"], "", 2)
    yield "captions", caption_line(report, "objects")
    if report["fill"] is not None:
        cut = report["fill_before"]
        cut = f" (cut out: {cut:.2f} in the files)" if cut is not None else ""
        yield "fill", f"{report['fill']:.2f} of the way from the middle to the border{cut}"
    more = [f"{n} more within {bound}°" for bound, n in report["bounds"].items()]
    yield "sets", (f"{report['within_bound']} of {looked} objects have {settings.views} views "
                   f"within {settings.bound:g}° of an even set"
                   + (f"; {more[0]}" if more else "")
                   + (f", {more[-1]} (--bound)" if len(more) > 1 else ""))
    yield "left out", left_out_line(report)


def image_lines(report, _):
    """(what, text) of a report on images."""
    count, looked = report["images"], report["looked_at"]
    some = f"; {looked} of them were looked at" if looked < count else ""
    yield "layout", report["layout"]
    yield "images", f"{count}{some}; {report['pictures']} of these can be used"
    yield "captions", caption_line(report, "images")
    yield "left out", left_out_line(report)


def between(limits, unit, digits):
    """Two numbers as "1 to 2°", equal ones as "1°"."""
    if limits is None:
        return "-"
    low, high = (f"{value:.{digits}f}" for value in limits)
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def caption_line(report, what):
    captions = report["captions"]
    example = f"; for example {captions['example']!r}" if captions["example"] else ""
    return f"{captions['items']} {what} have one, {captions['wordings']} wordings{example}"


def left_out_line(report):
    return f"{len(report['left_out'])}{', because of' if report['left_out'] else ''}"


def reasons_of(report):
    """{reason: names} of what is left out, the commonest first."""
    reasons = {}
    for entry in report.get("left_out", ()):
        reasons.setdefault(entry["reason"], []).append(entry["name"])
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


# ---- the command -----------------------------------------------------------------------------

def parts_of(path):
    """The path, or the two folders in it that mvd.toyworld writes: [text]."""
    parts = [Path(path) / name for name in ("sets", "images")]
    if all(map(os.path.isdir, parts)) and not (Path(path) / "index.jsonl").exists():
        return [str(part) for part in parts]
    return [path]


def in_one(path, reports):
    """The reports on the parts of a path as one: that on objects, and in it that on images."""
    if len(reports) == 1:
        return reports[0]
    objects, images = reports
    both = {**objects, "path": path, "images": images.get("images", 0), "of_images": images}
    if "error" in images:
        both.setdefault("error", images["error"])
    return both


def read_flags(argv):
    """The settings on the command line."""
    parser = cli.Parser(
        prog="python -m mvd.data", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    count = cli.converter(int, {"min": 1})
    add("paths", nargs="+", metavar="PATH",
        help="folders, .tar files or patterns with rendered objects or captioned images")
    add("--captions", nargs="+", default=[], metavar="FILE",
        help="tables with captions of objects: .csv, .tsv or .json")
    add("--background", metavar="COLOUR",
        help="what is background in pictures without alpha: white, black, grey or r,g,b")
    add("--views", type=count, default=cameras.VIEWS, metavar="N",
        help=f"views of a set (default: {cameras.VIEWS})")
    add("--bound", type=cli.converter(float, {"min": 0, "max": 180}), default=30.0, metavar="X",
        help="how many degrees a view may be from where an even set has it (default: 30)")
    add("--size", type=count, default=256, metavar="N",
        help="pixels along a side, to which pictures are decoded (default: 256)")
    add("--json", action="store_true",
        help="print one JSON object on one line for each path, and nothing else")
    return parser.parse_args(argv)


def main(argv=None):
    """The command: print a report for each path. Raises UserError, the first one's, at the end."""
    settings = read_flags(argv)
    errors = []
    for path in settings.paths:
        reports = []
        for part in parts_of(path):
            try:
                report = report_on(part, settings)
            except (UserError, PermissionError) as error:
                errors.append(error)
                report = {"path": part, "error": " ".join(str(error).split())}
            reports.append(report)
            if not settings.json:
                print_report(report, settings)
        if settings.json:
            print(json.dumps(in_one(path, reports)), flush=True)
    if errors:
        raise errors[0]


if __name__ == "__main__":
    cli.main(main)
