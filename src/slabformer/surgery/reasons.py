"""Why a norm or an attention stays, as codes for programs and words for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a norm was not folded, or a norm or an attention not converted; ``docs/fusing.md`` says what to do."""

    # what reads the norm
    MODEL_OUTPUT = "model-output"
    FEEDS_SUM = "feeds-sum"
    FEEDS_OPERATION = "feeds-operation"
    FEEDS_NORM = "feeds-norm"
    KEPT_OUTPUT = "kept-output"
    FURTHER_ARGUMENT = "further-argument"
    NOT_USED = "not-used"
    # how its channels get there
    PADDED = "padded"
    UNEVEN = "uneven"
    CHANNELS_MIXED = "channels-mixed"
    CHANNELS_SPREAD = "channels-spread"
    OTHER_AXIS = "other-axis"
    PICKED_BY_MASK = "picked-by-mask"
    CAST = "cast"
    DROPOUT = "dropout"
    SEVERAL_FACTORS = "several-factors"
    BROADCAST = "broadcast"
    # the layer that would take it over
    NO_BIAS = "no-bias"
    COMPUTED_WEIGHT = "computed-weight"
    TIED = "tied"
    SHARED_LAYER = "shared-layer"
    SHARED_NORM = "shared-norm"
    SHARED_OUTPUT = "shared-output"
    SEVERAL_PARTS = "several-parts"
    READ_RAW = "read-raw"
    WRAPPER = "wrapper"
    NOT_FLOAT = "not-float"
    NOT_SAVED = "not-saved"
    IN_PLACE = "in-place"
    HOOKS = "hooks"
    # what its input is made of
    COMES_FROM_OPERATION = "comes-from-operation"
    COMES_FROM_INPUT = "comes-from-input"
    COMES_FROM_NORM = "comes-from-norm"
    # values, and the model as a whole
    SCALE_NEAR_ZERO = "scale-near-zero"
    KEEP = "keep"
    NOT_TRACEABLE = "not-traceable"
    OUTPUT_CHANGES = "output-changes"
    AFFINE_CHANGES_OUTPUT = "affine-changes-output"
    # what looks like a norm and cannot be converted
    SEVERAL_AXES = "several-axes"
    PER_HEAD = "per-head"
    UNIT_LENGTH = "unit-length"
    MIXES_POSITIONS = "mixes-positions"
    UNKNOWN_WIDTH = "unknown-width"
    TWO_LAYOUTS = "two-layouts"
    NOT_A_NORM = "not-a-norm"
    DIFFERS_IN_TRAINING = "differs-in-training"
    LARGE_INPUTS_ONLY = "large-inputs-only"
    HOLDS_LAYERS = "holds-layers"
    FURTHER_INPUTS = "further-inputs"
    CANNOT_RUN = "cannot-run"
    IN_CODE = "in-code"
    OVER_MAPS = "over-maps"
    # what looks like a softmax attention and cannot be converted, beside FURTHER_INPUTS and CANNOT_RUN
    NOT_SOFTMAX_ATTENTION = "not-softmax-attention"
    UNEVEN_HEADS = "uneven-heads"
    NO_VALUES = "no-values"
    NO_GRID = "no-grid"
    FEW_KEYS = "few-keys"
    # what fuse cannot fold wherever it stands
    NOT_AFFINE = "not-affine"


@dataclass(frozen=True)
class Why:
    """One or several reasons.

    Attributes:
        codes: In the order of the words, each once.
        words: They complete "kept as Affine: ...".
    """

    codes: tuple[Reason, ...]
    words: str

    @classmethod
    def of(cls, code: Reason, words: str) -> Why:
        """One reason."""
        return cls((code,), words)

    @classmethod
    def joined(cls, reasons: Iterable[Why], separator: str) -> Why:
        """Several as one."""
        found = list(reasons)
        codes = dict.fromkeys(code for why in found for code in why.codes)
        return cls(tuple(codes), separator.join(why.words for why in found))


class RefusalError(Exception):
    """Raised where a reason against a fold is found; the search catches it, and the report tells.

    Args:
        code: Of the reason.
        words: They complete "kept as Affine: ...".
    """

    def __init__(self, code: Reason, words: str) -> None:
        super().__init__(words)
        self.why = Why.of(code, words)

    @classmethod
    def of(cls, why: Why) -> RefusalError:
        """The error that says ``why``."""
        error = cls(why.codes[0], why.words)
        error.why = why
        return error
