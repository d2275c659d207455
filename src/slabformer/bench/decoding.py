"""How fast does a language model write: :func:`compare_decoding` times reading a prompt and writing token after token.

    report = compare_decoding({"RMSNorm baseline": baseline, "as given": model, "fused": fused, "ceiling": bare})
    console.print(report.table())

The ceiling is the same model with its norms deleted outright. An equality comes before a speed, and all forms of a
batch size are timed in turns in one process, as in :mod:`slabformer.bench.compare`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from slabformer._defaults import RUNTIME_RTOL
from slabformer.bench.decoding_report import DecodeReport, Decoding
from slabformer.deployment.compiled import Compiled
from slabformer.measure.rows import Mode, Variant
from slabformer.measure.timing import (
    Machine,
    count_parameters,
    mebibytes_of,
    num_threads,
    quantile,
    ratio,
    time_interleaved,
)
from slabformer.models.cache import cache_argument
from slabformer.nn.affine import Folded
from slabformer.nn.norms import type_of
from slabformer.surgery.verify import verify

logger = logging.getLogger(__name__)

#: tokens written before the cache goes back to the prompt
ROOM = 64
Key = tuple[Variant, Mode]


def compare_decoding(
    variants: Mapping[Variant, PreTrainedModel],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    threads: int | None = None,
    compiled: bool = True,
    seconds: float = 20.0,
    name: str = "model",
    progress: Callable[[str], None] = logger.debug,
) -> DecodeReport:
    """Time the ``variants`` of one model, eager with a growing cache and compiled with a static one.

    Args:
        variants: In eval mode, on one device, "as given" among them; "fused" must compute what that one does.
        batch_sizes: Texts at once.
        prompt_tokens: Length of the prompt.
        threads: torch's, on a CPU; all cores by default.
        compiled: Also measure ``torch.compile``.
        seconds: Of measuring for each batch size, for prompts and for tokens each; 8 rounds are taken in any case.
        name: What the report calls the model.
        progress: Told what is being done.

    Raises:
        VerificationError: If the fused form, or a compiled one, computes something else.
        ValueError: If prompt and written tokens do not fit the context, or the model's logits are not finite.
    """
    given = variants["as given"]
    _check_room(given, prompt_tokens)
    with num_threads(threads), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        shape = (max(batch_sizes), prompt_tokens)
        ids = torch.randint(0, given.config.vocab_size, shape, generator=generator).to(given.device)
        if not Logits(given)(ids[:1]).isfinite().all():
            raise ValueError(f"{name} gives logits that are not finite: nothing can be compared with them")
        equality = verify(Logits(given), Logits(variants["fused"]), [(ids[:2],)]) if "fused" in variants else None
        rows: list[Decoding] = []
        for batch_size in batch_sizes:
            rows += _measure(variants, _writers(variants, ids[:batch_size], compiled, progress), seconds, progress)
            torch.compiler.reset()  # a program holds weights of its own
    return DecodeReport(
        model=name, machine=Machine.here(given.device), prompt_tokens=prompt_tokens, rows=rows, equality=equality
    )


def without_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The ceiling: ``model`` with every norm deleted, a copy that shares the weights of all else."""
    ceiling = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, module in list(ceiling.named_modules()):
        is_norm = type_of(module) is not None or type(module).__name__.endswith("RMSNorm")
        if is_norm or isinstance(module, Folded):
            ceiling.set_submodule(name, nn.Identity())
    return ceiling.eval()


