"""The README is true: its links lead somewhere, and those with a line lead to that function."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", ".github/RESULTS.md")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links(page):
    """(text, target) of each link of a page that leads to a file of the repository."""
    found = LINK.findall((ROOT / page).read_text("utf-8"))
    return [(text, target) for text, target in found if "://" not in target and target[0] != "#"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for text, target in links(page):
        path = (ROOT / page).parent / target.split("#")[0]
        assert path.exists(), f"{page}: [{text}] leads to {target}, which is not there"


def test_a_link_with_a_line_leads_to_the_function_that_it_names():
    numbered = [(text, target) for text, target in links("README.md") if "#L" in target]
    assert len(numbered) > 10
    for text, target in numbered:
        file, line = target.split("#L")
        source = (ROOT / file).read_text("utf-8").split("\n")
        name = text.strip("`")
        definition = rf"\s*(def|class) {name}\b|{name} = "
        assert re.match(definition, source[int(line) - 1]), (
            f"README.md: `{name}` is not at {file}, line {line}; it is at "
            f"{[i for i, text in enumerate(source, 1) if re.match(definition, text)]}"
        )


def anchors(page):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_headings_that_are_linked_are_there(page):
    targets = re.findall(r"\]\(([\w./]*)#([a-z][^)]+)\)", (ROOT / page).read_text("utf-8"))
    assert targets
    for file, heading in targets:
        assert heading in anchors(file or page), f"{page}: there is no heading #{heading}"
