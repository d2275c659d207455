from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models.swin_transformer import SwinTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import fusing
from slabformer import PRepBN, RepBN, SimplifiedLinearAttention, testing
from slabformer.models.official import load_published, to_published
from slabformer.models.published import PUBLISHED
from slabformer.models.registry import twin_of
from slabformer.nn.controls import prepbn_modules
from slabformer.nn.resample import resample_table
from slabformer.nn.windows import ShiftedWindowAttention, resample_bias_table
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close

NAMES = ("swin_tiny_prepbn", "swin_small_prepbn", "slab_swin_tiny", "slab_swin_small", "slab_swin_base")
PLANS = ("SSSS", "LLSS", "LLLL", "SLSL")
CONFIGS = [config for config, row in PUBLISHED.items() if row.model in NAMES]
# windows of 3 tokens: at 64 px maps of 16, 8, 4 and 2 are padded, shifted in odd blocks, and the last is smaller
SMALL = {"img_size": 64, "embed_dim": 8, "num_heads": (1, 2, 2, 4), "depths": (1, 1, 2, 1), "window_size": 3}
SIZES = [(64, 64), (96, 64), (50, 130)]
each_plan = pytest.mark.parametrize("attention", PLANS)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def create(attention: str = "LLSS", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("slab_swin_tiny", attention=attention, **{"num_classes": 10, **SMALL, **kwargs})
    return testing.randomize_norms_(model).double().eval()


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_as_many_as_published(config):
    row = PUBLISHED[config]
    with torch.device("meta"):
        model = timm.create_model(row.model, norm=row.norm)
    assert sum(p.numel() for p in model.parameters()) == row.num_params
    assert model.attention == row.attention


@pytest.mark.parametrize("name", NAMES)
def test_twins_are_of_the_same_shape(name):
    with torch.device("meta"):
        model, twin = timm.create_model(name, norm="layernorm", attention="SSSS"), timm.create_model(str(twin_of(name)))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())


def timms(model: nn.Module, **kwargs) -> SwinTransformer:
    """timm's Swin with the weights of ``model``, which has LayerNorm and softmax throughout."""
    twin = SwinTransformer(**kwargs)
    state = {name.replace("stages.", "layers."): value for name, value in model.state_dict().items()}
    twin.load_state_dict({name.replace("head.", "head.fc."): value for name, value in state.items()})
    return twin.double().eval()


def test_softmax_stages_equal_timms_where_nothing_is_padded():
    shape = {**SMALL, "img_size": 128, "window_size": 4, "num_classes": 10}
    model = testing.randomize_norms_(timm.create_model("slab_swin_tiny", attention="SSSS", norm="layernorm", **shape))
    twin, x = timms(model, **shape), images(128, 128)
    assert_close(model.double().eval()(x), twin(x), ALGEBRA)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_published_models_take_published_images(name):
    model = timm.create_model(name).eval()
    assert model.pretrained_cfg["architecture"] == name
    testing.randomize_norms_(model)
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    assert logits.std(0).min() > 0


