"""The callback in Hugging Face's trainer."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from laplace_debiased.integrations.hugging_face import LaplaceCallback

LENGTH, VOCABULARY = 5, 11
pytestmark = pytest.mark.filterwarnings("ignore")


def points(size, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    return [{"input_ids": own, "labels": int(own[0]) % 3} for own in tokens]


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_posterior_is_fitted_when_training_ends(tmp_path, evaluates):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=LENGTH,
            num_labels=3,
        )
    )
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
