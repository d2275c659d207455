"""Transformers without LayerNorm: convert, train, recalibrate, fuse, verify, deploy. Needs torch alone."""

from slabformer import models as _models  # noqa: F401  (registers the zoo where timm can be found)
from slabformer import ops, testing
from slabformer._moved import answer_to_old_names as _answer_to_old_names
from slabformer.deployment.deploy import deploy
from slabformer.distillation import Distiller, Teacher
from slabformer.models.weights.official import load_published, to_published
from slabformer.nn import Affine, DyT, PRepBN, RepBN, SimplifiedLinearAttention, TokenBatchNorm
from slabformer.nn.controls import blended, copy_gamma_, norm_parameters, set_token_mask, sync_norms_, token_mask
from slabformer.nn.norms import NormType, norm_types, register_norm
from slabformer.progressive import ProgressiveSchedule
from slabformer.surgery.audit import audit
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fit import fit_norms_
from slabformer.surgery.fuse import FuseReport, NormOutcome, fuse, fuse_
from slabformer.surgery.fuse.tree.files import load_fused, save_fused
from slabformer.surgery.recalibrate import recalibrate_
from slabformer.surgery.verify import VerificationError, VerifyResult, verify

__version__ = "0.1.0"
_answer_to_old_names()
__all__ = [
    "Affine",
    "Distiller",
    "DyT",
    "FuseReport",
    "NormOutcome",
    "NormType",
    "PRepBN",
    "ProgressiveSchedule",
    "RepBN",
    "SimplifiedLinearAttention",
    "Teacher",
    "TokenBatchNorm",
    "VerificationError",
    "VerifyResult",
    "audit",
    "blended",
    "convert_norms_",
    "copy_gamma_",
    "deploy",
    "fit_norms_",
    "fuse",
    "fuse_",
    "load_fused",
    "load_published",
    "norm_parameters",
    "norm_types",
    "ops",
    "recalibrate_",
    "register_norm",
    "save_fused",
    "set_token_mask",
    "sync_norms_",
    "testing",
    "to_published",
    "token_mask",
    "verify",
]
