"""Backbones of detectors: any model of the zoo or of timm as maps of strides 4, 8, 16 and 32, at any image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
from timm.layers.format import Format
from torch import Tensor, nn

from slabformer._timm import is_feature_getter
from slabformer._torch import BatchNorm
from slabformer.models import deit, swin
from slabformer.models.arguments import check_arguments
from slabformer.models.detection.token_pyramid import STRIDES, TokenPyramid
from slabformer.models.pvt import PVT
from slabformer.models.pyramid import PyramidTransformer
from slabformer.models.registry import check_model_name
from slabformer.models.weights.official import PublishedLayout
from slabformer.nn import RepBN
from slabformer.nn.norms import NormLayer, norms_of, resolve_norm_layer

#: epsilon of output norms, as published
NORM_EPS = 1e-5
#: published names of what a backbone does without
CLASSIFIER_ONLY = (r"^norm\.", r"^fc_norm\.", r"^head\.")


class Backbone(nn.Module):
    """A hierarchical model as maps, each through an output norm of its own, as Swin has them for detection.

    Args:
        body: A :class:`PyramidTransformer` without head; its final norm is taken off.
        num_channels: Channels of the maps.
        output_norm: Constructor of the output norms.

    Attributes:
        num_channels: As above.
        frozen_statistics: See :func:`freeze_norm_statistics_`.

    Shape:
        Images ``(B, 3, H, W)``, normalised, to four maps ``(B, C, h, w)`` of strides 4, 8, 16 and 32.
    """

    def __init__(self, body: nn.Module, num_channels: Sequence[int], output_norm: NormLayer) -> None:
        super().__init__()
        body.norm = nn.Identity()
        self.body = body
        self.num_channels = list(num_channels)
        self.output_norms = nn.ModuleList(output_norm(channels) for channels in self.num_channels)
        self.frozen_statistics = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to maps."""
        normed = (norm(x) for norm, x in zip(self.output_norms, self.maps(x), strict=True))
        return [x.permute(0, 3, 1, 2) for x in normed]

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images to maps ``(B, h, w, C)`` before the output norms."""
        body: Any = self.body
        return body.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")

    def train(self, mode: bool = True) -> Backbone:
        """As ever, but for norms whose statistics stand still: the body's; the others are new in a detector."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.body.modules():
                if isinstance(module, (RepBN, BatchNorm)):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping what they computed."""
        body: Any = self.body
        body.set_grad_checkpointing(enable)

    @property
    def published_layout(self) -> PublishedLayout:
        """The body's, without what only a classifier has; detection files hold no masks and no warm-up counters."""
        layout: PublishedLayout = getattr(self.body, "published_layout", PublishedLayout())
        named = ((r"^output_norms\.", "norm"),) if isinstance(self.body, swin.Swin) else ()
        return replace(
            layout,
            renames=((r"^body\.", ""), *layout.renames, *named),
            dropped=(*layout.dropped, *CLASSIFIER_ONLY),
            complete=lambda _, state: {
                name: value
                for name, value in layout.complete(self.body, state).items()
                if not name.endswith((".warm", ".attn_mask"))
            },
        )


class TokenBackbone(Backbone):
    """A plain transformer as a backbone: its last map through a :class:`TokenPyramid`."""

    def __init__(self, body: nn.Module, pyramid: TokenPyramid, output_norm: NormLayer) -> None:
        super().__init__(body, pyramid.num_channels, output_norm)
        self.pyramid = pyramid

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images to maps ``(B, h, w, C)`` before the output norms."""
        body: Any = self.body
        (last,) = body.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NCHW")
        return self.pyramid(last.permute(0, 2, 3, 1))


class TimmBackbone(Backbone):
    """What timm returns with ``features_only``, without the maps of other strides than a feature pyramid's.

    Raises:
        ValueError: If there are no maps of its strides.
    """

    def __init__(self, body: nn.Module, output_norm: NormLayer) -> None:
        info: Any = body.feature_info
        strides, channels = info.reduction(), info.channels()
        if not set(STRIDES) <= set(strides):
            raise ValueError(f"a backbone needs maps of strides {STRIDES}, this model has {tuple(strides)}")
        self.indices = [strides.index(stride) for stride in STRIDES]
        super().__init__(body, [channels[i] for i in self.indices], output_norm)
        self.channels_last = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images to maps ``(B, h, w, C)`` before the output norms."""
        maps = self.body(x)
        chosen = [maps[i] for i in self.indices]
        return chosen if self.channels_last else [x.permute(0, 2, 3, 1) for x in chosen]


