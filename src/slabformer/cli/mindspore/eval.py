"""`slab mindspore eval`: the accuracy that a model has in MindSpore."""

from __future__ import annotations

import tempfile

from jsonargparse import Namespace

from slabformer.cli.common import example_images
from slabformer.cli.data import add_data_options, data_of, progress_bar
from slabformer.cli.eval import compare_names, eval_outcome
from slabformer.cli.mindspore.common import add_model_options, load_torch_model
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FileToWrite


def parser() -> Parser:
    """Options of `slab mindspore eval`."""
    made = Parser(
        "slab mindspore eval",
        "Accuracy on validation images of the deployed form, which is converted, compared with PyTorch, and run by "
        "MindSpore in graph mode.",
        [
            "slab mindspore eval model.safetensors --data digits --fused",
            "slab mindspore eval swin_tiny_prepbn --checkpoint swin.ckpt --data PATH",
        ],
    )
    add_model_options(made)
    add_data_options(made)
    made.add_argument("--fused", action="store_true", help="fold the norms before evaluating")
    made.add_argument("--per-class", type=FileToWrite | None, help="also write every class's accuracy to this CSV file")
    return made


def run(config: Namespace) -> Outcome:
    """Convert, compare, evaluate."""
    import slabformer as sf
    from slabformer.mindspore.convert import from_torch, runtime_of
    from slabformer.mindspore.runtime import graph_mode, require
    from slabformer.mindspore.training.data import whole_batches
    from slabformer.tasks.classification.config import AugmentConfig
    from slabformer.tasks.classification.data import create_loader
    from slabformer.tasks.classification.evaluate import evaluate

    require()
    model, info = load_torch_model(config)
    loader = create_loader(
        data_of(config, info, "validation"),
        AugmentConfig(),
        "validation",
        batch_size=config.batch_size,
        seed=0,
        num_workers=config.num_workers,
    )
    compare_names(info, loader)
    images = example_images(info, batch_size=2)
    if config.fused and not info.fused:
        model, _ = sf.fuse(model, images)
    form = "fused" if config.fused or info.fused else "deployed"
    with graph_mode(), tempfile.TemporaryDirectory(prefix="slabformer-mindspore-") as folder:
        candidate = runtime_of(from_torch(model, images, folder, name=info.model))
        candidate.run = whole_batches(candidate.run, config.batch_size)
        with progress_bar("evaluate", loader.order.count) as advance:
            result = evaluate(candidate, loader, per_class=config.per_class is not None, progress=advance)
    return eval_outcome(config, f"{info.model} on {config.data}, MindSpore", {form: result})