class Logits(nn.Module):
    """Tokens ``(B, N)`` to logits ``(B, N, V)``, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        return self.model(input_ids=input_ids, use_cache=False).logits


class Writer(nn.Module):
    """One form of a model with a cache of its own: :meth:`read` a prompt, then :meth:`write` token after token.

    Args:
        model: A causal language model in eval mode.
        prompt: Tokens ``(B, N)``.
        static: Keep the cache at its full length from the start, as compiling needs it; else it grows.
        compiled: Write through ``torch.compile``. Reading stays eager, as in ``generate``.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, *, static: bool, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.prompt, self.static = model, prompt, static
        self.cache: Cache = self._empty()
        self.cache_argument = cache_argument(model)
        self.token = prompt[:, -1:]
        self.written = 0
        self._step: Any = Compiled(_Step(self), prompt.device) if compiled else _Step(self)

    def read(self) -> Tensor:
        """Read the prompt into a fresh cache; returns the first token ``(B, 1)``."""
        self.cache, self.written = self._empty(), 0
        outputs = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1, **self.cached())
        self.token = outputs.logits[:, -1:].argmax(-1)
        return self.token

    def write(self) -> Tensor:
        """Write one token; returns its logits ``(B, 1, V)``. The cache goes back to the prompt when it is full."""
        if self.written == ROOM:
            self._rewind()
        logits = self._step(self.token)
        self.token = logits.argmax(-1)
        self.written += 1
        return logits

    def cached(self) -> dict[str, Cache]:
        """Keyword arguments that hand the model its cache."""
        return {self.cache_argument: self.cache}

    def _empty(self) -> Cache:
        if not self.static:
            return DynamicCache(config=self.model.config)
        if hasattr(self, "cache"):  # a compiled step is bound to its tensors
            for layer in self.cache.layers:
                layer.reset()
            return self.cache
        return StaticCache(config=self.model.config, max_cache_len=self.prompt.shape[1] + ROOM)

    def _rewind(self) -> None:
        if self.static:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.prompt.shape[1])  # type: ignore[union-attr]
        else:
            self.cache.crop(-self.written)  # type: ignore[attr-defined]
        self.written = 0


class _Step(nn.Module):
    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = (writer,)  # not a child: it holds this

    def forward(self, token: Tensor) -> Tensor:
        writer = self._writer[0]
        return writer.model(input_ids=token, use_cache=True, **writer.cached()).logits


def _check_room(model: PreTrainedModel, prompt_tokens: int) -> None:
    context = model.config.max_position_embeddings
    if prompt_tokens < 1 or prompt_tokens + ROOM > context:
        raise ValueError(
            f"the prompt must have 1 to {context - ROOM} tokens ({ROOM} more are written), got {prompt_tokens}"
        )


def _writers(
    variants: Mapping[Variant, PreTrainedModel], prompt: Tensor, compiled: bool, progress: Callable[[str], None]
) -> dict[Key, Writer]:
    writers: dict[Key, Writer] = {}
    for name, model in variants.items():
        eager = Writer(model, prompt, static=False)
        eager.read()
        writers[name, "eager"] = eager
        if compiled:
            progress(f"compiling {name} for {len(prompt)} texts")
            program = writers[name, "compiled"] = Writer(model, prompt, static=True, compiled=True)
            program.read()
            verify(_Written(eager), _Written(program), [(prompt,)], rtol=RUNTIME_RTOL, lazy=True)
    return writers


class _Written(nn.Module):
    """Logits of the first tokens that a writer writes."""

    def __init__(self, writer: Writer, count: int = 3) -> None:
        super().__init__()
        self._writer, self.count = (writer,), count

    def forward(self, prompt: Tensor) -> Tensor:
        writer = self._writer[0]
        writer.read()
        return torch.cat([writer.write().clone() for _ in range(self.count)], 1)


def _measure(
    variants: Mapping[Variant, PreTrainedModel],
    writers: Mapping[Key, Writer],
    seconds: float,
    progress: Callable[[str], None],
) -> list[Decoding]:
    prompt = next(iter(writers.values())).prompt
    device = prompt.device
    progress(f"batch size {len(prompt)}: {', '.join(' '.join(key) for key in writers)}")
    reading = time_interleaved({key: writer.read for key, writer in writers.items()}, seconds=seconds, device=device)
    writing = time_interleaved({key: writer.write for key, writer in writers.items()}, seconds=seconds, device=device)
    rows = []
    for variant, mode in sorted(writers, key=lambda key: key[1] == "compiled"):
        writer, turns = writers[variant, mode], writing[variant, mode]
        texts, tokens = writer.prompt.shape
        first, p50 = quantile(reading[variant, mode], 0.5), quantile(turns, 0.5)

        def over(other: Variant, mode: Mode = mode, turns: list[list[float]] = turns) -> float | None:
            return ratio(writing[other, mode], turns) if (other, mode) in writing else None

        rows.append(
            Decoding(
                variant=variant,
                mode=mode,
                batch_size=texts,
                first_token_ms=first * 1e3,
                prompt_tokens_per_second=texts * tokens / first,
                p50_ms=p50 * 1e3,
                p90_ms=quantile(turns, 0.9) * 1e3,
                tokens_per_second=texts / p50,
                memory_mib=mebibytes_of(writer.write, device),
                parameters=count_parameters(variants[variant]),
                over_baseline=over("LayerNorm baseline"),
                over_given=over("as given"),
                of_ceiling=over("ceiling"),
            )
        )
    return rows
