"""Every row of the table of operations is tried with its own examples."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusing import fused, net, norm, tokens
from slabformer.surgery.fuse.graph.rules import RULES, Rule, compress
from slabformer.surgery.fuse.graph.trace import trace_model
from slabformer.surgery.fuse.tree.copies import Example, deployed_copy
from slabformer.surgery.fuse.tree.norms import find_norms
from slabformer.surgery.reasons import Reason

Step = Callable[[Tensor], Tensor]

#: examples that duplicate channels, or put others beside them: fine in front of a Linear, not behind one
NOT_BACKWARD = {
    "repeat.default": Reason.CHANNELS_MIXED,
    "repeat_interleave.self_int": Reason.CHANNELS_MIXED,
    "cat.default": Reason.COMES_FROM_OPERATION,
    "pixel_shuffle.default": Reason.CHANNELS_MIXED,
    "unfold.default": Reason.CHANNELS_MIXED,
    "new_empty.default": Reason.COMES_FROM_OPERATION,
}


def name_of(rule: Rule) -> str:
    op = rule.ops[0]
    return getattr(op, "_qualified_op_name", getattr(op, "__name__", "")).removeprefix("aten::")


PASSES = [pytest.param(rule, id=name_of(rule)) for rule in RULES if rule.example]
REFUSES = [pytest.param(*rule.refused, id=name_of(rule)) for rule in RULES if rule.refused]


def between(step: Step) -> nn.Module:
    """A norm, ``step``, a Linear; the input is a shape operation's own, so that nothing can fold backward."""
    width = step(torch.ones(2, 4, 6)).shape[-1]
    return net(lambda m, x: m.linear(step(m.norm(x))), norm=norm(), linear=nn.Linear(width, 5))


@pytest.mark.parametrize("rule", PASSES)
def test_a_norm_folds_through(rule: Rule) -> None:
    assert rule.example is not None
    _, report = fused(between(rule.example), tokens(2, 4, 6))
    assert [(o.name, o.action, o.into) for o in report] == [("norm", "forward", ("linear",))]


@pytest.mark.parametrize("rule", PASSES)
def test_the_example_of_a_rule_holds_its_operation(rule: Rule) -> None:
    assert rule.example is not None
    model = between(rule.example)
    graph = trace_model(deployed_copy(model), find_norms(model), Example((tokens(2, 4, 6),), {})).graph
    assert any(node.target in rule.ops for node in graph.nodes)


@pytest.mark.parametrize(("step", "code"), REFUSES)
def test_a_norm_is_kept_before(step: Step, code: Reason) -> None:
    _, report = fused(between(step), tokens(2, 4, 6))
    assert report.num_kept == 1
    assert report["norm"].codes[0] == code


@pytest.mark.parametrize("rule", PASSES)
def test_a_norm_folds_backward_through(rule: Rule) -> None:
    assert rule.example is not None
    step = rule.example
    width = step(torch.ones(2, 4, 6)).shape[-1]
    model = net(lambda m, x: torch.tanh(m.norm(step(m.linear(x)))), linear=nn.Linear(3, 6), norm=norm(width))
    _, report = fused(model, tokens(2, 4, 3))
    outcome = report["norm"]
    assert (outcome.action, outcome.codes[1:]) == (
        ("kept", (NOT_BACKWARD[name_of(rule)],)) if name_of(rule) in NOT_BACKWARD else ("backward", ())
    )


def test_compress_keeps_only_axes_that_labels_depend_on() -> None:
    labels = torch.arange(6).expand(2, 4, 6).clone()
    assert compress(labels).shape == (1, 1, 6)
    labels[0, 1, 0] = 5
    assert compress(labels).shape == (2, 4, 6)
