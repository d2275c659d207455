"""What other tools see of a fused model: no normalisation, and weights that stock models load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, load_model, save_model
from timm.utils.model import reparameterize_model
from torch import nn
from torch.fx import GraphModule

from fusing import assert_same_outputs, fused, ready, tokens
from slabformer.nn import Folded
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import fuse
from slabformer.surgery.fuse.tree.files import plain_
from tolerances import EXACT, assert_close

NORMALISES = re.compile("norm|var|rsqrt", re.IGNORECASE)
X = tokens(1, 3, 32, 32)


def vision(name: str = "test_vit", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model = timm.create_model(name, num_classes=5, img_size=32, **options)
    convert_norms_(model)
    return ready(model, dtype)


def operations(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def test_a_fused_model_exports_without_normalisation() -> None:
    model = vision()
    result, _ = fuse(model, X)
    assert any(map(NORMALISES.search, operations(torch.export.export(model, (X,)).graph)))
    assert not any(map(NORMALISES.search, operations(torch.export.export(result, (X,)).graph)))


def test_the_compiler_sees_no_normalisation() -> None:
    seen: list[set[str]] = []

    def backend(graph: GraphModule, inputs: list[Any]) -> Any:
        seen.append(operations(graph.graph) | {str(node.target) for node in graph.graph.nodes})
        return graph

    result, _ = fuse(vision(), X)
    with torch.no_grad():
        torch.compile(result, backend=backend)(X)
    assert len(seen) == 1
    # names of inputs and parameters aside
    assert not any(NORMALISES.search(name) for name in seen[0] if not name.startswith(("l_", "L_")))


@pytest.mark.slow
def test_onnx_sees_no_normalisation(tmp_path: Path) -> None:
    result, _ = fuse(vision(dtype=torch.float32), X.float())
    program = torch.onnx.export(result, (X.float(),), dynamo=True, verbose=False)
    kinds = {node.op_type for node in program.model.graph}
    assert "MatMul" in kinds or "Gemm" in kinds
    assert not any(map(NORMALISES.search, kinds))


def test_timms_own_reparameterisation_leaves_a_fused_model_as_it_is() -> None:
    result, _ = fuse(vision(), X)
    assert_close(reparameterize_model(result)(X), result(X), EXACT)


# --- weights for stock models --------------------------------------------------------------------------------------


def test_fused_weights_load_strictly_into_timms_model_without_norms(tmp_path: Path) -> None:
    model = vision()
    result, _ = fused(model, X)
    plain = plain_(timm.create_model("test_vit", num_classes=5, img_size=32, norm_layer=nn.Identity).double(), result)
    save_model(plain, str(tmp_path / "plain.safetensors"))
    stock = timm.create_model("test_vit", num_classes=5, img_size=32, norm_layer=nn.Identity).double().eval()
    load_model(stock, tmp_path / "plain.safetensors", strict=True)
    assert load_file(tmp_path / "plain.safetensors").keys() == stock.state_dict().keys()
    assert_same_outputs(model, stock, (X,))


def test_an_identity_with_attributes_stands_where_a_model_reads_its_norms() -> None:
    model = vision("vit_tiny_patch16_224", depth=1)
    result, _ = fused(model, X)
    arguments = {"num_classes": 5, "img_size": 32, "depth": 1}
    stock = timm.create_model("vit_tiny_patch16_224", norm_layer=Folded, **arguments).double()
    assert_same_outputs(model, plain_(stock, result), (X,))


def test_what_a_stock_model_has_no_place_for_is_named() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3, bias=False), nn.Tanh(), nn.LayerNorm(3))
    convert_norms_(model)
    result, _ = fused(ready(model), tokens(2, 6))
    stock = nn.Sequential(nn.Identity(), nn.Linear(6, 3, bias=False), nn.Tanh(), nn.Identity())
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot hold the fused weights: 1.bias is new \(and \d more\)"):
        plain_(stock, result)
    assert all(torch.equal(value, before[name]) for name, value in stock.state_dict().items())
