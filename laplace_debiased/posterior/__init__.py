r"""From folds to a posterior, with laplace-torch's interface.

The posterior precision is :math:`U \mathrm{diag}(\lambda) U^\top + \delta I` with the
prior precision :math:`\delta`.

This folder hands on the Laplace approximations.
"""
