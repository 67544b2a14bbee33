"""Input rows in a basis, without the rows themselves."""

import pytest
import torch

from laplace_debiased.rows.uses import Layout
from tests.rows.test_thinning import LAYOUTS, USES


@pytest.mark.parametrize("name", USES)
def test_they_are_products_with_the_basis(name):
    use, layout = USES[name], LAYOUTS.get(name, Layout())
    rows = use.input_rows(layout, 3)
    basis = torch.linalg.qr(torch.randn(2 * [rows.shape[-1]]).double()).Q
    turned = use.rotated_rows(layout, 3, basis)
    assert turned.shape == rows.shape and turned.dtype == torch.float64
    assert torch.allclose(turned, rows.double() @ basis)
    ones = torch.ones(rows.shape[-1])
    assert torch.equal(use.rotated_rows(layout, 3, ones), rows)
