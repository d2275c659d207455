from __future__ import annotations

import math
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from reference_files import GOLDEN, description, fill, published_state, reference
from slabformer.models.weights.official import PublishedLayout, load_published, read_published, to_published
from slabformer.models.weights.published import PUBLISHED
from slabformer.nn.controls import prepbn_modules
from tolerances import EXACT, assert_close

#: every published configuration that is registered and described; those above 40 M parameters take their time to fill
DESCRIBED = [
    pytest.param(row.config, marks=[pytest.mark.slow] if (row.num_params or 0) > 40e6 else [])
    for row in PUBLISHED.values()
    if timm.is_model(row.model) and (GOLDEN / f"{row.config}.json").exists()
]
WITH_LOGITS = [
    row.config for row in PUBLISHED.values() if timm.is_model(row.model) and (GOLDEN / f"{row.config}.npz").exists()
]


@pytest.fixture
def micro() -> nn.Module:
    """A model with published contents of its own: gamma 0, every tensor redrawn."""
    torch.manual_seed(0)
    model = timm.create_model("slab_deit_micro").eval()
    load_published(model, filled(model))
    return model


def filled(model: nn.Module, layout: str = "prepbn") -> dict[str, Tensor]:
    """Published state dict of the size of ``model``, filled from its names."""
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    state = to_published(model, layout)
    return {
        name: torch.from_numpy(fill.values(name, value.shape)).float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def numbered_state(name: str) -> dict[str, Tensor]:
    """State dict of a published model whose elements are all told apart, drawn in no time; counters at zero."""
    state = {}
    for index, (key, (shape, dtype)) in enumerate(description(name)["state_dict"].items()):
        numbers = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + index / 512
        state[key] = numbers if dtype == "float32" else torch.zeros(shape, dtype=torch.long)
    return state


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("norm", ["prepbn", "repbn"])
@pytest.mark.parametrize("name", WITH_LOGITS)
def test_logits_equal_the_published_ones(name, norm):
    model = timm.create_model(PUBLISHED[name].model, norm=norm).eval()
    load_published(model, {"model": published_state(name)})
    expected = reference(name)["logits"]
    with torch.no_grad():
        error = (model(fill.image(2)) - expected).abs().max() / expected.std()
    assert error <= 1e-5


@pytest.mark.parametrize("name", DESCRIBED)
def test_published_names_order_and_dtypes_come_back(name):
    state = numbered_state(name)
    model = timm.create_model(PUBLISHED[name].model, device="meta").to_empty(device="cpu")
    load_published(model, state)
    back = to_published(model, PUBLISHED[name].norm)
    written = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in back.items()}
    assert list(written.items()) == list(description(name)["state_dict"].items())
    # what no model reads is not kept; a total_step of 0 would make their gamma 0 / 0
    dropped = getattr(model, "published_layout", PublishedLayout()).dropped
    forgotten = {key for key in state if key.endswith("total_step") or any(re.search(p, key) for p in dropped)}
    for key in state.keys() - forgotten:
        assert_close(back[key], state[key], EXACT)


@pytest.mark.parametrize("layout", ["prepbn", "repbn"])
def test_a_round_trip_is_exact(micro, layout):
    loaded = timm.create_model("slab_deit_micro")
    loaded.load_state_dict(
        micro.state_dict() if layout == "repbn" else loaded.state_dict()
    )  # RepBN files hold no LayerNorm
    load_published(loaded, to_published(micro, layout))
    assert snapshot(loaded).keys() == snapshot(micro).keys()
    for name, value in micro.state_dict().items():
        assert_close(loaded.state_dict()[name], value, EXACT)


def test_a_repbn_file_leaves_layernorms_alone_and_ends_the_schedule(micro):
    model = timm.create_model("slab_deit_micro")
    before = snapshot(model)
    load_published(model, to_published(micro, "repbn"))
    for name, value in model.state_dict().items():
        kept = ".norm." in f".{name}" and "rep." not in name and "gamma" not in name
        assert_close(value, before[name] if kept else micro.state_dict()[name], EXACT)
    assert {norm.phase for norm in prepbn_modules(model).values()} == {"done"}
    assert all(float(norm.gamma) == 0 for norm in prepbn_modules(model).values())


def test_a_repbn_model_takes_its_part_of_a_prepbn_file(micro):
    model = timm.create_model("slab_deit_micro", norm="repbn").eval()
    load_published(model, to_published(micro, "prepbn"))
    images = torch.randn(2, 3, 32, 32)
    assert_close(model(images), micro(images), EXACT)


