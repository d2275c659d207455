"""What must stay beside the forward: outputs of modules, other methods; and which methods a fold changes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fusing import X, assert_same_outputs, fused, net, norm, ready, tokens
from slabformer.nn import Affine, Folded, RepBN
from slabformer.surgery.fuse import Reason, fuse, fuse_
from tolerances import assert_close


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = RepBN(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Backbone(nn.Module):
    """The methods that timm's models have."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = RepBN(6), nn.Linear(6, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(1)
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        first = self.blocks[0](x)
        return [first, self.blocks[1](first)]

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(6, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def backbone() -> nn.Module:
    return ready(Backbone())


def features_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.forward_features(X)


def test_the_report_names_the_methods_that_compute_something_else() -> None:
    model = backbone()
    result, report = fused(model, X)
    assert report["norm"].into == ("head",)
    assert report.changed_methods == ("forward_features", "forward_head", "reset_classifier")
    assert not torch.allclose(features_of(result), features_of(model))
    assert "; computed otherwise now: forward_features, forward_head, reset_classifier" in report.table()
    assert report.to_dict()["changed_methods"] == list(report.changed_methods)


@pytest.mark.parametrize(
    "outputs",
    ["forward_features", lambda model, x: model.forward_features(x), [lambda m, x: {"a": m.forward_features(x)}]],
    ids=["name", "function", "list"],
)
def test_another_output_stays_and_folds_hold_for_each(outputs: Any) -> None:
    model = backbone()
    result, report = fused(model, X, outputs=outputs)
    assert_close(features_of(result), features_of(model), 1e-9)
    assert (report["norm"].action, report["blocks.0.norm"].action) == ("kept", "forward")
    assert report["norm"].codes[0] == Reason.KEPT_OUTPUT
    assert report.changed_methods == ()


def test_a_new_head_reads_what_it_read_before_where_the_pooled_features_stay() -> None:
    model = backbone()
    result, report = fuse(model, X, outputs=lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True))
    assert "reset_classifier" not in report.changed_methods
    for one in (model, result):
        one.reset_classifier(0)
    assert_same_outputs(model, result, (X,))


def test_a_kept_norm_stays_as_an_affine_and_others_fold() -> None:
    model = backbone()
    result, report = fused(model, X, keep="norm")
    assert (report["norm"].action, report["norm"].codes) == ("kept", (Reason.KEEP,))
    assert isinstance(result.norm, Affine)
    assert isinstance(result.blocks[0].norm, Folded)
    assert_close(features_of(result), features_of(model), 1e-9)


@pytest.mark.parametrize("keep", ["blocks.*.norm", ["*.0.norm", "blocks.1.norm"]], ids=["pattern", "several"])
def test_patterns_keep_all_that_they_match(keep: Any) -> None:
    _, report = fused(backbone(), X, keep=keep)
    assert {o.name: o.action for o in report} == {
        "blocks.0.norm": "kept",
        "blocks.1.norm": "kept",
        "norm": "forward",
    }


def test_the_output_of_a_kept_module_stays() -> None:
    model = net(lambda m, x: m.linear(m.drop(m.norm(x.sin()))), norm=norm(), drop=nn.Dropout(), linear=nn.Linear(6, 6))
    assert fused(model, X)[1]["norm"].action == "forward"
    result, report = fused(model, X, keep="drop")
    assert "its output feeds" in report["norm"].reason or "the output of drop (keep)" in report["norm"].reason
    seen: list[Tensor] = []
    for one in (model, result):
        one.drop.register_forward_hook(lambda module, args, output: seen.append(output))
        one(X)
    assert_close(seen[1], seen[0], 1e-9)


def test_a_stream_that_is_moved_counts_as_an_output_where_its_block_is_kept() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x.sin())
        return m.conv(m.norm(m.block(x)).mT)

    children = {
        "stem": nn.Linear(6, 6),
        "block": Block(),
        "norm": norm(),
        "conv": nn.Conv1d(6, 4, 3, padding=1),
    }
    model = net(forward, **children)
    assert fused(model, X)[1]["norm"].into == ("conv", "block.fc2")
    _, report = fused(model, X, keep="block")
    assert report["norm"].action == "kept"
    assert "the output of block (keep)" in report["norm"].reason


