"""`slab mindspore export`: a fused model for MindSpore, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from slabformer.cli.common import example_images
from slabformer.cli.mindspore.common import add_model_options, load_torch_model
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FolderToWrite, PositiveFloat


def parser() -> Parser:
    """Options of `slab mindspore export`."""
    made = Parser(
        "slab mindspore export",
        "Fold the norms of a model and write it for MindSpore: readable source, its .ckpt, and MINDIR for any batch "
        "size. All are loaded again and compared with PyTorch; the folder appears when they have passed.",
        [
            "slab mindspore export model.safetensors --output exported",
            "slab mindspore export swin_tiny_prepbn --checkpoint swin.ckpt -o exported",
        ],
    )
    add_model_options(made)
    made.add_argument("--output", type=FolderToWrite, required=True, help="a folder that is empty or does not exist")
    made.add_argument("--unfused", action="store_true", help="keep the norms, to train on in MindSpore")
    made.add_argument(
        "--rtol",
        type=PositiveFloat,
        default=1e-5,
        help="largest difference of outputs, relative to their root mean square",
    )
    return made


def run(config: Namespace) -> Outcome:
    """Fuse, write, load, compare."""
    import slabformer as sf
    from slabformer._files import replaced_folder
    from slabformer.mindspore.convert import convert
    from slabformer.mindspore.mindir import SUFFIX, export_mindir
    from slabformer.mindspore.runtime import graph_mode, require

    require()
    model, info = load_torch_model(config)
    images = example_images(info, batch_size=2)
    form = "unfused" if config.unfused and not info.fused else "fused"
    if form == "fused" and not info.fused:
        model, _ = sf.fuse(model, images)
    with graph_mode(), replaced_folder(config.output) as folder:
        made = convert(model, images, folder, name=info.model, rtol=config.rtol)
        mindir = made.source.with_suffix(SUFFIX)
        graph = export_mindir(made.cell, model, images, mindir, rtol=config.rtol)
        names = [path.name for path in (made.source, made.checkpoint, mindir)]
    largest = max(made.result.max_rel, graph.max_rel)
    told = f"{info.model}, {form}: within {largest:.1e} of PyTorch's outputs"
    data = {"model": info.model, "form": form, "max_rel": made.result.max_rel, "max_rel_mindir": graph.max_rel}
    return Outcome(data=data, shown=[told], files=[Path(config.output, name) for name in names])
