"""The judge: do pictures show what was asked for, from every side?

Pictures belong to the caption whose candidates (candidates.py) are nearest to them; no pretrained
network is needed. Beside every score stands its ceiling, the same score of real renders.
- R-precision: the share of sets of views that are nearest to the true caption among 64, half of
  which differ from it in one word (cf. DreamFusion §4, where CLIP is the judge).
- View accuracy: the share of views that are nearest to their own azimuth among the set's.
- Janus rate: the share of recognised things whose back looks more like a front than like a back.
- Variety: how far samples of one caption are apart, as a share of the same for real renders.
View accuracy and Janus rate count only things that have a front.
"""
import math

import torch

from ..toyworld import COLOURS, ORIENTED, Thing
from .candidates import (
    candidate_geometry,
    cut_out,
    error_by_azimuth,
    error_of_sets,
    paint_candidates,
    select,
)
from .things import distractors


def name_colours(views, things, cameras):
    """The M Things, but one whose colour is None gets the colour that fits its pictures best.

    views [M, V, 3, H, W] in [0, 1].
    """
    cutouts = cut_out(views)
    named = []
    for m, thing in enumerate(things):
        if thing.colour is None:
            buffers = candidate_geometry(thing, cameras, views.device)
            errors = {}
            for colour in COLOURS:
                candidates = paint_candidates(buffers, colour)
                errors[colour] = error_of_sets(select(cutouts, [m]), candidates).item()
            thing = thing._replace(colour=min(errors, key=errors.get))
        named.append(thing)
    return named


def judge_sets(views, things, cameras, seed=0, progress=iter):
    """Judge M sets of pictures, views [M, V, 3, H, W] in [0, 1], of M Things with a colour.

    All sets are seen from `cameras`. seed: of the distractors. progress: wraps the loop (tqdm).
    Returns one `verdict` per set. The plain form of what is computed here is a loop over m and k:
        errors[m, k] = error_of_sets(picture m, candidates of captions[m][k])
    but many captions are chosen several times, so the loop is over captions, and each is drawn
    once.
    """
    device = views.device
    cutouts = cut_out(views)
    # The true caption first.
    captions = [[thing, *distractors(thing, seed)] for thing in things]
    count = len(cameras.azimuth)
    errors = torch.zeros(len(things), len(captions[0]), device=device)
    # [M, view, azimuth]
    confusion = torch.zeros(len(things), count, count, device=device)

    wanted = where_wanted(captions)
    for (subject, accessory), colours in progress(list(wanted.items())):
        buffers = candidate_geometry(Thing(subject, accessory), cameras, device)
        for colour, places in colours.items():
            candidates = paint_candidates(buffers, colour)
            ms = [m for m, k in places]
            ks = [k for m, k in places]
            errors[ms, ks] = error_of_sets(select(cutouts, ms), candidates)
            own = [m for m, k in places if k == 0]
            if own and subject in ORIENTED:
                confusion[own] = error_by_azimuth(select(cutouts, own), candidates)

    verdicts = []
    for m in range(len(things)):
        verdicts.append(verdict(captions[m], errors[m], confusion[m], cameras))
    return verdicts


def where_wanted(captions):
    """Where each caption stands: {(subject, accessory): {colour: [(m, k), ...]}}.

    captions[m][k] are Things. Colours are inside, since one geometry serves all of them.
    """
    wanted = {}
    for m, choice in enumerate(captions):
        for k, (subject, accessory, colour) in enumerate(choice):
            colours = wanted.setdefault((subject, accessory), {})
            colours.setdefault(colour, []).append((m, k))
    return wanted


def verdict(captions, errors, confusion, cameras):
    """What is found out about one set of pictures, a dict:

    thing        the true Thing, captions[0]
    nearest      the Thing that the pictures look most like
    recognised   bool: are the two the same?
    right_views  the share of views that are nearest to their own azimuth, or None without a front
    janus        bool: is the back nearer to the front than to the back? Or None without a front

    errors [len(captions)]; confusion [V, V] (`error_by_azimuth` of the true Thing).
    """
    thing = captions[0]
    nearest = captions[errors.argmin()]
    right_views = janus = None
    if thing.subject in ORIENTED:
        right, is_janus = sides_and_janus(confusion[None], cameras)
        right_views = right.float().mean().item()
        janus = is_janus.item()
    return {
        "thing": thing,
        "nearest": nearest,
        "right_views": right_views,
        "janus": janus,
        "recognised": nearest == thing,
    }


def sides_and_janus(confusion, cameras):
    """From `error_by_azimuth` [M, V, V]: two tensors of bool.

    [M, V]: is a view nearest to its own azimuth? [M]: is the back of a set nearer to the front of
    the thing than to its back (a Janus face)? Front and back are the views nearest to 0 and 180
    degrees.
    """
    front = view_nearest_to(0, cameras)
    back = view_nearest_to(180, cameras)
    own = torch.arange(confusion.shape[1], device=confusion.device)
    right = confusion.argmin(2) == own
    janus = confusion[:, back, front] < confusion[:, back, back]
    return right, janus


def view_nearest_to(azimuth, cameras):
    """The index of the view whose azimuth is nearest to this one, in degrees."""
    apart = [abs((own - azimuth + 180) % 360 - 180) for own in cameras.azimuth]
    return apart.index(min(apart))


def summary(verdicts):
    """Means over verdicts of `judge_sets`, a dict: n, r_precision, view_accuracy, janus_rate.

    A mean is None where nothing counts: view_accuracy counts things with a front, janus_rate those
    of them that were recognised.
    """
    oriented = [v for v in verdicts if v["right_views"] is not None]
    return {
        "n": len(verdicts),
        "r_precision": mean([v["recognised"] for v in verdicts]),
        "view_accuracy": mean([v["right_views"] for v in oriented]),
        "janus_rate": mean([v["janus"] for v in oriented if v["recognised"]]),
    }


def mean(values):
    """The mean of a list of numbers, or None if it is empty."""
    return sum(values) / len(values) if values else None


def report_line(label, verdicts, real_verdicts):
    """A line of the result, a dict: the label's items, the pictures' scores, and their ceilings."""
    ours = summary(verdicts)
    real = summary(real_verdicts)
    return {
        **label,
        "n": ours["n"],
        "r_precision": ours["r_precision"],
        "ceiling": real["r_precision"],
        "view_accuracy": ours["view_accuracy"],
        "view_ceiling": real["view_accuracy"],
        "janus_rate": ours["janus_rate"],
        "janus_ceiling": real["janus_rate"],
    }


def variety(views):
    """Mean distance between any two of N sets [N, V, 3, H, W]: the root of the mean square.

    Their backgrounds are replaced by one grey first, so that they do not count.
    """
    cutouts = cut_out(views)
    pictures = torch.where(cutouts.foreground > 0, cutouts.rgb, 0.5).flatten(1)
    return torch.pdist(pictures).mean().item() / math.sqrt(pictures.shape[1])
