"""Train, recalibrate, fuse, verify and benchmark a small SLAB model and its baseline on the handwritten digits."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

import slabformer as sf
from slabformer._files import replaced, write_csv, write_json, write_text
from slabformer._moved import RENAMED
from slabformer.bench.compare import compare
from slabformer.measure.timing import num_threads
from slabformer.quickstart.beside import training_beside
from slabformer.quickstart.report import write_report
from slabformer.quickstart.result import QuickstartConfig, QuickstartResult
from slabformer.tasks.classification.config import AugmentConfig, DataConfig, GammaConfig, ModelConfig, TrainConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.classification.train import TrainResult, train
from slabformer.tasks.engine.config import LrConfig, OptimizerConfig
from slabformer.tasks.engine.documents import parse_yaml, read_mapping
from slabformer.tasks.engine.manifest import Manifest
from slabformer.tasks.engine.observers import Observer
from slabformer.tasks.saved_model import load_model, save_model

SLAB, BASELINE = "slab_deit_micro", "deit_micro"
BATCH_SIZES = (1, 64)
#: what is written beside the two runs
OUTPUTS = (
    *("summary.json", "report.html", "metrics.csv", "config.yaml", "bench.csv", "bench.json", "bench.png"),
    *("model.safetensors", "baseline.safetensors", "fused.safetensors"),
)


#: shows that a named part of the job is running; what the block gets is told about its progress
Stage = Callable[[str], AbstractContextManager[Callable[[str], None]]]


def recipe(model: str, config: QuickstartConfig) -> TrainConfig:
    """How either model is trained; the same but for the model."""
    return TrainConfig(
        model=ModelConfig(name=model),
        data=DataConfig(path="digits", image_size=16, crop_pct=1.0, mean=(0.3,) * 3, std=(0.37,) * 3),
        augment=AugmentConfig(policy="light", mixup=0.0, cutmix=0.0, label_smoothing=0.1),
        optimizer=OptimizerConfig(lr=3e-3, lr_base_batch=None),
        lr_schedule=LrConfig(warmup_epochs=min(4, config.epochs / 4), warmup_lr=1e-5, min_lr=1e-5),
        gamma=GammaConfig(fade=0.8),
        epochs=config.epochs,
        batch_size=128,
        seed=config.seed,
        num_workers=0,
        log_every=11,
        eval_every=2,
        output=str(Path(config.output) / model),
        overwrite=True,
    )


def run_quickstart(
    config: QuickstartConfig,
    *,
    observers: Callable[[str], Sequence[Observer]] = lambda model: (),
    stage: Stage | None = None,
) -> QuickstartResult:
    """Do the whole job and write its files, ``report.html`` and ``summary.json`` last.

    Args:
        config: What to do.
        observers: Called with a model's name; told how its training goes.
        stage: Entered for every part that is not training.

    Raises:
        VerificationError: If the fused model computes something else.
    """
    began = time.perf_counter()
    output = Path(config.output)
    _clear(output)
    with num_threads(config.threads):
        result = _run(config, output, observers, stage or _silent, began)
    _write(output, result)
    return result


def _run(
    config: QuickstartConfig, output: Path, observers: Callable[[str], Sequence[Observer]], stage: Stage, began: float
) -> QuickstartResult:
    with training_beside(recipe(BASELINE, config), observers(BASELINE)) as beside:
        runs = {SLAB: train(recipe(SLAB, config), observers=observers(SLAB)), BASELINE: beside.result()}
    slab, baseline = runs[SLAB].model.cpu().eval(), runs[BASELINE].model.cpu().eval()
    images, labels = _test_images(recipe(SLAB, config))
    with stage("fuse and verify"):
        fused, fuse_report = sf.fuse(slab, images[:8])
        equality = sf.verify(slab, fused, images)
        _write_models(output, fused)
    with stage("benchmark") as say, torch.no_grad():
        bench = compare(
            slab,
            images,
            fused=fused,
            baseline=baseline,
            batch_sizes=BATCH_SIZES,
            compiled=BATCH_SIZES[-1:] if config.compiled else False,
            seconds=config.bench_seconds,
            name=SLAB,
            progress=say,
        )
        predictions = [model(images).argmax(-1) for model in (fused, baseline)]
    return QuickstartResult(
        config=config,
        slab=runs[SLAB],
        baseline=runs[BASELINE],
        fused=fused,
        fuse_report=fuse_report,
        equality=equality,
        bench=bench,
        images=images,
        labels=labels,
        fused_predictions=predictions[0],
        baseline_predictions=predictions[1],
        seconds=time.perf_counter() - began,
    )


def _write(output: Path, result: QuickstartResult) -> None:
    result.bench.write(output)
    _write_metrics(output, result)
    write_report(result, output / "report.html")
    write_json(output / "summary.json", result.summary())


def _silent(title: str) -> AbstractContextManager[Callable[[str], None]]:
    return nullcontext(lambda text: None)


def _clear(output: Path) -> None:
    """Remove what an earlier quickstart wrote to ``output``, and nothing else; its runs do so by themselves.

    Raises:
        NotADirectoryError: If ``output`` is a file.
        ValueError: If a file of the user's is in the way.
    """
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give another output folder")
    output.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(output, "quickstart")
    known = manifest.names() if manifest.exists else _written_without_manifest(output)
    manifest.delete(known)
    manifest.refuse_strangers(OUTPUTS, set())
    manifest.write(OUTPUTS)


def _written_without_manifest(output: Path) -> set[str]:
    """What a quickstart of an older version wrote, known by its configuration, which it wrote last but one."""
    config = output / "config.yaml"
    if not config.is_file() or "quickstart" not in read_mapping(config, parse_yaml):
        return set()
    return {*OUTPUTS, *(old for old, new in RENAMED.items() if new in OUTPUTS)}


def _test_images(config: TrainConfig) -> tuple[Tensor, Tensor]:
    loader = create_loader(config.data, config.augment, "validation", batch_size=config.batch_size, seed=config.seed)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def _write_models(output: Path, fused: nn.Module) -> None:
    for name, source in (("model", SLAB), ("baseline", BASELINE)):
        with replaced(output / f"{name}.safetensors") as temporary:
            shutil.copyfile(output / source / "model.safetensors", temporary)
    _, info = load_model(output / "model.safetensors")
    save_model(fused, output / "fused.safetensors", info)


def _write_metrics(output: Path, result: QuickstartResult) -> None:
    """Both histories in one file, and the resolved settings of both runs in another."""
    rows = [{"model": name, **row} for name, run in _runs(result).items() for row in run.history]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(output / "metrics.csv", rows, columns)
    settings = {"quickstart": asdict(result.config)}
    settings |= {name: recipe(name, result.config).to_dict() for name in (SLAB, BASELINE)}
    write_text(output / "config.yaml", yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))


def _runs(result: QuickstartResult) -> dict[str, TrainResult]:
    return {SLAB: result.slab, BASELINE: result.baseline}
