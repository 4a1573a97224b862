"""The README is true: links lead to what they name, and its commands run.

Every test run checks the flags of the commands. `-m slow` also runs all of them in a copy of the
repository, one after another, at a small size; so does `.ci/run`.
"""
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mutate
from mvd import MVDream
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


def blocks(wanted):
    """The blocks of the README in a language, "" for those of a shell."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    return [block for language, block in found if language == wanted]


def lines():
    """What the README says to a shell: the lines of its blocks, then the code in its sentences.

    Comments are cut off. A line that sets up is left out: `.ci/run` does that on a bare machine.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    block_lines = [line for block in blocks("") for line in block.splitlines()]
    in_sentences = [" ".join(code.split()) for code in re.findall(r"`(python [^`]*)`", text)]
    every = [line.split(" #")[0].strip() for line in block_lines + in_sentences]
    return [line for line in every if re.match("(python|torchrun) (?!.*venv)", line)]


def commands():
    """The lines that start a script or a module of ours: [[name, flag, ...], ...].

    The name is what can be imported: "train", "mvd.bench".
    """
    found = []
    for line in lines():
        words = shlex.split(line)
        if words[0] == "torchrun":
            words = words[1:]
        name, *flags = words[2:] if words[1] == "-m" else words[1:]
        if name.split("/")[0] not in ("pytest", "tests"):
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


# ---- every command, at a small size ----------------------------------------------------------

# What is added to a command, so that all take seven minutes on two cores. The last of two equal
# flags counts.
SMALL = {
    "distill.py": "--steps 2 --mesh-size 16",
    "sample.py": "--steps 1",
    "train.py": "--preset nano --steps 2 --batch 1",
    "dreambooth.py": "--steps 2",
    "mvd.bench": "--model small.safetensors",
    "mvd.toyworld": "--objects 3 --images 8 --size 64",
    "tests/mutate.py": "--count 3",
}
# What stands for something that is not here, or is large.
IN_PLACE = {
    "mvdream-sd21": "small.safetensors",
    "sd21": "small.safetensors",
    "--nproc-per-node=8": "--nproc-per-node=2",
    "renders/": "data/nano/sets",
    "runs/*": "runs/a-blue-elephant-with-balloons",
}
# What must follow a command that empties a function, since the next ones need it.
AFTER = {"python -m mvd.exercises start 3": "python -m mvd.exercises solution 3"}


def small(line):
    """A line of the README, at a small size."""
    words = [IN_PLACE.get(word, word) for word in line.split(" ")]
    flags = [flag for name, flag in SMALL.items() if name in words]
    return " ".join(words + flags)


@pytest.fixture(scope="module")
def copy_of_repository(tmp_path_factory):
    """A copy of the working tree, with what the README takes for granted."""
    folder = tmp_path_factory.mktemp("readme") / "mvd"
    mutate.copy_repository(folder)
    MVDream.random("nano").save(folder / "small.safetensors")
    random = np.random.default_rng(0)
    for place in ("shards", "photos"):
        (folder / place).mkdir()
        for k in range(8):
            photo = Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8))
            photo.save(folder / place / f"{k}.jpg")
            (folder / "shards" / f"{k}.txt").write_text("a red cube", "utf-8")
    return folder


def run_line(line, folder):
    """What a shell says to a line: asserts that its status is 0."""
    bin_folder = Path(sys.executable).parent
    environment = dict(
        os.environ,
        PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        CUDA_VISIBLE_DEVICES="",  # two processes want two GPUs, or none
    )
    ended = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = (ended.stdout + ended.stderr)[-2000:]
    assert ended.returncode == 0, f"`{line}` ends with status {ended.returncode}:\n{said}"


@pytest.mark.slow
def test_every_command_runs(copy_of_repository):
    for line in lines():
        run_line(small(line), copy_of_repository)
        if line in AFTER:
            run_line(AFTER[line], copy_of_repository)
    for block in blocks("python"):
        run_line(f"python -c {shlex.quote(block)}", copy_of_repository)