@each_size
@each_plan
def test_features_are_the_stages_outputs_as_maps(attention, size):
    model, x = create(attention), images(*size)
    backbone = create(attention, features_only=True, out_indices=(0, 2, 3))
    backbone.model.load_state_dict(model.state_dict(), strict=False)  # it has neither final norm nor head
    assert backbone.feature_info.channels() == [8, 32, 64]
    assert backbone.feature_info.reduction() == [4, 16, 32]
    outputs = {}
    for index in (0, 2, 3):
        model.stages[index].register_forward_hook(lambda _, __, out, index=index: outputs.update({index: out}))
    model(x)
    padded = [side + -side % 32 for side in size]
    for stride, index, features in zip((4, 16, 32), (0, 2, 3), backbone(x), strict=True):
        assert_close(features, outputs[index].permute(0, 3, 1, 2), EXACT)
        assert features.shape[2:] == tuple(side // stride for side in padded)


@each_plan
def test_intermediates_end_in_the_forward_features(attention):
    model, x = create(attention), images()
    final, maps = model.forward_intermediates(x, indices=2, norm=True, output_fmt="NHWC")
    assert_close(final, model.forward_features(x), EXACT)
    assert_close(maps[-1], final, EXACT)
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert early[0].shape == (2, 16, 8, 8)


@each_size
@each_plan
def test_any_image_size_gives_what_set_input_size_gives(attention, size):
    model = create(attention)
    expected = model(images(*size))
    assert expected.std() > 0
    model.set_input_size(size)
    assert_close(model(images(*size)), expected, ALGEBRA)


@each_size
def test_fixed_windows_keep_their_tables_at_every_size(size):
    model = create(fixed_windows=True, depths=(2, 1, 2, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(images(*size))
    model.set_input_size(size)
    for name, value in before.items():
        assert_close(model.state_dict()[name], value, EXACT)
    assert_close(model(images(*size)), expected, EXACT)
    assert model.stages[0].blocks[1].attn.shift == (8, 8)
    assert model.stages[2].blocks[1].attn.shift == (1, 1)


def test_another_image_size_from_the_start_makes_tables_of_its_grid():
    model = create(img_size=(70, 40))  # padded to 96x64
    assert model.stages[1].blocks[0].attn.grid_size == (12, 8)
    assert model.stages[2].blocks[1].attn.windows.grid == (6, 4)


@each_plan
def test_the_head_is_reset_as_timms_users_expect(attention):
    model = create(attention, num_classes=3, in_chans=1)
    x = images()[:, :1]
    assert model(x).shape == (2, 3)
    model.reset_classifier(5)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 64)


@pytest.mark.parametrize("fixed_windows", [False, True], ids=["whole_map", "fixed"])
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(fixed_windows):
    results = []
    for enable in (False, True):
        model = create(fixed_windows=fixed_windows).train()
        for norm in prepbn_modules(model).values():
            norm.set_gamma(0.5)
        model.set_grad_checkpointing(enable)
        model(images(50, 60)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    for plain, checkpointed in zip(*results, strict=True):
        for key, value in plain.items():
            assert_close(checkpointed[key], value, EXACT)


def test_position_tables_of_linear_attention_are_decayed_and_relative_ones_are_not():
    model = create()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert "stages.0.blocks.0.attn.positional_encoding" in decayed
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert decayed == {name for name in matrices if not name.endswith("relative_position_bias_table")}
    assert len(matrices - decayed) == 3


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_cover_every_parameter_once(coarse):
    model = create()
    groups = group_parameters(model, model.group_matcher(coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


@each_plan
def test_the_plan_is_what_stages_hold(attention):
    kinds = {"S": ShiftedWindowAttention, "L": SimplifiedLinearAttention}
    for letter, stage in zip(attention, create(attention).stages, strict=True):
        assert {type(block.attn) for block in stage.blocks} == {kinds[letter]}


@pytest.mark.parametrize(("norm", "kind"), [("prepbn", PRepBN), ("repbn", RepBN), ("layernorm", nn.LayerNorm)])
def test_norms_have_names_and_published_epsilons(norm, kind):
    model = create(norm=norm)
    norms = [model.norm, model.patch_embed.norm]
    for stage in model.stages:
        norms += [norm for block in stage.blocks for norm in (block.norm1, block.norm2)]
        norms += [stage.downsample.norm] if stage is not model.stages[0] else []
    assert {type(norm) for norm in norms} == {kind}
    assert len(norms) == 2 + 2 * 5 + 3
    epsilons = {(type(m), m.eps) for m in model.modules() if isinstance(m, (RepBN, nn.LayerNorm))}
    assert epsilons <= {(RepBN, 1e-5), (nn.LayerNorm, 1e-5)}


@pytest.mark.parametrize("attention", ["SSSS", "LLSS"])
def test_half_precision_stays_near(attention):
    model, x = create(attention), images(50, 60)
    expected = model(x)
    actual = model.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    # five blocks of some units in the last place each, on norms that were drawn at random
    assert_close(actual, expected, 0.1)


@pytest.mark.slow
def test_one_graph_holds_the_whole_model_at_one_size():
    model, graphs = create("LLSS"), []

    def backend(graph, examples):
        graphs.append([example for example in examples if not isinstance(example, Tensor)])
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in SIZES:
        assert_close(compiled(images(*size)), model(images(*size)), EXACT)
    assert graphs == [[]] * len(SIZES), "a graph with symbolic sizes takes minutes to compile"


class TestPretrained:
    @pytest.fixture
    def source(self) -> nn.Module:
        model = create(window_size=7).float()
        for norm in prepbn_modules(model).values():
            norm.set_gamma(0.0)
        return model

    @pytest.fixture
    def load(self, source, tmp_path):
        torch.save({"model": to_published(source)}, tmp_path / "published.pth")
        overlay = {"file": str(tmp_path / "published.pth")}  # known by its suffix
        shape = {**SMALL, "window_size": 7, "num_classes": 10}
        return lambda **kwargs: timm.create_model(
            "slab_swin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **{**shape, **kwargs}
        ).eval()

    def test_every_tensor_comes_back(self, source, load):
        x = images(50, 60).float()
        assert_close(load()(x), source(x), EXACT)

    def test_another_head_and_stem_are_fitted(self, source, load):
        model = load(num_classes=7, in_chans=1)
        assert model(images()[:, :1].float()).shape == (2, 7)
        assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True), EXACT)
        assert_close(model.stages[3].blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight, EXACT)

    def test_tables_follow_another_image_size(self, source, load):
        model, x = load(img_size=(96, 64)), images(96, 64).float()
        table = resample_table(source.stages[0].blocks[0].attn.positional_encoding, (16, 16), (24, 16))
        assert_close(model.stages[0].blocks[0].attn.positional_encoding, table, EXACT)
        assert_close(model(x), source(x), FLOAT32)

    def test_bias_tables_follow_another_window(self, source, load):
        model = load(window_size=4)
        table = source.stages[2].blocks[0].attn.relative_position_bias_table
        expected = resample_bias_table(table, (7, 7), (4, 4))
        assert_close(model.stages[2].blocks[0].attn.relative_position_bias_table, expected, EXACT)


def test_index_and_masks_are_put_back_as_published():
    """At the published size; order, shapes and dtypes are held elsewhere."""
    model = timm.create_model("slab_swin_tiny", embed_dim=8, num_heads=(1, 1, 2, 2))
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    state = to_published(model)
    twin = SwinTransformer(embed_dim=8, num_heads=(1, 1, 2, 2))
    masks = [name for name in state if name.endswith("attn_mask")]
    assert masks == [f"layers.2.blocks.{i}.attn_mask" for i in (1, 3, 5)]
    for name in masks:
        assert_close(state[name], twin.get_buffer(name), EXACT)
    indices = [name for name in state if name.endswith("relative_position_index")]
    assert len(indices) == 8
    for name in indices:
        assert_close(state[name], twin.get_buffer(name), EXACT)


def test_buffers_of_a_file_are_never_read():
    model = create().float()
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    state, x = to_published(model), images().float()
    for name, value in state.items():
        if name.endswith(("attn_mask", "relative_position_index")):
            state[name] = value + 1
    expected = model(x)
    load_published(model, state)
    assert_close(model(x), expected, EXACT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "LLS"}, "attention needs one letter for each of 4 stages, got 'LLS'"),
        ({"attention": "LLXS"}, "unknown letter 'X' in attention 'LLXS'"),
        ({"num_heads": (3, 6)}, r"num_heads needs a number for each of 4 stages, got \(3, 6\)"),
        ({"num_heads": (3, 6, 12, 24)}, "dim must be a multiple of num_heads, got 8 and 3"),
        ({"norm": "batchnorm"}, "unknown norm 'batchnorm'"),
        ({"attention": "LLLL", "attn_drop_rate": 0.1}, "attn_drop must be 0"),
    ],
    ids=["plan", "letter", "stages", "heads", "norm", "attn_drop"],
)
def test_arguments_that_make_no_model_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        create(**arguments)
    assert "\n" not in str(error.value)


