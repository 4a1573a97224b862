"""The page of a run, read as a browser reads it: whole, alone, and showing the right things."""
import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mvd.tools import page as page_module
from mvd.tools import pictures
from mvd.tools.page import round_values, write_page
from toy_data import read_png


class Page(HTMLParser):
    """What a browser finds in index.html.

    tags: in their order, [(name, {attribute: value})]. text: {kind of tag: [text, ...]}.
    """
    def __init__(self, out):
        super().__init__()
        self.tags = []
        self.open = []
        self.text = {}
        self.feed((out / "index.html").read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        """The attributes of all tags of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


def picture(uri, kind):
    """What an address holds: [3, H, W]."""
    head, content = uri.split(",")
    assert head == f"data:image/{kind};base64"
    content = base64.b64decode(content, validate=True)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == kind.upper()
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


@pytest.fixture
def out(tmp_path):
    (tmp_path / "progress").mkdir()
    return tmp_path


# ---- pictures --------------------------------------------------------------------------------

def test_frames_lie_where_the_script_looks_for_them(out):
    """Frame i is at column i mod columns, row i div columns, two pixels between frames."""
    colour = torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    shades = torch.linspace(0, 1, 14).view(14, 1, 1, 1)
    frames = shades * colour.expand(14, 3, 16, 24)
    write_page(out, "a bulldog", "40 of 40 steps", {"steps": 40}, {}, frames=frames)
    page = Page(out)
    canvas, = page.all("canvas")
    width, height = int(canvas["width"]), int(canvas["height"])
    count, columns = int(canvas["data-count"]), int(canvas["data-columns"])
    assert (width, height, count) == (24, 16, 14)
    sheet = picture(canvas["data-sheet"], "webp")
    for i, frame in enumerate(frames):
        x = i % columns * (width + 2)
        y = i // columns * (height + 2)
        # Without its rim, which WebP blurs.
        found = sheet[:, y + 4:y + height - 4, x + 4:x + width - 4]
        assert (found - frame[:, 4:-4, 4:-4]).abs().max() < 0.03, f"frame {i}"
    script, = page.text["script"]
    numbers = "i % columns * (width + 2), Math.floor(i / columns) * (height + 2), width, height,"
    assert numbers in script, "the script looks elsewhere"


def test_figures_are_inside_and_what_is_missing_is_left_out(out):
    progress = [out / "progress" / "000020.png", out / "progress" / "000040.png"]
    loss = out / "loss.png"
    paths = progress + [loss]
    for path, shade in zip(paths, (0.2, 0.6, 1.0)):
        pictures.save_png(path, torch.full((3, 8, 9), shade))
    figures = {
        "Progress": progress,
        "Depth": [out / "depth.png"],
        "Loss": [loss],
        "None": [],
    }
    write_page(out, "a bulldog", "40 of 40 steps", {}, figures)
    page = Page(out)
    assert page.text["h2"] == ["Progress", "Loss", "Settings"]
    assert page.text["figcaption"] == ["20", "40"]
    assert not page.all("canvas")
    for image, path in zip(page.all("img"), paths, strict=True):
        assert torch.equal(picture(image["src"], "png"), read_png(path))


# ---- charts ----------------------------------------------------------------------------------

def draw(out, lines):
    write_page(out, "a bulldog", "40 of 40 steps", {}, {"Loss": lines})
    return Page(out)


def drawn_points(page):
    """The points of each line of the chart, [[(x, y), ...], ...], in units of the drawing."""
    lines = []
    for polyline in page.all("polyline"):
        pairs = [pair.split(",") for pair in polyline["points"].split()]
        lines.append([(float(x), float(y)) for x, y in pairs])
    return lines


def test_lines_lie_where_the_numbers_say(out):
    lines = {
        "multiview": [(10, 0.5), (20, 0.02), (25, 0.11), (60, 0.004)],
        "single": [(20, 3.0), (110, 0.7)],
    }
    page = draw(out, lines)
    # Of both lines together: x from 10 to 110, y from 0.004 to 3.
    left, right = page_module.LEFT, page_module.RIGHT
    top, bottom = page_module.TOP, page_module.BOTTOM

    def height(y):
        share = math.log(y / 0.004) / math.log(3.0 / 0.004)
        return bottom + share * (top - bottom)

    for found, points in zip(drawn_points(page), lines.values(), strict=True):
        assert len(found) == len(points)
        for (found_x, found_y), (x, y) in zip(found, points):
            expected_x = left + (x - 10) / 100 * (right - left)
            assert found_x == pytest.approx(expected_x, abs=0.06)
            assert found_y == pytest.approx(height(y), abs=0.06)

    # The numbers at the axes: first and last x, then values of y, each beside its line.
    first, last, *values = page.text["text"]
    assert (first, last) == ("10", "110")
    assert len(values) >= 3
    for value, line in zip(values, page.all("line"), strict=True):
        expected_y = height(float(value))
        assert float(line["y1"]) == pytest.approx(expected_y, abs=0.06)
        assert line["y1"] == line["y2"], "the line is not level"
        assert top <= expected_y <= bottom, "the line is outside of the drawing"

    # A dot on the last point.
    for found, dot in zip(drawn_points(page), page.all("circle"), strict=True):
        assert (float(dot["cx"]), float(dot["cy"])) == found[-1]


def test_each_line_has_its_colour_and_stands_in_the_legend(out):
    names = ["a", "b", "c", "d", "e", "f"]
    lines = {name: [(0, i + 1.0), (1, i + 2.0)] for i, name in enumerate(names)}
    page = draw(out, lines)
    assert page.text["span"] == names
    colours = [polyline["stroke"] for polyline in page.all("polyline")]
    assert len(set(colours)) == 6
    keys = [key["style"] for key in page.all("i")]
    assert keys == [f"background: {colour}" for colour in colours]


@pytest.mark.parametrize("points, shown", [
    ([], 0),
    ([(3, 0.5)], 1),
    ([(0, 0.0), (1, 0.0)], 0),
    ([(0, np.nan), (1, -1.0), (2, np.inf)], 0),
    ([(0, np.nan), (1, 0.1), (2, -1.0), (3, 0.2), (4, np.inf)], 2),
    ([(i, 1e-9 * i) for i in range(300)], 299),
    ([(0, 1e30), (1, 1e-30)], 2),
    ([(0, 1e299), (1, 1e-299)], 2),
    ([(5, 2.0), (5, 3.0)], 2),
    ([(1, 0.7), (2, 0.7)], 2),
    ([(1, 0.7), (2, 0.7000001)], 2),
])
def test_chart_of_odd_data(out, points, shown):
    page = draw(out, {"loss": points, "other": points[:1]})
    assert not page.open, "a tag is not closed"
    if not shown:
        assert page.text["h2"] == ["Settings"], "a chart of nothing"
        assert not page.all("svg")
        return
    assert page.text["h2"] == ["Loss", "Settings"]
    loss, other = drawn_points(page)
    assert len(loss) == shown
    for x, y in loss + other:
        assert page_module.LEFT <= x <= page_module.RIGHT
        assert page_module.TOP <= y <= page_module.BOTTOM


@pytest.mark.parametrize("low, high, expected", [
    (0.02, 30.0, [0.1, 1, 10]),
    (0.1, 4.0, [0.1, 0.3, 1, 3]),
    (1.5, 10.0, [2, 5, 10]),
    (0.123, 0.142, [0.123, 0.129, 0.135, 0.141]),
])
def test_round_values(low, high, expected):
    assert round_values(low, high) == expected


# ---- the page --------------------------------------------------------------------------------

def test_it_asks_nobody_for_anything(out):
    figures = {"Loss": {"loss": [(1, 0.5), (2, 0.4)]}}
    frames = torch.rand(3, 3, 8, 8)
    write_page(out, "a bulldog", "40 of 40 steps", {"steps": 40}, figures, frames=frames)
    page = Page(out)
    text = (out / "index.html").read_text()
    text = re.sub('base64,[^"]*', "", text)
    assert not re.search(r"//\S", text), "there is an address in it"
    for name, attributes in page.tags:
        for value in attributes.values():
            assert not (value and value.startswith("/")), f"<{name}> names a file"
    assert not page.all("link") and not page.all("a")
    assert all("src" not in tag for tag in page.all("script"))
    assert not page.open, "a tag is not closed"


def test_what_a_user_types_is_text(out):
    words = 'a "bulldog" & </script><script>alert(1)</script> für $title'
    pictures.save_png(out / "loss.png", torch.zeros(3, 4, 4))
    settings = {words: 40, "negative": words}
    figures = {words: [out / "loss.png"], "Loss": {words: [(1, 0.5)]}}
    frames = torch.rand(3, 3, 8, 8)
    write_page(out, words, words, settings, figures, frames=frames)
    page = Page(out)
    for tag in ("h1", "title", "p"):
        assert "".join(page.text[tag]).startswith(words)
    assert "".join(page.text["h2"]) == words + "LossSettings"
    assert "".join(page.text["td"]) == words + "40negative" + words
    assert "".join(page.text["span"]) == words
    assert len(page.all("script")) == 1
    # What Python makes of a byte that is not text.
    write_page(out, "a bulldog \udce9", "", {}, {})
    assert "".join(Page(out).text["h1"]) == "a bulldog ?"


@pytest.mark.parametrize("live", [False, True])
def test_it_loads_itself_again_while_the_run_goes_on(out, live):
    write_page(out, "a bulldog", "20 of 40 steps", {}, {}, live=live)
    page = Page(out)
    kinds = [tag.get("http-equiv") for tag in page.all("meta")]
    assert kinds.count("refresh") == live
    assert page.text["p"][0] == "20 of 40 steps"


# ---- the script ------------------------------------------------------------------------------

# As much of a browser as the script asks for; every frame that is shown is printed.
BROWSER = """
const context = {
  drawImage(sheet, ...numbers) { console.log(JSON.stringify(numbers)) }
}
const element = {
  width: 24, height: 16, clientWidth: 240,
  dataset: {count: "14", columns: "6", sheet: "data:"},
  setPointerCapture() {},
  getContext() { return context }
}
const document = {querySelector() { return element }}
const matchMedia = () => ({matches: false})
class Image { set src(uri) { this.onload() } }
const clocks = []
const setInterval = clock => clocks.push(clock)
"""

# What the tests do to it.
HANDS = """
const tick = () => clocks[0]()
const event = (clientX, pointerId = 1, button = 0) => ({clientX, pointerId, button})
const press = (...where) => canvas.onpointerdown(event(...where))
const move = (...where) => canvas.onpointermove(event(...where))
const release = () => canvas.onlostpointercapture()
const type = key => canvas.onkeydown({key})
"""


@pytest.mark.skipif(not shutil.which("node"), reason="the script of the page needs Node.js")
@pytest.mark.parametrize("what, frames", [
    # It turns by itself.
    ("tick(); tick()", [0, 1, 2]),
    ("for (let i = 0; i < 14; i++) tick()", list(range(14)) + [0]),
    # Half the width to the right: half a turn clockwise. Then it stays.
    ("press(100); tick(); move(220); release(); move(0); tick()", [0, 7]),
    ("press(100); move(120); move(80)", [0, 13, 1]),
    # A second finger is not heard.
    ("press(100); press(0, 2); move(0, 2); move(80)", [0, 1]),
    # Nor is the right button.
    ("press(100, 1, 2); move(60); tick()", [0, 1]),
    ("type('ArrowRight'); type('ArrowRight'); type('ArrowLeft'); type('a'); tick()",
     [0, 13, 12, 13]),
])
def test_the_turntable_turns_as_it_is_dragged(out, what, frames):
    write_page(out, "a bulldog", "", {}, {}, frames=torch.rand(14, 3, 16, 24))
    script, = Page(out).text["script"]
    program = BROWSER + script + HANDS + what
    node = subprocess.run(
        ["node", "-"], input=program, capture_output=True, text=True, check=True)
    shown = [json.loads(line) for line in node.stdout.splitlines()]
    expected = []
    for i in frames:
        # From a place in the sheet to the whole canvas.
        expected.append([i % 6 * 26, i // 6 * 18, 24, 16, 0, 0, 24, 16])
    assert shown == expected
