"""A tool, not a test: breaks the paper's functions one by one, and looks whether a test notices.

    python tests/mutate.py --count 150 --seed 0 --jobs 64    # draw, run, print the survivors
    python tests/mutate.py --function ddim_step              # all of one, by its own tests alone
    python tests/mutate.py --function composite --tests test_sds test_distill

A mutant is a copy of the repository in which one expression of one public function is changed as
a person could mistake it: a sign, an axis, a factor, an operand, a comparison, a constant, one
more or less, a missing detach. It is caught if one of the tests fails, or hangs. Which tests: those
of the module's own file that mention the function; if they pass, the rest of that file.

A function is drawn first, then a kind of change, then one of that kind, so that long functions and
frequent operators do not count more than others. Every result is a line of --out: a run that was
killed goes on with the same command. The repository itself is not touched, nothing is fetched, and
no GPU is used.
"""
import argparse
import ast
import copy
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The paper's modules, and the test files that are a module's own.
MODULES = {
    "mvd/diffusion.py": ["test_diffusion", "test_prediction"],
    "mvd/cameras.py": ["test_cameras"],
    "mvd/unet.py": ["test_unet"],
    "mvd/groupnorm.py": ["test_groupnorm"],
    "mvd/vae.py": ["test_vae"],
    "mvd/text.py": ["test_text"],
    "mvd/model.py": ["test_model"],
    "mvd/hashgrid.py": ["test_hashgrid"],
    "mvd/nerf.py": ["test_nerf"],
    "mvd/render.py": ["test_render"],
    "mvd/sds.py": ["test_sds", "test_perfect_denoiser"],
    "mvd/mesh.py": ["test_mesh"],
    "dreambooth.py": ["test_dreambooth"],
}
# Of a script and of the model's file only these belong to the paper; the rest is plumbing.
ONLY = {
    "dreambooth.py": ["preserve", "class_loss"],
    "mvd/model.py": ["MVDream.encode", "MVDream.decode", "MVDream.sample"],
}

# Mutants that compute the same are not drawn: (function, kind, a part of the line, why).
EQUIVALENT = [
    ("encode_plainly", "detach", "floor()", "floor has no slope"),
    ("HashGrid.corners", "detach", "floor()", "floor has no slope"),
    ("pairs_are_complex", "comparison", "", "the two forms compute the same"),
    ("Lookup.backward", "comparison", "pairs_are", "the two forms compute the same"),
    ("TextTower.tokens_of", "comparison", "", "CLIP reads a text word by word, too"),
    ("NeRF.activate", "detach", "inside", "a comparison has no slope"),
    ("NeRF.geometry", "off by one", "hidden > 0", "a hidden number is never exactly 0"),
    ("march_rays", "detach", "no_grad", "rays and occupancy do not learn"),
    ("select_samples", "detach", "no_grad", "rays and occupancy do not learn"),
    ("smoothness_loss", "operands", "torch.cat", "the distance is the same from the other end"),
    ("draw_seen_points", "off by one", "clamp", "only NaN gets there"),
    ("draw_seen_points", "sign", "clamp", "only NaN gets there"),
    ("draw_seen_points", "detach", "", "an index has no slope"),
    ("orientation_loss", "detach", "hits", "a comparison has no slope"),
    ("TextTower.add_words", "detach", "no_grad", "a new parameter begins a graph of its own"),
    ("MultiViewUNet.add_token", "operands", "", "attention does not see the order of the text"),
    ("GroupNorm.written_out", "detach", "first", "a shift changes nothing, so it has no slope"),
    ("draw_cameras", "operands", "in_degrees", "each is half of the cases"),
    ("draw_cameras", "comparison", "in_degrees", "each is half of the cases"),
    ("class_loss", "detach", "no_grad", "neither θ0 nor the contexts learn"),
]


# ---- what can be mistaken --------------------------------------------------------------------

