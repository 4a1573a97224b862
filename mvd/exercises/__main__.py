"""python -m mvd.exercises: start, check, or bring back a function of the list."""
import argparse
import ast
import io
import re
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree
from pathlib import Path

from . import EXERCISES, __doc__ as description
from ..tools import cli
from ..tools.errors import UserError
from ..tools.files import write_atomic
from ..tools.run import free_file, make_folder

ROOT = Path(__file__).parents[2]
SOLUTIONS = Path(__file__).with_name("solutions.txt")
PROJECTS = Path(__file__).with_name("projects.md")
ATTEMPTS = "attempts"
COMMAND = "python -m mvd.exercises"
# Seconds after which the tests are stopped.
PATIENCE = 120
# Failed tests whose words are printed: the others mostly say the same.
SHOWN = 3


# ---- functions in files ----------------------------------------------------------------------

def split(file, content, name):
    """Cut a file's text at a function: (before, the function with its decorators, after).

    name: function, or Class.method. Comments at the end of the body belong to it. Raises UserError
    if the file is not Python, or has no such function.
    """
    try:
        node = ast.parse(content.encode())
    except SyntaxError as error:
        place = f"{file}, line {error.lineno}"
        raise UserError(f"{place}: {error.msg}; mend this first") from error
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if not found:
            raise UserError(
                f"{file} has no {name} any more: copy it back from mvd/exercises/{SOLUTIONS.name}")
        node = found[-1]
    decorators = [decorator.lineno for decorator in node.decorator_list]
    start = min([node.lineno, *decorators]) - 1
    end = node.end_lineno
    lines = list(io.StringIO(content, newline=""))
    for number, line in enumerate(lines[end:], start=end + 1):
        code = line.lstrip()
        within = code.startswith("#") and len(line) - len(code) > node.col_offset
        if code and not within:
            break
        if within:
            end = number
    return "".join(lines[:start]), "".join(lines[start:end]), "".join(lines[end:])


def stub(source, number, name):
    """The function with a body that only says which exercise it is."""
    node = ast.parse(textwrap.dedent(source)).body[0]
    docstring = node.body[0]
    lines = source.splitlines(keepends=True)[:docstring.end_lineno]
    indent = " " * (len(lines[-1]) - len(lines[-1].lstrip()))
    line = f'raise NotImplementedError("exercise {number}: {name} is not written yet")'
    return "".join(lines) + indent + line + "\n"


def held(path=SOLUTIONS):
    """{(file, name): source}: the functions that a file holds, each below a line that names it."""
    _, *parts = re.split(r"^#### (\S+) (\S+)\n", path.read_text("utf-8"), flags=re.M)
    triples = zip(parts[::3], parts[1::3], parts[2::3])
    return {(file, name): source.rstrip("\n") + "\n" for file, name, source in triples}


def read(file):
    """The text of a file of the repository. Raises UserError if there is none."""
    if not (ROOT / file).exists():
        raise UserError(f"{file} is not here: the exercises need the whole repository")
    try:
        return (ROOT / file).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}); mend this first") from error


def states(number):
    """What an exercise's file holds: (its text, {function: "ours", "started" or "yours"})."""
    file, names = EXERCISES[number][:2]
    content = read(file)
    solutions, found = held(), {}
    for name in names:
        source = split(file, content, name)[1].replace("\r\n", "\n")
        ours = solutions[file, name]
        blank = stub(ours, number, name)
        found[name] = {ours: "ours", blank: "started"}.get(source, "yours")
    return content, found


def write(number, content, sources):
    """Write an exercise's file with other functions: {name: source}."""
    file = EXERCISES[number].file
    for name, source in sources.items():
        before, old, after = split(file, content, name)
        if "\r\n" in old:
            source = source.replace("\n", "\r\n")
        content = before + source + after
    write_atomic(ROOT / file, content.encode())


# ---- the commands ----------------------------------------------------------------------------

def show_list():
    """Print the exercises, and which are started."""
    for number, exercise in EXERCISES.items():
        try:
            state = set(states(number)[1].values()) - {"ours"}
        except UserError as error:  # one file that is half written does not hide the others
            state = {str(error)}
        stars = "*" * exercise.level
        what = f"{', '.join(exercise.names)} in {exercise.file}"
        line = f"{number:2}  {what:<52} {stars:<4}{exercise.minutes:2} min"
        print("  ".join([line, *sorted(state)]))
        print(f"    read {exercise.read}")
        print(f"    grade: {COMMAND} check {number}  (pytest {exercise.tests} --exercise {number})")
    print(f"\nBegin with `{COMMAND} start 1`; `projects` shows larger ones. Stars: level, 1 to 3.")


