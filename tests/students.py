"""Tiny models that lose their norms against a teacher, and batches for them."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import slabformer as sf
from slabformer import testing

VOCABULARY = 50


def bert(seed: int = 0, dropout: float = 0.0, layers: int = 2) -> BertModel:
    """A BERT of width 16, in train mode, whose norms matter."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return testing.randomize_norms_(BertModel(config, add_pooling_layer=False), seed).train()


def vit(seed: int = 0) -> ViTModel:
    """A ViT of width 16 for images of 16 pixels, in train mode."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes), add_pooling_layer=False)
    return testing.randomize_norms_(model, seed).train()


def classifier(seed: int = 0, name: str = "deit_micro", **arguments: object) -> nn.Module:
    """A timm classifier of 5 classes for images of 16 pixels, in train mode."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{"img_size": 16, "num_classes": 5} | arguments)
    return testing.randomize_norms_(model, seed).train()


def converted(model: nn.Module) -> nn.Module:
    """``model`` with PRepBN that holds its norms, gamma 1."""
    sf.convert_norms_(model, eta=0.0)
    return model


def tokens(count: int = 4, length: int = 7, seed: int = 0, valid: int | None = None) -> dict[str, Tensor]:
    """A batch for :func:`bert`; with ``valid``, all but the first so many tokens are padding in every second row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, length, dtype=torch.long)
    mask[::2, valid:] = 0
    return {
        "input_ids": torch.randint(VOCABULARY, (count, length), generator=generator),
        "attention_mask": mask if valid is not None else torch.ones_like(mask),
    }
