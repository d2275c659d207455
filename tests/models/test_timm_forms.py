"""What timm's own suite asks of every model: TorchScript, torch.fx, a true configuration, a factory with a device."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import Tensor, nn

from slabformer import blended, testing
from slabformer.nn import Folded, PRepBN, RepBN
from slabformer.nn.attention import SimplifiedLinearAttention
from tolerances import ALGEBRA, EXACT, assert_close

scripts = pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript does not support Python 3.14")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported")


@dataclass
class Case:
    """A small model, and a size of image other than its own; None where it takes its own alone."""

    name: str
    size: int
    other: tuple[int, int] | None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def create(self, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(self.name, **{"img_size": self.size, "num_classes": 5, **self.kwargs, **kwargs})

    def ready(self) -> nn.Module:
        return testing.randomize_norms_(self.create()).double().eval()

    def images(self) -> list[Tensor]:
        sizes = [(2, self.size, self.size)] + ([(3, *self.other)] if self.other else [])
        return [torch.randn(B, 3, H, W, dtype=torch.float64) for B, H, W in sizes]


_DEIT = {"depth": 2, "embed_dim": 16, "num_heads": 2}
_SWIN = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 3}
_PVT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 2, 2)}
_CSWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4)}
_REDUCED = {**_PVT, "linear_sr_ratios": (4, 2, 1, 1)}
CASES = {
    "deit_prepbn": Case("deit_micro_prepbn", 16, None, _DEIT),
    "slab_deit": Case("slab_deit_micro", 16, None, _DEIT),
    "slab_deit_dynamic": Case("slab_deit_micro", 16, (16, 24), {**_DEIT, "dynamic_img_size": True}),
    "swin_prepbn": Case("swin_tiny_prepbn", 64, (96, 50), _SWIN),
    "slab_swin": Case("slab_swin_tiny", 64, (96, 50), _SWIN),
    "slab_swin_fixed_windows": Case("slab_swin_tiny", 64, (96, 50), {**_SWIN, "fixed_windows": True}),
    "pvt_prepbn": Case("pvt_tiny_prepbn", 64, (96, 50), _PVT),
    "slab_pvt": Case("slab_pvt_tiny", 64, (96, 50), _PVT),
    "slab_pvt_reduced": Case("slab_pvt_tiny", 64, (96, 50), _REDUCED),
    "slab_pvt_reduced_1d": Case("slab_pvt_tiny", 64, (96, 50), {**_REDUCED, "resize": "1d"}),
    "slab_pvt_v2": Case("slab_pvt_v2_b0", 64, (96, 50), _PVT),
    "cswin": Case("cswin_tiny", 64, (96, 50), _CSWIN),
    "slab_cswin": Case("slab_cswin_tiny", 64, (96, 50), _CSWIN),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
OURS = sorted(
    name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("slabformer.models.")
)


def reloaded(module: nn.Module) -> Any:
    """``module`` scripted, saved and loaded again."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


@scripts
@each_case
def test_scripted_models_compute_the_same_at_every_size(case: Case) -> None:
    model = case.ready()
    scripted = reloaded(model)
    with torch.no_grad(), torch.jit.optimized_execution(False):  # compiling for speed would take seconds
        for x in case.images():
            assert_close(scripted(x), model(x), ALGEBRA)
    assert scripted.state_dict().keys() >= model.state_dict().keys()


def graph_of(model: nn.Module) -> nn.Module:
    """The graph that timm's feature extraction makes of a model, up to its logits."""
    return create_feature_extractor(model, ["head"])


@each_case
def test_traced_graphs_compute_the_same_at_every_size(case: Case) -> None:
    model = case.ready()
    graph = graph_of(model)
    with torch.no_grad():
        for x in case.images():
            assert_close(graph(x)["head"], model(x), ALGEBRA)


@each_case
def test_traced_graphs_hand_every_parameter_its_gradient(case: Case) -> None:
    graph = graph_of(case.create().double().train())
    graph(case.images()[0])["head"].square().mean().backward()
    assert not [name for name, parameter in graph.named_parameters() if parameter.grad is None]


@scripts
@pytest.mark.parametrize("name", ["slab_deit", "slab_swin", "slab_pvt", "slab_cswin"])
def test_traced_graphs_script(name: str) -> None:
    model, (x, *_) = CASES[name].ready(), CASES[name].images()
    with torch.no_grad():
        assert_close(torch.jit.script(graph_of(model))(x)["head"], model(x), ALGEBRA)


