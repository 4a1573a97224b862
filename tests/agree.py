"""The comparison that the tests share: where numbers differ, it says so in words."""
import numpy as np
import torch


def agree(found, expected, what, hint="", *, rtol=0.0, atol=1e-5):
    """Raise AssertionError unless |found - expected| <= atol + rtol |expected| everywhere.

    found, expected: tensors, arrays or numbers; expected may be one number for all. The message
    names `what` was compared (with the equation), the greatest difference and its place; it says
    if all is off by one factor or by one number, and ends with the hint: the usual mistake.
    """
    found, expected = as_array(found), as_array(expected)
    if expected.ndim and found.shape != expected.shape:
        shapes = f"{list(found.shape)}, but it should be {list(expected.shape)}"
        raise AssertionError(with_hint(f"{what}: the shape is {shapes}", hint))
    expected = np.broadcast_to(expected, found.shape)
    allowed = atol + rtol * np.abs(expected)
    with np.errstate(invalid="ignore"):
        off = np.abs(found - expected)
    wrong = ~(off <= allowed) & (found != expected)
    if not wrong.any():
        return
    if np.isnan(found).any():
        count = np.isnan(found).sum()
        raise AssertionError(with_hint(f"{what}: {count} of {found.size} are not a number", hint))
    off = np.where(wrong, off, 0)
    place = np.unravel_index(off.argmax(), off.shape)
    at = f" at {[int(i) for i in place]}" if place else ""
    numbers = f"found {found[place]:.6g}, expected {expected[place]:.6g}"
    if f"{found[place]:.6g}" == f"{expected[place]:.6g}":
        numbers = f"found {found[place]:.6g}, off by {off[place]:.1g}: is something rounded"
        numbers += " to fewer digits than it was given with"
    words = f"{what}: {numbers}{at}"
    if found.size > 1:
        words += f"; {wrong.sum()} of {found.size} are off by more than {allowed[place]:.2g}"
        words += pattern(found, expected, off.max() / 100)
    raise AssertionError(with_hint(words, hint))


def near(found, expected, what, hint="", share=1e-4):
    """`agree` for what went through many layers: to a share of its root mean square."""
    size = np.sqrt(np.mean(as_array(expected) ** 2))
    agree(found, expected, what, hint, atol=share * size)


def as_array(values):
    """Numbers of any kind as a float64 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def with_hint(words, hint):
    """The words, and what the usual mistake is."""
    return f"{words}. {hint}" if hint else words


def pattern(found, expected, small):
    """What the numbers have in common, where that leaves differences below `small`: text, or ""."""
    factor = (found * expected).sum() / max((expected**2).sum(), 1e-30)
    if np.abs(found).max() <= small:
        return "; all are 0"
    if np.abs(found - factor * expected).max() <= small:
        return f"; all are {factor:.4g} times what is expected"
    offset = (found - expected).mean()
    if np.abs(found - expected - offset).max() <= small:
        return f"; all are {abs(offset):.4g} too {'large' if offset > 0 else 'small'}"
    return ""
