r"""From a loader to weighted folds.

Points are drawn with inclusion probabilities :math:`\pi_n` that grow with their
curvature; with weights :math:`1 / \pi_n`, sums over them are unbiased estimates of sums
over all data (Horvitz and Thompson, 1952).

This folder hands on folds: loaders over disjoint points, with their weights.
"""