@pytest.mark.parametrize("name", OURS)
def test_configurations_say_the_shape_of_the_features(name: str) -> None:
    try:
        model = timm.create_model(name, device="meta", depth=1).eval()
    except TypeError:  # a family with stages
        model = timm.create_model(name, device="meta", depths=(1, 1, 1, 1)).eval()
    config = model.pretrained_cfg
    features = model.forward_features(torch.empty(2, *config["input_size"], device="meta"))
    assert model.in_chans == config["input_size"][0]
    if config["pool_size"] is None:  # tokens, as timm's ViTs have them
        assert features.ndim == 3
        assert features.shape[-1] == model.num_features
    else:
        assert model.output_fmt == "NHWC"
        assert features.shape == (2, *config["pool_size"], model.num_features)


@each_case
def test_the_factory_builds_on_the_device_and_in_the_dtype_it_is_given(case: Case) -> None:
    tensors = case.create(device="meta", dtype=torch.float64).state_dict().values()
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors if t.is_floating_point()} >= {torch.float64}
    on_cpu = case.create(dtype=torch.bfloat16)
    assert {p.dtype for p in on_cpu.parameters()} == {torch.bfloat16}


@each_case
def test_a_new_head_is_where_the_model_is_and_in_its_mode(case: Case) -> None:
    model = case.create(device="meta", dtype=torch.float64).eval()
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())


@each_case
def test_frozen_models_stay_frozen_at_another_size(case: Case) -> None:
    model = case.create(device="meta").requires_grad_(False)
    model.set_input_size(img_size=(2 * case.size, 2 * case.size))
    assert not any(p.requires_grad for p in model.parameters())


@each_case
def test_unknown_arguments_are_refused(case: Case) -> None:
    with pytest.raises(TypeError, match="not_an_argument"):
        case.create(not_an_argument=1)


@scripts
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0], ids=["warm", "fading", "done"])
def test_scripted_norms_compute_what_eval_mode_does_in_every_phase(gamma: float) -> None:
    norm = testing.randomize_norms_(PRepBN(6)).double().eval()
    norm.set_gamma(gamma)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert_close(reloaded(norm)(x), norm(x), EXACT)


@scripts
@pytest.mark.parametrize("norm", [PRepBN(6), RepBN(6)], ids=["PRepBN", "RepBN"])
def test_scripted_norms_refuse_to_train(norm: nn.Module) -> None:
    scripted = torch.jit.script(norm.train())
    with pytest.raises(torch.jit.Error, match=r"for inference; call eval\(\)"):
        scripted(torch.randn(2, 3, 6))
    assert_close(scripted.eval()(x := torch.randn(2, 3, 6)), norm.eval()(x), EXACT)


@scripts
def test_scripted_norms_refuse_the_blend() -> None:
    norm = PRepBN(6).eval()
    with blended(norm), pytest.raises(torch.jit.Error, match="for inference"):
        torch.jit.script(norm)(torch.randn(2, 3, 6))


@scripts
def test_what_is_left_of_a_norm_scripts() -> None:
    x = torch.randn(2, 3, 6)
    affine = testing.randomize_norms_(RepBN(6)).eval().fuse()
    for module in (affine, Folded(6)):
        assert_close(reloaded(module)(x), module(x), EXACT)


@scripts
def test_scripted_attention_takes_context_and_mask() -> None:
    attention = SimplifiedLinearAttention(8, 2, grid_size=(2, 3)).double().eval()
    x, context = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 12, 8, dtype=torch.float64)
    mask = torch.rand(2, 12) > 0.3
    scripted = reloaded(attention)
    for kwargs in (
        {},
        {"grid_size": (3, 2)},
        {"context": context, "attn_mask": mask, "context_grid_size": (3, 4)},
        {"context": context, "attn_mask": mask[:, None, None], "grid_size": (2, 3), "context_grid_size": (3, 4)},
    ):
        assert_close(scripted(x, **kwargs), attention(x, **kwargs), ALGEBRA)
    with pytest.raises(torch.jit.Error, match="masks keys alone"):
        scripted(x, attn_mask=torch.ones(2, 6, 6, dtype=torch.bool))
