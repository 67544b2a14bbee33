"""Fitted posteriors that tests share."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace
from laplace_debiased.posterior import grid_search
from laplace_debiased.sampling.folds import draw_uniformly
from tests.cases import batch

SIZE = 60
LOSSES = {"regression": "mse", "binary_classification": "bce"}
SUBSETS = ["all", "last_layer"]
TWO_BATCH = {"estimator": "two_batch", "sampling": "uniform"}  # the paper's


def loader(name="mlp", likelihood="classification", size=SIZE, batch_size=7, **kwargs):
    loss = LOSSES.get(likelihood, "cross-entropy")
    data = batch(name, size, loss, **kwargs)
    return DataLoader(TensorDataset(*data), batch_size=batch_size)


def debiased(model, likelihood="classification", subset="all", **kwargs):
    return Laplace(model, likelihood, subset, "kron_debiased", **kwargs)


def two_roles(train, fraction=0.5, budget=None, seed=0):
    """Loaders of the points that give directions, and magnitudes."""
    folds = draw_uniformly(train, budget, seed).split([fraction, 1 - fraction]).folds
    return [fold.loader for fold in folds]


def searched(la, val, monkeypatch, **grid):
    """Search a grid in one pass: its losses, and the number of nodes by batch."""
    nodes, losses = [], []
    own, choose = la._variances_by_prior, grid_search._losses_from_one_pass

    def counting(X, priors):
        nodes.append(len(priors))
        return own(X, priors)

    def keeping(*args):
        losses.append(choose(*args))
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(la, "_variances_by_prior", counting)
        patch.setattr(grid_search, "_losses_from_one_pass", keeping)
        la.optimize_prior_precision(method="gridsearch", val_loader=val, **grid)
    return torch.tensor(losses[0]), nodes


def posterior(la):
    return la.posterior_precision.to_matrix()
