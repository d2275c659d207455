"""What the losses of a distillation weigh; apart from them, so that reading a recipe needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from slabformer.settings import NonNegativeFloat, Settings


@dataclass(kw_only=True)
class LossWeights(Settings):
    """Weight of each loss in the sum; a loss of weight 0 is not computed."""

    logits: NonNegativeFloat = 1.0
    """:func:`slabformer.distillation.logit_loss` of logits."""
    features: NonNegativeFloat = 1.0
    """:func:`slabformer.distillation.feature_loss` of features."""
    cosine: NonNegativeFloat = 1.0
    """:func:`slabformer.distillation.cosine_loss` of features, token by token if there are tokens."""
    pooled: NonNegativeFloat = 1.0
    """:func:`slabformer.distillation.cosine_loss` of the mean over a sample's tokens."""
    similarity: NonNegativeFloat = 0.0
    """:func:`slabformer.distillation.similarity_loss` between the samples of a batch, whose tokens are averaged; its
    gradient is noisy, and it slows what it should help (docs/log.md)."""
    tokens: NonNegativeFloat = 0.0
    """:func:`slabformer.distillation.similarity_loss` between the tokens of a sample."""
    hidden: NonNegativeFloat = 1.0
    """Mean of :func:`slabformer.distillation.feature_loss` over the outputs of the blocks."""
