"""Norm-free linear attention out of a trained ViT: what it costs in accuracy, and what it gains in speed.

    python benchmarks/attention_conversion.py baseline       # the LayerNorm, softmax ViT; kept in benchmarks/subjects/
    python benchmarks/attention_conversion.py run --seed 0   # `slab convert --attention all`, on images without labels
    python benchmarks/attention_conversion.py speed          # of its form, which training does not change
    python benchmarks/attention_conversion.py table          # attention.md and attention.png

The ViT has 6 layers of width 64 and patches of 8 pixels, so 197 tokens at the 112 pixels that it is trained at, on
Fashion-MNIST. A run has the three stages of a conversion: attention starts in closed form and is aligned layer by
layer, norms are fitted, and everything is distilled end to end while the norms fade; then it is fused and verified. It
sees 10,000 training images and no labels. Accuracy is that of the test images, agreement with the original that of 256
training images that are held out. Speed is on one thread, batch 1, in turns: the deployed result against the softmax
model with LayerNorms in eager mode, compiled, and in onnxruntime, at sizes that it was not trained at. Each run is one
file in benchmarks/results/conversion/attention/.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from subjects import FOLDER, MEAN, STD, as_photos, fashion_mnist
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
from slabformer.converting.run import lose_norms
from slabformer.deployment.compiled import Compiled
from slabformer.export.model import export
from slabformer.figures.plots import curves, save
from slabformer.measure.timing import Machine, num_threads, quantile, ratio, time_interleaved
from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.tasks.saved_model import ModelInfo, create_model, load_model, save_model

RESULTS = Path(__file__).parent / "results" / "conversion" / "attention"
ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 2, "num_classes": 10, "img_size": 112}
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIZE, BATCH = 112, 64
#: image size and images of each stage of the baseline's training
TRAINING = ((56, 128_000), (112, 16_000))
LR, DECAY = 1e-3, 0.05
NUM_IMAGES, STEPS = 10_000, 300
SIZES = (224, 512, 1024)
#: beyond so many pixels of a side onnxruntime, which holds the attention matrix, is not tried
LARGEST_IN_ONNXRUNTIME = 512


def baseline() -> Path:
    """File of the trained ViT, made where it is not there."""
    path = FOLDER / "fashion_vit.safetensors"
    if path.exists():
        return path
    torch.manual_seed(0)
    images, labels = fashion_mnist("train")
    model = create_model(ARCHITECTURE, **ARGUMENTS)
    begun = time.perf_counter()
    for stage, (size, count) in enumerate(TRAINING):
        model.set_input_size((size, size))  # type: ignore[operator]
        _train(model, images, labels, size, count // BATCH, LR if stage == 0 else LR / 3)
        print(f"{size} px: {accuracy(model, size, 2000):.4f} after {time.perf_counter() - begun:.0f} s", flush=True)
    info = ModelInfo(
        model=ARCHITECTURE,
        model_args=ARGUMENTS,
        class_names=CLASSES,
        input_size=(3, SIZE, SIZE),
        mean=MEAN,
        std=STD,
        crop_pct=1.0,
    )
    save_model(model.eval(), path, info)
    return path


def _train(model: nn.Module, images: Tensor, labels: Tensor, size: int, steps: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(size)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    order = torch.randperm(len(images), generator=generator).repeat(math.ceil(steps * BATCH / len(images)))
    for step, chosen in enumerate(order[: steps * BATCH].split(BATCH)):
        photos = as_photos(images[chosen], size)
        flipped = torch.rand(len(photos), generator=generator) < 0.5
        photos = torch.where(flipped[:, None, None, None], photos.flip(3), photos)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(photos).float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{size} px, step {step} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, size: int = SIZE, count: int = 10_000) -> float:
    """Share of the first test images that ``model`` names right."""
    model.eval()
    images, labels = fashion_mnist("test")
    named = [model(as_photos(part, size)).argmax(1) for part in images[:count].split(100)]
    return float((torch.cat(named) == labels[:count]).float().mean())


def pictures() -> Path:
    """Folder of training images, without labels."""
    folder = FOLDER / "fashion_pictures"
    if not folder.exists():
        images, _ = fashion_mnist("train")
        partial_folder = folder.with_name(f".{folder.name}")
        partial_folder.mkdir(exist_ok=True)
        for index in torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:NUM_IMAGES].tolist():
            Image.fromarray(images[index].numpy()).save(partial_folder / f"{index}.png")
        partial_folder.rename(folder)
    return folder


def run(seed: int, steps: int, lr: float | None, num_tested: int) -> None:
    """One conversion, and what the fused model is worth; nothing where that is known."""
    path = RESULTS / f"run_{title(seed, steps, lr)}.json"
    if path.exists():
        print(f"{path.name} is there already")
        return
    original, folder = baseline(), FOLDER / "runs" / f"attention_{title(seed, steps, lr)}"
    begun = time.perf_counter()
    result = lose_norms(
        original, pictures(), folder, steps=steps, seed=seed, lr=lr, attention="all", device="cpu", save_every=50
    )
    seconds = time.perf_counter() - begun
    fused, _ = load_model(folder / "fused.safetensors")
    row = {
        "seed": seed,
        "steps": steps,
        "lr": lr,
        "num_tested": num_tested,
        "original": accuracy(load_model(original)[0], count=num_tested),
        "converted": accuracy(fused, count=num_tested),
        "seconds": round(seconds, 1),
        "summary": result.summary,
        "history": (folder / "metrics.csv").read_text().split(),
        "machine": asdict(Machine.here(torch.device("cpu"))),
    }
    write(path, row)
    print({key: row[key] for key in ("seed", "original", "converted", "seconds")}, flush=True)


def title(seed: int, steps: int, lr: float | None) -> str:
    """Of a run."""
    return f"{steps}_{'default' if lr is None else f'{lr:g}'}_{seed}"


def at_size(model: nn.Module, size: int) -> nn.Module:
    """``model`` for images of another size: position embeddings and tables are resampled for good."""
    model.set_input_size((size, size))  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, ConvertedLinearAttention):
            module.set_grid_size(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
    return model


def onnxruntime_form(model: nn.Module, image: Tensor) -> Callable[[Tensor], Any]:
    """The model as an ONNX file, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, image, path, batch_sizes=(1, 2))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def untrained(size: int) -> nn.Module:
    """The baseline with linear attention and without norms, fused, after a start alone: as fast as a trained one."""
    model = load_model(baseline())[0]
    sf.convert_attention_(model)
    sf.convert_norms_(model, norm="repbn")
    images = as_photos(fashion_mnist("train")[0][:64], SIZE)
    sf.recalibrate_(model, images.split(32))
    return sf.fuse(at_size(model, size).eval(), torch.randn(1, 3, size, size))[0]


