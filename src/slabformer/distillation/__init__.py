"""Distillation: a model that loses its norms is held against what it computed with them."""

from slabformer._loss_weights import LossWeights
from slabformer.distillation.distiller import Comparison, Distiller
from slabformer.distillation.losses import cosine_loss, feature_loss, logit_loss, pooled, similarity_loss
from slabformer.distillation.teacher import Teacher

__all__ = [
    "Comparison",
    "Distiller",
    "LossWeights",
    "Teacher",
    "cosine_loss",
    "feature_loss",
    "logit_loss",
    "pooled",
    "similarity_loss",
]
