"""`slab lm bench`: how fast a language model writes, fused and not, beside its RMSNorm baseline and its ceiling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console

from slabformer.cli.lm.common import available_accelerator, check_no_file, quiet_transformers
from slabformer.cli.options import parse
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import DeviceName, FolderToWrite, NonEmptyStr, PositiveInt, Seconds, Threads

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from slabformer.measure.rows import Variant

RECIPE = (".yaml", ".yml")


def parser() -> Parser:
    """Options of `slab lm bench`."""
    made = Parser(
        "slab lm bench",
        "Time reading a prompt and writing tokens: a model as given, fused, its RMSNorm baseline and its ceiling "
        "(norms deleted), in turns in one process.",
        [
            "slab lm bench runs/llama_micro_prepbn",
            "slab lm bench recipes/llama_350m_prepbn.yaml --threads 1 --output results",
            "slab lm bench recipes/llama_350m_prepbn.yaml --device cuda --bf16",
        ],
    )
    made.add_argument(
        "model", type=NonEmptyStr, help="a folder or hub name, or a recipe (.yaml): random weights of its sizes"
    )
    made.add_argument("--device", type=DeviceName, default="cpu", metavar="DEVICE", help="where to run")
    made.add_argument("--bf16", action="store_true", help="weights and arithmetic in bfloat16")
    made.add_argument("--batch-sizes", type=PositiveInt, nargs="+", default=[1, 8], help="texts at once")
    made.add_argument("--prompt-tokens", type=PositiveInt, default=128, help="length of the prompt")
    made.add_argument("--threads", type=Threads | None, help="threads of torch on a CPU; all cores by default")
    made.add_argument("--compile", type=bool, default=True, help="also under torch.compile")
    made.add_argument(
        "--seconds",
        type=Seconds,
        default=20.0,
        help="time to measure for, at each batch size, for prompts and tokens each",
    )
    made.add_argument("--output", type=FolderToWrite | None, help="folder for decode.csv, decode.json and decode.md")
    return made


def run(config: Namespace) -> Outcome:
    """Measure and write."""
    import torch

    from slabformer.bench.decoding import compare_decoding

    quiet_transformers()
    if config.output is not None:
        check_no_file(config.output)
    device = available_accelerator(config.device)
    with Console(stderr=True).status("loading") as status:
        model = _model(config.model, device, torch.bfloat16 if config.bf16 else torch.float32)
        report = compare_decoding(
            _variants(model),
            batch_sizes=config.batch_sizes,
            prompt_tokens=config.prompt_tokens,
            threads=config.threads,
            compiled=config.compile,
            seconds=config.seconds,
            name=Path(config.model).stem,
            progress=status.update,
        )
    files = [] if config.output is None else report.write(config.output)
    return Outcome(data=report.to_dict(), shown=[report.table()], files=files)


def _model(given: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, or one with random weights, as large as a recipe says."""
    from slabformer.tasks.language.folders import load_model_folder

    if Path(given).suffix not in RECIPE:
        return load_model_folder(given, dtype, device)
    from torch import nn

    import slabformer as sf
    from slabformer.cli.lm.train import parser as recipe_options
    from slabformer.cli.lm.train import to_train_config
    from slabformer.models.llama import SlabLlamaForCausalLM
    from slabformer.nn.controls import repbn_modules
    from slabformer.tasks.language.build import config_of_model
    from slabformer.tasks.language.fusing import tokens_for

    try:
        recipe = to_train_config(parse(recipe_options(), ["--config", given], "slab lm train"))
    except ValueError as error:
        raise ValueError(f"{given} is no recipe: {error}") from error
    vocab_size = recipe.model.vocab_size or recipe.tokenizer.vocab_size
    model: Any = SlabLlamaForCausalLM(config_of_model(recipe.model, vocab_size, norm_start="zeros"))
    model.to(device).eval()
    for norm in repbn_modules(model).values():
        nn.init.constant_(norm.weight, 0.1)  # calm: gated MLPs square what grows from layer to layer
    sf.recalibrate_(model, [{"input_ids": tokens_for(model, 2, 32), "use_cache": False}])
    return model.to(dtype)


def _variants(model: PreTrainedModel) -> dict[Variant, PreTrainedModel]:
    """The forms to compare: of a model that has RMSNorms it is the baseline, and its converted copy "as given"."""
    import slabformer as sf
    from slabformer.bench.decoding import without_norms
    from slabformer.nn.controls import prepbn_modules, repbn_modules
    from slabformer.tasks.language.fusing import fuse_language_model

    baseline = _baseline(model)
    if not repbn_modules(model):
        model = copy.deepcopy(model)
        sf.convert_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    model.eval()
    fused, _ = fuse_language_model(model)
    return {"LayerNorm baseline": baseline, "as given": model, "fused": fused, "ceiling": without_norms(model)}


def _baseline(model: PreTrainedModel) -> PreTrainedModel:
    from slabformer.models.llama import SlabLlamaConfig
    from slabformer.nn.affine import Folded
    from slabformer.nn.controls import repbn_modules
    from slabformer.tasks.language.foreign import fresh_model

    ours = isinstance(model.config, SlabLlamaConfig)
    if any(isinstance(module, Folded) for module in model.modules()):
        raise ValueError("this model is fused already; give the one it was fused from")
    if not ours and not repbn_modules(model):
        return model
    # random weights take the time that any others do
    config = SlabLlamaConfig(**{**model.config.to_dict(), "norm": "rmsnorm"}) if ours else model.config
    baseline: Any = fresh_model(config, model.dtype)
    return baseline.to(model.device).eval()
