"""Folders: of a run, and of a model: transformers' own, converted by slabformer, or fused."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import slabformer.models.llama  # noqa: F401 (registers ours)
from slabformer._files import errors_of, sync_file, sync_folder, workspace
from slabformer.models.weights.hub import check_on_hub, is_hub_name
from slabformer.models.weights.official import unpickle, why_unreadable
from slabformer.settings import shown
from slabformer.tasks.engine.checkpoint import CheckpointFolders
from slabformer.tasks.engine.documents import read_json
from slabformer.tasks.engine.folder import Found, RunFolder
from slabformer.tasks.language.foreign import (
    CONFIG,
    FUSED_WEIGHTS,
    encoder_class,
    is_foreign,
    leave_pooler_out_,
    load_foreign,
    save_foreign,
)
from slabformer.tasks.language.trainer import latest_checkpoint

logger = logging.getLogger(__name__)

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
    check_source(model)
    if is_foreign(Path(model)):
        foreign = load_foreign(Path(model), dtype).to(device).eval()
        assert isinstance(foreign, PreTrainedModel)
        return foreign
    read = _read_model(AutoModelForCausalLM, model, dtype)
    nn.Module.to(read, device)
    return read.eval()


def load_mapped(model: str | Path) -> PreTrainedModel:
    """:func:`load_model_folder` in the dtype that its configuration names, on the CPU, weights mapped from its files.

    Pages that are read are dropped where memory is short, so that a model may be larger than the memory; weights that
    are stored in another dtype than the configuration names are held in memory.
    """
    check_source(model)
    dtype = getattr(AutoConfig.from_pretrained(model), "dtype", None)
    return load_model_folder(model, dtype or torch.float32)


def load_encoder_folder(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    """The model that a folder's configuration names, in float32 and eval mode, and its tokenizer or image processor.

    Encoders of text or images, with a head or without; causal language models too. The processor is None where the
    folder holds none.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no model in it, its weights do not fit, or its norms were converted before.
    """
    check_source(folder)
    if is_foreign(Path(folder)):
        raise ValueError(f"{str(folder)!r} holds a model whose norms were converted before; give the original")
    try:
        settings = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"no model at {str(folder)!r}: {' '.join(str(error).split())[:200]}") from error
    model = _read_model(encoder_class(settings) or AutoModelForCausalLM, folder, torch.float32).eval()
    reader: Any = AutoImageProcessor if model.main_input_name == "pixel_values" else AutoTokenizer
    try:
        return model, reader.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError):
        return model, None


def _read_model(loader: Any, model: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """What ``loader``, a class of transformers, reads: all of its weights, and no others."""
    _check_pickles(Path(model))
    try:
        with _without_load_report():
            read: Any = loader.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError, UnpicklingError) as error:
        pickled = isinstance(error, UnpicklingError)
        reason = why_unreadable(error) if pickled else " ".join(str(error).split())[:200]
        raise ValueError(f"no language model at {str(model)!r}: {reason}") from error
    loaded, info = read
    wrong = {what: sorted(map(str, info[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    if leave_pooler_out_(loaded, loaded.state_dict().keys() - set(wrong["missing"])):
        wrong["missing"] = [name for name in wrong["missing"] if not name.startswith("pooler.")]
        logger.info("%s holds no pooler: the model is taken without", model)
    found = [f"{len(names)} tensors {what} (first: {names[0]})" for what, names in wrong.items() if names]
    if found:
        raise ValueError(f"the weights in {str(model)!r} do not fit its configuration: {', '.join(found)}")
    return loaded


def check_source(model: str | Path) -> None:
    """Refuse at once what is neither a folder with a model nor a name on the hub, which is asked once.

    Raises:
        FileNotFoundError: If there is no such folder, and its name is none that the hub allows.
        ValueError: If it is a file, a folder without a configuration, or a name that neither cache nor hub know.
    """
    path, name = Path(model), str(model)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ValueError(f"no language model at {name!r}: the folder holds no {CONFIG}")
        settings = read_json(path / CONFIG)
        if not isinstance(settings, dict):
            raise ValueError(f"{path / CONFIG} must hold a mapping, got {shown(settings)}")
        return
    if path.is_file():
        raise ValueError(f"no language model at {name!r}: it is a file; give the folder that holds {CONFIG}")
    if not is_hub_name(name):
        raise FileNotFoundError(f"no language model at {name!r}: no such folder; give a folder, or a name on the hub")
    try:
        check_on_hub(name, CONFIG)
    except OSError as error:
        raise ValueError(f"no language model at {name!r}: {error}") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers' table of tensors that do not fit out of the log: they are refused, in one line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _check_pickles(folder: Path) -> None:
    """Refuse weights that ``torch.save`` did not write: reading those may fail in any way at all."""
    if not any(folder.glob("*.safetensors")):
        for file in sorted(folder.glob("pytorch_model*.bin")):
            if not zipfile.is_zipfile(file):  # as it writes them since PyTorch 1.6
                unpickle(file)


class LanguageRunFolder(RunFolder):
    """The output folder of one run; its checkpoints are folders of the Trainer's."""

    RESULT = "summary.json"
    OUTPUTS = (
        *("metrics.csv", "steps.csv", *WEIGHTS, CONFIG),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    )

    def look(self) -> Found:
        """As :meth:`RunFolder.look`; a run that left no checkpoint holds nothing, and another may take its place."""
        if self.path.is_dir() and not self.result_path.exists() and not self.holds_checkpoint():
            return "new"
        return super().look()

    def holds_checkpoint(self) -> bool:
        """Whether there is a checkpoint, damaged or not, that was written to its end."""
        return latest_checkpoint(self.path) is not None

    def _checkpoint_names(self) -> set[str]:
        return {path.name for path in CheckpointFolders(self.path).paths()}


def holds_model(folder: Path) -> bool:
    """Whether a model was written there."""
    return any((folder / name).exists() for name in WEIGHTS)


def save_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    record: Callable[..., None] | None = None,
) -> None:
    """Write safetensors, configuration and tokenizer for :func:`load_model_folder`; the weights appear last.

    transformers' ``from_pretrained`` reads the folder too, after ``import slabformer.models.llama``, unless it is of a
    fused model that transformers has no class for.

    Args:
        model: Any causal language model, converted or fused or not.
        tokenizer: Its own, if it has one.
        folder: Made if it does not exist.
        record: Told the names of all files before the first one appears.

    Raises:
        OSError: If the folder cannot be written to; what was there stays, or is replaced file by file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with errors_of(folder), workspace(folder) as place:
        temporary = place / "model"
        temporary.mkdir()
        save_foreign(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        files = sorted(temporary.iterdir(), key=lambda path: path.name in WEIGHTS)
        for file in files:
            sync_file(file)
        if record is not None:
            record(*(file.name for file in files))
        for file in files:
            os.replace(file, folder / file.name)  # noqa: PTH105 - the one call that is atomic on every platform
        for name in set(WEIGHTS) - {file.name for file in files}:
            (folder / name).unlink(missing_ok=True)  # of the model that was there
    sync_folder(folder)
