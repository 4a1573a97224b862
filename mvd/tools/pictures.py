"""Pictures of a run: sheets of images, PNG files, the turntable, depth and normals in colour, and charts.

Images are tensors [3, H, W] in [0, 1] with the top row first; files are written whole or not at all (`files.py`).
"""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import write_atomic


def grid(images, columns):
    """Images [N, 3, H, W] row by row on a white sheet, two pixels apart: [3, H', W']."""
    count, _, height, width = images.shape
    sheet = images.new_ones(3, -(-count // columns) * (height + 2) - 2, columns * (width + 2) - 2)
    for i, image in enumerate(images):
        y, x = i // columns * (height + 2), i % columns * (width + 2)
        sheet[:, y:y + height, x:x + width] = image
    return sheet


def to_pil(image):
    """[3, H, W] or [H, W] in [0, 1], clamped -> a Pillow picture."""
    pixels = (image.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte()
    return Image.fromarray((pixels.permute(1, 2, 0) if pixels.dim() == 3 else pixels).contiguous().numpy())


def save_png(path, image):
    """image: [3, H, W] or [H, W] (grey) in [0, 1], what lies outside is clamped; written in one stroke."""
    write_atomic(path, lambda file: to_pil(image).save(file, "PNG"))


def save_turntable(path, frames, seconds=4.0):
    """frames [N, 3, H, W] in [0, 1] -> an animated WebP that plays them once in `seconds`, for ever."""
    # WebP: all browsers and Pillow wheels know it; GIF has 256 colours (bands in the shading), APNG is 7 times larger.
    ends = np.round(np.arange(len(frames) + 1) * 1000 * seconds / len(frames)).astype(int)
    first, *others = [to_pil(frame) for frame in frames]
    write_atomic(path, lambda file: first.save(file, "WEBP", save_all=True, append_images=others, loop=0, quality=90,
                                               duration=np.diff(ends).tolist()))


def depth_picture(depth, opacity):
    """Near is pale, far is dark, nothing is white. depth [..., 1, H, W]: mean distance along the ray of what is seen;
    opacity [..., 1, H, W] in [0, 1]. Nearest and farthest are those of all views together.
    Returns [..., 3, H, W] in [0, 1]."""
    solid = depth[opacity > 0.5]
    near, far = (solid.min(), solid.max()) if solid.numel() else (0.0, 1.0)
    ramp = torch.tensor([[1.0, 0.93, 0.68], [0.96, 0.62, 0.36], [0.75, 0.29, 0.44], [0.40, 0.15, 0.47],
                         [0.08, 0.07, 0.25]], device=depth.device)                          # [5, 3]
    place = ((depth - near) / (far - near + 1e-6)).clamp(0, 1).squeeze(-3) * 4              # [..., H, W]
    low = place.long().clamp(max=3)
    rgb = torch.lerp(ramp[low], ramp[low + 1], (place - low)[..., None]).movedim(-1, -3)
    return 1 - opacity + opacity * rgb


def normal_picture(normal, opacity):
    """normal [..., 3, H, W]: unit vectors in the world, x, y, z as red, green, blue; opacity [..., 1, H, W] in
    [0, 1], nothing is white. Returns [..., 3, H, W] in [0, 1]."""
    return 1 - opacity + opacity * (normal + 1) / 2


COLOURS = ["#2563a8", "#d9622b", "#2e8b57", "#9b3d8f", "#b8860b", "#5a5a5a"]      # of the lines of a chart, six at most


def _ticks(low, high, log_scale):
    """Round numbers for an axis from low to high (log10 of the values if log_scale): [(position, text), ...]."""
    if log_scale and high - low > 0.7:
        steps = (1, 2, 5) if high - low < 3 else (1,)
        positions = [e + math.log10(m) for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
        return [(p, f"{10 ** p:.4g}") for p in positions if low <= p <= high]
    ends = (10 ** low, 10 ** high) if log_scale else (low, high)
    rough = (ends[1] - ends[0]) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    values = [i * step for i in range(math.ceil(ends[0] / step - 1e-6), math.floor(ends[1] / step + 1e-6) + 1)]
    return [(math.log10(v) if log_scale else v, f"{v:,.6g}") for v in values]


def save_curve(path, series, xlabel="step", ylabel="loss", log_scale=False, width=900, height=480):
    """A line chart as PNG, written in one stroke.

    series: {name: [(x, y), ...]}, six at most, with x ascending, drawn as measured (pale) and smoothed over a fortieth
    of the points. What is not finite, and with log_scale what is not positive, is left out; the outermost half per cent
    of all y may lie beyond the axis and is drawn at its end.
    """
    fine = 3                                                        # drawn so many times larger, then reduced: smooth
    sheet = Image.new("RGB", (width * fine, height * fine), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13 * fine)
    left, right, top, bottom = 70 * fine, (width - 24) * fine, 40 * fine, (height - 48) * fine

    lines = {}
    for name, points in series.items():
        xy = np.array(points, dtype=np.float64).reshape(-1, 2)
        xy = xy[np.isfinite(xy).all(1) & ((xy[:, 1] > 0) | (not log_scale))]
        lines[name] = xy if not log_scale else np.stack([xy[:, 0], np.log10(xy[:, 1])], 1)
    everything = np.concatenate([*lines.values(), np.zeros((0, 2))])
    if len(everything) == 0:
        everything = np.array([[0.0, 0.0], [1.0, 1.0]])
    x_low, x_high = np.quantile(everything[:, 0], [0, 1])
    y_low, y_high = np.quantile(everything[:, 1], [0.005, 0.995])
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if y_high - y_low < 1e-9 * max(1.0, abs(y_low)):
        y_low, y_high = y_low - 0.5, y_high + 0.5
    y_low, y_high = y_low - 0.06 * (y_high - y_low), y_high + 0.06 * (y_high - y_low)

    def place(xy):                                                  # [P, 2] data -> [(pixel, pixel), ...]
        x = left + (xy[:, 0] - x_low) / (x_high - x_low) * (right - left)
        y = bottom - ((xy[:, 1] - y_low) / (y_high - y_low)).clip(0, 1) * (bottom - top)
        return list(zip(x.tolist(), y.tolist()))

    for value, text in _ticks(y_low, y_high, log_scale):
        y = place(np.array([[x_low, value]]))[0][1]
        draw.line([(left, y), (right, y)], fill="#e4e4e4", width=fine)
        draw.text((left - 8 * fine, y), text, fill="#555555", font=font, anchor="rm")
    for value, text in _ticks(x_low, x_high, False):
        x = place(np.array([[value, y_low]]))[0][0]
        draw.line([(x, bottom), (x, bottom + 5 * fine)], fill="#888888", width=fine)
        draw.text((x, bottom + 9 * fine), text, fill="#555555", font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#888888", width=fine)
    draw.text(((left + right) / 2, (height - 8) * fine), xlabel, fill="#222222", font=font, anchor="mb")
    title = ylabel + (" (log scale)" if log_scale else "")
    draw.text((10 * fine, 14 * fine), title, fill="#222222", font=font, anchor="lm")

    legend = right                                                  # above the plot, from the right: it hides no data
    smooth = {}
    for (name, xy), colour in reversed(list(zip(lines.items(), COLOURS))):
        window = max(1, len(xy) // 40)
        if window > 1:
            pale = tuple(int(255 - 0.3 * (255 - int(colour[i:i + 2], 16))) for i in (1, 3, 5))
            draw.line(place(xy), fill=pale, width=fine)
            neighbours = np.convolve(np.ones(len(xy)), np.ones(window), "same")       # fewer at the ends
            xy = np.stack([xy[:, 0], np.convolve(xy[:, 1], np.ones(window), "same") / neighbours], 1)
        smooth[colour] = place(xy)
        draw.text((legend, 14 * fine), name, fill="#222222", font=font, anchor="rm")
        legend -= draw.textlength(name, font=font) + 6 * fine
        draw.line([(legend - 18 * fine, 14 * fine), (legend, 14 * fine)], fill=colour, width=3 * fine)
        legend -= 36 * fine
    for colour, pixels in smooth.items():                           # above everything pale
        if len(pixels) > 1:
            draw.line(pixels, fill=colour, width=2 * fine, joint="curve")
        for x, y in pixels[:1]:                                     # so that a single row can be seen
            draw.ellipse([x - 3 * fine, y - 3 * fine, x + 3 * fine, y + 3 * fine], fill=colour)
    sheet = sheet.resize((width, height), Image.LANCZOS)
    write_atomic(path, lambda file: sheet.save(file, "PNG"))
