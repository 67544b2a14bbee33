"""Layers with random Kronecker factors."""

import torch

from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.rows.layers import Layer
from tests.curvature.test_eigenbasis import positive_definite

LAYERS = [
    Layer("first", matrix=0, vector=1, d_out=4, d_in=3),
    Layer("second", matrix=2, vector=None, d_out=2, d_in=4),
    Layer("norm", matrix=None, vector=3, d_out=2, is_normalization=True),
]


def kronecker_factors(layers=LAYERS):
    return [
        Kronecker(
            positive_definite(layer.d_out),
            positive_definite(layer.d_in) if layer.has_inputs else None,
        )
        for layer in layers
    ]


def spectra(layers=LAYERS):
    return [
        Spectrum(
            torch.rand(layer.d_out, layer.d_in).double() if layer.has_inputs else None,
            torch.rand(layer.d_out).double() if layer.vector is not None else None,
        )
        for layer in layers
    ]


def bases(directions, layers=LAYERS):
    """Dense eigenvectors of each parameter, in their order."""
    of = {}
    for layer, own in zip(layers, directions, strict=True):
        if layer.matrix is not None:
            of[layer.matrix] = torch.kron(own.gradients, own.inputs)
        if layer.vector is not None:
            of[layer.vector] = own.gradients
    return [of[position] for position in sorted(of)]


def dense_factors(factors, layers=LAYERS):
    """Dense Kronecker products of each parameter, in their order."""
    return bases(factors, layers)
