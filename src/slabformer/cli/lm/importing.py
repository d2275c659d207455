"""`slab lm import`: the published LLaMA's folder into safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jsonargparse import Namespace

from slabformer.cli.lm.common import folder_to_write, quiet_transformers
from slabformer.cli.lm.fuse import fuse_verified
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FolderToWrite, InputPath


def parser() -> Parser:
    """Options of `slab lm import`."""
    made = Parser(
        "slab lm import",
        "Read a published folder strictly (config.json, pytorch_model.bin; nothing but tensors is unpickled) and write "
        "it as transformers and slab read it.",
        ["slab lm import DOWNLOADED --output llama-350m", "slab lm import DOWNLOADED --fuse --output llama-350m"],
    )
    made.add_argument("folder", type=Annotated[Path, InputPath("folder")], help="what was downloaded from the hub")
    made.add_argument("--output", type=FolderToWrite, required=True, help="folder to write")
    made.add_argument("--fuse", action="store_true", help="fold every norm into its neighbours")
    made.add_argument("--overwrite", action="store_true", help="replace the model that is there")
    return made


def run(config: Namespace) -> Outcome:
    """Read, fuse where asked, write."""
    from slabformer.tasks.language.folders import save_model_folder
    from slabformer.tasks.language.published import import_published

    quiet_transformers()
    folder_to_write(config.output, config.overwrite)
    model, tokenizer = import_published(config.folder)
    saved, data, shown = fuse_verified(model, untie=False) if config.fuse else (model, {}, [])
    save_model_folder(saved, tokenizer, config.output)
    parameters = sum(parameter.numel() for parameter in saved.parameters())
    return Outcome(
        data={**data, "parameters": parameters},
        shown=[*shown, f"{parameters / 1e6:.2f} M parameters"],
        files=[config.output],
    )
