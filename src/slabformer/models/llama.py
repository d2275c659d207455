"""LLaMA without RMSNorm, on transformers' own: importing this registers it with the Auto classes.

    config = SlabLlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=18, num_attention_heads=8)
    model = SlabLlamaForCausalLM(config)

Only norms differ: attention, cache, ``generate``, checkpointing, saving and loading are transformers'.
"""

from __future__ import annotations

from functools import wraps
from typing import Annotated, Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, LlamaRMSNorm

from slabformer._norm_names import norm_names
from slabformer._transformers import ModelHooks
from slabformer.models.weights.official import PublishedLayout, State
from slabformer.nn import PRepBN, RepBN, TokenBatchNorm
from slabformer.nn.affine import Folded
from slabformer.nn.attention_masks import keep_padding_out
from slabformer.nn.norms import check_eta, norm_type, type_of
from slabformer.nn.repbn import eta_of
from slabformer.settings import (
    Eta,
    FractionBelowOne,
    Known,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    check,
)

#: "folded" is none at all
LlamaNorm = Annotated[str, Known(lambda: [*norm_names(), "folded"])]
NormStart = Literal["zeros", "ones"]
#: of the configuration's fields, transformers' own included, whose types say less
RANGES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), PositiveInt),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), PositiveInt),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), PositiveInt | None),
    **dict.fromkeys(("rms_norm_eps", "bn_eps"), PositiveFloat),
    "initializer_range": NonNegativeFloat,
    "attention_dropout": FractionBelowOne | None,
    "bn_momentum": PositiveFraction,
    "norm": LlamaNorm,
    "norm_start": NormStart,
    "eta": Eta | None,
}


@strict
class SlabLlamaConfig(LlamaConfig):
    """transformers' ``LlamaConfig``, and which norm.

    Args:
        norm: A norm of the table (:mod:`slabformer.nn.norms`) by name: "prepbn" (RMSNorm that fades into RepBN),
            "rmsnorm" (the baseline), "repbn", "batchnorm" ...; or "folded": none at all, as :func:`slabformer.fuse`
            leaves a model whose norms all went into the projections behind them, which have biases then.
        norm_start: Of RepBN's skip weight, gain and offset: "zeros" as published, so that it fades in from nothing;
            "ones" for the start of the vision models. Other norms start as ever.
        eta: RepBN's initial skip weight, where ``norm_start`` is not to say it.
        bn_eps: BatchNorm's epsilon, inside RepBN too.
        bn_momentum: BatchNorm's momentum, inside RepBN too.

    Raises:
        ValueError: If a size or a rate is outside of its range.
    """

    model_type = "slab_llama"

    norm: str = "prepbn"
    norm_start: NormStart = "zeros"
    eta: Eta | None = None
    bn_eps: float = 1e-6
    bn_momentum: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        for name, allowed in RANGES.items():
            check(name, getattr(self, name), allowed, none="None")
        self.norm = self.norm.lower()
        if self.eta is not None:
            check_eta(norm_type(self.norm), self.eta)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(f"num_attention_heads must divide hidden_size ({self.hidden_size}), got {heads}")
        if groups is not None and heads % groups:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads ({heads}), got {groups}")
        super().__post_init__(**kwargs)


def norm_of(config: SlabLlamaConfig) -> nn.Module:
    """One norm as ``config`` describes it."""
    C = config.hidden_size
    if config.norm == "folded":
        return Folded(C, eps=config.bn_eps)
    if config.norm == "rmsnorm":  # as transformers' own models have it, to the last digit
        return LlamaRMSNorm(C, config.rms_norm_eps)
    settings: dict[str, Any] = {"bn_eps": config.bn_eps, "momentum": config.bn_momentum, "eps": config.rms_norm_eps}
    return norm_type(config.norm).layer(**settings, norm=LlamaRMSNorm(C, config.rms_norm_eps))(C)


class SlabLlamaPreTrainedModel(ModelHooks, LlamaPreTrainedModel):
    """What every model with these norms shares."""

    config: SlabLlamaConfig
    config_class = SlabLlamaConfig

    float32_modules = ("running_mean", "running_var", "gamma")

    #: rotary frequencies and counters follow from the architecture
    published_layout = PublishedLayout(
        dropped=(r"\.rotary_emb\.inv_freq$", r"\.num_step$"), complete=lambda model, state: _put_back(model, state)
    )

    def initialize(self, module: nn.Module) -> None:
        """See :class:`ModelHooks`."""
        if isinstance(module, RepBN):
            plain = isinstance(module, TokenBatchNorm)
            start = 0.0 if self.config.norm_start == "zeros" and not plain else 1.0
            init.constant_(module.weight, start)
            skip = 0.0 if plain else start if self.config.eta is None else eta_of(self.config.eta)
            init.constant_(module.eta, skip)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, PRepBN):
            init.ones_(module.gamma)
        elif isinstance(module, Folded):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif type_of(module) is not None and callable(reset := getattr(module, "reset_parameters", None)):
            reset()  # transformers keeps torch's initialisers off what a file has filled


class SlabLlamaModel(SlabLlamaPreTrainedModel, LlamaModel):
    """transformers' ``LlamaModel`` with norms of ``config.norm``; statistics see only tokens that are no padding."""

    def __init__(self, config: SlabLlamaConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.input_layernorm, layer.post_attention_layernorm = norm_of(config), norm_of(config)
            if config.norm == "folded":
                _add_biases(layer, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
                _add_biases(layer, "mlp.gate_proj", "mlp.up_proj")
        self.add_module("norm", norm_of(config))
        self.post_init()

    # callers read the signature: which inputs there are, what a cache is called
    @wraps(LlamaModel.forward, assigned=())
    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As transformers'; in training an attention mask ``(B, N)`` also tells the norms which tokens are padding."""
        keep_padding_out(self, (), {"attention_mask": attention_mask})
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class SlabLlamaForCausalLM(SlabLlamaPreTrainedModel, LlamaForCausalLM):
    """transformers' ``LlamaForCausalLM`` on :class:`SlabLlamaModel`."""

    def __init__(self, config: SlabLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # not LLaMA's own, which would build its model too
        self.model = SlabLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.norm == "folded")
        self.post_init()


class SlabLlamaForSequenceClassification(GenericForSequenceClassification, SlabLlamaPreTrainedModel):
    """transformers' classification head on :class:`SlabLlamaModel`."""


def _add_biases(module: nn.Module, *names: str) -> None:
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module.set_submodule(name, nn.Linear(linear.in_features, linear.out_features))


def _put_back(model: nn.Module, state: State) -> State:
    """``state`` with the counters and rotary frequencies of every layer, as published."""
    assert isinstance(model, SlabLlamaForCausalLM)
    whole: State = {}
    for name, value in state.items():
        if name.endswith(".warm"):
            whole[name.removesuffix("warm") + "num_step"] = torch.tensor(0)
        whole[name] = value
        if name.endswith(".o_proj.weight"):
            prefix = name.removesuffix("o_proj.weight")
            whole[f"{prefix}rotary_emb.inv_freq"] = model.model.rotary_emb.inv_freq.clone()
    return whole


AutoConfig.register(SlabLlamaConfig.model_type, SlabLlamaConfig)
AutoModel.register(SlabLlamaConfig, SlabLlamaModel)
AutoModelForCausalLM.register(SlabLlamaConfig, SlabLlamaForCausalLM)
AutoModelForSequenceClassification.register(SlabLlamaConfig, SlabLlamaForSequenceClassification)
