"""What a deployed program is for: how its run.py ends, and how its outputs are held against the model's.

A module says so in an attribute ``deployed_as``; those without one are plain models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from slabformer._defaults import RUNTIME_PIXELS, RUNTIME_RTOL
from slabformer.deployment.steps import Inputs
from slabformer.surgery.verify import VerificationError, VerifyResult, verify

KindName = Literal["model", "decoder", "detector"]


class Kind:
    """A plain model: tensors to tensors.

    Attributes:
        targets: That take it; all of them where this is empty.
        ending: Of run.py, behind the lines that define ``run``, from arrays by name to arrays in order.
    """

    targets: ClassVar[Sequence[str]] = ()
    ending = "print(run(dict(numpy.load(sys.argv[1]))))\n"

    def check_target(self, name: str) -> None:
        """Refuse a target that does not take it.

        Raises:
            ValueError: Names those that do.
        """
        if self.targets and name not in self.targets:
            raise ValueError(f"{name} takes no such model; use {' or '.join(self.targets)}")

    def cases(self, reference: nn.Module, inputs: Inputs) -> list[Any]:
        """Inputs that a form is held against the model on."""
        return [inputs]

    def compare_fused(self, reference: nn.Module, fused: nn.Module, inputs: Inputs) -> VerifyResult:
        """How far ``fused`` is from ``reference``, as strictly as :func:`slabformer.verify` is by default.

        Raises:
            VerificationError: If it is further.
        """
        return verify(reference, fused, inputs)

    def compare(self, reference: nn.Module, form: nn.Module, cases: list[Any], rtol: float) -> VerifyResult:
        """How far ``form`` is from ``reference``.

        Raises:
            VerificationError: If it is further than ``rtol`` of the outputs' scale.
        """
        return verify(reference, form, cases, rtol=rtol, check_dtype=False, lazy=True)


class Decoder(Kind):
    """A :class:`slabformer.export.static_decoder.StaticDecoder`: reads the prompt, then writes token after token."""

    targets = ("onnxruntime", "openvino", "torch", "aoti")
    ending = """\
state = dict(numpy.load(sys.argv[1]))  # input_ids (B, N), position 0, an empty cache; then how many tokens to write
context, written = state["keys"].shape[3], []
for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 16):
    begin, end = state["position"][0], state["position"][0] + state["input_ids"].shape[1]
    if end > context:
        sys.exit(f"the cache holds {context} tokens, and is full")
    logits, new_keys, new_values = run(state)
    state["keys"][..., begin:end, :], state["values"][..., begin:end, :] = new_keys, new_values
    state["input_ids"], state["position"] = logits.argmax(-1)[:, None], numpy.array([end])
    written.append(state["input_ids"])
    print(*written[-1][:, 0], flush=True)
"""

    def cases(self, reference: nn.Module, inputs: Inputs) -> list[Any]:
        """The prompt, and the token behind it."""
        from slabformer.export.static_decoder import following

        assert isinstance(inputs, Mapping)
        state = {name: tensor.clone() for name, tensor in inputs.items()}
        return [inputs, following(reference(**state), state)]


class Detector(Kind):
    """A :class:`slabformer.export.static_detector.StaticDetector`: an image to boxes, labels, scores, and masks."""

    targets = ("onnxruntime", "openvino")
    ending = """\
boxes, labels, scores, *_ = run(dict(numpy.load(sys.argv[1])))  # image (3, H, W) in [0, 1] on its canvas, and its size
names = json.loads(pathlib.Path(__file__).with_name("artifact.json").read_text())["class_names"]
for box, label, score in zip(boxes, labels, scores):
    if score >= 0:  # below it there is none
        print(names[label - 1] if names else label, f"{score:.3f}", *(f"{side:.1f}" for side in box))
"""

    def compare_fused(self, reference: nn.Module, fused: nn.Module, inputs: Inputs) -> VerifyResult:
        """See :class:`Kind`."""
        return self.compare(reference, fused, [inputs], RUNTIME_RTOL)

    def compare(self, reference: nn.Module, form: nn.Module, cases: list[Any], rtol: float) -> VerifyResult:
        """See :class:`Kind`. Detections are paired by place: those of equal scores may come in another order."""
        from slabformer.export.detector import without_padding
        from slabformer.measure.detections import agreement_of, agreement_over

        agreements, scale = [], 1.0
        for index, case in enumerate(cases):
            expected, found = (without_padding(module(**case)) for module in (reference, form))
            agreements.append(agreement_of(expected, found, f"image {index}"))
            scale = max(scale, expected["boxes"].square().mean().sqrt().item() if len(expected["boxes"]) else 0.0)
        result = agreement_over(agreements, RUNTIME_PIXELS)
        if result.max_score > rtol:
            raise VerificationError(f"scores differ by {result.max_score:.1e} (at most {rtol:.1e} allowed)")
        return VerifyResult(max_abs=result.max_pixels, max_rel=result.max_pixels / scale, top1_agreement=1.0)


#: by name
KINDS: Mapping[KindName, Kind] = {"model": Kind(), "decoder": Decoder(), "detector": Detector()}


def kind_of(model: nn.Module) -> KindName:
    """What ``model`` says that it is."""
    name: KindName = getattr(model, "deployed_as", "model")
    return name if name in get_args(KindName) else "model"
