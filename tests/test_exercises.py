"""The exercises: the package holds the code, nothing that is written is lost, grades are words.

`python tests/test_exercises.py` takes the solutions from the code again.
"""
import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

import mutate
from mvd.exercises import EXERCISES
from mvd.exercises import __main__ as exercises
from mvd.tools import files
from mvd.tools.errors import UserError

ROOT = exercises.ROOT
# Right functions that are written otherwise than ours, plainly and without docstrings.
REWRITINGS = Path(__file__).parent / "data" / "rewritings.txt"
OWN = '''def q_sample(x0, t, noise):
    x_t = x0  # mine
    return x_t
    # not done: the noise

'''


def live():
    """{(file, name): source} of all functions of the exercises, from the code itself."""
    found = {}
    for exercise in EXERCISES.values():
        content = (ROOT / exercise.file).read_text("utf-8")
        for name in exercise.names:
            found[exercise.file, name] = exercises.split(exercise.file, content, name)[1]
    return found


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The files that the exercises are in, in another folder, on which the commands work."""
    for exercise in EXERCISES.values():
        path = tmp_path / exercise.file
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / exercise.file, path)
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def whole_copy(tmp_path, monkeypatch):
    """The repository in another folder, on which the commands work."""
    folder = tmp_path / "mvd"
    mutate.copy_repository(folder)
    monkeypatch.setattr(exercises, "ROOT", folder)
    return folder


def put(number, name, source):
    """A student writes a function in place of what is there."""
    path = exercises.ROOT / EXERCISES[number].file
    exercises.write(number, path.read_bytes().decode(), {name: source})


def replace(number, old, new):
    """A student changes a line of our function."""
    path = exercises.ROOT / EXERCISES[number].file
    content = path.read_text("utf-8")
    assert content.count(old) == 1, f"{path} no longer says {old}: change the test"
    path.write_text(content.replace(old, new), "utf-8")


def grade(number, capsys):
    """(exit status, words) of `check`."""
    capsys.readouterr()
    status = 0
    try:
        exercises.main(["check", str(number)])
    except SystemExit as end:
        status = end.code
    return status, " ".join(capsys.readouterr().out.split())


# ---- what the package holds ------------------------------------------------------------------

def test_the_package_holds_the_code():
    solutions = exercises.held()
    for (file, name), source in live().items():
        assert solutions.get((file, name)) == source, (
            f"{name} in {file} is not what mvd/exercises/solutions.txt holds; an exercise ends "
            "with `python -m mvd.exercises solution N`; if you changed the package's own function, "
            "`python tests/test_exercises.py` takes it again")
    assert solutions.keys() == live().keys(), "solutions.txt holds a function of no exercise"
    assert exercises.held(REWRITINGS).keys() == live().keys(), "a function has no rewriting"


def test_every_exercise_is_graded_by_tests():
    for number, exercise in EXERCISES.items():
        content = (ROOT / exercise.tests).read_text("utf-8")
        graded = re.findall(r"mark\.exercise\(([\d, ]+)\)", content)
        numbers = {int(text) for group in graded for text in group.split(",")}
        assert number in numbers, f"no test of {exercise.tests} is marked exercise({number})"


# ---- start and solution ----------------------------------------------------------------------

@pytest.mark.parametrize("number", EXERCISES)
def test_what_start_takes_out_solution_brings_back(copy, number, capsys):
    file, names = EXERCISES[number][:2]
    path = copy / file
    before = path.read_bytes()
    exercises.main(["start", str(number)])
    content = path.read_text("utf-8")
    for name in names:
        _, source, _ = exercises.split(file, content, name)
        ours = exercises.held()[file, name]
        assert source != ours, f"start has left the body of {name}"
        assert source.count('"""') == 2, f"the docstring of {name} is gone"
        assert source.split('"""')[:2] == ours.split('"""')[:2], "signature or docstring changed"
        assert source.endswith(f'raise NotImplementedError("exercise {number}: {name} is not '
                               'written yet")\n'), "the body is not one line that says so"
    status, words = grade(number, capsys)
    assert status == 1 and "not written yet" in words
    exercises.main(["start", str(number)])
    assert path.read_text("utf-8") == content, "a second start changes something"
    exercises.main(["solution", str(number)])
    assert path.read_bytes() == before, "the file is not what it was"
    assert not (copy / "attempts").exists(), "an empty body was kept"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_own_work_is_never_lost(copy, ending, capsys):
    path = copy / "mvd/diffusion.py"
    ours = path.read_text("utf-8") + "\n\ndef helper():\n    return 1\n"
    path.write_text(ours, "utf-8", newline=ending)
    before = path.read_bytes()
    own = OWN.rstrip("\n").replace("\n", ending) + ending
    for count in (1, 2):
        put(1, "q_sample", OWN.rstrip("\n") + "\n")
        written = path.read_bytes()
        assert own.encode() in written
        with pytest.raises(UserError, match="may be your work; .* keeps it in attempts/"):
            exercises.main(["start", "1"])
        assert path.read_bytes() == written, "start has changed what it refused"
        exercises.main(["solution", "1"])
        assert path.read_bytes() == before, "the rest of the file is not what it was"
        kept = sorted((copy / "attempts").iterdir())
        assert len(kept) == count, "an earlier attempt was overwritten"
        assert all(attempt.read_bytes() == own.encode() for attempt in kept)
    exercises.main(["solution", "1"])
    assert "nothing was changed" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_a_half_written_exercise_keeps_its_half(copy):
    """One of two functions is written: that one is kept, the other was empty."""
    before = (copy / "mvd/cameras.py").read_bytes()
    exercises.main(["start", "6"])
    put(6, "rays", "def rays(c2w, fov_deg, size):\n    return 1, 2\n")
    exercises.main(["solution", "6"])
    assert (copy / "mvd/cameras.py").read_bytes() == before
    assert [path.name for path in (copy / "attempts").iterdir()] == ["rays.py"]