@dataclass
class Mutant:
    """One change: the bytes start..end of a file become `text`."""
    file: str
    function: str   # "composite" or "HashGrid.forward"
    kind: str
    line: int
    start: int
    end: int
    text: str
    before: str     # the source's lines that change, in one line
    after: str

    @property
    def key(self):
        """What it is called in the file of results."""
        return f"{self.file} {self.function} {self.kind} {self.before} -> {self.after}"


TWINS = {
    "cos": "sin", "sin": "cos", "amax": "amin", "amin": "amax", "maximum": "minimum",
    "minimum": "maximum", "max": "min", "min": "max", "floor": "ceil", "ceil": "floor",
}
# Which arguments of a method are axes, counted without the tensor itself.
AXES = {
    "sum": [0], "mean": [0], "std": [0], "cumsum": [0], "cumprod": [0], "softmax": [0],
    "amax": [0], "amin": [0], "all": [0], "any": [0], "unbind": [0], "chunk": [1], "split": [1],
    "stack": [0], "cat": [0], "flatten": [0], "transpose": [0, 1], "movedim": [0, 1],
    "index_select": [0], "repeat_interleave": [1], "unflatten": [0], "flip": [0],
}
OTHER_AXIS = {-3: -2, -2: -1, -1: -2, 0: 1, 1: 0, 2: 1, 3: 2}
OPPOSITE = {
    ast.Lt: ">=", ast.GtE: "<", ast.Gt: "<=", ast.LtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}
NEIGHBOUR = {ast.Lt: "<=", ast.GtE: ">", ast.Gt: ">=", ast.LtE: "<"}
DEVICES = ("cuda", "mps", "cpu")


def number(node):
    """The value of a literal number such as 2 or -1, or None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = number(node.operand)
        return None if value is None else -value
    plain = isinstance(node, ast.Constant) and type(node.value) in (int, float)
    return node.value if plain else None


def is_sequence(node):
    """Is it surely a list, a tuple or text, which + joins?"""
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text or isinstance(node, (ast.List, ast.Tuple, ast.JoinedStr, ast.ListComp))


def called(node):
    """The last part of the name of what a call calls: "cat" of torch.cat(...)."""
    function = node.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


def of_library(node):
    """Is it a function of torch or F, whose first argument is the tensor?"""
    function = node.func
    owner = function.value if isinstance(function, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id in ("torch", "F")


def is_plumbing(node):
    """What says something to people or to the type checker: not mutated."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
        return True
    if isinstance(node, ast.Compare):
        named = [getattr(c, "value", None) for c in node.comparators]
        return any(name in DEVICES for name in named)
    return isinstance(node, ast.Call) and called(node) in ("warn", "print", "UserError")


# What stands in place of an operator: its kind of change, the operator, the other.
INSTEAD = {
    ast.Add: ("sign", "+", "-"),
    ast.Sub: ("sign", "-", "+"),
    ast.Mult: ("factor", "*", "/"),
    ast.Div: ("factor", "/", "*"),
    ast.FloorDiv: ("factor", "//", "%"),
    ast.Mod: ("factor", "%", "//"),
}