@torch.no_grad()
def speed(sizes: list[int], seconds: float) -> None:
    """Time all forms at the sizes that are not measured yet."""
    path = RESULTS / "speed.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for size in sizes:
        if any(row["size"] == size for row in rows):
            continue
        image, original = torch.randn(1, 3, size, size), at_size(load_model(baseline())[0], size)
        deployed = sf.deploy(untrained(size), image, seconds=seconds)
        forms: dict[str, Callable[[Tensor], Any]] = {
            "softmax, LayerNorm: eager": original,
            "softmax, LayerNorm: compiled": Compiled(original, torch.device("cpu")),
            "deployed": deployed,
        }
        if size <= LARGEST_IN_ONNXRUNTIME:
            forms["softmax, LayerNorm: onnxruntime"] = onnxruntime_form(original, image)
        turns = time_interleaved(
            {name: partial(form, image) for name, form in forms.items()}, seconds=seconds, device=torch.device("cpu")
        )
        machine = asdict(Machine.here(torch.device("cpu")))
        rows += [
            {
                "size": size,
                "tokens": (size // 8) ** 2 + 1,
                "form": name,
                "p50_ms": round(1e3 * quantile(turns[name], 0.5), 2),
                "deployed_is_faster_by": round(ratio(turns[name], turns["deployed"]), 2),
                "taken": deployed.report.taken if name == "deployed" else None,
                "machine": machine,
            }
            for name in forms
        ]
        print(*rows[-len(forms) :], sep="\n", flush=True)
        write(path, {"rows": rows})
        torch._dynamo.reset()


def write(path: Path, data: dict[str, Any]) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def table() -> None:
    """Write ``attention.md`` and ``attention.png`` of all that is there."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("run_*.json"))]
    lines = [
        "| steps | rate | seed | test images | accuracy, original | converted, fused | points | agreement | seconds |",
        "|" + "---|" * 9,
    ]
    for row in runs:
        points = 100 * (row["converted"] - row["original"])
        lines.append(
            f"| {row['steps']} | {row['lr'] or 'default'} | {row['seed']} | {row['num_tested']} | "
            f"{row['original']:.4f} | {row['converted']:.4f} | {points:+.2f} | "
            f"{row['summary']['fused']['agreement']:.3f} | {row['seconds']:.0f} |"
        )
    speeds = RESULTS / "speed.json"
    rows = json.loads(speeds.read_text())["rows"] if speeds.exists() else []
    rows.sort(key=lambda row: row["size"])
    lines += ["", "| pixels | tokens | form | ms | deployed is faster by |", "|" + "---|" * 5]
    lines += [
        f"| {row['size']} | {row['tokens']} | {row['form']} | {row['p50_ms']} | {row['deployed_is_faster_by']} |"
        for row in rows
    ]
    (RESULTS / "attention.md").write_text("\n".join(lines) + "\n")
    names = list(dict.fromkeys(row["form"] for row in rows))
    times = {
        name: tuple(zip(*((r["size"], r["p50_ms"]) for r in rows if r["form"] == name), strict=True)) for name in names
    }
    save(curves({"milliseconds an image, one thread": times}, xlabel="pixels"), RESULTS / "attention.png")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("baseline")
    one = verbs.add_parser("run")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, default=STEPS)
    one.add_argument("--lr", type=float, help="by default that of slab convert")
    one.add_argument("--num-tested", type=int, default=10_000, help="test images that accuracy is taken from")
    timed = verbs.add_parser("speed")
    timed.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    timed.add_argument("--seconds", type=float, default=10.0, help="of measuring, for each size")
    verbs.add_parser("table")
    asked = parser.parse_args()
    with num_threads(1):
        if asked.verb == "baseline":
            print(f"accuracy {accuracy(load_model(baseline())[0]):.4f}")
        elif asked.verb == "run":
            run(asked.seed, asked.steps, asked.lr, asked.num_tested)
        elif asked.verb == "speed":
            speed(asked.sizes, asked.seconds)
        else:
            table()


if __name__ == "__main__":
    main()
