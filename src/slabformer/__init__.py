"""Transformers without LayerNorm: convert, train, recalibrate, fuse, verify, deploy. Needs torch alone.

Importing it costs next to nothing: each name is imported when it is first used, torch with it.
"""

from __future__ import annotations

import importlib.util as _importlib_util
from typing import TYPE_CHECKING, Any

from slabformer._moved import answer_to_old_names as _answer_to_old_names
from slabformer._registered import import_in_turn as _import_in_turn
from slabformer._registered import register_ours as _register_ours

if TYPE_CHECKING:
    from slabformer import ops, testing
    from slabformer.deployment.artifact import load_deployed
    from slabformer.deployment.deploy import deploy
    from slabformer.distillation import Distiller, Teacher
    from slabformer.models.weights.official import load_published, to_published
    from slabformer.nn import Affine, DyT, PRepBN, RepBN, SimplifiedLinearAttention, TokenBatchNorm
    from slabformer.nn.controls import blended, copy_gamma_, norm_parameters, set_token_mask, sync_norms_, token_mask
    from slabformer.nn.norms import NormType, norm_types, register_norm
    from slabformer.progressive import ProgressiveSchedule
    from slabformer.surgery.align_attention import align_attention_
    from slabformer.surgery.audit import audit
    from slabformer.surgery.audit_attention import audit_attention
    from slabformer.surgery.convert import convert_norms_
    from slabformer.surgery.convert_attention import convert_attention_
    from slabformer.surgery.fit import fit_norms_
    from slabformer.surgery.fuse import FuseReport, NormOutcome, fuse, fuse_
    from slabformer.surgery.fuse.tree.files import load_fused, save_fused
    from slabformer.surgery.recalibrate import recalibrate_
    from slabformer.surgery.verify import VerificationError, VerifyResult, verify

__version__ = "0.1.0"
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
    "align_attention_",
    "audit",
    "audit_attention",
    "blended",
    "convert_attention_",
    "convert_norms_",
    "copy_gamma_",
    "deploy",
    "fit_norms_",
    "fuse",
    "fuse_",
    "load_deployed",
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
#: module below this package -> the public names in it, as the imports above have them
_NAMES = {
    "deployment.artifact": ("load_deployed",),
    "deployment.deploy": ("deploy",),
    "distillation": ("Distiller", "Teacher"),
    "models.weights.official": ("load_published", "to_published"),
    "nn": ("Affine", "DyT", "PRepBN", "RepBN", "SimplifiedLinearAttention", "TokenBatchNorm"),
    "nn.controls": ("blended", "copy_gamma_", "norm_parameters", "set_token_mask", "sync_norms_", "token_mask"),
    "nn.norms": ("NormType", "norm_types", "register_norm"),
    "progressive": ("ProgressiveSchedule",),
    "surgery.align_attention": ("align_attention_",),
    "surgery.audit": ("audit",),
    "surgery.audit_attention": ("audit_attention",),
    "surgery.convert": ("convert_norms_",),
    "surgery.convert_attention": ("convert_attention_",),
    "surgery.fit": ("fit_norms_",),
    "surgery.fuse": ("FuseReport", "NormOutcome", "fuse", "fuse_"),
    "surgery.fuse.tree.files": ("load_fused", "save_fused"),
    "surgery.recalibrate": ("recalibrate_",),
    "surgery.verify": ("VerificationError", "VerifyResult", "verify"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

_answer_to_old_names()
_register_ours()


def __getattr__(name: str) -> Any:
    """A public name or a module of this package, imported now."""
    if name in _HOMES:
        value = getattr(_import_in_turn(_HOMES[name]), name)
    elif name.startswith("__") or _importlib_util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = _import_in_turn(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
