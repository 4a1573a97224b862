"""The README is true: links lead to what they name, and scripts know the flags of its commands."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

from mvd.tools import cli

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


def commands():
    """The commands of the README that start a script or a module of ours: [[name, flag, ...], ...].

    The name is what can be imported: "train", "mvd.bench".
    """
    text = (ROOT / "README.md").read_text("utf-8")
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        for line in [] if language else re.split(r"\n|&&", block):
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = words[1:]
            if words[:1] not in (["python"], ["--nproc-per-node=8"]):
                continue
            name, *flags = words[2:] if words[1] == "-m" else words[1:]
            if name not in ("pytest", "venv"):
                found.append([name.removesuffix(".py"), *flags])
    return found


class Parsed(Exception):
    """The command line is understood."""


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_is_understood(command, monkeypatch):
    """The scripts' own tests run them; here is every flag of the README."""
    known, look = cli.Parser.parse_args, cli.peek

    def parse(self, *arguments):
        known(self, *arguments)
        raise Parsed

    def peek(*arguments):
        flags = look(*arguments)
        for name in ("model", "init"):
            if getattr(flags, name, None):
                setattr(flags, name, "tiny")  # is here, unlike runs/nano or mvdream-sd21
        return flags

    monkeypatch.setattr(cli.Parser, "parse_args", parse)
    monkeypatch.setattr(cli, "peek", peek)
    name, *flags = command
    folder = ROOT / Path(*name.split("."))
    module = importlib.import_module(f"{name}.__main__" if folder.is_dir() else name)
    with pytest.raises(Parsed):
        module.main(flags)


def test_the_commands_are_found():
    names = {command[0] for command in commands()}
    expected = {"sample", "distill", "train", "dreambooth", "mvd.tour", "mvd.exercises"}
    assert expected <= names, "the README names fewer commands, or the test does not see them"
