"""What the coverage table is about: small models of every family of timm, transformers, torchvision and torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.models import _registry
from torch import Tensor, nn

#: words of names, from the smallest variant up; names with none of them stand behind "tiny"
WORDS = (
    "test",
    "zepto",
    "atto",
    "femto",
    "pico",
    "nano",
    "micro",
    "xxs",
    "xxtiny",
    "xtiny",
    "xs",
    "t0",
    "tiny",
    "mini",
)
#: models with more parameters are built with two blocks
LARGEST = 150_000_000
#: image sizes to try until a model takes one
SIZES = (96, 128, 192, 224, 256)
#: whether norms stand in front
ENCODERS = {"TransformerEncoder, norm_first=True": True, "TransformerEncoder, norm_first=False": False}
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Tensor:
    """Random inputs, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass(frozen=True)
class Subject:
    """One model of the table.

    Attributes:
        library: Where it comes from.
        family: Its module or model type.
        name: Of the model.
        build: Makes it, in float64 and eval mode, with its example inputs.
    """

    library: str
    family: str
    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = field(compare=False)

    @property
    def key(self) -> str:
        """Unique in the table."""
        return f"{self.library}/{self.family}"


def keys() -> list[str]:
    """Library and family of all of them; which timm families hold a norm shows when they are built."""
    families = {
        "timm": [module for module in sorted(_registry._module_to_models) if _variants(module)],
        "transformers": list(TRANSFORMERS),
        "torchvision": ["vit_b_16", "swin_t", "swin_v2_t", "convnext_tiny", "maxvit_t"],
        "torch": list(ENCODERS),
    }
    return [f"{library}/{family}" for library, names in families.items() for family in names]


def subject_of(key: str) -> Subject:
    """One of them."""
    library, _, family = key.partition("/")
    if library == "timm":
        name = smallest(family)
        return Subject(library, family, name, lambda: _timm(name))
    if library == "transformers":
        model, inputs = TRANSFORMERS[family]
        return Subject(library, family, family, lambda: (model(), (), dict(inputs)))
    if library == "torchvision":
        return Subject(library, family, family, lambda: _torchvision(family))
    return Subject(library, family, family, lambda: _encoder(ENCODERS[family]))


def _variants(module: str) -> list[str]:
    names = timm.list_models(module=module)
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith("timm.")]


def smallest(module: str) -> str:
    """The variant of a timm module with the fewest parameters among those whose names say that they are small."""
    return min(sorted(_variants(module), key=_rank)[:4], key=_num_parameters)


def _rank(name: str) -> tuple[int, int, str]:
    parts = re.split("[_.]", name)
    return next((i for i, word in enumerate(WORDS) if word in parts), len(WORDS)), len(name), name