# ---- mistakes --------------------------------------------------------------------------------

@pytest.mark.parametrize("command, words", [
    (["start"], "of which exercise"),
    (["check"], "of which exercise"),
    (["start", "0"], "choose 1 to 15"),
    (["solution", "16"], "choose 1 to 15"),
    (["check", "two"], "choose 1 to 15"),
    (["start", "-1"], "choose 1 to 15"),
    (["start", "1", "2"], "unrecognized arguments"),
    (["begin", "1"], "invalid choice"),
])
def test_bad_commands_are_one_line(copy, command, words, capsys):
    try:
        exercises.main(command)
    except UserError as error:
        said = str(error)
    except SystemExit as end:
        assert end.code == 2
        said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


@pytest.mark.parametrize("command", ["start", "check", "solution"])
def test_files_that_cannot_be_read_are_one_line(copy, command):
    path = copy / "mvd/diffusion.py"
    content = path.read_text("utf-8")
    path.write_text(content.replace("def q_sample(x0, t, noise):", "def q_sample(x0, t noise):"))
    with pytest.raises(UserError, match=r"mvd/diffusion.py, line \d+: .*; mend this"):
        exercises.main([command, "1"])
    path.write_text(content.replace("def q_sample(", "def other("))
    with pytest.raises(UserError, match="has no q_sample any more: copy it back"):
        exercises.main([command, "1"])
    path.write_bytes(content.encode().replace(b"ddim", b"\xe9"))
    with pytest.raises(UserError, match="mend this"):
        exercises.main([command, "1"])
    path.unlink()
    with pytest.raises(UserError, match="need the whole repository"):
        exercises.main([command, "1"])