def create_backbone(
    name: str,
    *,
    output_norm: str | NormLayer | None = None,
    norm: str | NormLayer | None = None,
    published: bool = False,
    **args: Any,
) -> Backbone:
    """Build a detector's backbone.

    Args:
        name: A model of the zoo, or any other of timm's that takes ``features_only``. The levels of a plain transformer
            come from a :class:`TokenPyramid`.
        output_norm: Of the maps: a norm by name (with "prepbn" fusing leaves no norm at all), "none" or a constructor.
            By default as published: "none" for PVT and timm's own, "layernorm" for all others.
        norm: Of a model of the zoo: a norm by name or a constructor; its own by default.
        published: Swin as published: windows of linear attention are constants, padded and shifted at every image size.
            By default they are the whole map, which knows neither.
        args: As the model takes them, such as ``img_size`` (that tables are made for), ``drop_path_rate``, ``depths``.

    Raises:
        ValueError: If the model is unknown, has no maps of the right strides, or an argument is not for it.
    """
    check_model_name(name)
    if timm.model_entrypoint(name).__module__.startswith("slabformer."):
        return _from_zoo(name, output_norm, norm, published, args)
    if norm is not None or published:
        raise ValueError(f"norm and published are for models of this package; convert_norms_ converts {name}")
    body = _create(name, features_only=True, **args)
    if is_feature_getter(body) and len(set(body.feature_info.reduction())) == 1:
        return _from_tokens(body.model, "layernorm", output_norm)
    return TimmBackbone(body, _output_norm(output_norm or "none"))


def check_backbone_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments for :func:`create_backbone` that a file or a recipe may not set.

    Raises:
        ValueError: See :func:`slabformer.models.arguments.check_arguments`; ``norm``, ``output_norm`` and ``published``
            are allowed beside those.
    """
    own = {"norm": str, "output_norm": str, "published": bool}
    for key, kind in own.items():
        if not isinstance(arguments.get(key), kind | None):
            raise ValueError(f"argument {key!r} of a backbone must be {kind.__name__} or null, got {arguments[key]!r}")
    check_arguments(name, {key: value for key, value in arguments.items() if key not in own})


def freeze_norm_statistics_(model: nn.Module, frozen: bool = True) -> None:
    """Let running statistics stand still, or move again; gains, offsets and skips train either way.

    As published for fine-tuning on small batches, and it survives ``model.train()``. Norms then take their running
    statistics in training too, so these must have been trained before: output norms and a token pyramid's, which no
    classifier brings, are left out.

    Args:
        model: A backbone, or a detector with one.
        frozen: Whether they stand still.

    Raises:
        ValueError: If there is no backbone of this package inside.
    """
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    if not backbones:
        raise ValueError(f"{type(model).__name__} holds no backbone from create_backbone to freeze norms in")
    for backbone in backbones:
        backbone.frozen_statistics = frozen
        backbone.train(backbone.training)


def _from_zoo(
    name: str, output_norm: str | NormLayer | None, norm: str | NormLayer | None, published: bool, args: dict[str, Any]
) -> Backbone:
    family = timm.model_entrypoint(name).__module__
    args = ({} if norm is None else {"norm": norm}) | args
    if family == deit.__name__:
        args = {"dynamic_img_size": True} | args
    if published:
        if family != swin.__name__:
            raise ValueError(f"published windows are Swin's alone; build {name} without published=True")
        args = {"fixed_windows": True} | args
    body = _create(name, num_classes=0, **args)
    if not isinstance(body, PyramidTransformer):
        return _from_tokens(body, norm or _norm_of(body), output_norm)
    channels: list[int] = [info["num_chs"] for info in body.feature_info]
    return Backbone(body, channels, _output_norm(output_norm or ("none" if isinstance(body, PVT) else "layernorm")))


def _create(name: str, **args: Any) -> nn.Module:
    try:
        return timm.create_model(name, **args)
    except TypeError as error:
        raise ValueError(f"{name} refuses its arguments ({error})") from error


def _norm_of(model: nn.Module) -> str:
    """The first kind of norm in ``model`` that others can be built of."""
    return next((row.name for _, row in norms_of(model) if row.build is not None), "layernorm")


def _from_tokens(body: nn.Module, norm: str | NormLayer, output_norm: str | NormLayer | None) -> TokenBackbone:
    stages: Any = body.feature_info
    info = stages[-1]
    pyramid = TokenPyramid(info["num_chs"], info["reduction"], resolve_norm_layer(norm, NORM_EPS))
    return TokenBackbone(body, pyramid, _output_norm(output_norm or "layernorm"))


def _output_norm(output_norm: str | NormLayer) -> NormLayer:
    named = output_norm.lower() if isinstance(output_norm, str) else output_norm
    return nn.Identity if named == "none" else resolve_norm_layer(output_norm, NORM_EPS)
