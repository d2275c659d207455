import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slabformer as sf
from slabformer.nn import PRepBN, RepBN
from slabformer.tasks.saved_file import DIGEST, digest_of
from slabformer.tasks.saved_model import ModelInfo, create_model, load_model, save_model

CLASSES = ["ant", "bee", "cow"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def info_of(name: str, **model_args: object) -> ModelInfo:
    return ModelInfo(
        model=name,
        model_args={"num_classes": 3, **model_args},
        class_names=CLASSES,
        input_size=(3, 32, 32),
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
        interpolation="bilinear",
        crop_pct=1.0,
    )


def build(info: ModelInfo, change: Callable[[nn.Module], object] = lambda model: None) -> nn.Module:
    model = timm.create_model(info.model, **info.model_args)
    change(model)
    if any(isinstance(module, RepBN) for module in model.modules()):
        sf.testing.randomize_norms_(model)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    info = info_of("slab_deit_micro")
    save_model(build(info), tmp_path / "model.safetensors", info)
    return tmp_path / "model.safetensors"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("slab_deit_micro", lambda model: None),
        ("deit_micro", lambda model: None),
        ("deit_micro", sf.convert_norms_),
        ("deit_micro", lambda model: sf.convert_norms_(model, norm="repbn")),
        *(
            ("deit_micro", lambda model, norm=norm: sf.convert_norms_(model, norm=norm))
            for norm in ("batchnorm", "rmsnorm", "dyt")
        ),
        ("deit_micro", lambda model: sf.convert_norms_(model, lambda m, name: "norm1" in name, eps=1e-3, momentum=0.2)),
    ],
    ids=["ours", "layernorm", "converted", "to-repbn", "to-batchnorm", "to-rmsnorm", "to-dyt", "in-part"],
)
def test_a_model_comes_back_as_it_was(tmp_path: Path, name: str, change: Callable[[nn.Module], object]) -> None:
    info = info_of(name, drop_path_rate=0.1)
    model = build(info, change)
    save_model(model, tmp_path / "model.safetensors", info)
    loaded, description = load_model(tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert description.class_names == CLASSES
    assert (description.mean, description.crop_pct, description.interpolation) == ((0.1, 0.2, 0.3), 1.0, "bilinear")
    settings = [(m.rep.eps, m.rep.momentum) for m in loaded.modules() if isinstance(m, PRepBN)]
    assert settings == [(m.rep.eps, m.rep.momentum) for m in model.modules() if isinstance(m, PRepBN)]


def test_norms_converted_with_different_settings_come_back(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        sf.convert_norms_(model, lambda m, name: "norm1" in name, eps=1e-3)
        sf.convert_norms_(model, lambda m, name: "norm2" in name, norm="repbn")

    info = info_of("deit_micro")
    model = build(info, change)
    save_model(model, tmp_path / "model.safetensors", info)
    loaded, description = load_model(tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(model))
    assert [(len(c.names), c.norm, c.eps) for c in description.converted] == [(4, "prepbn", 1e-3), (4, "repbn", 1e-5)]


@pytest.mark.parametrize("gamma", [1.0, 0.4, 0.0])
def test_gamma_comes_back(tmp_path: Path, gamma: float) -> None:
    info = info_of("slab_deit_micro")
    model = build(info)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.set_gamma(gamma)
    save_model(model, tmp_path / "model.safetensors", info)
    norms = [module for module in load_model(tmp_path / "model.safetensors")[0].modules() if isinstance(module, PRepBN)]
    assert [float(norm.gamma) for norm in norms] == pytest.approx([gamma] * 9)
    assert {norm.phase for norm in norms} == {{1.0: "warm", 0.4: "fading", 0.0: "done"}[gamma]}


def test_precision_comes_back(tmp_path: Path) -> None:
    info = info_of("slab_deit_micro")
    model = build(info).bfloat16()
    save_model(model, tmp_path / "model.safetensors", info)
    loaded, _ = load_model(tmp_path / "model.safetensors")
    for (name, tensor), (_, other) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor, other), name


def tie_heads(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    info = info_of("deit_micro")
    model = build(info, tie_heads)
    save_model(model, tmp_path / "model.safetensors", info)
    assert "blocks.1.mlp.fc1.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load_model(tmp_path / "model.safetensors")[0]), logits(model))


def test_views_of_one_storage_can_be_saved(tmp_path: Path) -> None:
    info = info_of("deit_micro")
    model = build(info)
    both = torch.randn(2, 64)
    model.blocks[0].norm1.weight.data, model.blocks[0].norm2.weight.data = both[0], both[1]
    save_model(model, tmp_path / "model.safetensors", info)
    assert torch.equal(logits(load_model(tmp_path / "model.safetensors")[0]), logits(model))


def test_a_compiled_model_is_saved_without_its_wrapper(tmp_path: Path) -> None:
    info = info_of("slab_deit_micro")
    model = build(info)
    save_model(torch.compile(model), tmp_path / "model.safetensors", info)
    assert torch.equal(logits(load_model(tmp_path / "model.safetensors")[0]), logits(model))


@pytest.mark.parametrize("change", [lambda model: None, sf.convert_norms_], ids=["ours", "converted"])
def test_a_fused_model_comes_back(tmp_path: Path, change: Callable[[nn.Module], object]) -> None:
    info = info_of("slab_deit_micro" if change is not sf.convert_norms_ else "deit_micro")
    model = build(info, change)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.set_gamma(0.0)
    save_model(model, tmp_path / "model.safetensors", info)
    _, description = load_model(tmp_path / "model.safetensors")
    fused, report = sf.fuse(model, IMAGES)
    save_model(fused, tmp_path / "fused.safetensors", description)
    loaded, fused_description = load_model(tmp_path / "fused.safetensors")
    assert report.num_folded > 0
    assert fused_description.fused
    assert not description.fused
    assert torch.equal(logits(loaded), logits(fused))


def test_precision_of_a_fused_model_comes_back(tmp_path: Path) -> None:
    info = info_of("slab_deit_micro")
    model = build(info)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.set_gamma(0.0)
    fused, _ = sf.fuse(model, IMAGES)
    save_model(fused.bfloat16(), tmp_path / "fused.safetensors", info)
    loaded, _ = load_model(tmp_path / "fused.safetensors")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(loaded(IMAGES.bfloat16()), fused(IMAGES.bfloat16()))


def test_loading_draws_nothing_from_the_global_generator(saved: Path) -> None:
    torch.manual_seed(7)
    load_model(saved)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(path: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(build(info_of("slab_deit_micro")), saved, info_of("slab_deit_micro"))
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("keep", [0, 1, 100, -1], ids=lambda keep: f"{keep}-bytes")
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is truncated, or no safetensors file"):
        load_model(saved)


def test_a_flipped_bit_is_noticed_wherever_it_is(saved: Path) -> None:
    content = saved.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    random = np.random.default_rng(0)
    places = [*range(8), *random.integers(8, header, 60), *random.integers(header, len(content), 20), len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"truncated|altered|does not say|cannot be read"):
            load_model(saved)


def test_a_description_of_tomorrow_is_refused(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(saved).items()}
    metadata["slabformer"] = json.dumps(json.loads(metadata["slabformer"]) | {"colour": "blue"})
    save_file(tensors, saved, metadata=metadata | {DIGEST: digest_of(metadata, tensors)})
    with pytest.raises(ValueError, match="unknown field 'colour'; a newer slabformer"):
        load_model(saved)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="does not say which model it holds"):
        load_model(tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no model at '.*none.safetensors'"):
        load_model(tmp_path / "none.safetensors")


def test_a_published_checkpoint_needs_its_name(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "published.pth")
    with pytest.raises(ValueError, match=r"published.pth does not say which model it holds; give the model's name"):
        load_model(tmp_path / "published.pth")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(build(info_of("slab_deit_micro")), tmp_path / "wrong.safetensors", info_of("deit_micro"))
    with pytest.raises(
        ValueError, match=r"does not fit deit_micro: \d+ tensors missing \(first: .*\), \d+ tensors unexpec"
    ):
        load_model(tmp_path / "wrong.safetensors")
    save_model(build(info_of("deit_micro")), tmp_path / "wrong.safetensors", info_of("deit_micro", num_classes=4))
    with pytest.raises(ValueError, match=r"2 tensors of another shape \(first: head.weight\)"):
        load_model(tmp_path / "wrong.safetensors")


def test_unknown_models_and_arguments_name_what_is_near() -> None:
    with pytest.raises(ValueError, match="unknown model 'slab_deit_micra'; did you mean 'slab_deit_micro'"):
        create_model("slab_deit_micra")
    with pytest.raises(ValueError, match=r"slab_deit_micro refuses its arguments .*num_clases"):
        create_model("slab_deit_micro", num_clases=3)
