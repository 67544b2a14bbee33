"""Tiny configurations of the networks that people use."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

NUM_CLASSES = 3
_TRANSFORMER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": NUM_CLASSES,
}


class Logits(nn.Module):
    """A Hugging Face classifier as laplace-torch needs it: from a batch to logits."""

    def __init__(self, classifier, *keys):
        super().__init__()
        self.classifier, self.keys = classifier, keys

    def forward(self, batch):
        return self.classifier(**{key: batch[key] for key in self.keys}).logits


def _resnet(block, stages, width_per_group=64):
    network = ResNet(block, [1, 1, 1, 1], NUM_CLASSES, width_per_group=width_per_group)
    for stage in ["layer1", "layer2", "layer3", "layer4"][stages:]:
        setattr(network, stage, nn.Identity())
    network.fc = nn.Linear(32 * 2**stages * block.expansion, NUM_CLASSES)
    return network


def _efficientnet():
    blocks = [
        MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1),
        MBConvConfig(2, 3, 2, 8, 16, 1, 1, 1),
    ]
    return EfficientNet(blocks, 0.1, num_classes=NUM_CLASSES, last_channel=24)


def _convnext():
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(blocks, 0.1, num_classes=NUM_CLASSES)


def _vit():
    return VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=NUM_CLASSES)


def _swin():
    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=NUM_CLASSES)


def _hugging_face_vit():
    config = ViTConfig(image_size=16, patch_size=8, **_TRANSFORMER)
    return ViTForImageClassification(config)


def _bert():
    config = BertConfig(vocab_size=30, max_position_embeddings=8, **_TRANSFORMER)
    return BertForSequenceClassification(config)


def _distilbert():
    config = DistilBertConfig(
        vocab_size=30,
        max_position_embeddings=8,
        dim=8,
        hidden_dim=16,
        n_layers=2,
        n_heads=2,
        num_labels=NUM_CLASSES,
    )
    return DistilBertForSequenceClassification(config)


def _gpt_2():
    config = GPT2Config(
        vocab_size=30,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        num_labels=NUM_CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2ForSequenceClassification(config)


def _llama():
    config = LlamaConfig(
        vocab_size=30,
        max_position_embeddings=8,
        num_key_value_heads=1,
        pad_token_id=0,
        **_TRANSFORMER,
    )
    return LlamaForSequenceClassification(config)


def _lora():
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(_bert(), config)


def _image_lora():
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    return get_peft_model(_hugging_face_vit(), config)


NETWORKS = {
    "resnet-18": lambda: _resnet(BasicBlock, stages=2),
    "resnet-50": lambda: _resnet(Bottleneck, stages=2),
    "wide-resnet-50": lambda: _resnet(Bottleneck, 1, width_per_group=128),
    "efficientnet": _efficientnet,
    "convnext": _convnext,
    "vit": _vit,
    "swin": _swin,
    "hugging-face-vit": lambda: Logits(_hugging_face_vit(), "pixel_values"),
    "bert": lambda: Logits(_bert(), "input_ids", "attention_mask"),
    "bert-lora": lambda: Logits(_lora(), "input_ids", "attention_mask"),
}
# those of Hugging Face, as they come
RAW = {
    "bert": _bert,
    "distilbert": _distilbert,
    "gpt-2": _gpt_2,
    "llama": _llama,
    "vit": _hugging_face_vit,
    "bert-lora": _lora,
    "vit-lora": _image_lora,
}


def network(name, dtype=torch.float64, networks=NETWORKS):
    """A network with random weights, and with what training would leave in it."""
    torch.manual_seed(0)
    model = networks[name]().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "head" in key:  # zeros at first
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch(name, size, dtype=torch.float64):
    """Inputs and targets: a pair, or a mapping for Hugging Face's networks."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(NUM_CLASSES, (size,), generator=generator)
    if "bert" in name:
        tokens = torch.randint(30, (size, 6), generator=generator)
        lengths = torch.randint(2, 7, (size, 1), generator=generator)
        mask = (torch.arange(6) < lengths).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": y}
    images = torch.randn(size, 3, 16, 16, generator=generator).to(dtype)
    if "hugging-face" in name:
        return {"pixel_values": images, "labels": y}
    return images, y
