"""requirements.txt lists what is imported, from which version on."""
import ast
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def required_by(distribution):
    """The names of what a distribution brings along."""
    lines = metadata.requires(distribution) or []
    return {re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line}


def holds(distribution):
    """The names that can be imported from an installed distribution: a set."""
    return {file.parts[0].split(".")[0] for file in metadata.files(distribution)}


def imported(path):
    """The first parts of all names that a Python file imports: a set."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def listed():
    """{name: its lower bound} of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    return dict(line.split(">=") for line in lines)


def test_what_is_imported_is_listed_or_brought_along():
    ours = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "mvd"]
    known = {path.stem for path in ours} | set(sys.stdlib_module_names)
    for name in {*listed(), *required_by("open_clip_torch")}:
        known |= holds(name)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("mvd/**/*.py"), *ROOT.glob("tests/*.py")]:
        missing = imported(path) - known
        assert not missing, f"{path.name} imports {missing}, which nothing brings along"