def test_a_file_of_another_plan_is_refused():
    source = create("SSSS", norm="repbn")
    with pytest.raises(ValueError, match=r"checkpoint does not fit slab_swin_tiny: .*missing .*unexpected") as error:
        load_published(create("LLSS"), to_published(source))
    assert "\n" not in str(error.value)


class TestFusing:
    @pytest.mark.parametrize("fixed_windows", [False, True], ids=["whole_map", "fixed"])
    def test_every_norm_is_folded_at_every_size(self, fixed_windows):
        model = fusing.ready(create(fixed_windows=fixed_windows))
        result, report = fusing.fused(model, images())
        assert (report.num_folded, report.num_kept) == (15, 0), report.table()
        assert not any(isinstance(module, (PRepBN, RepBN, nn.LayerNorm)) for module in result.modules())
        for size in SIZES[1:]:
            fusing.assert_same_outputs(model, result, (images(*size),))

    @pytest.mark.slow
    @pytest.mark.parametrize("attention", ["SSSS", "LLLL", "SLSL"])
    def test_every_plan_folds(self, attention):
        model = fusing.ready(create(attention))
        result, report = fusing.fused(model, images())
        assert report.num_kept == 0, report.table()
        fusing.assert_same_outputs(model, result, (images(40, 100),))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", NAMES)
    def test_every_published_model_folds(self, name):
        model = fusing.ready(timm.create_model(name))
        with torch.no_grad():
            result, report = fusing.fuse(model, images(96, 96, batch=1))
        assert report.num_kept == 0, report.table()
        fusing.assert_same_outputs(model, result, (images(64, 100, batch=1),))
