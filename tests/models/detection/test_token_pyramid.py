from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slabformer.models.detection.token_pyramid import TokenPyramid, Upsample
from tolerances import EXACT, FLOAT32, assert_close


@torch.no_grad()
def test_upsampling_is_a_deconvolution_behind_its_norm():
    module, deconvolution = Upsample(8, nn.LayerNorm), nn.ConvTranspose2d(8, 4, 2, stride=2)
    # rows of the projection: row and column inside the square, then channel
    weight = module.proj.weight.view(2, 2, 4, 8).permute(3, 2, 0, 1)
    deconvolution.weight.copy_(weight)
    module.proj.bias.copy_(torch.randn(4).repeat(4))
    deconvolution.bias.copy_(module.proj.bias[:4])
    x = torch.randn(2, 3, 5, 8)
    expected = F.gelu(deconvolution(module.norm(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert_close(module(x), expected, FLOAT32)


@pytest.mark.parametrize(
    ("stride", "channels"), [(4, [16] * 4), (8, [8, 16, 16, 16]), (16, [4, 8, 16, 16]), (32, [2, 4, 8, 16])]
)
def test_every_level_comes_from_the_one_map(stride, channels):
    pyramid, x = TokenPyramid(16, stride, nn.LayerNorm), torch.randn(2, 192 // stride, 128 // stride, 16)
    assert pyramid.num_channels == channels
    levels = pyramid(x)
    assert [tuple(level.shape) for level in levels] == [
        (2, 192 // s, 128 // s, c) for s, c in zip((4, 8, 16, 32), channels, strict=True)
    ]
    assert_close(levels[(4, 8, 16, 32).index(stride)], x, EXACT)
    if stride == 16:
        assert_close(levels[3][:, 1, 2], x[:, 2:4, 4:6].amax((1, 2)), EXACT)


def test_other_strides_are_refused():
    with pytest.raises(ValueError, match=r"strides \(4, 8, 16, 32\) needs a map of one of them, got a stride of 14"):
        TokenPyramid(16, 14, nn.LayerNorm)
