"""Swin's maps at any image size: features, tables, windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from small_swins import SIZES, create, each_plan, each_size, images
from tolerances import ALGEBRA, EXACT, assert_close


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