class Changes:
    """Collects the changes of one file's source: (kind, start, end, new text)."""

    def __init__(self, source):
        self.source = source
        self.found = []
        self.even = set()  # differences whose sign does not matter: of abs(a - b), (a - b) ** 2
        self.begin = [0]  # of each line, in bytes
        for line in source.splitlines(keepends=True):
            self.begin.append(self.begin[-1] + len(line))

    def span(self, node):
        """Where a node lies in the source: (start, end)."""
        start = self.begin[node.lineno - 1] + node.col_offset
        return start, self.begin[node.end_lineno - 1] + node.end_col_offset

    def lines_of(self, function):
        """Where a function's lines lie, with its decorators: (start, end)."""
        first = min(node.lineno for node in [function, *function.decorator_list])
        return self.begin[first - 1], self.begin[function.end_lineno]

    def text(self, node):
        start, end = self.span(node)
        return self.source[start:end].decode()

    def replace(self, kind, node, text):
        self.found.append((kind, *self.span(node), text))

    def between(self, kind, left, right, old, new):
        """Another operator between two nodes."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:end].decode()
        if old in gap:
            self.found.append((kind, start, end, gap.replace(old, new, 1)))

    # ---- by kind of node ----

    def visit(self, node):
        """All changes in a node and below it."""
        if is_plumbing(node):
            return
        handler = getattr(self, "on_" + type(node).__name__, None)
        if handler:
            handler(node)
        for child in ast.iter_child_nodes(node):
            self.visit(child)

    def on_FunctionDef(self, node):
        for decorator in node.decorator_list:
            self.allow_gradients(decorator)

    def on_With(self, node):
        for item in node.items:
            self.allow_gradients(item.context_expr)

    def allow_gradients(self, node):
        if isinstance(node, ast.Call) and called(node) == "no_grad":
            self.replace("detach", node, "torch.enable_grad()")

    def on_BinOp(self, node):
        left, op, right = node.left, node.op, node.right
        if is_sequence(left) or is_sequence(right):
            return
        if isinstance(op, ast.Pow) and number(right) == 2:
            self.even.add(left)
        if type(op) in INSTEAD:
            kind, symbol, other = INSTEAD[type(op)]
            self.between(kind, left, right, symbol, other)
        if isinstance(op, (ast.Mult, ast.Div)):
            self.forget_factor(node)
        if isinstance(op, (ast.Sub, ast.Div, ast.MatMult)) and node not in self.even:
            self.swap(node, ast.BinOp(right, op, left))
        if isinstance(op, ast.Pow) and number(right) is not None:
            self.replace("factor", right, "1" if number(right) in (0.5, 2) else "2")
        self.numbers_of(node)

    def forget_factor(self, node):
        """a * b becomes a, and also b; a / b becomes a."""
        self.replace("factor", node, "(" + ast.unparse(node.left) + ")")
        if isinstance(node.op, ast.Mult):
            self.replace("factor", node, "(" + ast.unparse(node.right) + ")")

    def numbers_of(self, node):
        """x + 1 becomes x + 2 and x + 0; 1 - x becomes 2 - x; 2 * x becomes 3 * x."""
        left, op, right = node.left, node.op, node.right
        if isinstance(op, (ast.Add, ast.Sub)) and type(number(right)) is int:
            self.one_more_or_less(right)
        elif isinstance(op, (ast.Add, ast.Sub)) and type(number(left)) is int:
            self.replace("constant", left, str(number(left) + 1))
        elif isinstance(op, (ast.Mult, ast.Div)):
            for side in (left, right):
                if type(number(side)) is int:
                    self.replace("constant", side, str(number(side) + 1))

    def one_more_or_less(self, node):
        value = number(node)
        self.replace("off by one", node, str(value + 1))
        if value > 0:
            self.replace("off by one", node, str(value - 1))

    def swap(self, node, swapped):
        self.replace("operands", node, ast.unparse(swapped))

    def on_UnaryOp(self, node):
        if isinstance(node.op, ast.USub) and number(node) is None:
            self.replace("sign", node, "(" + ast.unparse(node.operand) + ")")
        if isinstance(node.op, ast.Not):
            self.replace("comparison", node, "(" + ast.unparse(node.operand) + ")")

    def on_AugAssign(self, node):
        if isinstance(node.value, (ast.Call, ast.List)) or is_sequence(node.value):
            return
        if isinstance(node.op, ast.Add):
            self.between("sign", node.target, node.value, "+=", "-=")

    def on_Compare(self, node):
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, node.comparators):
            symbol = OPPOSITE.get(type(op))
            if symbol is None:
                continue
            old = {value: key for key, value in SYMBOLS.items()}[type(op)]
            self.between("comparison", left, right, old, symbol)
            whole = type(number(left)) is int or type(number(right)) is int
            if whole and type(op) in NEIGHBOUR:
                self.between("off by one", left, right, old, NEIGHBOUR[type(op)])

    def on_BoolOp(self, node):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        self.between("comparison", node.values[0], node.values[1], old, new)

    def on_Constant(self, node):
        if type(node.value) is float and abs(node.value) >= 1e-3:
            self.replace("constant", node, repr(2 * node.value))

    def on_Slice(self, node):
        for bound in (node.lower, node.upper):
            if bound is not None and type(number(bound)) is int:
                self.one_more_or_less(bound)

    def on_Subscript(self, node):
        place = node.slice
        if getattr(node.value, "attr", "") == "shape" and number(place) in OTHER_AXIS:
            self.replace("axis", place, str(OTHER_AXIS[number(place)]))
        elif isinstance(place, ast.Tuple) and len(place.elts) > 1:
            nones = [isinstance(e, ast.Constant) and e.value is None for e in place.elts]
            # x[:, None] becomes x[None, :].
            if nones[0] != nones[1]:
                first, second = place.elts[:2]
                swapped = copy.copy(place)
                swapped.elts = [second, first, *place.elts[2:]]
                self.replace("axis", place, ast.unparse(swapped).strip("()"))

    def on_Call(self, node):
        name, arguments = called(node), node.args
        if name in ("abs", "square"):
            self.even.update(arguments[:1] or [node.func.value])
        if name == "detach" and isinstance(node.func, ast.Attribute):
            self.replace("detach", node, self.text(node.func.value))
        if name in TWINS and (isinstance(node.func, ast.Attribute) or len(arguments) > 1):
            # The name ends where the brackets begin.
            end = self.span(node.func)[1]
            self.found.append(("twin", end - len(name), end, TWINS[name]))
        if name == "where" and len(arguments) == 3:
            self.swap_nodes(arguments[1], arguments[2])
        if name in ("cross", "lerp") and len(arguments) > 1:
            self.swap_nodes(arguments[0], arguments[1])
        if name in ("cat", "stack") and arguments and isinstance(arguments[0], ast.List):
            if len(arguments[0].elts) > 1:
                self.swap_nodes(*arguments[0].elts[:2])
        if name == "range":
            for argument in arguments:
                if type(number(argument)) is int:
                    self.one_more_or_less(argument)
        self.axes(node, name)

    def swap_nodes(self, a, b):
        """Two neighbours in a list change places."""
        start, end = self.span(a)[0], self.span(b)[1]
        gap = self.source[self.span(a)[1]:self.span(b)[0]].decode()
        if self.text(a) != self.text(b):
            self.found.append(("operands", start, end, self.text(b) + gap + self.text(a)))

    def axes(self, node, name):
        """Another axis: x.sum(-1) becomes x.sum(-2), dim=1 becomes dim=0."""
        first = 1 if of_library(node) else 0
        axes = [i + first for i in AXES.get(name, [])]
        nodes = [node.args[i] for i in axes if i < len(node.args)]
        nodes += [keyword.value for keyword in node.keywords if keyword.arg == "dim"]
        for axis in nodes:
            if number(axis) in OTHER_AXIS:
                self.replace("axis", axis, str(OTHER_AXIS[number(axis)]))


SYMBOLS = {
    "<": ast.Lt, ">=": ast.GtE, ">": ast.Gt, "<=": ast.LtE, "==": ast.Eq, "!=": ast.NotEq,
}


# ---- the mutants of a file -------------------------------------------------------------------

def functions(tree):
    """(name, node) of the public functions and methods of a module; a method is "Class.method"."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                yield f"{node.name}.{method.name}", method


