"""Hugging Face's networks as they come, without a wrapper."""

import warnings

import pytest
import torch
from laplace.curvature import AsdlGGN
from peft import PeftModel
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from tests.dense import relative_error
from tests.fits import SUBSETS, debiased, posterior
from tests.networks import NUM_CLASSES, RAW, Logits, network

pytestmark = pytest.mark.filterwarnings("ignore:.*stay at their trained values")
SIZE = 14


def examples(name, size=SIZE):
    """Points, in the order of a data set: texts of several lengths, or images."""
    generator = torch.Generator().manual_seed(1)

    def numbers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    points = []
    for _ in range(size):
        point = {"labels": int(numbers(0, NUM_CLASSES, 1))}
        if "vit" in name:
            pixels = torch.randn(3, 16, 16, generator=generator, dtype=torch.float64)
            points.append(point | {"pixel_values": pixels})
        else:
            tokens = numbers(3, 30, int(numbers(2, 8, 1)))
            points.append(point | {"input_ids": tokens})
    return points


def padded(points):
    """Pads a batch to its longest text, as tokenizers do."""
    y = torch.tensor([point["labels"] for point in points])
    if "pixel_values" in points[0]:
        images = torch.stack([point["pixel_values"] for point in points])
        return {"pixel_values": images, "labels": y}
    texts = [point["input_ids"] for point in points]
    tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    masks = [torch.ones_like(text) for text in texts]
    mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return BatchEncoding({"input_ids": tokens, "attention_mask": mask, "labels": y})


def raw(name):
    return network(name, networks=RAW)


def loader(name, batch_size=5):
    return DataLoader(examples(name), batch_size, collate_fn=padded)


def inputs(name, count=3):
    """Points to predict, which carry their labels."""
    return padded(examples(name, count))


def keys(name):
    return ("pixel_values",) if "vit" in name else ("input_ids", "attention_mask")


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", RAW)
def test_predictions_are_exact(name, subset, magnitudes):
    la, X = debiased(raw(name), subset=subset, magnitudes=magnitudes), inputs(name)
    la.fit(loader(name))
    model = la.model if subset == "all" else la.model.model
    assert model.config.problem_type is None  # which a loss would set
    fitted = {id(param) for param in la.params}
    params = {n: p.detach() for n, p in model.named_parameters() if id(p) in fitted}
    own = {key: X[key] for key in keys(name)}

    def logits(params):
        return functional_call(model, params, (), own).logits

    jacobians = jacrev(logits)(params)
    J = torch.cat([jacobian.flatten(2) for jacobian in jacobians.values()], 2)
    f_mu, f_var = la._glm_predictive_distribution(X)
    assert torch.allclose(f_mu, logits(params))
    assert relative_error(f_var, la.functional_variance(J)) < 1e-8


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", ["bert", "vit", "bert-lora"])
def test_a_wrapper_gives_the_same(name, subset):
    """laplace-torch needs one, whose ``forward`` takes a mapping as one argument."""
    X, found = inputs(name), []
    for model in (raw(name), Logits(raw(name), *keys(name))):
        la = debiased(model, subset=subset, dict_key_x=keys(name)[0])
        la.fit(loader(name))
        la.optimize_prior_precision()
        nn_samples = la.predictive_samples(
            X, "nn", 3, generator=torch.Generator().manual_seed(0)
        )
        found.append([posterior(la), la(X), la(X, joint=True), nn_samples])
    for own, wrapped in zip(*found, strict=True):
        assert torch.equal(own, wrapped)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", ["distilbert", "gpt-2", "llama", "vit-lora"])
def test_all_that_is_done_with_a_posterior(name, subset, tmp_path):
    model, train, X = raw(name), loader(name), inputs(name)
    la = debiased(model, subset=subset)
    la.fit(train)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=train, grid_size=3, link_approx="probit"
    )
    la.calibrate(train)
    probabilities = la(X)
    assert probabilities.shape == (3, NUM_CLASSES)
    assert torch.allclose(la(dict(X)), probabilities)
    assert torch.allclose(la.uncertainty(X).probabilities, probabilities)
    own = {key: X[key] for key in keys(name)}  # without labels
    assert torch.equal(la(own), probabilities)
    assert la(X, pred_type="nn", link_approx="mc", n_samples=2).shape == (3, 3)
    assert la.report(train, [own]).num_points == SIZE
    la.save(tmp_path / "la.pt")
    again = debiased(raw(name), subset=subset)
    again.load(tmp_path / "la.pt")
    assert torch.equal(again(X), probabilities)


