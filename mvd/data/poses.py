"""Cameras of other people's renders: whose axes, which way is up, where the object is.

Inside this project a camera is a camera-to-world matrix with OpenGL axes in a world whose z is up
and whose origin is the object (cameras.py). On disks lie four kinds of matrices, of which nothing
in a file says which it is: camera-to-world or its inverse, OpenGL or OpenCV axes. A network that is
trained on the wrong kind learns cameras that mean nothing, and no error is raised.

But cameras round an object look at it, and only the right reading of the matrices shows that:

    as they are                 as their inverse             with the other axes

        o                       o o o o                              o
     o  x  o                    all stand at one place, or        o  x  o
        o                       round a point far from the           o
    all look at x,              origin                       all look away from x
    which is near the origin

The words "convention" for the kind, "reading" for matrices taken as of one kind, are used below.
Everything is computed in float64 with numpy. Angles are in degrees.
"""
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from ..tools.errors import BadMember, UserError
from .found import MOST_BAD


class Convention(NamedTuple):
    """What the matrices of a data set are; str() says it in words."""
    inverse: bool  # world-to-camera
    opencv: bool   # camera axes: x right, y down, looks along +z

    def __str__(self):
        way = "world-to-camera" if self.inverse else "camera-to-world"
        if self.opencv:
            return f"{way}, OpenCV axes (x right, y down, looks along +z)"
        return f"{way}, OpenGL axes (x right, y up, looks along -z)"


# The likelier ones first: NeRF and TRELLIS, Zero-1-to-3, G-Objaverse.
CONVENTIONS = [
    Convention(inverse=False, opencv=False),
    Convention(inverse=True, opencv=False),
    Convention(inverse=False, opencv=True),
    Convention(inverse=True, opencv=True),
]


# ---- matrices --------------------------------------------------------------------------------