def one_line(source, start, end, text):
    """The lines round the bytes start..end, with `text` in their place, as one line."""
    first = source.rfind(b"\n", 0, start) + 1
    last = source.find(b"\n", end)
    lines = source[first:start].decode() + text + source[end:last].decode()
    return " ".join(lines.split())


def mutants_of(file, root=ROOT):
    """All mutants of a module's public functions: [Mutant], in the order of the source."""
    source = (root / file).read_bytes()
    found = []
    for name, node in functions(ast.parse(source)):
        if name not in ONLY.get(file, [name]):
            continue
        changes = Changes(source)
        changes.on_FunctionDef(node)
        for statement in node.body:
            changes.visit(statement)
        for kind, start, end, text in changes.found:
            old = source[start:end].decode()
            line = source.count(b"\n", 0, start) + 1
            mutant = Mutant(
                file, name, kind, line, start, end, text,
                before=one_line(source, start, end, old),
                after=one_line(source, start, end, text),
            )
            lines = changes.lines_of(node)
            if is_new(source, mutant, *lines) and not equivalent(mutant):
                found.append(mutant)
    return found


def apply(source, mutant):
    """The bytes of the file with this mutant's change."""
    return source[:mutant.start] + mutant.text.encode() + source[mutant.end:]


def is_new(source, mutant, start, end):
    """Is the changed function, the bytes start..end of the source, Python and another program?"""
    changed = apply(source, mutant)
    before = textwrap.dedent(source[start:end].decode())
    after = textwrap.dedent(changed[start:end + len(changed) - len(source)].decode())
    try:
        return ast.dump(ast.parse(before)) != ast.dump(ast.parse(after))
    except SyntaxError:
        return False


