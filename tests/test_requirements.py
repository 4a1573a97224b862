"""requirements.txt lists what is imported, from which version on."""
import ast
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def plain(name):
    """A distribution's name as all tools understand it: open_clip_torch -> open-clip-torch."""
    return name.lower().replace("_", "-")


def required_by(distribution):
    """The names of what a distribution brings along."""
    lines = metadata.requires(distribution) or []
    return {plain(re.match(r"[\w.-]+", line)[0]) for line in lines if "extra ==" not in line}


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
    return {plain(name): bound for name, bound in (line.split(">=") for line in lines)}


def test_what_is_imported_is_listed_or_brought_along():
    here = set(listed())
    for name in listed():
        here |= required_by(name)
    ours = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "mvd"]}
    known = ours | set(sys.stdlib_module_names)
    distributions = metadata.packages_distributions()
    files = [*ROOT.glob("*.py"), *ROOT.rglob("mvd/**/*.py"), *ROOT.glob("tests/*.py")]
    for path in files:
        for name in imported(path) - known:
            owners = {plain(owner) for owner in distributions[name]}
            assert owners & here, f"{path.name} imports {name}, which nothing brings along"