def test_checkpoints_lie_beside_those_of_the_model(tmp_path):
    model, X = raw("bert"), inputs("bert")
    la = debiased(model)
    la.fit(loader("bert"))
    model.save_pretrained(tmp_path)
    la.save(tmp_path / "laplace.pt")
    restored = BertForSequenceClassification.from_pretrained(tmp_path).double().eval()
    again = debiased(restored)
    again.load(tmp_path / "laplace.pt")
    assert torch.equal(again(X), la(X))


def test_checkpoints_lie_beside_those_of_adapters(tmp_path):
    model, X = raw("bert-lora"), inputs("bert")
    la = debiased(model)
    la.fit(loader("bert"))
    model.save_pretrained(tmp_path)
    la.save(tmp_path / "laplace.pt")
    restored = PeftModel.from_pretrained(raw("bert"), tmp_path, is_trainable=True)
    again = debiased(restored.double().eval())
    again.load(tmp_path / "laplace.pt")
    assert torch.allclose(again(X), la(X))


def test_trainers_loaders_are_read(tmp_path):
    model = raw("bert")
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=5,
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(
        model, arguments, data_collator=padded, train_dataset=examples("bert")
    )
    la = debiased(model, magnitudes="ggn")
    la.fit(trainer.get_train_dataloader())
    assert la.n_data == SIZE
    expected = debiased(raw("bert"), magnitudes="ggn")
    expected.fit(loader("bert"))
    assert torch.allclose(la.loss, expected.loss)
    # the points are the same, in another order
    assert relative_error(posterior(la).trace(), posterior(expected).trace()) < 0.2


def test_labels_do_not_reach_the_network():
    class Watched(BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            assert labels is None
            return super().forward(input_ids, attention_mask)

    train, X = loader("bert"), inputs("bert")
    for subset in ("all", "last_layer"):
        la = debiased(Watched(raw("bert").config).double(), subset=subset)
        la.fit(train)
        la.partial_fit(X) if subset == "all" else None
        la.calibrate(train)
        assert la(X).isfinite().all()
        assert la(X, pred_type="nn", link_approx="mc", n_samples=2).isfinite().all()


def test_entries_that_the_network_does_not_take_are_named():
    class Narrow(BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None):
            return super().forward(input_ids, attention_mask)

    def numbered(points):
        batch = padded(points)
        batch["number"] = torch.arange(len(points))
        return batch

    train = DataLoader(examples("bert"), 5, collate_fn=numbered)
    for subset in ("all", "last_layer"):
        la = debiased(Narrow(raw("bert").config).double(), subset=subset)
        with pytest.warns(UserWarning, match=r"without .*\['number'\].*Narrow"):
            la.fit(train)
    la = debiased(raw("bert"), subset="last_layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.fit(loader("bert"))


def test_other_backends_need_a_wrapper():
    model = raw("bert")
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith("bert.embeddings"))
    la = debiased(model, backend=AsdlGGN)
    with pytest.raises(ValueError, match="takes keywords"):
        la.fit(loader("bert"))


def test_several_labels_of_a_text():
    """As for `problem_type="multi_label_classification"`, whose labels are floats."""
    model = raw("bert")
    batches = [padded(examples("bert")[k : k + 5]) for k in range(0, SIZE, 5)]
    for own in batches:
        classes = torch.arange(NUM_CLASSES)
        own["labels"] = (own["labels"][:, None] >= classes).float()
    la = debiased(model, "binary_classification")
    la.fit(batches)
    logits = torch.cat([la._network(**own).logits for own in without(batches)])
    y = torch.cat([own["labels"] for own in batches]).double()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
    assert torch.allclose(la.loss, loss)
    assert la(batches[0]).shape == batches[0]["labels"].shape
    assert la.calibrate(batches).num_points == SIZE


def without(batches):
    return [{k: v for k, v in own.items() if k != "labels"} for own in batches]


class Whole(nn.Module):
    """Takes a batch as laplace-torch's networks do, by the attributes of its class."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, batch):
        tokens = batch.to("cpu").input_ids
        return self.head(self.table(tokens).mean(1).tanh())


def encoded(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, (count, 5), generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return BatchEncoding({"input_ids": tokens, "labels": y})


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("budget", [None, 16])
def test_batches_keep_their_class(subset, budget):
    batches, model = [encoded(15, seed) for seed in range(2)], Whole()
    la = debiased(model, subset=subset, budget=budget, memory_limit=2000)
    la.fit(batches)
    la.calibrate(batches)
    plain = nn.Sequential(model.table, Pooled(), model.head)
    other = debiased(plain, subset=subset, budget=budget)
    other.fit([(own["input_ids"], own["labels"]) for own in batches])
    assert torch.allclose(la.H.to_matrix(), other.H.to_matrix(), rtol=1e-4, atol=1e-6)
    found = la.uncertainty(encoded(4))
    assert found.probabilities.shape == (4, 3)
    if subset == "all":
        la.partial_fit(encoded(9))


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1).tanh()