def start(number):
    """Take the bodies of an exercise's functions out. Raises UserError if they are not ours."""
    file, names, reading, *_ = EXERCISES[number]
    content, found = states(number)
    for name, state in found.items():
        if state == "yours":
            raise UserError(
                f"{name} in {file} is not what the package holds, so it may be your work; "
                f"`{COMMAND} solution {number}` keeps it in {ATTEMPTS}/ and brings ours back, "
                "then start again"
            )
    solutions = held()
    write(number, content, {name: stub(solutions[file, name], number, name) for name in names})
    print(f"exercise {number}: write {' and '.join(names)} in {file}")
    print(f"read: the docstring; {reading}")
    print(f"then: {COMMAND} check {number}")


def solution(number):
    """Bring the functions back as the package holds them; what was written is kept in a file."""
    file, names = EXERCISES[number][:2]
    content, found = states(number)
    if set(found.values()) == {"ours"}:
        print(f"{file} has our {' and '.join(names)} already; nothing was changed")
        return
    for name, state in found.items():
        if state == "yours":
            kept = keep(name, split(file, content, name)[1])
            print(f"your {name} is kept in {kept}")
    solutions = held()
    write(number, content, {name: solutions[file, name] for name in names})
    print(f"{file} has our {' and '.join(names)} again")


def keep(name, source):
    """Write a function into the first free file of attempts/; returns its path from the root."""
    path = ROOT / ATTEMPTS / f"{name}.py"
    make_folder(path)
    path = free_file(path)
    write_atomic(path, source.encode())
    return path.relative_to(ROOT)


def check(number):
    """Grade an exercise: print what is wrong, in words; exit status 1 if something is."""
    file, names = EXERCISES[number][:2]
    _, found = states(number)
    missing = [name for name in names if found[name] == "started"]
    if missing:
        print(f"exercise {number}: {' and '.join(missing)} in {file} is not written yet")
        raise SystemExit(1)
    cases = run_tests(number)
    if not cases:
        raise UserError(f"no test of {EXERCISES[number].tests} was run")
    failed = [case for case in cases if problem_of(case) is not None]
    for case in failed[:SHOWN]:
        line = f"- {case.get('name')}: {in_words(problem_of(case).text, file)}"
        print(textwrap.fill(line, 96, subsequent_indent="  "))
    if failed:
        print(f"exercise {number}: {len(failed)} of {len(cases)} tests fail")
        raise SystemExit(1)
    print(f"exercise {number} is right: all {len(cases)} tests of {' and '.join(names)} pass")


def run_tests(number):
    """The cases of pytest's report on an exercise, XML elements; what failed holds its report."""
    tests = EXERCISES[number].tests
    read(tests)
    command = [sys.executable, "-m", "pytest", tests, f"--exercise={number}"]
    command += ["-q", "--tb=short", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command.append(f"--junitxml={report}")
        try:
            run = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"the tests are not done after {PATIENCE} s: does a loop never end?")
            raise SystemExit(1) from None
        if not report.exists():
            said = (run.stderr or run.stdout).strip().splitlines()
            raise UserError(f"the tests cannot run: {said[-1] if said else run.returncode}")
        return list(xml.etree.ElementTree.parse(report).iter("testcase"))


def problem_of(case):
    """The report in a case of pytest's that failed or broke; None if it passed or was skipped."""
    failure = case.find("failure")
    return failure if failure is not None else case.find("error")


def in_words(problem, file):
    """The message in pytest's report of a failed test, and the line in `file` that raised it."""
    lines = []
    for line in re.findall(r"^E   (.*)", problem, flags=re.M):
        if lines and line.startswith(("assert ", " +  where")):
            break
        lines.append(line.strip())
    message = " ".join(lines)
    if message.startswith("AssertionError: "):
        return message.removeprefix("AssertionError: ")
    places = re.findall(rf"^{re.escape(file)}:(\d+): in ", problem, flags=re.M)
    return f"{file}, line {places[-1]}: {message}" if places else message


def read_number(text):
    """The number of an exercise on the command line."""
    if text.isdecimal() and int(text) in EXERCISES:
        return int(text)
    raise UserError(f"there is no exercise {text!r}: choose 1 to {len(EXERCISES)}")


def main(argv=None):
    """The command. Raises UserError."""
    parser = cli.Parser(
        prog=COMMAND, description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {"start": start, "check": check, "solution": solution}
    parser.add_argument(
        "command", nargs="?", default="list", choices=["list", *known, "projects"])
    parser.add_argument("number", nargs="?", help=f"of the exercise, 1 to {len(EXERCISES)}")
    flags = parser.parse_args(argv)
    if flags.command == "list":
        show_list()
    elif flags.command == "projects":
        print(PROJECTS.read_text("utf-8"))
    elif flags.number is None:
        raise UserError(f"of which exercise? For example `{COMMAND} {flags.command} 1`")
    else:
        known[flags.command](read_number(flags.number))


if __name__ == "__main__":
    cli.main(main)