def test_hooks_of_a_module_between_keep_what_they_see() -> None:
    model = net(
        lambda m, x: m.linear(m.between(m.norm(x.sin()))), norm=norm(), between=nn.Identity(), linear=nn.Linear(6, 6)
    )
    handle = model.between.register_forward_hook(lambda module, args, output: None)
    assert "the forward hooks of between" in fused(model, X)[1]["norm"].reason
    handle.remove()
    model.between.register_forward_pre_hook(lambda module, args: None)
    assert "the forward pre-hooks of between" in fused(model, X)[1]["norm"].reason


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no match": ({"keep": "blcks.0"}, ValueError, "keep='blcks.0' matches no module of Backbone; did you mean"),
    "one of two": ({"keep": ["norm", "nothing.*"]}, ValueError, "keep='nothing.*' matches no module"),
    "not run": ({"keep": "unused"}, ValueError, "keep='unused' matches unused, which the example inputs do not run"),
    "inside a norm": ({"keep": "norm.weight"}, ValueError, "matches no module"),
    "no text": ({"keep": [3]}, TypeError, "keep must be names of modules or patterns such as 'blocks.*', got 3"),
    "no method": ({"outputs": "forward_feature"}, ValueError, "outputs='forward_feature' is no method of Backbone"),
    "a module": ({"outputs": "norm"}, ValueError, "keep='norm' keeps the output of a module"),
    "no function": ({"outputs": [3]}, TypeError, "names of methods or functions of (model, *inputs), got 3"),
    "fails": (
        {"outputs": lambda m, x: m.missing(x)},
        ValueError,
        "outputs[0] does not run on the example inputs: AttributeError",
    ),
    "empty": ({"outputs": lambda m, x: None}, ValueError, "outputs[0] returns no tensor on the example inputs"),
}


@pytest.mark.parametrize("call", [fuse, fuse_], ids=["fuse", "fuse_"])
@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_kept_is_refused_before_anything_changes(
    options: dict[str, Any], error: type[Exception], message: str, call: Any
) -> None:
    model = Backbone()
    model.unused = nn.Identity()
    ready(model)
    with pytest.raises(error) as caught:
        call(model, X, **options)
    assert message in str(caught.value)
    assert isinstance(model.norm, RepBN)
    assert not any(module._forward_hooks for module in model.modules())


def test_every_size_that_is_tried_is_tried_for_every_output() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.windows = RepBN(3, channel_dim=1), nn.Conv2d(3, 4, 14, 14)

        def forward_features(self, x: Tensor) -> Tensor:
            y, pad = self.norm(x.sin()), -x.shape[-1] % 14
            return self.windows(nn.functional.pad(y, (0, pad, 0, pad)) if pad > 0 else y)

        def forward(self, x: Tensor) -> Tensor:
            return self.windows(self.norm(x[..., :14, :14].sin()))

    model, image = ready(Padded()), tokens(1, 3, 112, 112)
    assert fuse(model, image)[1]["norm"].action == "forward"
    _, report = fuse(model, image, outputs="forward_features")
    assert report["norm"].codes[0] == Reason.PADDED
    assert report.input_shapes == (((1, 3, 112, 112),), ((1, 3, 80, 80),))


def test_hidden_states_and_embedded_tokens_of_a_language_model_are_held_against_the_model() -> None:
    from slabformer.models.llama import SlabLlamaConfig, SlabLlamaForCausalLM

    config = SlabLlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = ready(SlabLlamaForCausalLM(config))
    ids = torch.arange(12).view(2, 6)
    options = {"input_ids": ids, "use_cache": False}
    _, report = fuse(model, (), options)
    assert {"hidden_states", "base_model"} <= set(report.changed_methods)
    kept, report = fuse(model, (), options, outputs=lambda m, **k: m(**k, output_hidden_states=True).hidden_states)
    assert not {"hidden_states", "base_model"} & set(report.changed_methods)
    states = [one(**options, output_hidden_states=True).hidden_states for one in (model, kept)]
    for one, other in zip(*states, strict=True):
        assert_close(other, one, 1e-9)


def test_features_of_a_model_of_timm_stay_where_they_are_asked_for() -> None:
    model = ready(timm.create_model("slab_deit_micro", img_size=16, num_classes=5))
    x = tokens(2, 3, 16, 16)
    _, report = fuse(model, x)
    assert {"forward_features", "forward_head"} <= set(report.changed_methods)
    result, report = fuse(model, x, outputs=["forward_features", "forward_intermediates"])
    assert report.changed_methods == ()
    with torch.no_grad():
        assert_close(result.forward_features(x), model.forward_features(x), 1e-9)
