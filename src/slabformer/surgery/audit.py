"""What fusing would do to a model, before anybody trains anything."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slabformer._torch import HOOKS
from slabformer.nn.affine import Affine
from slabformer.nn.norms import norm_type
from slabformer.settings import PositiveFraction, PositiveInt, checked
from slabformer.surgery.batches import NO_BATCH, as_arguments, eval_mode, model_device, to_device
from slabformer.surgery.conversion_plan import ConversionPlan
from slabformer.surgery.convert import find_layer_norms, nothing_to_convert, replace_norms_
from slabformer.surgery.converted import LeftModule
from slabformer.surgery.fuse.report import FuseReport
from slabformer.surgery.fuse.search.decide import propose
from slabformer.surgery.fuse.search.request import check_examples, shapes_of
from slabformer.surgery.fuse.tree.copies import Example, deployed_copy, quiet
from slabformer.surgery.fuse.tree.fold import set_module
from slabformer.surgery.fuse.tree.norms import Norm, find_norms, tail_of
from slabformer.surgery.fuse.tree.sharing import Untied
from slabformer.surgery.normal import makes_ordinary_tensors, need_unsharded
from slabformer.surgery.reasons import Reason, Why
from slabformer.surgery.sensitivity import NormCost, Outputs, norm_costs

#: what code that is no module of its own normalises with
NORM_FUNCTIONS = (F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm)
#: runs that are timed; the first is not counted
NUM_RUNS = 6


@dataclass(frozen=True)
class NormTime:
    """What norms cost in one forward, eager, on the model's device.

    Attributes:
        norms: Seconds inside them.
        total: Seconds of the forward.
    """

    norms: float
    total: float

    @property
    def share(self) -> float:
        """Of the forward."""
        return self.norms / self.total


@dataclass(frozen=True)
class AuditReport(FuseReport):
    """What fusing would do, and what losing each norm would cost.

    Attributes:
        costs: One per norm where the audit was given data.
        plan: Which norms to convert, where it was given data.
    """

    costs: tuple[NormCost, ...] = ()
    plan: ConversionPlan | None = None

    def cost_table(self) -> str:
        """One line a norm, aligned: how well a line stands in for it, where the error is, what losing it costs."""
        kept = set() if self.plan is None else set(self.plan.keep)
        width = max((len(cost.name) for cost in self.costs), default=4)
        lines = [f"{'norm':<{width}}  {'R2':>6}  {'alone':>8}  plan     error in"]
        for cost in self.costs:
            choice = "keep" if cost.name in kept else "convert"
            lines.append(f"{cost.name:<{width}}  {cost.r2:6.3f}  {cost.alone:8.2g}  {choice:<7}  {cost.where()}")
        return "\n".join([*lines, "" if self.plan is None else self.plan.summary()])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plan = None if self.plan is None else self.plan.to_dict()
        return super().to_dict() | {"costs": [asdict(cost) for cost in self.costs], "plan": plan}


@makes_ordinary_tensors
@checked
def audit(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    fixed_size: bool = False,
    untie: bool = False,
    batches: Iterable[Any] | None = None,
    num_batches: PositiveInt | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    outputs: Outputs | None = None,
    budget: PositiveFraction | None = None,
) -> AuditReport:
    """What :func:`slabformer.fuse` would do with every norm once it is converted and trained; nothing is changed.

    Without data only the architecture counts: parameters may be on the meta device, then the inputs must be there too.
    A channel that training drives to a scale of 0 can still keep a norm that stands in front of padding. With
    ``batches`` of data, the trained model is also asked what losing each norm would cost, and which ones to take::

        report = slabformer.audit(model, batches=loader, budget=0.003)  # at most 0.3 % of the outputs' cosine
        slabformer.convert_norms_(model, plan=report.plan)

    Args:
        model: With its own norms, converted, or anything between; in any mode.
        example_inputs: As for :func:`slabformer.fuse`; the first of ``batches`` if there are any and this is left out.
        example_kwargs: The same.
        fixed_size: The same.
        untie: The same.
        batches: Data, as for :func:`slabformer.recalibrate_`; padding is left out by ``attention_mask``. Each norm
            takes a forward of all of them.
        num_batches: Stop after so many; 8 by default.
        forward: As for :func:`slabformer.recalibrate_`.
        outputs: ``outputs(model, batch)`` returns the tensors ``(*, C)`` whose cosine counts, an embedding for example;
            by default those that the forward returns, each token for itself.
        budget: What the norms that are taken may cost together, before training; None takes those that cost at most
            0.1 each.

    Returns:
        One outcome per norm; ``left`` holds what looks like a norm and cannot be converted.

    Raises:
        TypeError: If the example inputs are of the wrong kind.
        ValueError: If the model has nothing that looks like a norm, or cannot be copied; with data as
            :func:`slabformer.surgery.sensitivity.norm_costs`.
    """
    need_unsharded(model)
    costs: tuple[NormCost, ...] = ()
    plan: ConversionPlan | None = None
    if batches is not None:
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise ValueError(NO_BATCH)
        if example_inputs is None and example_kwargs is None:
            example_inputs, example_kwargs = as_arguments(to_device(first, model_device(model)))
        batches = itertools.chain([first], batches)
        costs, plan = norm_costs(
            model, batches, num_batches=num_batches, forward=forward, outputs=outputs, budget=budget
        )
    elif budget is not None:
        raise ValueError("a budget needs data; pass batches=...")
    if example_inputs is None and example_kwargs is None:
        raise ValueError("an audit needs example inputs, or batches of data")
    examples = check_examples(() if example_inputs is None else example_inputs, example_kwargs)
    copied = deployed_copy(model).eval()
    norms, left = _as_affines_(copied)
    left += _norms_in_code(model, examples, [name for norm in norms for name in norm.names] + [n.name for n in left])
    if not norms and not left:
        raise ValueError(nothing_to_convert(model, 0, left))
    for parameter in copied.parameters():
        if parameter.numel() == max(
            parameter.shape, default=1
        ):  # a fresh LayerScale is next to 0, a trained one is not
            parameter.data = torch.ones_like(parameter)
    folds = propose(copied, norms, examples, fixed_size, Untied(copied) if untie else None) if norms else None
    found = folds.outcomes(norms) if folds else ()
    return AuditReport(found, shapes_of(examples), left, costs=costs, plan=plan)


def _as_affines_(model: nn.Module) -> tuple[list[Norm], tuple[LeftModule, ...]]:
    """Every norm of ``model`` as an Affine on the CPU, whose map has values and a shift, whatever holds the weights.

    What looks like a norm and stays is returned too.
    """
    found, left = find_layer_norms(model)
    replace_norms_(model, found, norm=norm_type("repbn"))
    for norm in find_norms(model):
        new = Affine(norm.num_channels, channel_dim=norm.channel_dim, then=tail_of(norm.module))
        nn.init.ones_(new.bias)
        for name in HOOKS:
            setattr(new, name, getattr(norm.module, name))
        set_module(model, norm.names, new.eval())
    return find_norms(model), left


def _norms_in_code(model: nn.Module, examples: list[Example], known: list[str]) -> tuple[LeftModule, ...]:
    """Modules whose own code calls a norm's function on ``examples``, but for those ``known`` by name as norms.

    None if the model does not run; whoever traces it says why.
    """
    copied, calls = deployed_copy(model).eval(), _NormCalls()
    for name, module in copied.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.inside.append(name))
        module.register_forward_hook(lambda *_: calls.inside.pop() and None, always_call=True)
    devices = {tensor.device for example in examples for tensor in example.tensors() if tensor.is_cuda}
    try:
        with quiet(), torch.random.fork_rng(devices), calls:
            for example in examples:
                copied(*example.args, **example.kwargs)
    except Exception:  # code of others, on inputs of others
        return ()
    inside = tuple(f"{name}." for name in known)
    return tuple(
        LeftModule.of(
            name, model.get_submodule(name), Why.of(Reason.IN_CODE, f"its code calls {call}; a norm must be a module")
        )
        for name, call in calls.found.items()
        if name not in known and not name.startswith(inside)
    )


class _NormCalls(TorchFunctionMode):
    """Notes in which module, by name, a norm's function is called first, while hooks keep ``inside`` up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.found: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NORM_FUNCTIONS and self.inside:
            self.found.setdefault(self.inside[-1], func.__name__)
        return func(*args, **(kwargs or {}))


