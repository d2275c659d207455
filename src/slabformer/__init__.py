"""Transformers without LayerNorm: convert, train, recalibrate, fuse, verify, deploy. Needs torch alone."""

from importlib.util import find_spec

from slabformer import ops, testing
from slabformer.nn import Affine, PRepBN, RepBN
from slabformer.nn.controls import blended, copy_gamma_, set_token_mask, sync_norms_, token_mask
from slabformer.progressive import ProgressiveSchedule
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fit import fit_norms_
from slabformer.surgery.recalibrate import recalibrate_
from slabformer.surgery.verify import VerificationError, VerifyResult, verify

__version__ = "0.1.0"
__all__ = [
    "Affine",
    "PRepBN",
    "ProgressiveSchedule",
    "RepBN",
    "VerificationError",
    "VerifyResult",
    "blended",
    "convert_norms_",
    "copy_gamma_",
    "fit_norms_",
    "ops",
    "recalibrate_",
    "set_token_mask",
    "sync_norms_",
    "testing",
    "token_mask",
    "verify",
]

if find_spec("timm") is not None:
    from slabformer import models as _models  # noqa: F401  (registers the zoo)
