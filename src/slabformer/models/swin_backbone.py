"""Swin as a detector's backbone: a map from every stage, each through a LayerNorm of its own, as published."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slabformer.models.official import PublishedLayout, State
from slabformer.models.swin import Swin, put_back


def strip(model: nn.Module, state: State) -> State:
    """``state`` as detection files hold it: with the index of every bias table, without masks and warm-up counters."""
    return {name: value for name, value in put_back(model, state).items() if not name.endswith((".warm", ".attn_mask"))}


class SwinBackbone(Swin):
    """:class:`Swin` without final norm and head, with the norms ``norm0`` ... of the maps that it returns.

    They are plain LayerNorms, as published; :func:`slabformer.convert_norms_` takes them away too.

    Args:
        fixed_windows: As published, so that its checkpoints mean what they meant; with False linear stages attend over
            the whole map at every size, as they were trained to for classification.
        kwargs: As for :class:`Swin`.
    """

    published_layout = PublishedLayout(
        renames=Swin.published_layout.renames,
        # a classifier's file goes in through load_pretrained
        dropped=(*Swin.published_layout.dropped, r"^norm\.", r"^head\."),
        complete=strip,
    )

    def __init__(self, fixed_windows: bool = True, **kwargs: Any) -> None:
        super().__init__(fixed_windows=fixed_windows, **{**kwargs, "num_classes": 0})
        self.norm = nn.Identity()
        self.num_channels = [info["num_chs"] for info in self.feature_info]
        for i, channels in enumerate(self.num_channels):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]  # maps instead of logits
        """Images ``(B, in_chans, H, W)`` to normed maps ``(B, C, H', W')``, one a stage."""
        maps = self.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        normed = (self.get_submodule(f"norm{i}")(x) for i, x in enumerate(maps))
        return [x.permute(0, 3, 1, 2) for x in normed]

    def fit_tables(self, state: State) -> None:
        """As :class:`Swin`'s; a classifier's file has no output norms, and they stay as they are."""
        super().fit_tables(state)
        own = self.state_dict()
        for i in range(len(self.num_channels)):
            for name in (f"norm{i}.weight", f"norm{i}.bias"):
                state.setdefault(name, own[name])
