r"""Mini-batch quadratics: how biased they are, and how to use them nevertheless.

A mini-batch approximates the loss by :math:`q(s) = g^\top s + \frac12 s^\top H s`.
Along the top eigenvectors of H and the directions of conjugate gradients, slopes and
curvatures are extreme for that batch (arXiv 2410.14325, Sections 3 and 4).

This folder hands on reports of that bias, eigenspaces, slopes and curvatures along
directions, and debiased conjugate gradients.
"""
