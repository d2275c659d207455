"""Models of transformers' own classes, their norms converted or folded by slabformer: how folders hold them.

transformers builds a model from its configuration alone, which knows nothing of conversions. So a converted model's
configuration notes them (``slabformer_norms`` and ``slabformer_attentions`` in ``config.json``), and a fused one's
weights lie in a file of another name, whose header says which norms are gone: ``from_pretrained`` finds no weights
there, and loads none wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import slabformer as sf
from slabformer._files import check_readable
from slabformer.models.llama import SlabLlamaConfig, SlabLlamaForCausalLM
from slabformer.nn.affine import Affine, Folded
from slabformer.settings import check
from slabformer.surgery.fuse.tree.sharing import load_tensors_, names_of_shared
from slabformer.tasks.conversion import Conversion, as_written_now, convert_as_described_, converted_norms, describe
from slabformer.tasks.conversion_of_attention import (
    AttentionConversion,
    convert_attentions_as_described_,
    describe_attentions,
)
from slabformer.tasks.engine.documents import read_json
from slabformer.tasks.saved_file import load_strictly

Model = TypeVar("Model", bound=nn.Module)

#: what a configuration calls the conversions
NOTE, ATTENTION_NOTE = "slabformer_norms", "slabformer_attentions"
FUSED_WEIGHTS, CONFIG = "fused.safetensors", "config.json"


def note_norms_(model: PreTrainedModel) -> None:
    """Note in ``model.config`` which norms were converted, so that every folder it is saved to says so.

    A model whose own configuration says so already is left alone.
    """
    if not isinstance(model.config, SlabLlamaConfig):
        setattr(model.config, NOTE, [asdict(conversion) for conversion in describe(converted_norms(model))])


def is_foreign(folder: Path) -> bool:
    """Whether ``folder`` holds a model that transformers cannot build: fused, or with a note of conversions."""
    return (folder / FUSED_WEIGHTS).is_file() or bool(_noted(folder) or _noted_attentions(folder))


def load_foreign(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder that :func:`is_foreign`.

    Raises:
        ValueError: If its weights are missing or damaged, or do not fit its configuration.
    """
    attentions = _noted_attentions(folder)
    build = fresh_model if attentions else _skeleton  # attentions are recognised by what they compute
    try:
        skeleton = build(AutoConfig.from_pretrained(folder), dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"no language model at {str(folder)!r}: {str(error).partition(chr(10))[0]}") from error
    convert_attentions_as_described_(skeleton, attentions, type(skeleton).__name__)
    fused = folder / FUSED_WEIGHTS
    if fused.is_file():
        leave_pooler_out_(skeleton, _names(fused))
        return _with_parameters_in(sf.load_fused(skeleton, fused), dtype)
    read = _read(folder)
    leave_pooler_out_(skeleton, dict(read))
    convert_as_described_(skeleton, _noted(folder), type(skeleton).__name__)
    own = skeleton.state_dict()  # statistics and gamma are float32 whatever the weights are
    tensors = {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in read}
    load_strictly(skeleton, tensors | _tied(skeleton, tensors), f"the weights in {str(folder)!r} do not fit")
    return skeleton


def leave_pooler_out_(model: nn.Module, names: Container[str]) -> bool:
    """Take the pooler off an encoder whose weights, of these ``names``, have none, as ``add_pooling_layer=False`` does.

    Sentence encoders, which average tokens, are often saved without; transformers would draw a random one.
    """
    pooler = getattr(model, "pooler", None)
    optional = "add_pooling_layer" in inspect.signature(type(model)).parameters
    if not optional or pooler is None or any(f"pooler.{name}" in names for name in pooler.state_dict()):
        return False
    model.register_module("pooler", None)
    return True


def save_foreign(model: PreTrainedModel, folder: Path) -> None:
    """Write configuration and weights of ``model`` as its class can be read back, not atomically.

    A fused LLaMA is written as :class:`SlabLlamaForCausalLM`, which has a form without norms; any other fused model
    as ``fused.safetensors``.
    """
    norms = [module for module in model.modules() if isinstance(module, (Affine, Folded))]
    if norms and type(model) is LlamaForCausalLM and all(isinstance(norm, Folded) for norm in norms):
        model = as_slab_llama(model)
    if attentions := describe_attentions(model):
        setattr(model.config, ATTENTION_NOTE, [asdict(conversion) for conversion in attentions])
    if norms and not is_buildable(model):
        sf.save_fused(model, folder / FUSED_WEIGHTS)
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:  # encoders have none
            model.generation_config.save_pretrained(folder)
        return
    if converted_norms(model):
        note_norms_(model)
    # names as the modules have them, not as older files did, where transformers itself cannot read the folder
    model.save_pretrained(folder, save_original_format=not (attentions or getattr(model.config, NOTE, None)))