def equivalent(mutant):
    """Is it one of those that compute the same?"""
    for function, kind, part, _ in EQUIVALENT:
        if (function, kind) == (mutant.function, mutant.kind) and part in mutant.before:
            return True
    return False


def draw(mutants, count, seed):
    """`count` different ones: each time a function at random, then a kind, then a mutant."""
    dice = random.Random(seed)
    left = list(mutants)
    drawn = []
    while left and len(drawn) < count:
        function = dice.choice(sorted({(m.file, m.function) for m in left}))
        of_it = [m for m in left if (m.file, m.function) == function]
        kind = dice.choice(sorted({m.kind for m in of_it}))
        mutant = dice.choice([m for m in of_it if m.kind == kind])
        left.remove(mutant)
        drawn.append(mutant)
    return drawn


# ---- the tests of a function -----------------------------------------------------------------

def names_in(node):
    """All names that a piece of a test file uses: a set."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            names.add(part.attr)
        elif isinstance(part, ast.arg):  # perhaps a fixture
            names.add(part.arg)
    return names


def tests_that_mention(word, folder, test_file):
    """The tests, "tests/test_x.py::test_y", that use a name themselves or by a helper: a list."""
    tree = ast.parse((folder / test_file).read_bytes())
    used = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            used[node.name] = names_in(node)
    found = []
    for test in used:
        reached, new = set(), {test}
        while new:
            reached |= new
            new = {name for one in new for name in used[one] if name in used} - reached
        if test.startswith("test_") and any(word in used[one] for one in reached):
            found.append(f"{test_file}::{test}")
    return found


def tests_of(mutant, folder, files):
    """The tests of a function: of its name, else of its class, else all of the files."""
    words = mutant.function.split(".")
    for word in reversed(words):
        found = []
        for file in files:
            found += tests_that_mention(word, folder, file)
        # "forward" and the like are mentioned by no test, or by tests of something else.
        if found and word not in ("forward", "backward"):
            return found
    return files


# ---- running ---------------------------------------------------------------------------------

@dataclass
class Outcome:
    """How one run of pytest ended."""
    code: int       # pytest's exit status; None: it took too long
    seconds: float
    failed: list    # "tests/test_x.py::test_y - AssertionError: ..." of the short summary


def run_tests(folder, tests, without=(), timeout=None, stop=True):
    """Run tests in a copy of the repository: Outcome."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=line"]
    command += ["-x"] if stop else ["--continue-on-collection-errors"]
    for test in without:
        command += ["--deselect", test]
    quiet = dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", CUDA_VISIBLE_DEVICES="")
    # A cached .pyc is told from its source by second and size, which a mutant may keep.
    quiet.update(PYTHONDONTWRITEBYTECODE="1", COLUMNS="200")
    begin = time.time()
    process = subprocess.Popen(
        [*command, *tests], cwd=folder, env={**os.environ, **quiet}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        # With all processes that the tests have started.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code = None
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, flags=re.M)
    return Outcome(code, time.time() - begin, failed)


