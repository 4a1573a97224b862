"""The mutation check: which changes it makes, which tests it runs, and that its lists are true."""
import ast

import pytest

import mutate

SOURCE = '''
def area(x, width):
    """Doc - string."""
    if len(x) < 3:
        raise ValueError(f"{len(x) - 1} points")
    corner = x.detach().sum(0)
    return width / 2 - corner


def _private(x):
    return x + 1
'''
# (kind, what the line becomes).
CHANGES = {
    ("comparison", "if len(x) >= 3:"),
    ("off by one", "if len(x) <= 3:"),
    ("detach", "corner = x.sum(0)"),
    ("axis", "corner = x.detach().sum(1)"),
    ("sign", "return width / 2 + corner"),
    ("operands", "return corner - width / 2"),
    ("factor", "return width * 2 - corner"),
    ("factor", "return (width) - corner"),
    ("operands", "return 2 / width - corner"),
    ("constant", "return width / 3 - corner"),
}


def test_the_mutants_of_a_function(tmp_path):
    (tmp_path / "shape.py").write_text(SOURCE)
    found = mutate.mutants_of("shape.py", tmp_path)
    assert {(mutant.kind, mutant.after) for mutant in found} == CHANGES
    assert {mutant.function for mutant in found} == {"area"}
    for mutant in found:
        changed = mutate.apply(SOURCE.encode(), mutant).decode()
        lines = [line.strip() for line in changed.splitlines()]
        assert mutant.after in lines and mutant.before not in lines
        ast.parse(changed)


def test_a_draw_repeats_and_has_no_mutant_twice(tmp_path):
    (tmp_path / "shape.py").write_text(SOURCE)
    all_of_them = mutate.mutants_of("shape.py", tmp_path)
    first, again = [mutate.draw(all_of_them, 6, seed=1) for _ in range(2)]
    assert first == again and len({mutant.key for mutant in first}) == 6
    assert len(mutate.draw(all_of_them, 99, seed=1)) == len(CHANGES)


@pytest.mark.parametrize("function, file", [
    ("ddim_step", "test_diffusion"),
    ("HashGrid.forward", "test_hashgrid"),
])
def test_the_tests_of_a_function_mention_it(function, file):
    mutant = mutate.Mutant("", function, "", 0, 0, 0, "", "", "")
    path = f"tests/{file}.py"
    found = mutate.tests_of(mutant, mutate.ROOT, [path])
    assert found and found != [path]
    assert all(name.startswith(f"{path}::test_") for name in found)
    nobody = mutate.Mutant("", "nobody_has_this", "", 0, 0, 0, "", "", "")
    assert mutate.tests_of(nobody, mutate.ROOT, [path]) == [path]


def test_what_is_listed_is_there():
    """Modules, their tests, and the functions whose mutants compute the same."""
    known = set()
    for module, tests in mutate.MODULES.items():
        source = (mutate.ROOT / module).read_text("utf-8")
        names = [name for name, _ in mutate.functions(ast.parse(source))]
        assert names and set(mutate.ONLY.get(module, [])) <= set(names)
        known |= set(names)
        for test in tests:
            assert (mutate.ROOT / f"tests/{test}.py").exists()
    unknown = {function for function, *_ in mutate.EQUIVALENT} - known
    assert not unknown, "a function of the list of equivalent mutants is not there any more"
