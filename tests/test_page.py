"""The page of a run, read as a browser reads it: whole, alone, and showing the right pictures."""
import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mvd.tools import pictures
from mvd.tools.page import write_page
from toy_data import read_png


class Page(HTMLParser):
    """Tags in their order, [(name, {attribute: value})], and the text within each kind of tag."""
    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], {}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag                                            # closed in the order they were opened

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(uri, kind):
    """What an address holds: [3, H, W]."""
    head, content = uri.split(",")
    assert head == f"data:image/{kind};base64"
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
        assert image.format == kind.upper()
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


@pytest.fixture
def out(tmp_path):
    (tmp_path / "progress").mkdir()
    return tmp_path


def test_frames_lie_where_the_script_looks_for_them(out):
    """Frame i is at column i mod columns, row i div columns, two pixels between frames: the numbers in the script are these."""
    frames = torch.linspace(0, 1, 14).view(14, 1, 1, 1) * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1).expand(14, 3, 16, 24)
    write_page(out, "a bulldog", "40 of 40 steps", {"steps": 40}, {}, frames)
    page = Page(out / "index.html")
    canvas, = page.all("canvas")
    width, height, count, columns = (int(canvas[name]) for name in ("width", "height", "data-count", "data-columns"))
    assert (width, height, count) == (24, 16, 14)
    sheet = picture(canvas["data-sheet"], "webp")
    for i, frame in enumerate(frames):
        x, y = i % columns * (width + 2), i // columns * (height + 2)
        assert (sheet[:, y + 4:y + height - 4, x + 4:x + width - 4] - frame[:, 4:-4, 4:-4]).abs().max() < 0.03
    script, = page.text["script"]
    assert "i % columns * (width + 2), Math.floor(i / columns) * (height + 2), width, height," in script


def test_figures_are_inside_and_what_is_missing_is_left_out(out):
    paths = [out / "progress" / "000020.png", out / "progress" / "000040.png", out / "loss.png"]
    shades = torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 9)
    for path, shade in zip(paths, shades):
        pictures.save_png(path, shade)
    write_page(out, "a bulldog", "40 of 40 steps", {}, {"Progress": paths[:2], "Depth": [out / "depth.png"], "Loss": paths[2:], "None": []})
    page = Page(out / "index.html")
    assert page.text["h2"] == ["Progress", "Loss", "Settings"] and page.text["figcaption"] == ["20", "40"] and not page.all("canvas")
    for image, path in zip(page.all("img"), paths, strict=True):
        assert torch.equal(picture(image["src"], "png"), read_png(path))


def test_it_asks_nobody_for_anything(out):
    write_page(out, "a bulldog", "40 of 40 steps", {"steps": 40}, {}, torch.rand(3, 3, 8, 8))
    page = Page(out / "index.html")
    assert not re.search(r"//\S", re.sub('base64,[^"]*', "", (out / "index.html").read_text()))      # no address anywhere
    assert not any(value.startswith("/") for _, tag in page.tags for value in tag.values() if value)
    assert not page.all("link") and not page.all("a") and all("src" not in tag for tag in page.all("script"))
    assert not page.open                                                         # every tag is closed


def test_what_a_user_types_is_text(out):
    words = 'a "bulldog" & </script><script>alert(1)</script> für $title'
    pictures.save_png(out / "loss.png", torch.zeros(3, 4, 4))
    write_page(out, words, words, {words: 40, "negative": words}, {words: [out / "loss.png"]}, torch.rand(3, 3, 8, 8))
    page = Page(out / "index.html")
    for tag in ("h1", "title", "p"):
        assert "".join(page.text[tag]).startswith(words)
    assert "".join(page.text["h2"]) == words + "Settings" and "".join(page.text["td"]) == words + "40negative" + words
    assert len(page.all("script")) == 1
    write_page(out, "a bulldog \udce9", "", {}, {})                              # what Python makes of a byte that is no text
    assert "".join(Page(out / "index.html").text["h1"]) == "a bulldog ?"


BROWSER = """                                         // as much of one as the script asks for; every frame shown is printed
const element = {width: 24, height: 16, clientWidth: 240, dataset: {count: "14", columns: "6", sheet: "data:"}, setPointerCapture() {},
  getContext: () => ({drawImage: (sheet, x, y, w, h, ...to) => console.log(JSON.stringify([x, y, w, h, ...to]))})}
const document = {querySelector: () => element}, matchMedia = () => ({matches: false}), ticks = []
const setInterval = tick => ticks.push(tick)
class Image { set src(uri) { this.onload() } }
const event = (clientX, pointerId = 1, button = 0) => ({clientX, pointerId, button})
"""


@pytest.mark.skipif(not shutil.which("node"), reason="the script of the page needs Node.js")
@pytest.mark.parametrize("what, frames", [
    ("ticks[0](); ticks[0]()", [0, 1, 2]),                                       # it turns by itself
    ("for (let i = 0; i < 14; i++) ticks[0]()", [*range(14), 0]),
    ("canvas.onpointerdown(event(100)); ticks[0](); canvas.onpointermove(event(220)); canvas.onlostpointercapture(); "
     "canvas.onpointermove(event(0)); ticks[0]()", [0, 7]),                      # half the width to the right: half a turn clockwise
    ("canvas.onpointerdown(event(100)); canvas.onpointermove(event(120)); canvas.onpointermove(event(80))", [0, 13, 1]),
    ("canvas.onpointerdown(event(100)); canvas.onpointerdown(event(0, 2)); canvas.onpointermove(event(0, 2)); "
     "canvas.onpointermove(event(80))", [0, 1]),                                 # a second finger is not heard
    ("canvas.onpointerdown(event(100, 1, 2)); canvas.onpointermove(event(60)); ticks[0]()", [0, 1]),     # nor the right button
    ("for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'a']) canvas.onkeydown({key}); ticks[0]()", [0, 13, 12, 13]),
])
def test_the_turntable_turns_as_it_is_dragged(out, what, frames):
    write_page(out, "a bulldog", "", {}, {}, torch.rand(14, 3, 16, 24))
    script, = Page(out / "index.html").text["script"]
    shown = subprocess.run(["node", "-"], input=BROWSER + script + "\n" + what, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in shown.splitlines()] == [[i % 6 * 26, i // 6 * 18, 24, 16, 0, 0, 24, 16] for i in frames]


@pytest.mark.parametrize("live", [False, True])
def test_it_loads_itself_again_while_the_run_goes_on(out, live):
    write_page(out, "a bulldog", "20 of 40 steps", {}, {}, live=live)
    assert [tag.get("http-equiv") for tag in Page(out / "index.html").all("meta")].count("refresh") == live
    assert Page(out / "index.html").text["p"][0] == "20 of 40 steps"
