"""The table of norms: one row a kind, which models, ``convert_norms_``, ``fuse``, recipes and the command line read.

A kind from outside is one row too: ``slabformer.register_norm(slabformer.NormType(...))``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._norm_names import REGISTERED, norm_names
from slabformer.nn.affine import Affine
from slabformer.nn.dyt import DyT
from slabformer.nn.foreign_norms import batch_norm_map, is_batch_norm, is_frozen_batch_norm, probed_map
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.repbn import RepBN
from slabformer.nn.token_batch_norm import TokenBatchNorm
from slabformer.ops.precision import wide
from slabformer.settings import Eta, check

ScaleShift = tuple[Tensor, Tensor]
NormLayer = Callable[..., nn.Module]
#: what a norm makes of ``x`` before its gain and offset, eps left out: a function of ``x`` and the channels' axes
Normalise = Callable[[Tensor, tuple[int, ...]], Tensor]
#: settings that a kind of norm may be built with: the norm's own eps, BatchNorm's, BatchNorm's momentum, the initial
#: skip weight, the norm that fades, the axis of the channels
SETTINGS = ("eps", "bn_eps", "momentum", "eta", "norm", "channel_dim")
#: why fuse leaves most of what it leaves
PER_TOKEN = "it divides each token by a statistic of that token, which is no scale and shift per channel"


def _channels_of(module: Any) -> int:
    shape = getattr(module, "normalized_shape", None) or getattr(module, "num_features", None)
    return int(shape if isinstance(shape, int) else shape[0] if shape else len(module.weight))


@dataclass(frozen=True, kw_only=True, eq=False)
class NormType:
    """One kind of norm: a row of the table, and all that the library knows about it.

    With ``build`` models can be made with it and converted to it by its name; with ``normalise`` or
    ``gain_and_offset`` models are converted from it; with ``scale_shift`` :func:`slabformer.fuse` folds it.

    Attributes:
        name: In models' ``norm``, recipes and on the command line: "prepbn".
        title: In reports: "PRepBN".
        matches: Whether a module is of this kind. Of several rows that match, the one registered last counts.
        build: Constructor, called ``build(dim, device=, dtype=)`` and with what ``settings`` names.
        settings: Those of :data:`SETTINGS` that ``build`` takes, and what it calls them.
        normalise: ``normalise(x, dim)``, what it computes over the axes ``dim`` before gain and offset, eps left out.
            Modules of any class that compute this are converted.
        gain_and_offset: Names of the tensors ``(C,)`` that conversion keeps, None for neither; for a kind that only
            ``matches`` can tell.
        scale_shift: Map of eval mode, ``x * scale + shift``, float64 ``(C,)`` each.
        num_channels: ``C`` of a module; by default what ``normalized_shape``, ``num_features`` or ``weight`` say.
        channel_dim: Axis of its channels, -1 or 1; by default its attribute ``channel_dim``, or -1.
        stays: Why ``fuse`` leaves it, as a clause, where there is no ``scale_shift``.
        elsewhere: Library -> what it calls this kind, for documentation.

    Raises:
        ValueError: If the name is no lower-case identifier, a setting is unknown, or the row says nothing to do.
    """

    name: str
    title: str
    matches: Callable[[nn.Module], bool]
    build: NormLayer | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    normalise: Normalise | None = None
    gain_and_offset: tuple[str, str] | None = None
    scale_shift: Callable[[Any], ScaleShift] | None = None
    num_channels: Callable[[Any], int] = _channels_of
    channel_dim: Callable[[Any], int] = lambda module: getattr(module, "channel_dim", -1)
    stays: str = "it is no scale and shift per channel in eval mode"
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.name.isidentifier() and self.name.islower()):
            raise ValueError(f"name of a norm must be a lower-case identifier such as 'prepbn', got {self.name!r}")
        unknown = sorted(set(self.settings) - set(SETTINGS))
        if unknown:
            raise ValueError(f"norm {self.name!r} asks for the setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
        if not any((self.build, self.normalise, self.gain_and_offset, self.scale_shift)):
            raise ValueError(f"norm {self.name!r} needs one of build, normalise, gain_and_offset and scale_shift")

    def layer(self, **settings: Any) -> NormLayer:
        """Constructor ``(dim, device=, dtype=)`` with those of the ``settings`` that this kind has.

        Raises:
            ValueError: If there is none.
        """
        if self.build is None:
            raise ValueError(f"norm {self.name!r} cannot be built; choose from {', '.join(norm_names())}")
        return partial(
            self.build, **{self.settings[key]: value for key, value in settings.items() if key in self.settings}
        )


def _over(x: Tensor, square: Tensor) -> Tensor:
    return x * square.clamp(min=torch.finfo(square.dtype).tiny).rsqrt()


_RUNNING = {"bn_eps": "eps", "momentum": "momentum", "channel_dim": "channel_dim"}
#: the kinds that are here from the start
_BUILT_IN = (
    NormType(
        name="prepbn",
        title="PRepBN",
        matches=lambda m: isinstance(m, PRepBN),
        build=PRepBN,
        settings={name: name for name in SETTINGS},
        scale_shift=lambda m: m.scale_shift(),
        channel_dim=lambda m: m.rep.channel_dim,
        elsewhere={"SLAB": ("LinearNorm",)},
    ),
    NormType(
        name="batchnorm",
        title="BatchNorm",
        matches=lambda m: isinstance(m, TokenBatchNorm),
        build=TokenBatchNorm,
        settings=_RUNNING,
        scale_shift=lambda m: m.scale_shift(),
        elsewhere={"torch": ("BatchNorm1d",)},
    ),
    NormType(
        name="repbn",
        title="RepBN",
        matches=lambda m: isinstance(m, RepBN) and not isinstance(m, TokenBatchNorm),
        build=RepBN,
        settings={**_RUNNING, "eta": "eta"},
        scale_shift=lambda m: m.scale_shift(),
        elsewhere={"SLAB": ("RepBN",)},
    ),
    NormType(
        name="layernorm",
        title="LayerNorm",
        matches=lambda m: isinstance(m, nn.LayerNorm),
        build=nn.LayerNorm,
        settings={"eps": "eps"},
        normalise=lambda x, dim: _over(x - x.mean(dim, keepdim=True), x.var(dim, correction=0, keepdim=True)),
        stays=PER_TOKEN,
        elsewhere={
            "torch": ("LayerNorm",),
            "timm": ("LayerNorm", "LayerNorm2d", "LayerNormFp32"),
            "torchvision": ("LayerNorm2d",),
            "transformers": ("ConvNextLayerNorm", "CohereLayerNorm"),
            "apex": ("FusedLayerNorm",),
        },
    ),
    NormType(
        name="rmsnorm",
        title="RMSNorm",
        matches=lambda m: isinstance(m, nn.RMSNorm),
        build=nn.RMSNorm,
        settings={"eps": "eps"},
        normalise=lambda x, dim: _over(x, x.square().mean(dim, keepdim=True)),
        stays=PER_TOKEN,
        elsewhere={
            "torch": ("RMSNorm",),
            "timm": ("RmsNorm", "RmsNorm2d"),
            "transformers": ("LlamaRMSNorm", "T5LayerNorm", "Gemma2RMSNorm"),
            "apex": ("FusedRMSNorm",),
        },
    ),
    NormType(
        name="simplenorm",
        title="SimpleNorm",
        matches=lambda m: False,
        normalise=lambda x, dim: _over(x, x.var(dim, correction=1, keepdim=True)),
        stays=PER_TOKEN,
        elsewhere={"timm": ("SimpleNorm", "SimpleNorm2d")},
    ),
    NormType(
        name="dyt",
        title="DyT",
        matches=lambda m: isinstance(m, DyT),
        build=DyT,
        settings={"channel_dim": "channel_dim"},
        gain_and_offset=("weight", "bias"),
        stays="its tanh is not linear, so it is no scale and shift per channel",
        elsewhere={"Zhu et al.": ("DynamicTanh",)},
    ),
    NormType(
        name="affine",
        title="Affine",
        matches=lambda m: isinstance(m, Affine),
        scale_shift=lambda m: (wide(m.weight.detach()), wide(m.bias.detach())),
    ),
    NormType(
        name="batchnorm2d",
        title="BatchNorm of maps",
        matches=is_batch_norm,
        scale_shift=batch_norm_map,
        channel_dim=lambda m: 1,
        elsewhere={
            "torch": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
            "timm": ("BatchNormAct2d",),
        },
    ),
    NormType(
        name="frozenbatchnorm",
        title="Frozen BatchNorm",
        matches=is_frozen_batch_norm,
        scale_shift=probed_map,
        num_channels=lambda m: len(m.bias),
        channel_dim=lambda m: 1,
        elsewhere={
            "torchvision": ("FrozenBatchNorm2d",),
            "timm": ("FrozenBatchNormAct2d",),
            "transformers": ("DetrFrozenBatchNorm2d",),
        },
    ),
)
#: rows from outside, by name
_REGISTERED: dict[str, NormType] = {}


class RegisteredNorm:
    """A row that :func:`register_norm` added.

    Attributes:
        row: The row.
    """

    def __init__(self, row: NormType) -> None:
        self.row = row

    def remove(self) -> None:
        """Take the row out of the table again; models that hold such norms stay as they are."""
        if _REGISTERED.get(self.row.name) is self.row:
            del _REGISTERED[self.row.name]
            if self.row.build is not None:
                REGISTERED.remove(self.row.name)


def register_norm(row: NormType) -> RegisteredNorm:
    """Add a kind of norm to the table, which all that reads it knows from then on.

    Returns:
        A handle whose ``remove()`` takes it out again.

    Raises:
        TypeError: If ``row`` is no :class:`NormType`.
        ValueError: If there is a norm of that name.
    """
    if not isinstance(row, NormType):
        raise TypeError(f"register_norm takes a NormType, got {type(row).__name__}")
    if row.name in norm_types():
        raise ValueError(f"there is a norm {row.name!r} already; choose another name, or remove() the other one")
    _REGISTERED[row.name] = row
    if row.build is not None:
        REGISTERED.append(row.name)
    return RegisteredNorm(row)


def rows() -> tuple[NormType, ...]:
    """The table in the order in which it is asked: what was registered last comes first."""
    return (*reversed(_REGISTERED.values()), *_BUILT_IN)


def norm_types() -> dict[str, NormType]:
    """A copy of the table: rows by name."""
    return {row.name: row for row in _BUILT_IN} | _REGISTERED


def norm_type(name: str) -> NormType:
    """The row of a norm that can be built, in upper or lower case.

    Raises:
        ValueError: If the name is unknown.
    """
    names = norm_names()
    check("norm", name, str)
    if name.lower() not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown norm {name!r}; {suggestion}choose from {', '.join(names)}, or pass a constructor")
    return norm_types()[name.lower()]


def type_of(module: nn.Module) -> NormType | None:
    """The row that ``module`` matches; None where its class says nothing."""
    return next((row for row in rows() if row.matches(module)), None)


def norms_of(model: nn.Module) -> Iterator[tuple[str, NormType]]:
    """Name and row of every norm of ``model`` that a row matches, those inside another one left out."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside) and (row := type_of(module)) is not None:
            inside += (f"{name}." if name else "",)
            yield name, row


