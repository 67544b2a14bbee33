"""The folders of the library are in reading order: none imports one below it."""

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
    "comparison",
)
ROOT = Path(laplace_debiased.__file__).parent
MODULES = sorted(ROOT.glob("*/*.py"))


def imported(path):
    """Modules of the library that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] == "laplace_debiased")


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
    of_module = {
        ".".join(("laplace_debiased", path.parent.name, path.stem)): set(imported(path))
        for path in MODULES
    }
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