def checked(matrices):
    """The matrices as float64 [..., 4, 4], if they are rigid motions; a last row is added.

    matrices: numbers [..., 3 or 4, 4]. Raises BadMember if the shape is another, a number is not
    finite, or the 3x3 part is no rotation (but for one scale).
    """
    try:
        matrices = np.array(matrices, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadMember("the matrix does not consist of numbers") from error
    if matrices.shape[-2:] not in [(3, 4), (4, 4)]:
        shape = "x".join(str(side) for side in matrices.shape[-2:])
        raise BadMember(f"the matrix is {shape or 'one number'}, not 3x4 or 4x4")
    last = np.array([0.0, 0.0, 0.0, 1.0])
    if matrices.shape[-2] == 3:
        rows = np.broadcast_to(last, matrices.shape[:-2] + (1, 4))
        matrices = np.concatenate([matrices, rows], -2)
    # What is as large as this would overflow below.
    if not (np.abs(matrices) < 1e12).all():
        raise BadMember("the matrix holds NaN, infinity or senseless numbers")

    if np.abs(matrices[..., 3, :] - last).max(initial=0) > 1e-3:
        if np.abs(matrices[..., :, 3] - last).max() < 1e-3:
            raise BadMember("the matrix looks transposed: its last column, "
                            "not its last row, is 0 0 0 1")
        raise BadMember("the last row of the matrix is not 0 0 0 1")
    axes = matrices[..., :3, :3]
    products = axes.swapaxes(-1, -2) @ axes
    scale = np.trace(products, axis1=-2, axis2=-1) / 3    # squared
    if (scale < 1e-12).any():
        raise BadMember("the rotation of the matrix is zero")
    if np.abs(products / scale[..., None, None] - np.eye(3)).max(initial=0) > 0.02:
        raise BadMember("the rotation of the matrix is not orthonormal")
    if (np.linalg.det(axes) < 0).any():
        raise BadMember("the rotation of the matrix is mirrored (left-handed axes)")
    return matrices


def to_c2w(matrices, convention):
    """Camera-to-world matrices with OpenGL axes, float64 [..., 4, 4]; rotations orthonormal.

    matrices [..., 3 or 4, 4] of the convention. Raises BadMember as `checked` does, for all
    matrices together: give one at a time to know which.
    """
    c2w = converted(checked(matrices), convention.inverse)
    return c2w * OTHER_AXES if convention.opencv else c2w


# What turns OpenGL axes of cameras into OpenCV's, and back.
OTHER_AXES = np.array([1, -1, -1, 1])


def converted(matrices, inverse):
    """Matrices that `checked` has returned, or their inverses; rotations orthonormal."""
    c2w = np.linalg.inv(matrices) if inverse else matrices.copy()
    u, _, v = np.linalg.svd(c2w[..., :3, :3])
    c2w[..., :3, :3] = u @ v
    return c2w


def usable(matrices):
    """The rows of one object's matrices that are rigid motions.

    Returns (float64 [n, 4, 4], their numbers [n], {number of another row: why it is none}).
    Raises BadMember, the first row's, if there is none.
    """
    if not len(matrices):
        raise BadMember("there is no matrix")
    try:
        good = checked(matrices)
        return good, np.arange(len(good)), {}
    except BadMember as error:
        first = error
    good, reasons = {}, {}
    for number, matrix in enumerate(matrices):
        try:
            good[number] = checked(matrix)
        except BadMember as error:
            reasons[number] = str(error)
    if not good:
        raise first
    return np.stack(list(good.values())), np.array(list(good)), reasons


# ---- what the cameras look at ----------------------------------------------------------------

# Steps of reweighting. Each makes lines that pass far away count less.
REWEIGHTINGS = 10
# Draws to the origin, so weakly that it decides only where axes are parallel or there is one.
TO_ORIGIN = 1e-9


def nearest_point(c2w):
    """The point [3] nearest to the optical axes of c2w [n, 4, 4], and how well it is determined.

    The sum of the distances (not of their squares: a few wrong cameras do not move it) is
    smallest. The second, a matrix [3, 3], is the mean over the axes b of I - b bᵀ: its smallest
    eigenvalue is 0 if all axes are parallel.
    """
    position = c2w[:, :3, 3]
    backward = c2w[:, :3, 2]
    along = (position * backward).sum(1, keepdims=True)
    foot = position - along * backward    # of the perpendicular from the origin
    weights = np.ones(len(c2w))
    point = np.full(3, np.inf)
    for _ in range(REWEIGHTINGS):
        before = point
        weights = weights / weights.sum()
        curvature = np.eye(3) - (weights * backward.T) @ backward
        point = np.linalg.solve(curvature + TO_ORIGIN * np.eye(3), weights @ foot)
        offset = position - point
        squared = (offset ** 2).sum(1)
        distance = np.sqrt(median(squared))
        if np.abs(point - before).max() <= 1e-9 * distance:
            break
        miss = np.sqrt(np.maximum(squared - (offset * backward).sum(1) ** 2, 0))
        # Below 2% all lines count alike, as in least squares.
        weights = 1 / np.maximum(miss, 0.02 * distance + 1e-12)
    return point, curvature


def median(values):
    """The middle one of values [n], the larger of two; for so few far quicker than np.median."""
    return np.sort(values)[len(values) // 2]


def facing(c2w, point):
    """The cosine [n] between what a camera turns its back to and where it stands, from the point.

    1: it looks at the point; -1: it looks away from it; 0 also if it stands on it.
    """
    offset = c2w[:, :3, 3] - point
    distance = np.linalg.norm(offset, axis=1)
    along = (offset * c2w[:, :3, 2]).sum(1)
    return along / np.maximum(distance, 1e-9)


# A camera looks at the object if it is aimed within 35 degrees, and does not if beyond 60.
AIMED = np.cos(np.deg2rad(35))
ASTRAY = np.cos(np.deg2rad(60))


def meeting_points(c2w):
    """Points [3] that the cameras may look at: where their axes meet, and the origin, for cameras
    that are so close together that their axes meet where they stand."""
    return [nearest_point(c2w)[0], np.zeros(3)]


# ---- which convention ------------------------------------------------------------------------

# A reading fits an object if this share of its views looks at one point.
MOST_VIEWS = 0.85
# One reading must be this many times likelier than another. The inverses of cameras round a point
# (0, 0, h) at distance d are cameras round (0, 0, -d) at distance h: with h near d it is a tie.
TIE = 1.5


def recognise(objects, *, expected=None):
    """The convention of the matrices of a data set.

    objects: a list of (name, matrices [n, 3 or 4, 4]); rows that are no rigid motions are passed
    over. expected: the convention that the layout usually has; it decides where the cameras do
    not, as for photographs that were begun at the origin. Raises UserError if the objects
    contradict each other, if the views of one do, or if no convention fits; up to 5% of the
    objects may differ.
    """
    fits, unfit, reasons = {}, {}, {}
    for name, matrices in objects:
        try:
            rows, numbers, _ = usable(matrices)
        except BadMember as error:
            reasons[name] = str(error)
            continue
        found = costs_of(readings(rows))
        if found:
            fits[name] = found
        else:
            unfit[name] = rows, numbers
    if not fits and not unfit:
        name, reason = next(iter(reasons.items()), ("the data set", "there is no matrix"))
        raise UserError(f"no camera can be read: {name}: {reason}; write matrices of "
                        "camera-to-world or world-to-camera, 3x4 or 4x4")
    if len(unfit) > MOST_BAD * len(objects):
        name = next(iter(unfit))
        raise UserError(why_unfit(name, *unfit[name]))

    accepted = {name: like_best(found) for name, found in fits.items()}
    best = max(CONVENTIONS, key=lambda one: rank(one, fits, accepted, expected))
    others = [name for name, found in accepted.items() if best not in found]
    if len(others) > MOST_BAD * len(objects):
        raise UserError(contradiction(best, fits, others))
    return best


class Reading(NamedTuple):
    """An object's matrices, taken as of one convention."""
    unlikely: float
    c2w: np.ndarray     # [n, 4, 4]
    facing: np.ndarray  # [n], the point that they look at


def readings(matrices, ways=(False, True)):
    """{convention: Reading} of the conventions that fit an object's matrices [n, 4, 4].

    matrices: as `usable` returns them. ways: whether their inverses are taken; both are tried.
    """
    found = {}
    for inverse in ways:
        c2w = converted(matrices, inverse)
        # With the other axes they are the same points: a camera looks along the same line.
        points = meeting_points(c2w)
        cosines = [facing(c2w, point) for point in points]
        for opencv, sign in [(False, 1), (True, -1)]:
            each = [Reading(unlikely(c2w, point, sign * cosine), c2w, sign * cosine)
                    for point, cosine in zip(points, cosines)]
            best = min(each, key=lambda reading: reading.unlikely)
            if best.unlikely < np.inf:
                if opencv:
                    best = best._replace(c2w=c2w * OTHER_AXES)
                found[Convention(inverse, opencv)] = best
    return found


def taken_as(matrices, convention):
    """An object's cameras, c2w [n, 4, 4], and which of them are astray, bool [n].

    matrices: as `usable` returns them, of the convention. Those astray do not look at what most
    look at, or stand on it: after `recognise` these are views with a wrong matrix. Raises
    BadMember if most look at nothing, or if the matrices are clearly of another convention.
    """
    way = convention.inverse
    found = readings(matrices, [way])
    if convention in found:
        reading = found[convention]
        # The inverses' up axes are rows. Mostly their roll alone makes them less likely.
        least = {**costs_of(found), None: roll_of(reading.c2w[:, 1, :3])}
        if convention in like_best(least):
            return reading.c2w, reading.facing < ASTRAY
    costs = costs_of(found | readings(matrices, [not way]))
    if not costs:
        raise BadMember("its cameras do not look at one point, however its matrices are read")
    if convention not in like_best(costs):
        likeliest = min(costs, key=costs.get)
        raise BadMember(
            f"its matrices look like {likeliest}; those of the other objects are {convention}")
    return reading.c2w, reading.facing < ASTRAY


def costs_of(found):
    """{convention: how unlikely it is} of what `readings` returns."""
    return {convention: reading.unlikely for convention, reading in found.items()}


def unlikely(c2w, point, cosine):
    """0 for level cameras round the origin that are well aimed at it; inf if they do not look at
    the point. It grows with the point's distance from the origin, in camera distances, with the
    errors of aim, in radians, and with roll. cosine [n]: as `facing` has it."""
    if (cosine > AIMED).mean() < MOST_VIEWS:
        return np.inf
    distance = median(np.linalg.norm(c2w[:, :3, 3] - point, axis=1))
    off = np.linalg.norm(point) / distance
    error = np.arccos(cosine.clip(-1, 1)).mean()
    return off + error + roll_of(c2w[:, :3, 1])


def roll_of(up):
    """How unlikely cameras are because they roll: 0 if their up axes [n, 3] agree, up to 0.2.

    Read the wrong way, a turntable's cameras stand still and roll.
    """
    return 0.2 * (1 - np.linalg.norm(up.mean(0)))


def like_best(found):
    """The conventions of {convention: how unlikely} that cannot be told apart."""
    limit = TIE * min(found.values()) + 0.01
    return {one for one, cost in found.items() if cost <= limit}


def rank(convention, fits, accepted, expected):
    """How well a convention does over all objects; the largest is the best. The tuple's parts
    count in their order: objects that accept it, what is expected, how likely it is."""
    votes = sum(convention in found for found in accepted.values())
    costs = [found[convention] for found in fits.values() if convention in found]
    return votes, convention == expected, -np.median(costs) if costs else -np.inf


def some(names):
    """The first three of the names, as a text."""
    text = ", ".join(str(name) for name in names[:3])
    return text + (f", … ({len(names)} in all)" if len(names) > 3 else "")


def contradiction(best, fits, others):
    """The message for objects of several conventions; `others` do not fit the best."""
    groups = {best: [name for name in fits if name not in others]}
    for name in others:
        likeliest = min(fits[name], key=fits[name].get)
        groups.setdefault(likeliest, []).append(name)
    looks = [f"{some(names)}: {convention}" for convention, names in groups.items()]
    return ("the objects' matrices contradict each other: " + "; ".join(looks)
            + "; convert some of them, or give each kind as a data set of its own")


def why_unfit(name, matrices, numbers):
    """The message for an object that fits no convention. numbers [n]: the views' own ones."""
    groups = by_convention(matrices)
    if len(groups) > 1:
        looks = []
        for convention, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
            looks.append(f"views {some(list(numbers[rows]))}: {convention}")
        return (f"{name}: the views' matrices contradict each other: " + "; ".join(looks)
                + " (counted from 0); take out or convert the fewer")
    return (f"{name}: its cameras do not look at one point, however the matrices are read (from "
            "or to the world, OpenGL or OpenCV axes); cameras round an object are needed that "
            "look at it, not ones that look outward or all in one direction")


def by_convention(matrices):
    """{convention: row numbers} if nearly every view of [n, 4, 4] fits one by itself; else {}."""
    for inverse in [False, True]:
        # With the other axes a camera looks the other way along the same line.
        c2w = to_c2w(matrices, Convention(inverse, opencv=False))
        cosine = facing(c2w, nearest_point(c2w)[0])
        if (np.abs(cosine) > AIMED).mean() >= MOST_VIEWS:
            return {
                Convention(inverse, opencv=False): np.flatnonzero(cosine > 0),
                Convention(inverse, opencv=True): np.flatnonzero(cosine <= 0),
            }
    groups = defaultdict(list)
    for row, matrix in enumerate(matrices):
        for convention in CONVENTIONS:
            c2w = to_c2w(matrix[None], convention)
            if facing(c2w, np.zeros(3))[0] > AIMED:
                groups[convention].append(row)
                break
    seen = sum(len(rows) for rows in groups.values())
    return groups if seen >= MOST_VIEWS * len(matrices) else {}


# ---- which way is up -------------------------------------------------------------------------

# {axis that is up: rotation of the world that turns it to z}, the likelier first.
TURNS = {
    "z": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    "-y": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "-z": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
    "x": [[0, 0, -1], [0, 1, 0], [1, 0, 0]],
    "-x": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
}
# Cameras are level about an axis if their right axes stray from its plane by less than this
# (root mean square): 8.6 degrees of roll.
LEVEL = 0.15


def upright(cameras):
    """Which axis of the world is up: (rotation float64 [3, 3] that turns it to z, its name).

    cameras: a list of c2w [n, 4, 4] of all objects that share a world. Cameras have no roll about
    the up axis. The first in the order of TURNS about which most objects are level and clearly
    upright is taken; if there is none, the one that their up axes agree with best. Apply the
    rotation from the left: rotation @ c2w[:, :3].
    """
    rolls, upness = np.median([about_axes(c2w) for c2w in cameras], axis=0)
    level = dict(zip(TURNS, rolls < LEVEL))
    upness = dict(zip(TURNS, upness))
    # 0.3: cameras that look down from 70 degrees on the average.
    fits = [name for name in TURNS if level[name] and upness[name] > 0.3]
    if not fits:
        steep = [name for name in TURNS if level[name] and upness[name] > 1e-3]
        fits = sorted(steep or TURNS, key=lambda name: -upness[name])
    return np.array(TURNS[fits[0]], dtype=np.float64), fits[0]


def about_axes(c2w):
    """How cameras c2w [n, 4, 4] stand about the axes of TURNS: float64 [2, 6].

    How far their right axes stray from its plane (root mean square), and how much their up axes
    agree with it (mean cosine).
    """
    axes = np.array([turn[2] for turn in TURNS.values()], dtype=np.float64).T
    c2w = np.asarray(c2w)
    right, up = c2w[:, :3, 0] @ axes, c2w[:, :3, 1] @ axes
    return np.array([np.sqrt(np.mean(right ** 2, 0)), up.mean(0)])


def other_up(c2w, axis):
    """The name of the axis that is clearly up for cameras c2w [n, 4, 4] instead of `axis`, or None.

    They are level about it, but not about `axis`, or they hang upside down. Where cameras roll
    about every axis, none is clear.
    """
    rolls, upness = about_axes(c2w)
    ours = list(TURNS).index(axis)
    if rolls[ours] < 2 * LEVEL and upness[ours] > -0.3:
        return None
    clear = np.where(rolls < LEVEL, upness, 0)
    best = clear.argmax()
    return list(TURNS)[best] if clear[best] > 1e-3 else None


def check_up(objects, axis):
    """Raises UserError if another axis is up in more than 5% of objects [(name, c2w)]."""
    groups = {}
    for name, c2w in objects:
        groups.setdefault(other_up(c2w, axis) or axis, []).append(name)
    others = sum(len(names) for other, names in groups.items() if other != axis)
    if others > MOST_BAD * len(objects):
        looks = [f"{other} is up in {some(names)}" for other, names in groups.items()]
        raise UserError(
            "the objects' worlds contradict each other: " + "; ".join(looks)
            + "; turn some of them, or give each kind as a data set of its own")


# ---- where the object is, and from where it is seen ------------------------------------------


def centre(c2w):
    """c2w [n, 4, 4] with the point that all cameras look at moved to the origin.

    Unchanged if the point is there within 2% of the cameras' distance, or is not determined: one
    view, or axes that are parallel but for their errors of aim.
    """
    point, curvature = nearest_point(c2w)
    offset = c2w[:, :3, 3] - point
    distance = median(np.linalg.norm(offset, axis=1))
    aim = 1 - median(facing(c2w, point)) ** 2    # squared sine of the usual error of aim
    determined = np.linalg.eigvalsh(curvature)[0] > max(4 * aim, 1e-3)
    if not determined or np.linalg.norm(point) <= 0.02 * distance:
        return c2w
    moved = c2w.copy()
    moved[:, :3, 3] = offset
    return moved


def angles(c2w):
    """From where cameras c2w [n, 4, 4] see the origin: azimuth, elevation, distance, each [n].

    The azimuth is in [0, 360), 0 on +x and 90 on +y. A camera straight above or below has the
    azimuth of its up direction, as in cameras.orbit.
    """
    x, y, z = c2w[:, :3, 3].T
    flat = np.hypot(x, y)
    distance = np.hypot(flat, z)
    pole = flat <= 1e-6 * distance
    right = c2w[:, :3, 0]
    x = np.where(pole, right[:, 1], x)
    y = np.where(pole, -right[:, 0], y)
    azimuth = np.rad2deg(np.arctan2(y, x)) % 360
    azimuth[azimuth == 360] = 0  # a tiny negative angle
    elevation = np.rad2deg(np.arctan2(z, flat))
    return azimuth, elevation, distance


def directions(azimuth, elevation):
    """Unit vectors [..., 3] from the object to where cameras stand."""
    azimuth = np.deg2rad(azimuth)
    elevation = np.deg2rad(elevation)
    flat = np.cos(elevation)
    vector = [flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)]
    return np.stack(np.broadcast_arrays(*vector), -1)


def view_sets(azimuth, elevation, views, bound=30.0):
    """Sets of views that surround the object at one elevation: int64 [S, views].

    azimuth, elevation [n]. Each view in turn is the first of a set. The others are wanted at its
    elevation and at its azimuth + k·360/views; for k = 1, 2, … in turn the nearest view that the
    set does not have yet is taken (so a later one may get its next best although an exchange
    would be better). Sets whose worst view is more than `bound` degrees of a great circle from
    where it is wanted are left out. Row by row in the order of the first views.
    """
    azimuth = np.asarray(azimuth, dtype=np.float64)
    elevation = np.asarray(elevation, dtype=np.float64)
    n = len(azimuth)
    if n < views:
        return np.zeros((0, views), dtype=np.int64)
    first = np.arange(n)
    taken = np.eye(n, dtype=bool)
    worst = np.zeros(n)
    chosen = [first]
    places = directions(azimuth, elevation)
    for k in range(1, views):
        wanted = directions(azimuth + k * 360 / views, elevation)
        cosine = (wanted @ places.T).clip(-1, 1)
        # Rounded, so that equal angles are equal on every machine: the first view is taken.
        away = np.rad2deg(np.arccos(cosine)).round(4)  # [n, n]
        away[taken] = np.inf
        nearest = away.argmin(1)
        worst = np.maximum(worst, away[first, nearest])
        taken[first, nearest] = True
        chosen.append(nearest)
    return np.stack(chosen, 1)[worst <= bound + 1e-4]
