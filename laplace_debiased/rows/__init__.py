r"""From a network to rows.

A layer that is applied at :math:`S` positions of an example maps input rows
:math:`x_{ns}` to output rows :math:`W x_{ns} + b`. With the output gradient rows
:math:`g_{ns}`, the gradient of example n is :math:`\sum_s g_{ns} x_{ns}^\top`.

This folder finds the layers, and hands on their rows ``[n, S, groups, features]``.
"""
