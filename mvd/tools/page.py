"""The page of a run, index.html: what was asked, how it went, and what came of it.

It is one file that needs no network: pictures, curves and script are inside, so that it
can be moved or sent alone. Until the run has ended, a browser loads the page again every
five seconds (also after the run was stopped, since it may be resumed). The turntable is a
sheet of frames, of which a canvas shows one at a time.
"""
import base64
import html
import io
import itertools
import math
from string import Template

from .files import write_atomic
from .pictures import grid, to_pil

# Frames per row of the turntable's sheet.
COLUMNS = 6

RELOAD = '<meta http-equiv="refresh" content="5">'

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
$reload
<title>$title</title>
<style>
body {
  max-width: 1080px;
  margin: 2em auto;
  padding: 0 1em;
  font: 16px/1.5 system-ui, sans-serif;
  color: #222;
  background: #fff;
}
h1 { font-size: 1.6em; margin: 0 }
h2 { font-size: 1em; margin: 1.5em 0 .3em }
h1, td, figcaption { overflow-wrap: anywhere }
figcaption, p, td { color: #666 }
td { padding-right: 1em }
img { max-width: 100% }
figure { display: inline-block; margin: 0 .6em .3em 0 }
figure img { width: 200px }
figure.chart { display: block; max-width: 480px; margin: 0 }
.chart span { display: inline-block; margin-right: 1.2em }
.chart i { display: inline-block; width: 1.2em; height: .25em; margin: 0 .4em .25em 0 }
svg { display: block; width: 100%; font-size: 13px; fill: #666 }
svg polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round }
svg line { stroke: #e4e4e4 }
canvas { width: min(100%, 960px); margin-top: 1em; cursor: grab; touch-action: pan-y }
</style>
</head>
<body>
<h1>$title</h1>
<p>$status</p>
$turntable
$figures
<h2>Settings</h2>
<table>
$settings
</table>
</body>
</html>
""")

TURNTABLE = Template("""<canvas width="$width" height="$height" tabindex="0"
  aria-label="the object; drag or use the arrow keys to turn it"
  data-count="$count" data-columns="$columns" data-sheet="$sheet"></canvas>
<p>Colours and normals. Drag to turn them.</p>
<script>
const canvas = document.querySelector("canvas")
const {width, height} = canvas
const {count, columns} = canvas.dataset
const sheet = new Image()

// How far the object is turned, in frames; they go round counterclockwise, seen from above.
let turn = 0
// While it is dragged: which pointer drags it, where that was pressed, and the turn then.
let grabbed = null
let spinning = !matchMedia("(prefers-reduced-motion: reduce)").matches

// Draw the frame nearest to a turn; turns may be negative or go round several times.
function show(now) {
  turn = now
  const i = (Math.round(turn) % count + Number(count)) % count
  canvas.getContext("2d").drawImage(
    sheet,
    i % columns * (width + 2), Math.floor(i / columns) * (height + 2), width, height,
    0, 0, width, height)
}

canvas.onpointerdown = event => {
  // A second finger or another button than the left one changes nothing.
  if (grabbed || event.button) return
  spinning = false
  grabbed = {by: event.pointerId, x: event.clientX, turn}
  // Moves count even when the pointer leaves the canvas.
  canvas.setPointerCapture(event.pointerId)
}

// The width of the canvas is one full turn; to the right turns the cameras back.
canvas.onpointermove = event => {
  if (grabbed?.by != event.pointerId) return
  const share = (event.clientX - grabbed.x) / canvas.clientWidth
  show(grabbed.turn - share * count)
}

canvas.onlostpointercapture = () => { grabbed = null }

canvas.onkeydown = event => {
  const step = {ArrowLeft: 1, ArrowRight: -1}[event.key]
  if (!step) return
  spinning = false
  show(turn + step)
}

// Once the sheet is decoded: show it, and go round in four seconds until it is dragged.
sheet.onload = () => {
  show(0)
  setInterval(() => { if (spinning) show(turn + 1) }, 4000 / count)
}
sheet.src = canvas.dataset.sheet
</script>""")


def data_uri(content, kind):
    """The address that holds the bytes of a picture; kind: "png" or "webp"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def turntable(frames):
    """HTML: a canvas that shows one of the frames [N, 3, H, W], and a script to turn it."""
    sheet = io.BytesIO()
    to_pil(grid(frames, COLUMNS)).save(sheet, "WEBP", quality=90)
    count, _, height, width = frames.shape
    return TURNTABLE.substitute(
        width=width, height=height, count=count, columns=COLUMNS,
        sheet=data_uri(sheet.getvalue(), "webp"))


def images(paths):
    """HTML: the PNG files that exist; several become small and have their names below."""
    paths = [path for path in paths if path.exists()]
    parts = []
    for path in paths:
        source = data_uri(path.read_bytes(), "png")
        image = f'<img src="{source}" alt="{html.escape(path.stem)}">'
        if len(paths) > 1:
            # The name is often a number of steps: 20 instead of 000020.
            caption = html.escape(path.stem.lstrip("0"))
            image = f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        parts.append(image)
    return "\n".join(parts)


# ---- charts ----------------------------------------------------------------------------------

# Of the lines, in turn; a seventh line has the first colour again.
COLOURS = ["#2563a8", "#d9622b", "#2e8b57", "#9b3d8f", "#b8860b", "#5a5a5a"]

# The box that the lines fill, in a drawing of 400 x 240 units with y downward.
LEFT, RIGHT = 56, 390
TOP, BOTTOM = 12, 212

CHART = Template("""<figure class="chart">
<svg viewBox="0 0 400 240">
$drawing
</svg>
<figcaption>
$legend
</figcaption>
</figure>""")


def round_values(low, high):
    """A few round numbers in [low, high], evenly spaced on a log scale; high >= 1.02 low."""
    # Powers of ten; 1, 3, 10, 30, ...; 1, 2, 5, 10, ...; then finer series.
    for per_decade, digits in ((1, 1), (2, 1), (3, 1), (10, 2), (100, 3), (1000, 4)):
        first = math.floor(math.log10(low) * per_decade)
        last = math.ceil(math.log10(high) * per_decade)
        values = []
        for i in range(first, last + 1):
            value = float(f"{10 ** (i / per_decade):.{digits}g}")
            if low <= value <= high:
                values.append(value)
        if len(values) >= 3:
            break
    return values[::math.ceil(len(values) / 5)]


def chart(lines):
    """HTML: lines {name: [(x, y), ...]} as an SVG drawing, y on a log scale, with a legend.

    A point is left out if its y is not finite or not positive (or beyond 1e-300 to 1e300).
    If no point is left, there is no chart: "". A dot marks the last point of each line.
    """
    drawn = {}
    for name, points in lines.items():
        drawn[name] = [(x, y) for x, y in points if 1e-300 < y < 1e300]
    everything = sum(drawn.values(), [])
    if not everything:
        return ""
    xs, ys = zip(*everything)
    first, last = min(xs), max(xs)
    low, high = min(ys), max(ys)
    # Nearly constant lines lie in the middle.
    if high < 1.02 * low:
        low, high = low / 1.2, high * 1.2

    def place(x, y):
        across = (x - first) / (last - first or 1)
        up = (math.log(y) - math.log(low)) / (math.log(high) - math.log(low))
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    below = BOTTOM + 20
    parts = [f'<text x="{LEFT}" y="{below}">{first:,.10g}</text>']
    if last > first:
        parts.append(f'<text x="{RIGHT}" y="{below}" text-anchor="end">{last:,.10g}</text>')
    for value in round_values(low, high):
        _, y = place(first, value)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        # Four units below the line is about half the height of a digit.
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    legend = []
    for (name, points), colour in zip(drawn.items(), itertools.cycle(COLOURS)):
        spots = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        for x, y in spots[-1:]:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        legend.append(f'<span><i style="background: {colour}"></i>{html.escape(name)}</span>')
    return CHART.substitute(drawing="\n".join(parts), legend="\n".join(legend))


# ---- the page --------------------------------------------------------------------------------

def write_page(out, title, status, settings, figures, *, frames=None, live=False):
    """Write index.html into the folder `out` (Path) of a run, whole or not at all.

    title, status: one line each, any text.
    settings: {name: value}.
    figures: {heading: [path of a PNG file, ...]}; several pictures under one heading become
        small, with their names; or {heading: {name of a line: [(x, y), ...]}}, which becomes
        a chart (see `chart`). What is not there is left out.
    frames: [N, 3, H, W] in [0, 1], views of the object all round, counterclockwise seen from
        above, equally far apart, each with colours on the left and normals on the right;
        or None.
    live: whether the run goes on.
    """
    parts = []
    for heading, content in figures.items():
        shown = chart(content) if isinstance(content, dict) else images(content)
        if shown:
            parts.append(f"<h2>{html.escape(heading)}</h2>\n{shown}")
    turning = "" if frames is None else turntable(frames)
    fill_page(out, title, status, settings, parts, turning=turning, live=live)


def fill_page(out, title, status, settings, sections, *, turning="", live=False):
    """Write index.html as `write_page`, from HTML: sections, a list, and the turntable's, or ""."""
    rows = []
    for name, value in settings.items():
        name = html.escape(name)
        value = html.escape(str(value))
        rows.append(f"<tr><td>{name}</td><td>{value}</td></tr>")
    page = PAGE.substitute(
        title=html.escape(title),
        status=html.escape(status),
        reload=RELOAD if live else "",
        turntable=turning,
        figures="\n".join(sections),
        settings="\n".join(rows))
    # A flag may hold bytes that are not text, which UTF-8 cannot encode: they become "?".
    write_atomic(out / "index.html", page.encode(errors="replace"))