def test_counters_may_be_absent(micro):
    state = {name: value for name, value in to_published(micro).items() if not name.endswith(".warm")}
    model = timm.create_model("slab_deit_micro").eval()
    load_published(model, state)
    images = torch.randn(2, 3, 32, 32)
    assert_close(model(images), micro.eval()(images), EXACT)


class TestFiles:
    @pytest.fixture
    def yacs_file(self, micro, tmp_path, monkeypatch) -> Path:
        """As the published training script saves: weights, optimizer, and a config of a class that is gone on load."""
        module = types.ModuleType("yacs.config")
        module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", module)
            config = module.CfgNode(MODEL=module.CfgNode(NAME="slab"), BASE=[""])
            config.__dict__["__immutable__"] = True
            contents = {
                "model": to_published(micro),
                "optimizer": {"state": {}},
                "max_accuracy": 74.3,
                "config": config,
            }
            torch.save(contents, tmp_path / "published.pth")
        return tmp_path / "published.pth"

    def test_training_checkpoints_load_without_yacs(self, yacs_file, micro):
        model = timm.create_model("slab_deit_micro").eval()
        load_published(model, yacs_file)
        images = torch.randn(2, 3, 32, 32)
        assert_close(model(images), micro(images), EXACT)

    def test_files_without_wrapper_load_too(self, micro, tmp_path):
        torch.save(to_published(micro), tmp_path / "bare.pth")
        state = read_published(str(tmp_path / "bare.pth"))
        assert list(state) == list(to_published(micro))

    def test_nothing_is_executed(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "executed",))

        torch.save({"model": {}, "config": Trap()}, tmp_path / "trap.pth")
        (tmp_path / "raw.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
        for name in ("trap.pth", "raw.pth"):
            with pytest.raises(ValueError, match=f"cannot read .*{name} as a checkpoint of plain tensors") as error:
                read_published(tmp_path / name)
            assert "\n" not in str(error.value)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_truncated_files_are_refused(self, micro, tmp_path, share):
        torch.save(to_published(micro), tmp_path / "whole.pth")
        contents = (tmp_path / "whole.pth").read_bytes()
        (tmp_path / "cut.pth").write_bytes(contents[: int(len(contents) * share)])
        with pytest.raises(ValueError, match="cannot read"):
            read_published(tmp_path / "cut.pth")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
            read_published(tmp_path / "nowhere.pth")

    @pytest.mark.parametrize(
        "contents", [[1, 2], {"model": {"a": 1}}, {"epoch": 3}], ids=["list", "number", "no_model"]
    )
    def test_contents_that_are_no_state_dict_are_refused(self, tmp_path, contents):
        torch.save(contents, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="maps names to tensors"):
            read_published(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("pos_embed"), r"1 tensors missing \(first: pos_embed\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(first: extra\)"),
        (
            lambda s: s.update({"head.weight": torch.zeros(7, 64)}),
            r"1 of another shape \(first: head.weight is \(7, 64\), the model's \(10, 64\)\)",
        ),
        (lambda s: s.pop("blocks.1.norm2.norm2.alpha"), r"1 tensors missing \(first: blocks.1.norm2.norm2.alpha\)"),
        (lambda s: s.clear(), r"tensors missing \(first: pos_embed\)"),
    ],
    ids=["missing", "unexpected", "shape", "norm", "empty"],
)
def test_what_does_not_fit_is_named_and_the_model_untouched(micro, damage, message):
    state = to_published(micro)
    damage(state)
    model = timm.create_model("slab_deit_micro")
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"checkpoint does not fit slab_deit_micro: .*{message}") as error:
        load_published(model, state)
    assert "\n" not in str(error.value)
    for name, value in model.state_dict().items():
        assert_close(value, before[name], EXACT)
    assert {norm.phase for norm in prepbn_modules(model).values()} == {"warm"}


def test_a_model_with_layernorms_refuses_published_norms(micro):
    with pytest.raises(ValueError, match=r"checkpoint does not fit deit_micro: .*missing .*unexpected"):
        load_published(timm.create_model("deit_micro"), to_published(micro))


def test_only_a_finished_model_is_written(micro):
    next(iter(prepbn_modules(micro).values())).set_gamma(0.5)
    with pytest.raises(ValueError, match="needs gamma 0"):
        to_published(micro)


def test_layouts_that_cannot_be_written_are_refused(micro):
    with pytest.raises(ValueError, match="layout must be one of"):
        to_published(micro, "layernorm")
    with pytest.raises(ValueError, match="this model has none; use 'repbn'"):
        to_published(timm.create_model("slab_deit_micro", norm="repbn"), "prepbn")
