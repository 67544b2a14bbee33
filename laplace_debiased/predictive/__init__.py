r"""From a posterior to moments of the network's outputs.

The linearized network has the output covariance :math:`J_n P^{-1} J_n^\top`, with the
posterior precision P. In its eigenbasis it is a contraction of rotated rows.

This folder hands on means and covariances of outputs.
"""
