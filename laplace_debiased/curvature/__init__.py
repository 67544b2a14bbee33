r"""From rows to directions and magnitudes.

A layer's curvature is :math:`U \mathrm{diag}(\lambda) U^\top`, with directions
:math:`U = U_G \otimes U_A` from the Kronecker factors of some points, and magnitudes
:math:`\lambda_{ij} = u_{ij}^\top \tilde H u_{ij}` from others (arXiv 2410.14325).

This folder hands on directions and magnitudes of each layer, and the matrix of both.
"""
