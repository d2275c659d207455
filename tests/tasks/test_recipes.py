"""Every recipe holds what was published, and trains."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.optim import Optimizer

import slabformer as sf
from image_folders import fill_splits
from recipes_of import NAMES, RECIPES, header, load
from slabformer.models.weights.published import BY_MODEL
from slabformer.tasks.classification.build import build_model
from slabformer.tasks.classification.config import AugmentConfig, GammaConfig, TrainConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.classification.mixup import MixedStep
from slabformer.tasks.engine.build import build_gamma_schedule, build_lr_schedule, build_optimizer, rate_scale
from slabformer.tasks.engine.config import LrConfig, OptimizerConfig

PUBLISHED = [name for name in NAMES if name in BY_MODEL]
NUM_PROCESSES, IMAGENET = 8, 1_281_167
AUGMENT = AugmentConfig(
    policy="timm", auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, re_prob=0.25, re_mode="pixel",
    mixup=0.8, cutmix=1.0, mixup_prob=1.0, mixup_switch_prob=0.5, label_smoothing=0.1,
)  # fmt: skip
#: images of one of the eight processes, where they are not 128
BATCH_SIZES = {
    **dict.fromkeys(("pvt_small_prepbn", "slab_pvt_small", "slab_pvt_medium", "slab_swin_base"), 64),
    "slab_cswin_tiny": 256,
}
CLIP_NORMS = {"deit": 5.0, "swin": 5.0, "pvt": None, "cswin": None}


def family(model: str) -> str:
    return next(name for name in ("cswin", "swin", "pvt", "deit") if name in model)


def steps_per_epoch(config: TrainConfig) -> int:
    return IMAGENET // (config.batch_size * NUM_PROCESSES)


@pytest.mark.parametrize("name", sorted(name for name in BY_MODEL if timm.is_model(name)))
def test_every_published_model_that_can_be_built_has_a_recipe(name: str) -> None:
    assert name in NAMES, f"write {RECIPES / name}.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses_and_says_what_it_gives_and_costs(name: str) -> None:
    assert load(name).output == f"runs/{name}"
    assert "Expected top-1" in header(name)
    assert "Cost" in header(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_tells_the_published_accuracy_and_configuration(name: str) -> None:
    row, told = BY_MODEL[name], header(name)
    assert row.config in told
    accuracies = re.findall(r"Expected top-1[^:]*: ([\d.]+) %", told)
    assert accuracies == ([] if row.top1 is None else [f"{row.top1:.1f}"])


@pytest.mark.parametrize("name", [name for name in PUBLISHED if BY_MODEL[name].fade is not None])
def test_the_fade_is_the_published_count_over_the_published_steps(name: str) -> None:
    config, row = load(name), BY_MODEL[name]
    (count,) = re.findall(r"T = ([\d,]+)", header(name))
    total = (config.epochs + config.lr_schedule.cooldown_epochs) * steps_per_epoch(config)
    assert int(count.replace(",", "")) / total == pytest.approx(row.fade, abs=0.006)
    assert config.gamma == GammaConfig(warmup=0.0, fade=row.fade, shape="linear", warm_statistics=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_is_the_published_one(name: str) -> None:
    config, row = load(name), BY_MODEL[name]
    assert config.model.name == name
    assert config.model.args["drop_path_rate"] == row.drop_path
    model = described(name)
    fading = [module for module in model.modules() if isinstance(module, sf.PRepBN)]
    assert {norm.norm.eps for norm in fading} == ({row.norm_eps} - {None})
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules()) or fading
    assert getattr(model, "attention", row.attention) == row.attention


@pytest.mark.parametrize("name", PUBLISHED)
def test_optimizer_rates_and_batch_are_the_published_ones(name: str) -> None:
    config, kind = load(name), family(name)
    late = kind in ("pvt", "cswin")
    clip_norm = 1.0 if name in ("pvt_medium_prepbn", "slab_pvt_medium") else CLIP_NORMS[kind]
    assert config.optimizer == OptimizerConfig(
        name="adamw", lr=5e-4, lr_base_batch=512, weight_decay=0.05, clip_norm=clip_norm,
        args={"betas": [0.9, 0.999], "eps": 1e-8},
    )  # fmt: skip
    assert config.lr_schedule == LrConfig(
        warmup_epochs=5 if kind == "pvt" else 20,
        warmup_lr=1e-6 if late else 5e-7,
        min_lr=1e-5 if late else 5e-6,
        cooldown_epochs=10 if late else 0,
    )
    assert (config.epochs, config.batch_size) == (300, BATCH_SIZES.get(name, 128))
    assert (config.precision, config.ema.decay, config.recalibrate.enabled) == ("fp32", 0.0, True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_prepared_as_published(name: str) -> None:
    config = load(name)
    assert config.augment == AUGMENT
    assert (config.data.image_size, config.data.interpolation, config.data.crop_pct) == (224, "bicubic", 0.875)


@functools.cache
def described(name: str) -> nn.Module:
    """The model of a recipe on the meta device, to look at."""
    config = load(name)
    with torch.device("meta"):
        return build_model(config.model, 1000, config.data.image_size)[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_splits(tmp_path_factory.mktemp("images"))


def reduced(name: str, images: Path) -> TrainConfig:
    """One block a stage, small images, small batches; all else as it is."""
    config = load(name)
    config.num_workers, config.batch_size = 0, 4
    if config.data.image_size > 32:
        stages = getattr(described(name), "stages", None)
        config.model.args |= {"depth": 1} if stages is None else {"depths": [1] * len(stages)}
        config.data.path, config.data.image_size = str(images), 32
    return config


def decayed_or_not(model: nn.Module, optimizer: Optimizer) -> dict[str, bool]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_run(name: str, images: Path) -> None:
    config = reduced(name, images)
    loader = create_loader(config.data, config.augment, "train", batch_size=config.batch_size, seed=0)
    num_classes = len(loader.class_names)
    model, _ = build_model(config.model, num_classes, config.data.image_size)
    optimizer = build_optimizer(config.optimizer, model, 1024)
    lr_schedule, epochs = build_lr_schedule(
        config.lr_schedule,
        optimizer,
        epochs=config.epochs,
        steps_per_epoch=1251,
        scale=rate_scale(config.optimizer, 1024),
    )
    gamma_schedule = build_gamma_schedule(config.gamma, model, optimizer, epochs * 1251)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss_of = MixedStep(config.augment, num_classes, config.batch_size)
    for step, batch in zip(range(1, 3), loader, strict=False):
        loss = loss_of(model, batch)
        loss.backward()
        if config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step_update(step)
        if gamma_schedule is not None:
            gamma_schedule.step()
        assert torch.isfinite(loss)
    still = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert not all(still)
    assert (gamma_schedule is None) == (not any(isinstance(module, sf.PRepBN) for module in model.modules()))
    assert gamma_schedule is None or 0 < gamma_schedule.gamma < 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_decay_spares_what_it_spared_in_the_publication(name: str) -> None:
    model = described(name)
    for parameter, decayed in decayed_or_not(model, build_optimizer(load(name).optimizer, model, 1024)).items():
        shape = model.get_parameter(parameter).shape
        spared = ("relative_position_bias_table", *(("pos_embed", "cls_token") if family(name) == "deit" else ()))
        assert decayed == (len(shape) > 1 and not parameter.endswith(spared)), parameter
