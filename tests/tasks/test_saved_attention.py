"""Models whose attention was made linear come back from their files, converted or fused, as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import ViTModel

import slabformer as sf
from slabformer.nn.controls import prepbn_modules
from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.tasks.language.folders import load_model_folder, save_model_folder
from slabformer.tasks.saved_model import ModelInfo, load_model, save_model
from students import vit
from tolerances import FLOAT32, assert_close

ARGUMENTS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def linear(model: nn.Module, first: str, fused: bool) -> nn.Module:
    """One attention of the model made linear, the others as they were; all norms gone."""
    assert sf.convert_attention_(model, plan=[first], kernel_size=3) == [first]
    for name, parameter in model.named_parameters():
        if "encoding" in name or "dwc" in name:
            nn.init.normal_(parameter, std=0.2)
    sf.convert_norms_(model)
    sf.testing.randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    return sf.fuse(model.eval(), IMAGES)[0] if fused else model.eval()


def names_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ConvertedLinearAttention)]


@pytest.mark.parametrize("fused", [False, True], ids=["converted", "fused"])
def test_a_file_holds_linear_attention(fused: bool, tmp_path: Path) -> None:
    model = linear(timm.create_model("vit_tiny_patch16_224", patch_size=8, **ARGUMENTS), "blocks.1.attn", fused)
    info = ModelInfo(
        model="vit_tiny_patch16_224",
        model_args={"patch_size": 8, **ARGUMENTS},
        class_names=list("abc"),
        input_size=(3, 32, 32),
    )
    save_model(model, tmp_path / "model.safetensors", info)
    again, read = load_model(tmp_path / "model.safetensors")
    assert names_of(again) == ["blocks.1.attn"]
    assert read.attentions[0].grid_size == (4, 4)
    assert_close(again(IMAGES), model(IMAGES), FLOAT32)
    assert read.fused == fused


@pytest.mark.parametrize("fused", [False, True], ids=["converted", "fused"])
def test_a_folder_of_transformers_holds_linear_attention(fused: bool, tmp_path: Path) -> None:
    model = ViTModel(vit().config).eval()
    model.config.architectures = ["ViTModel"]
    first = next(name for name, module in model.named_modules() if hasattr(module, "q_proj"))
    images = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    sf.convert_attention_(model, plan=[first])
    nn.init.normal_(model.get_submodule(first).dwc.weight)
    deployed = model
    if fused:
        sf.convert_norms_(model, norm="repbn")
        sf.testing.randomize_norms_(model)
        deployed, _ = sf.fuse(model.eval(), images)
    save_model_folder(deployed, None, tmp_path / "vit")
    again = load_model_folder(tmp_path / "vit")
    assert names_of(again) == [first]

    def output(each: nn.Module) -> Tensor:
        with torch.no_grad():
            return each(images).last_hidden_state

    assert_close(output(again), output(deployed), FLOAT32)
    path = tmp_path / "vit" / "config.json"
    noted = json.loads(path.read_text())
    noted["slabformer_attentions"][0]["names"] = ["layers.9"]
    path.write_text(json.dumps(noted))
    with pytest.raises(ValueError, match=r"attentions of ViTModel cannot be converted as described: .*'layers.9'"):
        load_model_folder(tmp_path / "vit")
    noted["slabformer_attentions"][0]["kernel_size"] = "wide"
    path.write_text(json.dumps(noted))
    with pytest.raises(ValueError, match="says which attentions were converted in words that cannot be read"):
        load_model_folder(tmp_path / "vit")


def test_a_folder_of_a_model_that_transformers_has_renamed_parts_of_holds_converted_norms(tmp_path: Path) -> None:
    """transformers writes a ViT under the names of its older versions, which no converted model is read by."""
    model = ViTModel(vit().config).eval()
    sf.convert_norms_(model, norm="repbn")
    sf.testing.randomize_norms_(model)
    save_model_folder(model, None, tmp_path / "vit")
    images = torch.randn(1, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        outputs = [each(images).last_hidden_state for each in (load_model_folder(tmp_path / "vit"), model)]
    assert_close(*outputs, FLOAT32)
