"""What a fold is tried on: outputs of every kind, what they are made of, and how near is near enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusing import Net, net, norm, ready, tokens
from slabformer.surgery.fuse import Reason, fuse
from slabformer.surgery.fuse.search.trial import Trial
from slabformer.surgery.fuse.tree.norms import find_norms
from slabformer.surgery.verify import verify

X = tokens(2, 4, 6)

#: what a model may make of its logits
ENDINGS: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda logits: logits,
    "labels": lambda logits: logits.argmax(-1),
    "labels_as_floats": lambda logits: logits.argmax(-1).double(),
    "list_of_labels": lambda logits: logits.argmax(-1).tolist(),
    "mask": lambda logits: logits > 0,
    "mask_as_floats": lambda logits: torch.where(logits > 0, 1.0, 0.0),
    "best": lambda logits: logits.topk(2).indices,
    "largest": lambda logits: logits.max(-1)[1],
    "rounded": lambda logits: logits.round(),
    "integers": lambda logits: (100 * logits).int(),
    "numbers": lambda logits: logits.sum().item() > 0,
    "dictionary": lambda logits: {"labels": logits.argmax(-1), "text": "a"},
}


def with_unread_bias(ending: Callable[[Tensor], Any], shift: float = 0.05) -> nn.Module:
    """A model whose Linear would need a bias that its forward does not read, so that a fold moves its logits."""
    model = net(
        lambda m, x: ending(F.linear(m.norm(x), m.linear.weight)), norm=norm(), linear=nn.Linear(6, 3, bias=False)
    )
    nn.init.zeros_(model.norm.running_mean)
    nn.init.constant_(model.norm.bias, shift)
    return model


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_fold_is_refused_whatever_the_model_makes_of_its_logits(ending):
    _, report = fuse(with_unread_bias(ending), X)
    assert report["norm"].action == "kept"
    assert report["norm"].codes == (Reason.OUTPUT_CHANGES,)


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_fold_that_holds_is_taken_whatever_the_model_makes_of_its_logits(ending):
    model = net(lambda m, x: ending(m.linear(m.norm(x))), norm=norm(), linear=nn.Linear(6, 3))
    fused, report = fuse(model, X)
    assert report.num_kept == 0
    verify(model, fused, X)


@pytest.mark.parametrize(("shift", "action"), [(1e-8, "forward"), (1e-5, "kept")])
def test_in_float64_a_fold_may_move_an_output_by_a_millionth_of_its_scale(shift, action):
    model = with_unread_bias(lambda logits: logits, shift)
    nn.init.ones_(model.linear.weight)
    nn.init.ones_(model.norm.weight)
    assert fuse(model, X)[1]["norm"].action == action


class NotInFloat64(nn.Module):
    """Refuses float64, as kernels and devices may."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise NotImplementedError("no kernel for float64")
        return x


@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [(torch.float32, 1e-4, 1e-2), (torch.bfloat16, 3e-2, 0.6), (torch.float16, 1e-2, 0.2)],
    ids=str,
)
def test_a_model_that_does_not_run_in_float64_is_tried_in_its_own_dtype(dtype, small, large):
    for shift, action in ((small, "forward"), (large, "kept")):
        model = with_unread_bias(lambda logits: logits, shift)
        model.norm = nn.Sequential(NotInFloat64(), model.norm)
        nn.init.ones_(model.norm[1].weight)
        nn.init.constant_(model.linear.weight, 1 / 6)
        nn.init.ones_(model.norm[1].eta)
        assert fuse(model.eval().to(dtype), (4 * X).to(dtype))[1]["norm.1"].action == action


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (lambda logits: logits / 0 * 0, r"output is NaN in 24 of 24 entries"),
        (lambda logits: {"a": logits, "b": (logits[0], logits.log())}, r"output\['b'\]\[1\] is NaN in"),
        (lambda logits: logits.new_full((2,), float("inf")), "output is infinite in every entry"),
        (lambda logits: "text", "returns no tensor with entries"),
        (lambda logits: logits[:0], "returns no tensor with entries"),
    ],
    ids=["nan", "one_of_several", "infinite", "text", "empty"],
)
def test_an_example_that_shows_nothing_is_refused(ending, said):
    model = net(lambda m, x: ending(m.linear(m.norm(x))), norm=norm(), linear=nn.Linear(6, 3))
    with pytest.raises(ValueError, match=f"folds cannot be tried on example input 1: .*{said}.*|input 0: .*{said}"):
        fuse(model, [X, X])


def test_an_example_of_nan_is_refused_beside_a_good_one():
    model = net(lambda m, x: m.linear(m.norm(x)), norm=norm(), linear=nn.Linear(6, 3))
    with pytest.raises(ValueError, match="cannot be tried on example input 1: output is NaN in 24 of 24 entries"):
        fuse(model, [X, X * float("nan")])


def test_masked_logits_are_compared_where_they_are_finite():
    masked = torch.tensor([False, True, False])
    model = net(
        lambda m, x: m.linear(m.norm(x)).masked_fill(masked, float("-inf")), norm=norm(), linear=nn.Linear(6, 3)
    )
    assert fuse(model, X)[1].num_kept == 0


def test_labels_of_a_model_that_does_not_run_in_float64_may_turn_where_logits_are_equal_to_rounding():
    """A thousandth of the entries may, since the logits that they are made of are compared too."""

    def turned(share: float) -> Callable[[nn.Module, Tensor], Tensor]:
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            labels = torch.zeros(10_000, dtype=torch.long)
            if not isinstance(m.norm, type(norm())):
                labels[: int(share * len(labels))] = 1
            return m.linear(m.norm(m.start(x))), labels

        return forward

    for share, kept in ((0.0005, 0), (0.005, 1)):
        model = Net(turned(share), start=NotInFloat64(), norm=norm(), linear=nn.Linear(6, 3))
        assert fuse(ready(model, torch.float32), X.float())[1].num_kept == kept


def test_a_trial_compares_with_random_numbers_and_restores_their_state():
    model = net(lambda m, x: m.linear(m.norm(x)) + torch.randn(3), norm=norm(), linear=nn.Linear(6, 3))
    before = torch.get_rng_state()
    Trial(model, find_norms(model), [])
    assert fuse(model, X)[1].num_kept == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_that_starts_at_0_hides_no_fold():
    head = nn.Linear(3, 2)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    model = net(
        lambda m, x: m.head(F.linear(m.norm(x), m.linear.weight)),
        norm=norm(),
        linear=nn.Linear(6, 3, bias=False),
        head=head,
    )
    fused, report = fuse(model, X)
    assert report["norm"].action == "kept"
    weight = torch.randn(2, 3)
    for each in (model, fused):
        each.head.weight.data.copy_(weight)
    verify(model, fused, X)


def test_a_fold_that_holds_is_taken_in_front_of_a_head_that_starts_at_0():
    model = nn.Sequential(norm(), nn.Linear(6, 3), nn.Linear(3, 2)).eval()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    assert fuse(model, X)[1].num_kept == 0
