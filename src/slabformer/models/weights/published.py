"""The published models: configuration, name here, file, figures. The one table behind `slab list`, configs and docs."""

from __future__ import annotations

from dataclasses import dataclass

RELEASE = "https://github.com/xinghaochen/SLAB/releases/download/ckpts"


@dataclass(frozen=True)
class Published:
    """One published image model, for 224x224 pixels and 1000 classes."""

    config: str
    """Name in the publication."""
    model: str
    """Name that `timm.create_model` knows once slabformer is imported."""
    attention: str
    """One letter a stage: S softmax, L linear."""
    fade: float | None
    """Share of all optimizer steps over which gamma fell from 1 to 0; None without schedule or recipe."""
    norm_eps: float | None
    """LayerNorm's epsilon; None where RepBN was there from the start."""
    drop_path: float
    """Stochastic depth rate in training."""
    num_params: int | None
    """Parameters in training form, LayerNorm and RepBN both present, what the files hold but do not use included."""
    top1: float | None = None
    """ImageNet-1K accuracy in percent."""
    file: str | None = None
    """Released weights."""

    @property
    def norm(self) -> str:
        """Norm in training, as models here name it: "prepbn", or "repbn" where it was there from the start."""
        return "repbn" if self.norm_eps is None else "prepbn"

    @property
    def url(self) -> str | None:
        """Address of the released weights."""
        return f"{RELEASE}/{self.file}" if self.file else None


# config, model, attention, fade, norm_eps, drop_path, num_params, top1, file
_ROWS = (
    Published("deit_t_prepbn", "deit_tiny_prepbn", "S", None, None, 0.0, 5_717_441, 73.6, "deit_tiny_prepbn.pth"),
    Published("deit_s_prepbn", "deit_small_prepbn", "S", 0.8, 1e-6, 0.0, 22_069_889, 80.2, "deit_small_prepbn.pth"),
    Published("slab_deit_t", "slab_deit_tiny", "L", 0.16, 1e-6, 0.0, 6_198_401, 74.3, "slab_deit_tiny.pth"),
    Published("slab_deit_s", "slab_deit_small", "L", 0.16, 1e-6, 0.0, 22_992_641, 80.0, "slab_deit_small.pth"),
    Published("pvt_t_prepbn", "pvt_tiny_prepbn", "SSSS", 0.77, 1e-6, 0.0, 13_239_554, 76.0, "pvt_tiny_prepbn.pth"),
    Published("pvt_s_prepbn", "pvt_small_prepbn", "SSSS", 0.39, 1e-6, 0.1, 24_507_801, 80.1, "pvt_small_prepbn.pth"),
    Published("pvt_m_prepbn", "pvt_medium_prepbn", "SSSS", 0.77, 1e-6, 0.3, 44_253_117, 81.7, "pvt_medium_prepbn.pth"),
    Published("slab_pvt_t", "slab_pvt_tiny", "LLLL", 0.77, 1e-6, 0.0, 12_157_692, 76.5, "slab_pvt_tiny.pth"),
    Published("slab_pvt_s", "slab_pvt_small", "LLLL", 0.39, 1e-6, 0.1, 21_683_788, None, None),
    Published("slab_pvt_m", "slab_pvt_medium", "LLLL", 0.39, 1e-6, 0.3, 37_267_300, None, None),
    Published("swin_t_prepbn", "swin_tiny_prepbn", "SSSS", None, None, 0.1, 28_288_383, 81.4, "swin_tiny_prepbn.pth"),
    Published("slab_swin_t", "slab_swin_tiny", "LLSS", 0.16, 1e-5, 0.2, 29_216_605, 81.8, "slab_swin_tiny.pth"),
    Published("slab_swin_s", "slab_swin_small", "LLSS", 0.16, 1e-5, 0.3, 50_552_965, 83.6, "slab_swin_small.pth"),
    Published("slab_swin_b", "slab_swin_base", "LLSS", 0.08, 1e-5, 0.5, 89_029_373, None, None),
    Published("slab_cswin_t", "slab_cswin_tiny", "LLSS", 0.62, 1e-5, 0.1, 21_227_807, 82.8, "slab_cswin_tiny.pth"),
    Published("slab_cswin_s", "slab_cswin_small", "LLSS", 0.31, 1e-5, 0.3, 35_494_205, None, None),
    Published("slab_pvt_v2_b0", "slab_pvt_v2_b0", "LLLL", None, 1e-6, 0.0, 3_599_968),
    Published("slab_pvt_v2_b1", "slab_pvt_v2_b1", "LLLL", None, 1e-6, 0.0, 12_941_504),
    Published("slab_pvt_v2_b2", "slab_pvt_v2_b2", "LLLL", None, 1e-6, 0.0, 22_564_880),
    Published("slab_pvt_v2_b3", "slab_pvt_v2_b3", "LLLL", None, 1e-6, 0.0, None),
    Published("slab_pvt_v2_b4", "slab_pvt_v2_b4", "LLLL", None, 1e-6, 0.0, None),
    Published("slab_pvt_v2_b5", "slab_pvt_v2_b5", "LLLL", None, 1e-6, 0.0, None),
)

PUBLISHED = {row.config: row for row in _ROWS}
BY_MODEL = {row.model: row for row in _ROWS}

#: ImageNet-1K accuracy in percent of what these models are held against, as the families' own papers give it
BASELINE_TOP1 = {
    "deit_tiny_patch16_224": 72.2,
    "deit_small_patch16_224": 79.8,
    "pvt_tiny": 75.1,
    "pvt_small": 79.8,
    "pvt_medium": 81.2,
    "swin_tiny_patch4_window7_224": 81.3,
    "swin_small_patch4_window7_224": 83.0,
    "swin_base_patch4_window7_224": 83.5,
}