def is_buildable(model: PreTrainedModel) -> bool:
    """Whether transformers can build this fused model from its configuration: ours, without any norm."""
    return isinstance(model, SlabLlamaForCausalLM) and model.config.norm == "folded"


def as_slab_llama(model: LlamaForCausalLM) -> SlabLlamaForCausalLM:
    """A fused LLaMA of transformers' own class as ours, which computes the same and shares its weights."""
    settings = {**model.config.to_dict(), "norm": "folded", "tie_word_embeddings": False}
    settings = {name: value for name, value in settings.items() if name not in (NOTE, "model_type", "architectures")}
    with init_empty_weights(include_buffers=False):
        made = SlabLlamaForCausalLM(SlabLlamaConfig(**settings))
    own = model.state_dict()
    # a fused head may have kept no bias of its own, where nothing was shifted
    like: Any = {"dtype": model.dtype, "device": model.device}
    absent = {name: torch.zeros(value.shape, **like) for name, value in made.state_dict().items() if name not in own}
    load_tensors_(made, absent | own)
    made.generation_config = model.generation_config
    made.train(model.training)
    return made


def fresh_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers' own for ``config``, norms and all; the random numbers drawn are not missed elsewhere."""
    with torch.random.fork_rng(devices=[]):
        return _built(config, dtype)


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """As :func:`fresh_model`, its parameters on the meta device: nothing is drawn, and what is loaded takes no copy."""
    with init_empty_weights(include_buffers=False):
        model = _built(config, dtype)
    model.tie_weights()  # each parameter was registered as one of its own
    return model


def _built(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    encoder = encoder_class(config)
    model: Any = AutoModelForCausalLM.from_config(config) if encoder is None else encoder(config)
    return _with_parameters_in(model, dtype)


def _with_parameters_in(model: Model, dtype: torch.dtype) -> Model:
    """Buffers stay as they are: rotary frequencies are float32, as from_pretrained has them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that ``config`` names, unless it is a causal language model's or not transformers'."""
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and not name.endswith("ForCausalLM"):
            return named
    return None


def _noted(folder: Path) -> list[Conversion]:
    return [Conversion(**row) for row in _rows(folder, NOTE, list[Conversion], "norms")]


def _noted_attentions(folder: Path) -> list[AttentionConversion]:
    rows = _rows(folder, ATTENTION_NOTE, list[AttentionConversion], "attentions")
    return [AttentionConversion(**row) for row in rows]


def _rows(folder: Path, note: str, kind: Any, what: str) -> list[dict[str, Any]]:
    """What ``config.json`` notes of conversions, checked; none where the file cannot be read."""
    try:
        rows: list[dict[str, Any]] = as_written_now(read_json(folder / CONFIG).get(note) or [])
    except (OSError, ValueError, AttributeError):
        return []  # whoever reads the folder next says what is wrong with it
    try:
        check(note, rows, kind)
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG} says which {what} were converted in words that cannot be read: {error}"
        ) from error
    return rows


def _names(file: Path) -> set[str]:
    """Of the tensors in a file; none where it cannot be read, as whoever reads it next says."""
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError):
        return set()


def _read(folder: Path) -> list[tuple[str, Tensor]]:
    """Tensors of ``model.safetensors``, or of its shards."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"no language model at {str(folder)!r}: no model.safetensors beside its configuration")
    try:
        return [row for file in files for row in load_file(check_readable(file, "weights")).items()]
    except SafetensorError as error:
        raise ValueError(f"the weights in {str(folder)!r} are damaged: {error}") from error


def _tied(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that ``model`` shares with one of ``tensors``, which therefore are not in the file."""
    found: dict[str, Tensor] = {}
    for names in names_of_shared(model):
        given = next((name for name in names if name in tensors), None)
        if given is not None:
            found |= {name: tensors[given] for name in names if name not in tensors}
    return found