@pytest.mark.parametrize("command", ["start", "solution"])
def test_a_read_only_folder_is_one_line(copy, command, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    if command == "solution":
        exercises.main(["start", "1"])
    before = (copy / "mvd/diffusion.py").read_bytes()
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(UserError, match="cannot write .*diffusion.py: Read-only file system"):
        exercises.main([command, "1"])
    assert (copy / "mvd/diffusion.py").read_bytes() == before


def test_the_list_shows_every_exercise_and_what_is_started(copy, capsys):
    exercises.main(["start", "3"])
    put(1, "q_sample", OWN)
    capsys.readouterr()
    exercises.main([])
    lines = capsys.readouterr().out.splitlines()
    for number, exercise in EXERCISES.items():
        line = next(line for line in lines if line.startswith(f"{number:2}  "))
        assert all(name in line for name in exercise.names) and exercise.file in line
        assert line.split()[-1] == {1: "yours", 3: "started"}.get(number, "min")
    exercises.main(["projects"])
    assert "v-prediction" in capsys.readouterr().out


# ---- grades ----------------------------------------------------------------------------------

def test_check_says_what_is_wrong_in_words(whole_copy, capsys):
    put(1, "q_sample", "def q_sample(x0, t, noise):\n    return x0 + nosie\n")
    status, words = grade(1, capsys)
    assert status == 1
    assert "NameError: name 'nosie' is not defined" in words
    assert re.search(r"mvd/diffusion.py, line \d+: NameError", words), "it does not say where"
    assert "3 of 3 tests fail" in words


@pytest.mark.slow
def test_right_functions_that_are_written_otherwise_pass(whole_copy):
    """All rewritings at once: the tests know no more than the docstrings."""
    for (file, name), source in exercises.held(REWRITINGS).items():
        number = next(n for n, e in EXERCISES.items() if e.file == file and name in e.names)
        put(number, name, source)
    tests = sorted({exercise.tests for exercise in EXERCISES.values()})
    command = [sys.executable, "-m", "pytest", "-q", *tests, "-m", "exercise", "--tb=line"]
    run = subprocess.run(command, cwd=whole_copy, capture_output=True, text=True)
    assert run.returncode == 0, f"a right rewriting fails: {run.stdout[-3000:]}"


LOOP = '''def composite(samples, density, values, ray_count):
    weights = torch.zeros_like(density)
    sums = []
    for r in range(ray_count):
        one = samples.ray == r
        alpha = 1 - torch.exp(-density[one] * samples.width[one])
        light = torch.cumprod(torch.cat([torch.ones_like(alpha[:1]), 1 - alpha]), 0)
        weights[one] = light[:-1] * alpha
        w = weights[one]
        sums.append((
            (w[:, None] * values[one]).sum(0), w.sum(), (w * samples.distance[one]).sum()))
    return weights, *map(torch.stack, zip(*sums))
'''


@pytest.mark.slow
@pytest.mark.parametrize("number, old, new, words", [
    (3, "- sigma**2)", ")", "the direction term of DDIM eq. 12, eta 0.6: .* Is σ² subtracted"),
    (3, "eps = eps.float()\n    sigma", "eps = eps.bfloat16()\n    sigma", "direction term"),
    (10, "", LOOP, "a boolean index gives a shape that depends on data: nothing in a step may"),
    (10, "torch.exp(-before) * alpha", "alpha", r"weights along a ray sum to .*cannot exceed 1"),
    (12, "with torch.no_grad():", "if True:", "asked with gradients on"),
    (12, "0.5 * ((x0 - aim) ** 2)", "((x0 - aim) ** 2)", "all are 2 times what is expected"),
])
def test_what_breaks_a_rule_fails_with_the_rule(whole_copy, number, old, new, words, capsys):
    if old:
        replace(number, old, new)
    else:
        put(number, "composite", new)
    status, said = grade(number, capsys)
    assert status == 1 and re.search(words, said), said


@pytest.mark.slow
def test_ours_is_right(whole_copy, capsys):
    assert grade(1, capsys) == (0, "exercise 1 is right: all 3 tests of q_sample pass")


@pytest.mark.slow
def test_a_loop_that_never_ends_is_stopped(whole_copy, monkeypatch, capsys):
    monkeypatch.setattr(exercises, "PATIENCE", 20)
    put(1, "q_sample", "def q_sample(x0, t, noise):\n    while True:\n        pass\n")
    status, words = grade(1, capsys)
    assert status == 1 and "does a loop never end?" in words


if __name__ == "__main__":
    if any("is not written yet" in source for source in live().values()):
        sys.exit("error: an exercise is started: bring ours back first")
    parts = [f"#### {file} {name}\n{source}" for (file, name), source in live().items()]
    exercises.SOLUTIONS.write_text("\n".join(parts), "utf-8")
