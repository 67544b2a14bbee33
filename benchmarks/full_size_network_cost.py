"""What each stage costs on full-size networks: time and peak memory, random inputs.

The cost depends on shapes alone, so neither weights nor inputs are trained or real.
Each case runs in a process of its own; times are those of the processor, peak memory is
that of the process so far. The limit of a prediction is a forward pass and one backward
pass for each class; that of a fit is as much for each of its points, but for one of the
backward passes, since a softmax's curvature has one column less than classes. For a
last layer it is the forward pass. The pool that points are drawn from by default costs
at least a forward pass. The networks of Hugging Face need the extra ``test``.

    python benchmarks/full_size_network_cost.py

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shared.command_line import add_out, parse
from shared.internals import POOL_FACTOR
from shared.networks import wide_resnet
from shared.processes import in_own_process, peak_megabytes
from shared.reports import Progress, write_report
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import models
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from laplace_debiased import Laplace

STUDY = Path(__file__).stem
NUM_TOKENS = 128
TIME_LIMIT = 1800.0


def cifar_resnet18(num_classes: int) -> nn.Module:
    """Build ResNet-18 with the first layers that are usual for 32×32 images."""
    model = models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit(num_classes: int) -> nn.Module:
    """Build torchvision's ViT-B/16, with a head that is not zero."""
    model = models.vit_b_16(num_classes=num_classes)
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def hugging_face_vit(num_classes: int) -> nn.Module:
    """Build Hugging Face's ViT-B/16."""
    return ViTForImageClassification(ViTConfig(num_labels=num_classes))


def bert(num_classes: int) -> nn.Module:
    """Build BERT-base for sequence classification."""
    return BertForSequenceClassification(BertConfig(num_labels=num_classes))


def minilm(num_classes: int) -> nn.Module:
    """Build a BERT of the size of MiniLM-L6."""
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        intermediate_size=1536,
        num_labels=num_classes,
    )
    return BertForSequenceClassification(config)


