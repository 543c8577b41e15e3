"""What the six files promise to who reads and copies them: imports, lengths of lines and functions."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIX = ("losses", "head", "atu", "data", "evaluate", "train")
MAY_IMPORT = {  # of local files; and of packages, where a file is to be copied
    "losses": {"torch"}, "head": {"torch"}, "atu": {"torch", "numpy", "tqdm", "head", "losses"},
    "data": set(), "evaluate": {"data"}, "train": {"atu", "data", "evaluate", "head", "losses"}}
LINE, FUNCTION = 110, 45


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imports(name: str) -> set[str]:
    """The packages and files that a file imports anywhere, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
    return found - sys.stdlib_module_names


def local() -> set[str]:
    """All that lies in the repository and could be imported."""
    return {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]} | {
        path.name for path in ROOT.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", SIX)
def test_a_file_imports_those_below_it_alone(name):
    found = imports(name)
    of_the_repository = found & local() | {other for other in found if other.startswith(".")}
    assert of_the_repository <= MAY_IMPORT[name]
    if name in ("losses", "head", "atu"):  # to be copied
        assert found <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", SIX)
def test_no_file_names_what_stands_on_it(name):
    said = source(name)
    assert not [word for word in ("experiments", "tests/", "conftest", "pytest") if word in said]


@pytest.mark.parametrize("name", SIX)
def test_lines_and_functions_are_short(name):
    lines = source(name).splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > LINE] == []
    functions = [node for node in ast.walk(ast.parse("\n".join(lines)))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {node.name: length
            for node in functions if (length := node.end_lineno - node.lineno + 1) > FUNCTION} == {}


@pytest.mark.parametrize("name", SIX)
def test_a_line_holds_one_statement(name):
    tree = ast.parse(source(name))
    starts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert sorted({line for line in starts if starts.count(line) > 1}) == []


@pytest.mark.parametrize("name", SIX)
def test_every_function_says_what_it_does(name):
    tree = ast.parse(source(name))
    public = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    inner = {id(child) for node in public for child in ast.walk(node) if child is not node}
    assert ast.get_docstring(tree)
    assert [node.name for node in public if id(node) not in inner and not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", SIX)
def test_nothing_is_imported_for_nothing(name):
    tree = ast.parse(source(name))
    names = [alias.asname or alias.name.partition(".")[0] for node in ast.walk(tree)
             if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert [alias for alias in names if alias not in used] == []
