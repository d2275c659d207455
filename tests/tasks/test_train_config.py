"""Recipes are data: what follows from them, and mistakes in them are named."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
import torch
from torch import nn

import slabformer as sf
from recipes_of import load
from slabformer._norm_names import norm_names
from slabformer.cli.train import parser
from slabformer.nn.norms import norm_types
from slabformer.tasks.classification.build import build_model
from slabformer.tasks.classification.config import AugmentConfig, ModelConfig, TrainConfig
from slabformer.tasks.classification.mixup import MixedStep
from slabformer.tasks.conversion import count_norms
from slabformer.tasks.engine.build import build_gamma_schedule, build_lr_schedule, build_optimizer, rate_scale
from slabformer.tasks.engine.config import LrConfig, OptimizerConfig

IMAGENET_STEPS, PUBLISHED_BATCH = 1_281_167 // 1024, 1024


def test_the_published_rates_come_out_of_the_published_batch() -> None:
    config = load("slab_deit_tiny")
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(config.optimizer, model, PUBLISHED_BATCH)
    schedule, epochs = build_lr_schedule(
        config.lr_schedule,
        optimizer,
        epochs=config.epochs,
        steps_per_epoch=IMAGENET_STEPS,
        scale=rate_scale(config.optimizer, PUBLISHED_BATCH),
    )
    rates = []
    for step in (0, 20 * IMAGENET_STEPS, 300 * IMAGENET_STEPS):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[-1]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[1] == pytest.approx(1e-3, rel=0.02)
    assert rates[2] == pytest.approx(1e-5)
    assert epochs == 300


def test_the_published_fade_comes_out_of_the_published_steps() -> None:
    config = load("slab_deit_tiny")
    config.model.args.update(embed_dim=48, depth=1)
    model, _ = build_model(config.model, 10, 224)
    total = 300 * IMAGENET_STEPS
    schedule = build_gamma_schedule(
        config.gamma, model, build_optimizer(config.optimizer, model, PUBLISHED_BATCH), total
    )
    assert schedule is not None
    assert schedule.fade_steps == pytest.approx(60_000, rel=0.001)


def test_decay_spares_norms_biases_and_what_the_model_names() -> None:
    config = load("slab_deit_tiny")
    config.model.args.update(embed_dim=48, depth=1)
    model, _ = build_model(config.model, 10, 224)
    groups = build_optimizer(config.optimizer, model, PUBLISHED_BATCH).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert "blocks.0.attn.positional_encoding" in decayed
    assert "blocks.0.attn.qkv.weight" in decayed
    spared = set(names.values()) - decayed
    assert {"pos_embed", "blocks.0.norm1.rep.eta", "blocks.0.norm1.norm.weight", "head.bias"} <= spared


def test_rates_are_taken_as_they_are_without_a_base_batch() -> None:
    assert rate_scale(OptimizerConfig(lr_base_batch=None), 4096) == 1.0
    assert rate_scale(OptimizerConfig(lr_base_batch=512), 1024) == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs must be in \[1, 100000\], got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_senseless_numbers_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_a_warmup_longer_than_training_is_refused() -> None:
    config = TrainConfig(epochs=5, lr_schedule=LrConfig(warmup_epochs=5))
    with pytest.raises(ValueError, match=r"warmup_epochs \(5\) must be below epochs \(5\)"):
        build_lr_schedule(
            config.lr_schedule,
            torch.optim.SGD(nn.Linear(1, 1).parameters()),
            epochs=config.epochs,
            steps_per_epoch=10,
            scale=1.0,
        )


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"name must be an optimizer that timm knows, got 'adamv'; did you mean 'adam"):
        OptimizerConfig(name="adamv")


def test_a_model_without_fading_norms_has_no_schedule() -> None:
    config = TrainConfig()
    baseline, _ = build_model(ModelConfig(name="deit_micro"), 10, 32)
    optimizer = build_optimizer(config.optimizer, baseline, 512)
    assert build_gamma_schedule(config.gamma, baseline, optimizer, 100) is None
    rep, _ = build_model(ModelConfig(name="deit_micro_prepbn", args={"norm": "repbn"}), 10, 32)
    assert build_gamma_schedule(config.gamma, rep, build_optimizer(config.optimizer, rep, 512), 100) is None


def test_the_image_size_of_the_data_reaches_the_model() -> None:
    model, arguments = build_model(ModelConfig(name="slab_deit_micro"), 4, 16)
    assert arguments == {"num_classes": 4, "img_size": 16}
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


def test_convert_norms_works_on_any_timm_model() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", args={"depth": 1}, convert_norms=True)
    model, _ = build_model(config, 5, 32)
    assert sum(isinstance(module, sf.PRepBN) for module in model.modules()) == 3


@pytest.mark.parametrize("norm", norm_names())
@pytest.mark.parametrize("name", ["slab_deit_micro", "vit_tiny_patch16_224"], ids=["ours", "timm"])
def test_any_norm_is_a_setting(name: str, norm: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "slabformer")
    model, _ = build_model(ModelConfig(name=name, args={"depth": 1}, norm=norm), 5, 32)
    title = norm_types()[norm].title
    assert count_norms(model) == {title: 3}
    assert f"norms of {name}: 3 {title}" in caplog.text


def test_the_norm_that_is_converted_to_is_a_setting() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", args={"depth": 1}, norm="repbn", eta=0.0, convert_norms=True)
    model, _ = build_model(config, 5, 32)
    assert [m.eta.item() for m in model.modules() if isinstance(m, sf.RepBN)] == [0.0] * 3


def test_settings_of_norms_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^norm must be one of prepbn, .*got 'layernrm'; did you mean 'layernorm'"):
        TrainConfig(model=ModelConfig(norm="layernrm"))
    with pytest.raises(ValueError, match=r"give model.norm or model.args.norm, not both"):
        ModelConfig(norm="repbn", args={"norm": "dyt"})
    with pytest.raises(ValueError, match=r"model.eta is for PRepBN and RepBN; say with model.norm that vit_tiny"):
        build_model(ModelConfig(name="vit_tiny_patch16_224", args={"depth": 1}, eta=0.0), 5, 32)
    with pytest.raises(ValueError, match="eta is for norms with a skip"):
        build_model(ModelConfig(norm="batchnorm", eta=0.0), 5, 32)


def test_an_odd_batch_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="mixup needs an even batch_size, got 9"):
        MixedStep(AugmentConfig(mixup=0.8), 10, 9)


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        (AugmentConfig(mixup=0, cutmix=0, label_smoothing=0), "cross entropy"),
        (AugmentConfig(mixup=0, cutmix=0, label_smoothing=0.1), "smoothed"),
        (AugmentConfig(mixup=0.8, cutmix=0, mixup_prob=0.0, label_smoothing=0.1), "smoothed"),
    ],
    ids=["plain", "smoothing", "never mixed"],
)
def test_the_loss_is_that_of_its_targets(augment: AugmentConfig, expected: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = MixedStep(augment, 5, 6)(nn.Identity(), (images, labels))
    smoothing = 0.1 if expected == "smoothed" else 0.0
    reference = nn.functional.cross_entropy(images, labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss, reference)


def test_mixing_leaves_the_loader_s_batch_alone() -> None:
    images, labels = torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    before = images.clone()
    MixedStep(AugmentConfig(), 5, 6)(lambda x: x.flatten(1)[:, :5], (images, labels))
    assert torch.equal(images, before)


def test_every_field_is_explained_on_the_command_line() -> None:
    text = parser().format_help()
    undocumented = [
        f"{owner.__name__}.{field.name}"
        for owner in (TrainConfig, *(kind for kind in get_type_hints(TrainConfig).values() if is_dataclass(kind)))
        for field in fields(owner)
        if field.name.replace("_", "-") not in text
    ]
    assert not undocumented
    assert "Share of training that the fade takes" in " ".join(text.split())