def gpt_2(num_classes: int) -> nn.Module:
    """Build GPT-2 (124M) for sequence classification."""
    config = GPT2Config(num_labels=num_classes, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def llama(num_classes: int) -> nn.Module:
    """Build a small decoder with rotary positions and gated layers."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_labels=num_classes,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def bert_lora(num_classes: int) -> nn.Module:
    """Adapt BERT-base by LoRA of rank 8."""
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    return get_peft_model(bert(num_classes), config)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ResNet-18": cifar_resnet18,
    "ResNet-50": models.resnet50,
    "WideResNet-40-4": lambda num_classes: wide_resnet(classes=num_classes),
    "WideResNet-50-2": models.wide_resnet50_2,
    "EfficientNet-B0": models.efficientnet_b0,
    "ConvNeXt-Tiny": models.convnext_tiny,
    "ViT-B/16": vit,
    "Swin-T": models.swin_t,
    "ViT-B/16, Hugging Face": hugging_face_vit,
    "BERT-base": bert,
    "BERT-base, LoRA": bert_lora,
    "MiniLM-L6": minilm,
    "GPT-2": gpt_2,
    "Llama, 8 layers": llama,
}
TEXT = ("BERT", "MiniLM", "GPT", "Llama")


@dataclass(frozen=True)
class Case:
    """A network, what is fitted, and how much is predicted.

    Args:
        network: Name in ``NETWORKS``.
        subset: ``"all"`` or ``"last_layer"``.
        size: Height and width of an image; number of tokens for BERT.
        classes: Number of classes.
        budget: Number of points that the posterior is fitted to.
        batch_size: Number of points in a batch.
        predicted: Number of images or texts in one prediction.
        magnitudes: The magnitudes.
        estimator: The estimator: with large layers, the time is that of their
            eigendecompositions, of which ``"cross_fit"`` takes three.
    """

    network: str
    subset: str
    size: int
    classes: int
    budget: int
    batch_size: int
    predicted: int
    magnitudes: str = "kfac"
    estimator: str = "two_batch"

    @property
    def on_text(self) -> bool:
        """Whether the inputs are tokens."""
        return self.network.startswith(TEXT)

    @property
    def on_mappings(self) -> bool:
        """Whether the network is one of Hugging Face's."""
        return self.on_text or self.network.endswith("Hugging Face")

    @property
    def dict_key_x(self) -> str:
        """The key of the inputs in a mapping."""
        return "input_ids" if self.on_text else "pixel_values"


CASES = [
    Case("ResNet-18", "all", 32, 10, 256, 32, 64),
    Case("ResNet-18", "all", 32, 10, 256, 32, 64, estimator="cross_fit"),
    Case("ResNet-50", "last_layer", 224, 1000, 32, 16, 8),
    Case("ViT-B/16", "last_layer", 224, 1000, 32, 16, 8),
    Case("EfficientNet-B0", "all", 224, 10, 32, 4, 4),
    Case("ConvNeXt-Tiny", "all", 224, 10, 32, 4, 4),
    Case("Swin-T", "all", 224, 10, 32, 4, 4),
    Case("ResNet-50", "all", 224, 10, 32, 4, 4),
    Case("BERT-base, LoRA", "all", NUM_TOKENS, 2, 32, 4, 4),
    Case("ViT-B/16", "all", 224, 10, 32, 4, 4),
    Case("MiniLM-L6", "all", NUM_TOKENS, 2, 32, 4, 4),
    Case("Llama, 8 layers", "all", NUM_TOKENS, 2, 32, 4, 4),
    Case("BERT-base", "all", NUM_TOKENS, 2, 32, 4, 4),
    Case("GPT-2", "all", NUM_TOKENS, 2, 32, 4, 4),
    Case("ViT-B/16, Hugging Face", "all", 224, 10, 32, 4, 4),
    Case("WideResNet-40-4", "all", 32, 10, 32, 8, 8),
    Case("WideResNet-50-2", "last_layer", 224, 1000, 32, 16, 8),
]
QUICK_CASE = Case("ResNet-18", "last_layer", 32, 10, 8, 4, 2)


class RandomInputs(Dataset):
    """Inputs of a case, as pairs or as mappings for Hugging Face's networks.

    Args:
        case: The case.
    """

    def __init__(self, case: Case):
        self._on_mappings, self._key = case.on_mappings, case.dict_key_x
        count = max(case.budget, case.predicted)
        self._labels = torch.randint(case.classes, (count,))
        if case.on_text:
            tokens = torch.randint(1000, 30_000, (count, case.size))
            self._inputs = {self._key: tokens, "attention_mask": tokens.sign()}
        else:
            images = torch.randn(count, 3, case.size, case.size)
            self._inputs = {self._key: images}

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Any:
        y = self._labels[index]
        row = {key: value[index] for key, value in self._inputs.items()}
        return row | {"labels": y} if self._on_mappings else (row[self._key], y)


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """Compute the network's outputs ``[inputs, classes]``."""
    if not isinstance(inputs, MutableMapping):
        return model(inputs)
    return model(**{key: inputs[key] for key in inputs if key != "labels"}).logits


@torch.no_grad()
def network_alone(model: nn.Module, inputs: Any) -> None:
    """Predict by the network itself."""
    outputs_of(model, inputs)


def passes(model: nn.Module, inputs: Any) -> None:
    """Make a forward pass, and a backward pass for each class."""
    params = [param for param in model.parameters() if param.requires_grad]
    for column in outputs_of(model, inputs).sum(0):
        torch.autograd.grad(column, params, retain_graph=True, allow_unused=True)


def run_case(case: Case) -> dict[str, Any]:
    """Run all stages in this process.

    Args:
        case: What to run.

    Returns:
        Number of fitted parameters, of those of which a diagonal alone is kept, of
        those that stay at their trained values, for each stage (the limit of the
        prediction is one) its seconds and the peak memory so far in megabytes, and the
        seconds of the fit that eigendecompositions took.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = NETWORKS[case.network](num_classes=case.classes).eval()
    points = RandomInputs(case)
    train = DataLoader(Subset(points, range(case.budget)), case.batch_size)
    batch = next(iter(DataLoader(points, case.predicted)))
    inputs = batch if isinstance(batch, MutableMapping) else batch[0]
    la = Laplace(
        model,
        "classification",
        case.subset,
        "kron_debiased",
        magnitudes=case.magnitudes,
        estimator=case.estimator,
        budget=case.budget,
        dict_key_x=case.dict_key_x,
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    limit = passes if case.subset == "all" else network_alone
    network_alone(model, inputs)  # the first call also sets up
    stages: dict[str, Callable] = {
        "network alone": partial(network_alone, model, inputs),
        "limit": partial(limit, model, inputs),
        "fit": partial(la.fit, train),
        "tune the prior": la.optimize_prior_precision,
        "predict": partial(la, inputs),
    }
    result: dict[str, Any] = {"stages": {}}
    with DecompositionTimer() as decompositions:
        for name, stage in stages.items():
            start = time.process_time()
            stage()
            seconds = time.process_time() - start
            result["stages"][name] = {"seconds": seconds, "peak_mb": peak_megabytes()}
    kept = trainable - la.n_params if case.subset == "all" else 0
    sizes = {name: param.numel() for name, param in la.model.named_parameters()}
    kinds = la.parameter_kinds if case.subset == "all" else {}
    return result | {
        "n_params": la.n_params,
        "n_diagonal": sum(sizes[k] for k in kinds if kinds[k] == "diagonal"),
        "n_kept": kept,
        "decompositions": decompositions.seconds,
    }


class DecompositionTimer(TorchFunctionMode):
    """Counts the seconds of all eigendecompositions while it is active."""

    seconds = 0.0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call a function of torch; time it if it is an eigendecomposition."""
        if func is not torch.linalg.eigh:
            return func(*args, **kwargs or {})
        start = time.process_time()
        result = func(*args, **kwargs or {})
        self.seconds += time.process_time() - start
        return result


def table(rows: list[dict[str, Any]]) -> str:
    """Format the cases as a Markdown table."""
    lines = [
        "| network | fitted | parameters | diagonal | left out | estimator | points "
        "| fit: limit s | fit s | ratio | of it decompositions s | GB | pool s "
        "| prior s | inputs | predict: limit s | predict s | ratio | GB |",
        "|---" * 19 + "|",
    ]
    for row in rows:
        is_text = row["network"].startswith(TEXT)
        size = f"{row['size']} tokens" if is_text else f"{row['size']}²"
        name = f"{row['network']}, {size}, {row['classes']} classes"
        if "error" in row:
            lines.append(f"| {name} | {row['subset']} | {row['error']}{' |' * 17}")
            continue
        alone, limit, fit, tune, predict = (
            row["stages"][stage]
            for stage in ("network alone", "limit", "fit", "tune the prior", "predict")
        )
        least = limit["seconds"]
        of_backward = (1 - 1 / row["classes"]) * (least - alone["seconds"])
        share = row["budget"] / row["predicted"]
        least_of_fit = share * (alone["seconds"] + of_backward)
        pool = POOL_FACTOR * share * alone["seconds"]
        lines.append(
            f"| {name} | {row['subset'].replace('_', ' ')} "
            f"| {row['n_params'] / 1e6:.1f}M | {row['n_diagonal'] / 1e6:.2f}M "
            f"| {row['n_kept']} | {row['estimator'].replace('_', '-')} "
            f"| {row['budget']} | {least_of_fit:.1f} | {fit['seconds']:.1f} "
            f"| {fit['seconds'] / least_of_fit:.1f} "
            f"| {row['decompositions']:.1f} | {fit['peak_mb'] / 1024:.1f} "
            f"| {pool:.0f} | {tune['seconds']:.1f} | {row['predicted']} "
            f"| {least:.1f} | {predict['seconds']:.1f} "
            f"| {predict['seconds'] / least:.1f} | {predict['peak_mb'] / 1024:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all cases, each in its own process, and write their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=json.loads, help="run one case in this process")
    add_out(parser, STUDY)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a single small case"
    )
    settings = parse(parser)
    if settings.case is not None:
        print(json.dumps(run_case(Case(**settings.case))))
        return

    progress = Progress(settings, STUDY)
    rows = []
    for case in tqdm([QUICK_CASE] if settings.quick else CASES):
        key = json.dumps(asdict(case))
        measure = partial(in_own_process, __file__, ["--case", key], TIME_LIMIT)
        rows.append(asdict(case) | progress.run(key, measure))
    write_report(settings.out, STUDY, {}, rows, table(rows))
    progress.clear()


if __name__ == "__main__":
    main()
