"""Folders: of a run, and of a model: transformers' own, converted by slabformer, or fused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import slabformer.models.llama  # noqa: F401 (registers ours)
from slabformer.tasks.engine.files import sync_file, sync_folder
from slabformer.tasks.engine.folder import Found, RunFolder
from slabformer.tasks.language.foreign import FUSED_WEIGHTS, is_foreign, load_foreign, save_foreign
from slabformer.tasks.language.trainer import latest_checkpoint

#: written last, since a folder with one of them is a whole model
WEIGHTS = ("model.safetensors", FUSED_WEIGHTS)


def load_model_folder(
    model: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal language model in eval mode, from a folder or the hub.

    Ours, any that transformers knows, one of those that a plain ``Trainer`` with a
    :class:`~slabformer.tasks.language.callback.ProgressiveCallback` saved, or fused and saved by
    :func:`save_model_folder`.

    Raises:
        ValueError: If there is none, or its weights do not fit its configuration.
    """
    if is_foreign(Path(model)):
        foreign = load_foreign(Path(model), dtype).to(device).eval()
        assert isinstance(foreign, PreTrainedModel)
        return foreign
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no language model at {str(model)!r}: {reason}") from error
    loaded, info = read
    wrong = {what: sorted(map(str, info[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    found = [f"{len(names)} tensors {what} (first: {names[0]})" for what, names in wrong.items() if names]
    if found:
        raise ValueError(f"the weights in {str(model)!r} do not fit its configuration: {', '.join(found)}")
    return loaded.to(device).eval()


class LanguageRunFolder(RunFolder):
    """The output folder of one run; checkpoints are the Trainer's."""

    @property
    def result_path(self) -> Path:
        """Written last: its presence says that the run is finished."""
        return self.path / "summary.json"

    def look(self) -> Found:
        """As :meth:`RunFolder.look`; a run that left no checkpoint holds nothing, and another may take its place."""
        if self.path.is_dir() and not self.result_path.exists() and latest_checkpoint(self.path) is None:
            return "new"
        found = super().look()
        return "unfinished" if found == "new" and latest_checkpoint(self.path) is not None else found

    def _clear(self) -> None:
        super()._clear()
        self.result_path.unlink(missing_ok=True)
        for path in self.path.glob("checkpoint-*"):
            shutil.rmtree(path)


def holds_model(folder: Path) -> bool:
    """Whether a model was written there."""
    return any((folder / name).exists() for name in WEIGHTS)


def save_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write safetensors, configuration and tokenizer for :func:`load_model_folder`; the weights appear last.

    transformers' ``from_pretrained`` reads the folder too, after ``import slabformer.models.llama``, unless it is of a
    fused model that transformers has no class for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".model-", dir=folder) as temporary:
        save_foreign(model, Path(temporary))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        files = sorted(Path(temporary).iterdir(), key=lambda path: path.name in WEIGHTS)
        for file in files:
            sync_file(file)
            os.replace(file, folder / file.name)  # noqa: PTH105 - the one call that is atomic on every platform
        for name in set(WEIGHTS) - {file.name for file in files}:
            (folder / name).unlink(missing_ok=True)  # of the model that was there
    sync_folder(folder)