def copy_repository(folder):
    """A copy of the repository without what is not tracked: runs, data, caches."""
    top = {".git", "runs", "samples", "data"}

    def ignore(place, names):
        left_out = {n for n in names if n.endswith("cache__") or n.startswith((".venv", ".pytest"))}
        return left_out | (top & set(names) if Path(place) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=ignore)


def copy_of_copy(first, folder):
    """A worker's own copy; what is large is a hard link, since nothing writes to it."""
    def place(source, target):
        large = os.path.getsize(source) > 1 << 20
        return os.link(source, target) if large else shutil.copy2(source, target)

    shutil.copytree(first, folder, copy_function=place)


@dataclass
class Baseline:
    """What the tests of a module do when nothing is broken."""
    files: list         # the test files that can be run
    without: list       # tests that fail here anyway
    seconds: float


def baseline(folder, files):
    """Run the test files as they are: Baseline. Tests that fail here are left out, and named."""
    outcome = run_tests(folder, files, stop=False)
    bad = [line.split(" - ")[0] for line in outcome.failed]
    files = [file for file in files if file not in bad]
    if not files:
        sys.exit(f"error: none of these tests can be run here: {', '.join(bad)}")
    return Baseline(files, [test for test in bad if "::" in test], outcome.seconds)


def judge(folder, mutant, base, only_its_own):
    """Run the tests against a mutant in a worker's copy: {"result": ..., "by": ...}.

    result: "caught" by a check, "crashed" if it raises anything but AssertionError, "timeout",
    "survived".
    """
    path = folder / mutant.file
    source = path.read_bytes()
    timeout = 60 + 5 * base.seconds
    path.write_bytes(apply(source, mutant))
    try:
        own = tests_of(mutant, folder, base.files)
        rounds = [(own, base.without)]
        if not only_its_own and own != base.files:
            rounds.append((base.files, [*base.without, *own]))
        for tests, without in rounds:
            outcome = run_tests(folder, tests, without, timeout)
            if outcome.code is None:
                return {"result": "timeout", "by": ""}
            if outcome.code not in (0, 5):  # 5: every test is deselected or slow
                by = outcome.failed[0] if outcome.failed else f"pytest ended with {outcome.code}"
                told = "AssertionError" in by or " - assert" in by or "Failed: " in by
                return {"result": "caught" if told else "crashed", "by": by}
        return {"result": "survived", "by": ""}
    finally:
        path.write_bytes(source)


# ---- the report ------------------------------------------------------------------------------

def table(title, rows, key):
    """Lines: how many mutants of each kind, and how many of them were caught."""
    lines = [f"{title:<24} mutants  caught"]
    of = Counter(key(row) for row in rows)
    caught = Counter(key(row) for row in rows if row["result"] != "survived")
    for name in sorted(of):
        lines.append(f"{name:<24} {of[name]:7} {caught[name]:7}")
    return lines


def summary(rows, bases):
    """What a run found, as text."""
    lines = []
    for file, base in bases.items():
        for test in base.without:
            lines.append(f"left out, since it fails with nothing broken: {test}")
        for lost in set(files_of(file)) - set(base.files):
            lines.append(f"left out, since it cannot be imported here: {lost}")
    survivors = [row for row in rows if row["result"] == "survived"]
    for row in survivors:
        lines.append(f"survived  {row['file']}:{row['line']}  {row['function']}  ({row['kind']})")
        lines.append(f"    - {row['before']}")
        lines.append(f"    + {row['after']}")
    lines += table("module", rows, lambda row: row["file"])
    lines += table("kind", rows, lambda row: row["kind"])
    results = Counter(row["result"] for row in rows)
    caught = len(rows) - len(survivors)
    names = {(row["file"], row["function"]) for row in rows}
    lines.append(
        f"{caught} of {len(rows)} mutants of {len(names)} functions caught "
        f"({caught / max(len(rows), 1):.1%}): {results['caught']} by a check, "
        f"{results['crashed']} by a crash, {results['timeout']} by a timeout; "
        f"{len(survivors)} survived"
    )
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------