def is_from_here(module: nn.Module) -> bool:
    """Whether it is a norm that models are built with by name and that torch does not bring."""
    row = type_of(module)
    return row is not None and row.build is not None and not type(module).__module__.startswith("torch.")


def resolve_norm_layer(norm: str | NormLayer, eps: float | None = None, eta: Eta | None = None) -> NormLayer:
    """Constructor ``norm(dim, device=, dtype=)`` of the norm of that name; any other callable as it is.

    Args:
        norm: Name or constructor.
        eps: LayerNorm's and RMSNorm's epsilon, also inside PRepBN; BatchNorm keeps its own.
        eta: Initial skip weight of RepBN and PRepBN; their own default where None.

    Raises:
        ValueError: If the name is unknown, or ``eta`` is given for a norm without a skip.
    """
    if callable(norm):
        if eta is not None:
            raise ValueError("eta is for a norm by name; give it to the constructor")
        return norm
    row = norm_type(norm)
    given = {"eps": eps, "eta": None if eta is None else check_eta(row, eta)}
    return row.layer(**{key: value for key, value in given.items() if value is not None})


def check_eta(row: NormType, eta: Eta) -> Eta:
    """``eta``, a finite number or "published", for a norm that has a skip weight.

    Raises:
        ValueError: If it is not, or ``row`` has none.
    """
    check("eta", eta, Eta)
    if "eta" not in row.settings:
        having = [name for name, other in norm_types().items() if "eta" in other.settings]
        raise ValueError(f"eta is for norms with a skip ({', '.join(having)}), and {row.name!r} has none; leave it out")
    return eta
