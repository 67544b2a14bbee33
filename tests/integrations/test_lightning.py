"""The callback in a real Lightning trainer."""

import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace
from laplace_debiased.integrations.lightning import LaplaceCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(pl.LightningModule):
    def __init__(self, nested=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.nested = nested

    def forward(self, x):
        return {"scores": self.body(x)} if self.nested else self.body(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch, index, dataloader_idx=0):
        self.log("loss", nn.functional.cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def loader(size, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(size, 4, generator=generator)
    return DataLoader(TensorDataset(X, X[:, :3].argmax(1)), 16, shuffle=True)


NO_DATA = DataLoader([], 4)


def train(module, callback, *loaders, **options):
    trainer = pl.Trainer(
        **options,
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *loaders)


pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_posterior_is_fitted_calibrated_and_saved(tmp_path):
    torch.manual_seed(0)
    module, data = Classifier(), (loader(120, 0), loader(60, 1))
    callback = LaplaceCallback(budget=32, path=tmp_path / "posterior.pt")
    train(module, callback, *data)
    la = callback.posterior
    assert la.calibration is not None and la.n_data == 120
    X = data[1].dataset.tensors[0]
    restored = Laplace(module, "classification", "all", "kron_debiased", budget=32)
    restored.load(tmp_path / "posterior.pt")
    assert torch.equal(restored(X), la(X))
    expected = Laplace(module, "classification", "all", "kron_debiased", budget=32)
    expected.fit(data[0])
    expected.calibrate(data[1])
    assert torch.allclose(la(X), expected(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "images"}, "images"),
        ({"budgt": 3}, "budgt"),
        ({"budget": 1}, "`budget` must be at least"),
        ({"network": "nett"}, "nett"),
    ],
)
def test_mistakes_are_told_before_training(options, message):
    module = Classifier()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        train(module, LaplaceCallback(**options), loader(60, 0))
    assert all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize(
    ("subset", "options"),
    [
        ("all", {"prior_precision": torch.full((4,), 3.0), "prior_mean": 0.1}),
        ("last_layer", {"last_layer_name": "body.2"}),
    ],
)
def test_options_may_be_those_of_one_network(subset, options):
    callback = LaplaceCallback(subset_of_weights=subset, **options)
    train(Classifier(), callback, loader(60, 0))
    assert callback.posterior is not None


def test_training_does_not_notice_it():
    trained = []
    for callback in (pl.Callback(), LaplaceCallback()):
        torch.manual_seed(0)
        module = Classifier()
        train(module, callback, loader(60, 0))
        trained.append(module.body[0].weight)
    assert torch.equal(*trained)


def test_folders_are_made_but_not_by_a_trial_run(tmp_path):
    path = tmp_path / "new" / "posterior.pt"
    callback = LaplaceCallback(path=path)
    train(Classifier(), callback, loader(60, 0), fast_dev_run=True)
    assert callback.posterior is not None and not path.exists()
    train(Classifier(), callback, loader(60, 0))
    assert path.exists()


def test_a_posterior_that_cannot_be_calibrated_is_not_lost():
    module, callback = Classifier(), LaplaceCallback(budget=16, val_loader=NO_DATA)
    with pytest.raises(ValueError, match="no data"):
        train(module, callback, loader(60, 0))
    assert callback.posterior.n_data == 60


def test_a_posterior_that_cannot_be_saved_is_not_lost(tmp_path):
    callback = LaplaceCallback(path=tmp_path)  # a folder
    with pytest.raises(OSError, match="directory"):
        train(Classifier(), callback, loader(60, 0))
    assert callback.posterior is not None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_better_weights_that_were_kept_are_named(tmp_path, mode):
    checkpoints = ModelCheckpoint(tmp_path, monitor="loss", mode=mode)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[LaplaceCallback(), checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Classifier(), loader(120, 0), loader(60, 1))
    told = [str(own.message) for own in caught if "best by 'loss'" in str(own.message)]
    # the loss falls: the last weights are the best if it is minimized
    assert len(told) == (mode == "max")
    if told:
        assert checkpoints.best_model_path in told[0]


def test_submodules_and_other_validation_data_can_be_given():
    module = Classifier(nested=True)
    callback = LaplaceCallback(network="body", val_loader=loader(60, 1))
    train(module, callback, loader(60, 0))
    assert callback.posterior.model is module.body
    assert callback.posterior.calibration is not None


def test_without_validation_data_the_marginal_likelihood_chooses():
    callback = LaplaceCallback(subset_of_weights="last_layer")
    train(Classifier(), callback, loader(60, 0))
    la = callback.posterior
    assert la.calibration is None and la.prior_precision.item() != 1


def test_several_loaders_are_refused():
    callback = LaplaceCallback()
    with pytest.raises(ValueError, match=r"val_dataloaders.* single DataLoader"):
        train(Classifier(), callback, loader(60, 0), [loader(20, 1), loader(20, 2)])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("64-true", torch.float64), ("bf16-true", torch.bfloat16)],
)
def test_batches_have_the_trainers_precision(precision, dtype, given):
    torch.manual_seed(0)
    module, data, val = Classifier(), loader(60, 0), loader(60, 1)
    callback = LaplaceCallback(val_loader=val if given else None)
    loaders = (data,) if given else (data, val)
    train(module, callback, *loaders, precision=precision)
    la = callback.posterior
    assert la.mean.dtype == dtype and la.calibration is not None
    X, y = data.dataset.tensors
    assert X.dtype == torch.float32  # the trainer's own data stay
    expected = Laplace(module, "classification", "all", "kron_debiased")
    expected.fit(DataLoader(TensorDataset(X.to(dtype), y), 16))
    assert torch.equal(la.loss, expected.loss)
    assert torch.allclose(la.H.to_matrix(), expected.H.to_matrix(), rtol=1e-4)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from zip(*loader(60, 0).dataset.tensors, strict=True)


def test_streams_of_kept_workers_have_the_trainers_precision():
    data = DataLoader(Stream(), 16, num_workers=1, persistent_workers=True)
    callback = LaplaceCallback()
    train(Classifier(), callback, data, precision="64-true")
    assert callback.posterior.mean.dtype == torch.float64
    assert callback.posterior.n_data == 60


def test_mixed_precision_is_the_trainers_alone():
    module, data = Classifier(), loader(60, 0)
    callback = LaplaceCallback()
    train(module, callback, data, precision="bf16-mixed")
    expected = Laplace(module, "classification", "all", "kron_debiased")
    expected.fit(data)
    assert torch.equal(callback.posterior.loss, expected.loss)
