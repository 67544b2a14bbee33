"""The examples in docstrings run, and public names have one."""

import doctest
import importlib
import pkgutil
import warnings

import pytest
import torch

import laplace_debiased

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(laplace_debiased.__path__, "laplace_debiased.")
    if not info.name.endswith("__main__")
)
# what other functions return, or another package documents
WITHOUT_EXAMPLE = {
    "BiasReport",
    "CGResult",
    "Comparison",
    "DirectionalDerivatives",
    "Eigenspace",
    "EigenspaceComparison",
    "Laplace",
    "__version__",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted({*laplace_debiased.__all__} - WITHOUT_EXAMPLE))
def test_public_names_have_an_example(name):
    item = getattr(laplace_debiased, name)
    assert doctest.DocTestParser().get_examples(item.__doc__ or "")