def time_norms(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
) -> NormTime:
    """An estimate of the time that the norms of ``model`` take today: medians of eager forwards, on a CPU.

    Raises:
        ValueError: If the model or its inputs are not on a CPU, where calls wait for their results.
    """
    (example,) = check_examples(example_inputs, example_kwargs)
    tensors = [*model.parameters(), *example.tensors()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        raise ValueError("norms are timed on a CPU; move the model and its inputs there")
    copied = deployed_copy(model)
    found, left = _as_affines_(deployed_copy(model))
    if not found:
        raise ValueError(nothing_to_convert(model, 0, left))
    norms = [copied.get_submodule(norm.name) for norm in found]
    clock = _Clock()
    handles = [handle for norm in norms for handle in clock.watch(norm)]
    try:
        with torch.no_grad(), eval_mode(copied):
            times = [clock.run(copied, example) for _ in range(NUM_RUNS)][1:]
    finally:
        for handle in handles:
            handle.remove()
    return NormTime(*(statistics.median(column) for column in zip(*times, strict=True)))


class _Clock:
    """Adds up the time between the beginning and the end of the calls that it watches."""

    def __init__(self) -> None:
        self.inside, self.began = 0.0, 0.0

    def watch(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda *_: setattr(self, "began", time.perf_counter())),
            module.register_forward_hook(lambda *_: self._end()),
        ]

    def _end(self) -> None:
        self.inside += time.perf_counter() - self.began

    def run(self, model: nn.Module, example: Example) -> tuple[float, float]:
        self.inside, began = 0.0, time.perf_counter()
        model(*example.args, **example.kwargs)
        return self.inside, time.perf_counter() - began