def files_of(module):
    """The test files of a module, as paths."""
    return [f"tests/{name}.py" for name in MODULES[module]]


def state_of(file):
    """A short hash of a module and all tests: results of another version do not count."""
    tests = sorted((ROOT / "tests").glob("*.py"))
    text = b"".join(path.read_bytes() for path in [ROOT / file, *tests])
    return hashlib.sha256(text).hexdigest()[:12]


def read_rows(path):
    """The lines of the file of results; a last one that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", help="all mutants of this one, and its own tests alone: "
                        "composite, HashGrid.forward")
    parser.add_argument("--module", help="of this file alone, for example mvd/cameras.py")
    parser.add_argument("--tests", nargs="+", help="these test files in place of the module's own")
    parser.add_argument("--count", type=int, help="mutants to draw (default: 150; of one function "
                        "all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at the same time "
                        "(default: as many as there are cores)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/mutants.jsonl",
                        help="file of results, one JSON object per line "
                        "(default: runs/mutants.jsonl)")
    flags = parser.parse_args(argv)
    if flags.module and flags.module not in MODULES:
        parser.error(f"there is no module {flags.module}: choose {', '.join(MODULES)}")
    if flags.tests:
        named = [Path(name).stem for name in flags.tests]
        for module in MODULES:
            MODULES[module] = named
    chosen = [flags.module] if flags.module else list(MODULES)
    mutants = [mutant for module in chosen for mutant in mutants_of(module)]
    if flags.function:
        mutants = [m for m in mutants if flags.function in (m.function, *m.function.split("."))]
    if not mutants:
        parser.error("there is no such function, or nothing in it to break")
    count = flags.count or (len(mutants) if flags.function else 150)
    return flags, draw(mutants, count, flags.seed)


def main(argv=None):
    """The command: draw mutants, run the tests on each, print what survived."""
    flags, drawn = parse(argv)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    modules = sorted({mutant.file for mutant in drawn})
    states = {module: state_of(module) for module in modules}
    mode = "function" if flags.function else "module"
    rows = {}
    for row in read_rows(flags.out):
        rows[row["key"], row["state"], row["mode"]] = row

    def name(mutant):
        return mutant.key, states[mutant.file], mode

    missing = [mutant for mutant in drawn if name(mutant) not in rows]
    print(f"{len(drawn)} mutants, {len(drawn) - len(missing)} of them in {flags.out} already",
          flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        place = Path(place)
        copy_repository(place / "first")
        free = queue.Queue()
        for i in range(max(1, min(flags.jobs, max(len(missing), len(modules))))):
            copy_of_copy(place / "first", place / str(i))
            free.put(place / str(i))

        def in_a_copy(function, *arguments):
            folder = free.get()
            try:
                return function(folder, *arguments)
            finally:
                free.put(folder)

        pool = ThreadPoolExecutor(free.qsize())
        try:
            wanted = sorted({m.file for m in missing})
            tried = {file: pool.submit(in_a_copy, baseline, files_of(file)) for file in wanted}
            bases = {file: one.result() for file, one in tried.items()}
            jobs = {}
            for mutant in missing:
                base = bases[mutant.file]
                jobs[pool.submit(in_a_copy, judge, mutant, base, bool(flags.function))] = mutant
            for done, job in enumerate(as_completed(jobs), 1):
                mutant = jobs[job]
                row = {"key": mutant.key, "state": states[mutant.file], "mode": mode}
                row.update(file=mutant.file, line=mutant.line, function=mutant.function)
                row.update(kind=mutant.kind, before=mutant.before, after=mutant.after)
                row.update(job.result())
                rows[name(mutant)] = row
                with open(flags.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{done}/{len(jobs)} {row['result']:<9} {mutant.file}:{mutant.line} "
                      f"{mutant.function} ({mutant.kind})", flush=True)
        finally:
            # After Ctrl-C nothing new is begun.
            pool.shutdown(cancel_futures=True)
    print(summary([rows[name(mutant)] for mutant in drawn], bases))


if __name__ == "__main__":
    main()
