"""Linear attention of whole models in C++: the same outputs, the same weights, and nothing else changed."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch

import slabformer as sf
from slabformer.bench.compare import compare
from slabformer.deployment import native
from slabformer.deployment.native import natively, use_native_
from slabformer.nn.attention import LinearAttentionCore
from slabformer.ops.native.build import BuildError
from slabformer.testing import randomize_norms_
from tolerances import FLOAT32, assert_close

pytestmark = pytest.mark.usefixtures("_compiler")

CPU = torch.device("cpu")
SMALL = {
    "slab_deit_tiny": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 128},
    "slab_pvt_tiny": {
        "embed_dims": (16, 32, 32, 32),
        "num_heads": (1, 2, 2, 2),
        "depths": (1, 1, 1, 1),
        "img_size": 64,
    },
    "slab_swin_tiny": {"embed_dim": 32, "depths": (2, 1, 1, 1), "num_heads": (2, 4, 4, 8), "img_size": 128},
    "slab_cswin_tiny": {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (2, 4, 4, 8), "img_size": 128},
}


def small(name: str) -> torch.nn.Module:
    model = timm.create_model(name, num_classes=5, **SMALL[name]).eval()
    for module in model.modules():
        if isinstance(module, LinearAttentionCore):
            torch.nn.init.normal_(module.positional_encoding, std=0.5)
    return randomize_norms_(model)


def images(B: int = 2, size: int = 128) -> torch.Tensor:
    return torch.randn(B, 3, size, size)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_computes_the_same_on_weights_that_it_shares(name):
    model, x = small(name), images()
    native, count = natively(model, CPU)
    assert count == sum(isinstance(module, LinearAttentionCore) for module in model.modules()) > 0
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), native.parameters(), strict=True))
    with torch.no_grad():
        expected = model(x)
        assert_close(native(x), expected, FLOAT32)
        assert not torch.equal(native(x), expected)  # it was another program
    assert model.state_dict().keys() == native.state_dict().keys()


def test_training_is_not_touched():
    model, x = small("slab_deit_tiny"), images()
    native, _ = natively(model, CPU)
    for each in (model, native):
        each(x).square().sum().backward()
    grads = [{name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (model, native)]
    assert grads[0].keys() == grads[1].keys() > {"blocks.0.attn.qkv.weight"}
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_an_exported_program_does_without_it():
    native, _ = natively(small("slab_deit_tiny"), CPU)
    program = torch.export.export(native, (images(),))
    assert not any("native" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore")  # tracing warns of every shape that it fixes, and of itself
def test_a_traced_program_does_without_it():
    native, _ = natively(small("slab_deit_tiny"), CPU)
    with torch.no_grad():
        assert "native" not in str(torch.jit.trace(native, images()).inlined_graph)


def test_other_image_sizes_and_batches_go_as_before():
    model = small("slab_deit_tiny")
    native, _ = natively(model, CPU)
    with torch.no_grad():
        x = images(3)
        assert_close(native(x), model(x), FLOAT32)
    pyramid = small("slab_pvt_tiny")
    native, _ = natively(pyramid, CPU)
    with torch.no_grad():
        x = images(1, 96)
        assert_close(native(x), pyramid(x), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_goes_as_before(dtype):
    model, x = small("slab_deit_tiny"), images()
    native, _ = natively(model, CPU)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert_close(native(x), model(x), 32 * torch.finfo(dtype).eps)


def test_a_hooked_or_adapted_projection_is_still_called():
    model, x = small("slab_deit_tiny"), images()
    native, _ = natively(model, CPU)
    seen = []
    for each in (model, native):
        each.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out) or out * 1.5)
    with torch.no_grad():
        assert_close(native(x), model(x), FLOAT32)
    assert len(seen) == 2


def test_models_without_linear_attention_of_such_widths_are_returned_themselves():
    for model in (timm.create_model("test_vit").eval(), small("slab_deit_tiny").to(torch.float16)):
        assert natively(model, CPU) == (model, 0)
    assert natively(small("slab_deit_tiny"), torch.device("cuda"))[1] == 0
    narrow = timm.create_model("slab_deit_tiny", embed_dim=24, depth=1, num_heads=3, img_size=64).eval()
    assert use_native_(narrow) == 0


@pytest.fixture
def _no_compiler(monkeypatch):
    def fail(*_: object) -> None:
        raise BuildError("no C++ compiler (c++); install one")

    monkeypatch.setattr(native, "prepare", fail)


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_it_is_said_and_done_without(caplog):
    model, notes = small("slab_deit_tiny"), []
    with caplog.at_level(logging.WARNING):
        assert natively(model, CPU, notes) == (model, 0)
    assert notes == ["no linear attention in C++: no C++ compiler (c++); install one"]
    assert "no C++ compiler" in caplog.text
    with pytest.raises(BuildError, match="install one"):
        use_native_(model)
    assert not any(module.native for module in model.modules() if isinstance(module, LinearAttentionCore))
    deployed = sf.deploy(_done(model), images(), compile=False, seconds=0)
    assert [step.name for step in deployed.report.steps] == ["as given", "fused", "channels last"]
    assert notes[0] in deployed.report.notes


def _done(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, sf.PRepBN):
            module.set_gamma(0.0)
    return model


def test_deploy_verifies_and_times_it():
    model, x = _done(small("slab_deit_tiny")), images()
    deployed = sf.deploy(model, x, compile=False, seconds=0.2)
    step = deployed.report.steps[-1]
    assert (step.name, step.did) == ("in C++", "2 linear attentions")
    assert 0 < step.max_rel < FLOAT32
    assert_close(deployed(x), model(x).detach(), FLOAT32)


def test_in_bfloat16_it_is_no_further_off_than_torch():
    model, x = _done(small("slab_deit_tiny")), images()
    deployed = sf.deploy(model, x, dtype=torch.bfloat16, compile=False, seconds=0)
    last, before = deployed.report.steps[-1], deployed.report.steps[-2]
    assert last.name == "in C++"
    assert last.max_rel < 1.5 * before.max_rel


def test_a_benchmark_says_so():
    report = compare(_done(small("slab_deit_tiny")), images(), batch_sizes=(1,), compiled=False, seconds=0.1)
    assert "fused: 2 linear attentions in C++" in report.notes
