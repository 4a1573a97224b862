"""The page of a run, index.html: what was asked, how it went, and what came of it, as one file that needs no network.

Pictures are inside the file, so it can be moved or sent alone. Until the run has ended, a browser loads the page again every five
seconds; that of a run that was stopped, too, since it may be resumed. The turntable is a sheet of frames of which a canvas shows one: the
one that dragging, an arrow key or the clock has come to.
"""
import base64
import html
import io
from string import Template

from .files import write_atomic
from .pictures import grid, to_pil

COLUMNS = 6                                      # of the sheet of frames
RELOAD = '<meta http-equiv="refresh" content="5">'

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">$reload
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em; margin: 0 } h2 { font-size: 1em; margin: 1.5em 0 .3em }
h1, td { overflow-wrap: anywhere }
canvas { width: min(100%, 480px); cursor: grab; touch-action: pan-y; margin-top: 1em }
img { max-width: 100% } figure { display: inline-block; margin: 0 .6em .3em 0 } figure img { width: 200px }
figcaption, p, td { color: #666 } td { padding-right: 1em }
</style>
</head>
<body>
<h1>$title</h1>
<p>$status</p>
$turntable
$figures
<h2>Settings</h2>
<table>$settings</table>
</body>
</html>
""")

TURNTABLE = Template("""<canvas width="$width" height="$height" data-count="$count" data-columns="$columns" data-sheet="$sheet" tabindex="0"
  aria-label="the object; drag or use the arrow keys to turn it"></canvas>
<p>Drag to turn it.</p>
<script>
const canvas = document.querySelector("canvas"), sheet = new Image(), {width, height} = canvas, {count, columns} = canvas.dataset
let turn = 0, grabbed = null, spinning = !matchMedia("(prefers-reduced-motion: reduce)").matches
function show(now) {                             // turn: in frames, whose cameras go round counterclockwise, seen from above
  turn = now
  const i = (Math.round(turn) % count + Number(count)) % count
  canvas.getContext("2d").drawImage(sheet, i % columns * (width + 2), Math.floor(i / columns) * (height + 2), width, height,
                                    0, 0, width, height)
}
canvas.onpointerdown = e => {
  if (grabbed || e.button) return                // a second finger, another button
  spinning = false; grabbed = {by: e.pointerId, x: e.clientX, turn}; canvas.setPointerCapture(e.pointerId)
}
canvas.onpointermove = e => { if (grabbed?.by == e.pointerId) show(grabbed.turn - (e.clientX - grabbed.x) / canvas.clientWidth * count) }
canvas.onlostpointercapture = () => { grabbed = null }
canvas.onkeydown = e => { const by = {ArrowLeft: 1, ArrowRight: -1}[e.key]; if (by) { spinning = false; show(turn + by) } }
sheet.onload = () => { show(0); setInterval(() => { if (spinning) show(turn + 1) }, 4000 / count) }
sheet.src = canvas.dataset.sheet
</script>""")


def data_uri(content, kind):
    """Bytes of a picture ("png", "webp") -> the address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def write_page(out, title, status, settings, figures, frames=None, live=False):
    """Write index.html into the folder `out` (Path) of a run, in one stroke.

    title, status: one line each, any text. settings: {name: value}. figures: {heading: [path of a PNG file, ...]}; several under one
    heading become small, with their names; what is not there is left out. frames [N, 3, H, W] in [0, 1]: views of the object all round,
    counterclockwise seen from above, equally far apart; or None. live: the run goes on.
    """
    turntable, parts = "", []
    if frames is not None:
        sheet = io.BytesIO()
        to_pil(grid(frames, COLUMNS)).save(sheet, "WEBP", quality=90)
        turntable = TURNTABLE.substitute(width=frames.shape[3], height=frames.shape[2], count=len(frames), columns=COLUMNS,
                                         sheet=data_uri(sheet.getvalue(), "webp"))
    for heading, paths in figures.items():
        paths = [path for path in paths if path.exists()]
        images = [f'<img src="{data_uri(path.read_bytes(), "png")}" alt="{html.escape(path.stem)}">' for path in paths]
        if len(images) > 1:
            images = [f"<figure>{image}<figcaption>{html.escape(path.stem.lstrip('0'))}</figcaption></figure>"
                      for image, path in zip(images, paths)]
        if images:
            parts.append("\n".join([f"<h2>{html.escape(heading)}</h2>", *images]))
    rows = [f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in settings.items()]
    write_atomic(out / "index.html", PAGE.substitute(
        title=html.escape(title), status=html.escape(status), reload=RELOAD if live else "", turntable=turntable,
        figures="\n".join(parts), settings="\n".join(rows)).encode(errors="replace"))      # a flag may hold bytes that are no text
