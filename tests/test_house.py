"""The library is in reading order, and its files and functions are short."""

import ast
from pathlib import Path

import pytest

import laplace_debiased

FOLDERS = (
    "rows",
    "curvature",
    "sampling",
    "predictive",
    "quadratics",
    "posterior",
    "integrations",
    "comparison",
)
ROOT = Path(laplace_debiased.__file__).parent
MODULES = sorted(ROOT.glob("*/*.py"))

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
LONGER = {
    "posterior/laplace.py": "the interface of one class, half of it docstrings",
}


def running(node):
    """A node and all in it, but for what is there for type checkers alone."""
    yield node
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in node.orelse if for_types else ast.iter_child_nodes(node):
        yield from running(child)


def modules_named_by(node):
    """Modules that a statement imports, whether they are packages or their parts."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        parts = [f"{node.module}.{alias.name}" for alias in node.names]
        return [node.module, *(part for part in parts if part in NAMES)]
    return []


def imported(path):
    """Modules of the library that a file imports at run time, also in functions."""
    for node in running(ast.parse(path.read_text())):
        for name in modules_named_by(node):
            if name.split(".")[0] == "laplace_debiased":
                yield name


def name_of(path):
    return ".".join(("laplace_debiased", path.parent.name, path.stem))


NAMES = {name_of(path) for path in MODULES}


def test_every_module_is_in_a_folder():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == set(FOLDERS)
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_folders_import_none_below_them(path):
    above = FOLDERS[: FOLDERS.index(path.parent.name) + 1]
    for name in imported(path):
        _, folder, *_ = [*name.split("."), "(top)"]
        assert folder in above, f"{path.parent.name} imports {name}"


def test_modules_do_not_import_each_other_in_circles():
    of_module = {name_of(path): set(imported(path)) for path in MODULES}
    while free := [
        name for name, needed in of_module.items() if not needed & of_module.keys()
    ]:
        for name in free:
            del of_module[name]
    assert not of_module


def test_tests_mirror_the_folders():
    here = Path(__file__).parent
    assert {
        path.name for path in here.iterdir() if (path / "__init__.py").exists()
    } == set(FOLDERS)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *MODULES], ids=name_of)
def test_files_are_short(path):
    count = len(path.read_text().splitlines())
    is_long = count > MOST_LINES
    assert is_long == (path.relative_to(ROOT).as_posix() in LONGER), count


def num_lines(function):
    """Lines of a function from its ``def`` on, without the docstring."""
    first, *_ = function.body
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_functions_are_short():
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": num_lines(node)
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and num_lines(node) > MOST_LINES_OF_A_FUNCTION
    }
    assert not long