def _num_parameters(name: str) -> int:
    with torch.device("meta"):
        try:
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except (NotImplementedError, RuntimeError):  # reads values while it is built
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def _timm(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    fewer = {"depth": 2} if _num_parameters(name) > LARGEST else {}
    for size in SIZES:
        for arguments in ({"img_size": size, **fewer}, fewer):
            try:
                model = timm.create_model(name, num_classes=10, **arguments).eval()
                with torch.no_grad():
                    model(torch.zeros(1, 3, size, size))
            except (TypeError, ValueError, AssertionError, RuntimeError):
                continue
            return model.double(), (noise(1, 3, size, size),), {}
    raise ValueError(f"{name} takes none of the sizes {SIZES}")


def _torchvision(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    size = 224 if name == "maxvit_t" else 64
    arguments = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **arguments)
    return model.eval().double(), (noise(1, 3, size, size),), {}


def _encoder(norm_first: bool) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    return model.eval().double(), (noise(2, 7, 16),), {}


def _of(name: str, head: str = "Model", **options: Any) -> Callable[[], nn.Module]:
    """A random transformers model of class ``name + head`` from ``nameConfig(**options)``."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**options)
        config._attn_implementation = "eager"
        return getattr(transformers, f"{name}{head}")(config).eval().double()

    return build


BASE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**{k: v for k, v in BASE.items() if "token" not in k and k != "vocab_size"}, "image_size": 32, "patch_size": 8}
WINDOWS = {
    "initializer_range": 0.3,
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
BOTH = {**TEXT, "decoder_input_ids": IDS}
PIXELS = {"pixel_values": noise(1, 3, 32, 32)}
CLIP = {key: {**BASE, "projection_dim": 16} for key in ("text_config",)} | {
    "vision_config": {**IMAGE, "projection_dim": 16},
    "projection_dim": 16,
}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
BART = {
    "vocab_size": 50,
    "d_model": 32,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
       (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: model type -> how to make a small one, its keyword arguments
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (_of("Bert", **BASE), TEXT),
    "roberta": (_of("Roberta", **BASE), TEXT),
    "distilbert": (_of("DistilBert", vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64), TEXT),
    "electra": (_of("Electra", embedding_size=32, **BASE), TEXT),
    "deberta-v2": (_of("DebertaV2", **BASE, relative_attention=True, pos_att_type=["p2c", "c2p"]), TEXT),
    "gpt2": (_of("GPT2", "LMHeadModel", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, **TOKENS), TEXT),
    "gpt_neox": (_of("GPTNeoX", "ForCausalLM", **BASE), TEXT),
    "opt": (
        _of("OPT", "ForCausalLM", ffn_dim=64, word_embed_proj_dim=32, **{**BASE, "intermediate_size": None}),
        TEXT,
    ),
    "phi": (_of("Phi", "ForCausalLM", **BASE), TEXT),
    "llama": (_of("Llama", "ForCausalLM", **GROUPED), TEXT),
    "mistral": (_of("Mistral", "ForCausalLM", **GROUPED), TEXT),
    "qwen2": (_of("Qwen2", "ForCausalLM", **{k: v for k, v in GROUPED.items() if k != "head_dim"}), TEXT),
    "qwen3": (_of("Qwen3", "ForCausalLM", **GROUPED), TEXT),
    "gemma2": (_of("Gemma2", "ForCausalLM", **GROUPED), TEXT),
    "t5": (_of("T5", **T5), BOTH),
    "bart": (_of("Bart", **BART), BOTH),
    "vit": (_of("ViT", "ForImageClassification", **IMAGE), PIXELS),
    "deit": (_of("DeiT", "ForImageClassification", **IMAGE), PIXELS),
    "swin": (_of("Swin", "ForImageClassification", **WINDOWS), PIXELS),
    "swinv2": (_of("Swinv2", "ForImageClassification", **WINDOWS), PIXELS),
    "beit": (_of("Beit", "ForImageClassification", **IMAGE), PIXELS),
    "dinov2": (_of("Dinov2", "ForImageClassification", **{**IMAGE, "intermediate_size": None}), PIXELS),
    "dinov3_vit": (_of("DINOv3ViT", **IMAGE), PIXELS),
    "clip": (_of("CLIP", **CLIP), {**TEXT, **PIXELS}),
    "siglip": (_of("Siglip", **{k: v for k, v in CLIP.items() if k != "projection_dim"}), {**TEXT, **PIXELS}),
    "segformer": (
        _of(
            "Segformer",
            "ForImageClassification",
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 24, 32],
            num_attention_heads=[1, 2, 2, 4],
        ),
        {"pixel_values": noise(1, 3, 64, 64)},
    ),
    "convnextv2": (
        _of("ConvNextV2", "ForImageClassification", depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32]),
        {"pixel_values": noise(1, 3, 64, 64)},
    ),
    "detr": (
        _of(
            "Detr",
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone_config=transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
            ),
            backbone=None,
            num_queries=5,
            init_std=0.3,
            **{k: v for k, v in BART.items() if "token" not in k and k != "vocab_size"},
        ),
        {"pixel_values": noise(1, 3, 64, 64)},
    ),
    "whisper": (
        _of("Whisper", num_mel_bins=8, max_source_positions=10, decoder_start_token_id=1, **BART),
        {"input_features": noise(1, 8, 20), "decoder_input_ids": IDS[:1]},
    ),
    "wav2vec2": (
        _of(
            "Wav2Vec2",
            conv_dim=(16, 16),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embedding_groups=4,
            **BASE,
        ),
        {"input_values": noise(1, 400)},
    ),
    "patchtst": (
        _of("PatchTST", context_length=32, patch_length=8, patch_stride=8, num_input_channels=2, d_model=16,
            num_hidden_layers=2, num_attention_heads=4, ffn_dim=32),
        {"past_values": noise(2, 32, 2)},
    ),
}  # fmt: skip
