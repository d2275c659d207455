"""What hierarchical families share: maps ``(B, H, W, C)`` through stages, then final norm, mean, head."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from slabformer._timm import take_indices
from slabformer.models.stages import Stage, grid_sizes, pad_images
from slabformer.models.weights.official import PublishedLayout, State, load_published, published_names, read_published
from slabformer.models.weights.pretrained import fit_head, fit_stem
from slabformer.nn.resample import resample_table
from slabformer.settings import FractionBelowOne, ImageSize, NonNegativeInt, PositiveInt, checked


class PyramidTransformer(nn.Module):
    """Stages of ever fewer and wider tokens, the final norm, the mean over tokens, the head.

    Images of any size go: they are padded right and bottom to ``pad_to``, and tables are resampled where the map
    is not the one they were made for. :meth:`set_input_size` does that once and for all.

    Args:
        patch_embed: Images ``(B, in_chans, H, W)`` to maps ``(B, H', W', C)``; holds the convolution ``proj``.
        stages: Modules as :class:`Stage`.
        norm: Final norm, or ``nn.Identity()``.
        attention: One letter a stage.
        embed_dims: Channels of the maps that each stage returns.
        strides: Pixels to a token of each stage, on either axis.
        pad_to: Images are padded to a multiple of it; the last stride by default.
        num_classes: 0 for no head.
        global_pool: "avg", or "" for maps.
        drop_rate: Dropout before the head.
        img_size: That tables are made for.
    """

    published_layout: PublishedLayout
    #: of :meth:`forward_features`
    output_fmt = "NHWC"

    @checked
    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Sequence[Stage],
        norm: nn.Module,
        *,
        attention: str,
        embed_dims: Sequence[PositiveInt],
        strides: Sequence[PositiveInt] = (4, 8, 16, 32),
        pad_to: PositiveInt | None = None,
        num_classes: NonNegativeInt = 1000,
        global_pool: str = "avg",
        drop_rate: FractionBelowOne = 0.0,
        img_size: ImageSize = 224,
    ) -> None:
        super().__init__()
        self.attention, self.strides, self.img_size = attention, tuple(strides), to_2tuple(img_size)
        self.pad_to = pad_to or self.strides[-1]
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(embed_dims, strides, strict=True))
        ]
        self.patch_embed = patch_embed
        self.in_chans = self._stem().in_channels
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    # this file has no postponed annotations: torch.fx copies these into its graphs, where TorchScript reads them
    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last stage's maps ``(B, H, W, C)``, normed."""
        x = self.patch_embed(pad_images(x, self.pad_to))
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed maps to logits, or to the pooled features before the head."""
        if self.global_pool == "avg":
            x = x.mean((1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of the stages in ``indices``, as timm's; with ``norm`` the last stage's are normed."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        taken, last = take_indices(len(self.stages), indices)
        x = self.patch_embed(pad_images(x, self.pad_to))
        features = []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in taken:
                features.append(self.norm(x) if norm and index == len(self.stages) - 1 else x)
        if output_fmt == "NCHW":
            features = [y.permute(0, 3, 1, 2).contiguous() for y in features]
        if intermediates_only:
            return features
        return (self.norm(x) if index == len(self.stages) - 1 else x), features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of ``indices``, as timm's feature extractor asks for."""
        taken, last = take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        if prune_head or last < len(self.feature_info) - 1:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes``; 0 for none."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        stem = self._stem().weight
        factory: dict[str, Any] = {"device": stem.device, "dtype": stem.dtype}
        head = nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()
        _init_weights(head)
        self.head = head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping what they computed."""
        for stage in self._each_stage():
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by name, for learning rates that decay from layer to layer."""
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that are not decayed."""
        return set()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample every table to images of another size for good."""
        self.img_size = to_2tuple(img_size)
        grids = grid_sizes(self.img_size, self.strides, self.pad_to)
        for stage, grid in zip(self._each_stage(), grids, strict=False):
            stage.set_grid_size(grid)

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a published file, fitted to this model's head, input channels and image size; timm calls this."""
        state = read_published(checkpoint_path)
        fit_head(state, self.head)
        fit_stem(state, self.in_chans, self.published_layout.name("patch_embed.proj"))
        self.fit_tables(state)
        load_published(self, state)

    def fit_tables(self, state: State, names: Mapping[str, str | None] | None = None) -> None:
        """Resample the position tables of a state dict, made for a square, to this model's size, in place.

        Args:
            state: Changed where tables differ.
            names: Its names and ours; by default it is a published one.
        """
        for name, ours in (names or published_names(self, "repbn")).items():
            owner, _, leaf = str(ours).rpartition(".")
            if leaf in ("pos_embed", "positional_encoding") and name in state:
                side = math.isqrt(state[name].shape[1])
                grid: Any = self.get_submodule(owner).grid_size
                if side * side == state[name].shape[1]:
                    state[name] = resample_table(state[name], (side, side), grid)

    def _stem(self) -> nn.Conv2d:
        stem = self.patch_embed.get_submodule("proj")
        assert isinstance(stem, nn.Conv2d)
        return stem

    def _each_stage(self) -> Iterator[Stage]:
        for stage in self.stages:
            assert isinstance(stage, Stage)
            yield stage


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
