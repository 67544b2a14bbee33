"""The callback in Hugging Face's trainer."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from laplace_debiased.integrations.hugging_face import LaplaceCallback

LENGTH, VOCABULARY = 5, 11
pytestmark = pytest.mark.filterwarnings("ignore")


def points(size, seed, kind=int):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    return [{"input_ids": own, "labels": kind(own[0]) % 3} for own in tokens]


def network(num_labels=3):
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=LENGTH,
            num_labels=num_labels,
        )
    )


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_posterior_is_fitted_when_training_ends(tmp_path, evaluates):
    model = network()
    arguments = TrainingArguments(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        eval_strategy="epoch" if evaluates else "no",
        disable_tqdm=True,
    )
    callback = LaplaceCallback(budget=16, path=tmp_path / "posterior.pt")
    trainer = Trainer(
        model,
        arguments,
        train_dataset=points(40, 0),
        eval_dataset=points(24, 1),
        callbacks=[callback],
    )
    trainer.train()
    la = callback.posterior
    assert la.n_data == 40 and (la.calibration is not None) == evaluates
    assert "left out" not in la.parameter_kinds.values()
    X = {"input_ids": torch.stack([point["input_ids"] for point in points(4, 2)])}
    probabilities = la(X)
    assert probabilities.shape == (4, 3) and probabilities.isfinite().all()
    assert (tmp_path / "posterior.pt").exists()


@pytest.mark.parametrize("before", ["predict", "evaluate"])
def test_data_predicted_before_training_do_not_calibrate(tmp_path, before):
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    callback = LaplaceCallback(budget=16)
    trainer = Trainer(
        network(), arguments, train_dataset=points(40, 0), callbacks=[callback]
    )
    getattr(trainer, before)(points(24, 1))
    trainer.train()
    assert callback.posterior is not None and callback.posterior.calibration is None


def test_a_posterior_that_cannot_be_calibrated_is_not_lost(tmp_path):
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    callback = LaplaceCallback(budget=16, val_loader=DataLoader([], 4))
    data = points(40, 0)
    trainer = Trainer(network(), arguments, train_dataset=data, callbacks=[callback])
    with pytest.raises(ValueError, match="no data"):
        trainer.train()
    assert callback.posterior.n_data == 40


def test_mistakes_are_told_before_training(tmp_path):
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    callback, model = LaplaceCallback(budgt=3), network()
    trainer = Trainer(
        model, arguments, train_dataset=points(40, 0), callbacks=[callback]
    )
    with pytest.raises(TypeError, match="budgt"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_regressions_of_one_number(tmp_path):
    """Its labels are ``[batch]``, as its own loss takes them, and outputs a column."""
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    callback = LaplaceCallback("regression")
    data = points(40, 0, float)
    model = network(num_labels=1)
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    la = callback.posterior
    tokens = torch.stack([point["input_ids"] for point in data])
    y = torch.tensor([point["labels"] for point in data])
    with torch.no_grad():
        squares = (model(tokens).logits[:, 0] - y).square()
    assert torch.allclose(la.loss, squares.sum() / 2, rtol=1e-4)
    f_mu, f_var = la({"input_ids": tokens[:4]})
    assert f_mu.shape == (4, 1) and (f_var > 0).all()
