"""A language model as ONNX with its cache as inputs and outputs, checked against PyTorch through onnxruntime.

Inputs are ``input_ids`` ``(B, N)`` and for each layer ``past.I.key`` and ``past.I.value`` ``(B, H, P, D)``, empty
(``P = 0``) before the first call; outputs are ``logits`` ``(B, N, V)`` and ``present.I.key`` and ``present.I.value``
``(B, H, P + N, D)``, which are the next call's past. Texts of a batch have one length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from slabformer._defaults import RUNTIME_RTOL
from slabformer._extras import require
from slabformer._files import replaced_with
from slabformer.export.exporter import quiet_exporter
from slabformer.measure.equality import Runtime
from slabformer.models.cache import cache_argument
from slabformer.surgery.verify import verify

#: batch, past and new tokens that are compared: a prompt, one token more, and several at once
CASES = ((1, 0, 5), (2, 0, 1), (2, 7, 1), (3, 4, 3))


#: bytes of weights in one file: a protobuf ends at 2 GiB, and holds the graph too
LARGEST_FILE = 2**31 - 2**26


@dataclass(frozen=True)
class DecoderExport:
    """A file that computes what the model does.

    Attributes:
        path: The file.
        weights: The file with its weights, where they are too many for one; None otherwise.
        max_abs: Largest absolute difference to PyTorch over all outputs and cases.
        max_rel: The same over the root mean square of PyTorch's outputs.
    """

    path: Path
    weights: Path | None
    max_abs: float
    max_rel: float


class CachedDecoder(nn.Module):
    """A causal language model as a function of tensors alone.

    Args:
        model: LLaMA-like, in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.cache_argument = cache_argument(model)

    def forward(self, input_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Logits, then keys and values of every layer in turn."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        before, new = past[0][0].shape[2], input_ids.shape[1]
        position = torch.arange(before, before + new, device=input_ids.device)
        # given as a whole: transformers' own mask cannot be traced for any length
        mask = torch.arange(before + new, device=input_ids.device)[None, :] <= position[:, None]
        logits = self.model(
            input_ids=input_ids,
            position_ids=position[None],
            attention_mask=mask[None, None].expand(input_ids.shape[0], 1, -1, -1),
            use_cache=True,
            **{self.cache_argument: cache},
        ).logits
        layers: list[Any] = cache.layers
        return [logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]


def export_decoder(
    model: PreTrainedModel, path: str | Path, *, rtol: float = RUNTIME_RTOL, metadata: Mapping[str, str] | None = None
) -> DecoderExport:
    """Write ``model`` as ONNX with cache inputs, any batch and length, and compare the file with it.

    Args:
        model: In eval mode, on a CPU, fused or not.
        path: To write. The file appears when it has passed; until then what was there stays. More weights than fit
            into one file, about 2 GB, lie in :func:`weights_file` beside it, which it refers to by that name.
        rtol: Largest difference that passes, relative to the outputs' scale.
        metadata: Strings to keep in the file's header.

    Raises:
        VerificationError: If the file computes something else.
        ValueError: If ``model`` is in train mode.
        ImportError: If onnx or onnxruntime is missing; names the extra.
        OSError: If ``path`` cannot be written.
    """
    path = Path(path)
    require("onnxscript", extra="export")
    runtime = require("onnxruntime", extra="export")
    if model.training:
        raise ValueError("export needs eval mode, got a model in train mode; call model.eval() first")
    decoder = CachedDecoder(model).eval()
    with replaced_with(path, weights_file(path)) as temporary, torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            decoder,
            _case(model, 2, 6, 3),
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(len(_names(model, "past")) // 2),
            input_names=["input_ids", *_names(model, "past")],
            output_names=["logits", *_names(model, "present")],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(metadata or {})
        weights = weights_file(path) if _size(program) > LARGEST_FILE else None
        save = require("onnx_ir", extra="export").save
        save(program.model, str(temporary), external_data=None if weights is None else weights.name)
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        cases = [_case(model, *case, seed=seed) for seed, case in enumerate(CASES)]
        result = verify(decoder, Runtime(_runner(session)), cases, rtol=rtol, lazy=True)
    return DecoderExport(path, weights, result.max_abs, result.max_rel)


def weights_file(path: Path) -> Path:
    """Where the weights of an exported ``path`` lie if they do not fit into it."""
    return path.with_name(f"{path.name}.data")


def _size(program: Any) -> int:
    """Bytes of the weights."""
    return sum(value.const_value.nbytes for value in program.model.graph.initializers.values())


def _runner(session: Any) -> Any:
    names = [given.name for given in session.get_inputs()]

    def run(input_ids: Tensor, past: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        tensors = [input_ids, *(tensor for pair in past for tensor in pair)]
        outputs = session.run(None, dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return run


def _names(model: PreTrainedModel, kind: str) -> list[str]:
    layers = range(model.config.num_hidden_layers)
    return [f"{kind}.{layer}.{part}" for layer in layers for part in ("key", "value")]


def _dynamic_shapes(num_layers: int) -> Any:
    batch, past, new = (torch.export.Dim(name, min=low) for name, low in (("batch", 1), ("past", 0), ("new", 1)))
    cached = {0: batch, 2: past}
    return ({0: batch, 1: new}, [(cached, cached)] * num_layers)


def _case(model: PreTrainedModel, batch: int, past: int, new: int, seed: int = 0) -> tuple[Any, ...]:
    """Tokens, and a cache of random numbers."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, past, width)
    pairs = [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(config.num_hidden_layers)
    ]
    return torch.randint(0, config.vocab_size, (batch, new), generator=generator), pairs
