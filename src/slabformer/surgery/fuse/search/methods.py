"""Which of a model's usual methods compute something else once it is fused, though its forward does not."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from slabformer.surgery.fuse.search.request import method_output
from slabformer.surgery.fuse.search.trial import is_same, observe
from slabformer.surgery.fuse.tree.copies import Example, Output, quiet
from slabformer.surgery.outputs import first_line

logger = logging.getLogger(__name__)

#: methods that take what the forward takes, as timm, transformers, DINO and CLIP name them
_METHODS = (
    *("forward_features", "forward_intermediates", "get_intermediate_layers", "forward_feature_pyramid"),
    *("extract_features", "get_last_selfattention", "encode", "encode_image", "encode_text"),
    *("get_image_features", "get_text_features"),
)


def changed_methods(before: nn.Module, after: nn.Module, example: Example) -> tuple[str, ...]:
    """Names of what ``after`` computes otherwise than ``before`` on ``example``; both may be changed.

    Those are tried that the model has and that take the example's inputs: methods, transformers' hidden states, base
    model and ``inputs_embeds``, and the features that a new head would read (``reset_classifier``).
    """
    plain = dataclasses.replace(example, output=Output(), watched=())
    return tuple(
        name
        for name, output, inputs in _probes(before, plain)
        if _differs(before, after, dataclasses.replace(inputs, output=output))
    )


def _probes(model: nn.Module, example: Example) -> Iterator[tuple[str, Output, Example]]:
    """Name, what to ask for, and what with."""
    for name in _METHODS:
        if callable(getattr(model, name, None)):
            yield name, method_output(name), example
    if callable(getattr(model, "forward_features", None)) and callable(getattr(model, "forward_head", None)):
        features = _tried(lambda: model.forward_features(*example.args, **example.kwargs))  # type: ignore[operator]
        if isinstance(features, Tensor):
            yield "forward_head", method_output("forward_head"), Example((features,), {})
            yield "forward_head(pre_logits=True)", method_output("forward_head"), Example((features,), _PRE_LOGITS)
    yield "hidden_states", Output(lambda m, *args, **kwargs: m(*args, **kwargs).hidden_states), _with_states(example)
    if isinstance(getattr(model, "base_model", None), nn.Module) and model.base_model is not model:
        yield "base_model", Output(lambda m, *args, **kwargs: m.base_model(*args, **kwargs)), example
    embedded = _embedded(model, example)
    if embedded is not None:
        yield "inputs_embeds", Output(), embedded
    if callable(getattr(model, "reset_classifier", None)):
        yield "reset_classifier", Output(_without_head), example  # the last, since it changes the model


_PRE_LOGITS = {"pre_logits": True}


def _with_states(example: Example) -> Example:
    return dataclasses.replace(example, kwargs={**example.kwargs, "output_hidden_states": True})


def _without_head(model: Any, *args: Any, **kwargs: Any) -> Any:
    model.reset_classifier(0)
    return model(*args, **kwargs)


def _embedded(model: Any, example: Example) -> Example | None:
    """``example`` with embeddings in place of tokens, as transformers' models take them."""
    kwargs = dict(example.kwargs)
    tokens = kwargs.pop("input_ids", example.args[0] if len(example.args) == 1 else None)
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or not hasattr(model, "get_input_embeddings"):
        return None
    embeddings = _tried(lambda: model.get_input_embeddings()(tokens))
    return None if embeddings is None else Example((), {**kwargs, "inputs_embeds": embeddings})


def _tried(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or None where it fails."""
    try:
        with quiet():
            return call()
    except Exception as error:
        logger.debug("not tried: %s", first_line(error))
        return None


def _differs(before: nn.Module, after: nn.Module, example: Example) -> bool:
    expected = _tried(lambda: observe(before, example))
    if expected is None or not expected.tensors():
        return False
    actual = _tried(lambda: observe(after, example))
    return actual is None or not is_same(expected, actual)
