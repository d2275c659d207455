"""What surgery makes can be trained and has values, whatever mode its caller is in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slabformer as sf

MODES = {"inference": torch.inference_mode, "meta": lambda: torch.device("meta")}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    return request.param


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """The model can take an optimizer step after the block."""
    yield
    x = torch.randn(4, 5, 6)
    model(x).square().mean().backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(tensor.is_inference() or tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def faded() -> nn.Module:
    torch.manual_seed(0)
    model = Block()
    sf.convert_norms_(model)
    model.norm.set_gamma(0)
    sf.testing.randomize_norms_(model)
    return model.eval()


def test_converted_and_fitted_models_are_ordinary(mode: object) -> None:
    model, batches = Block(), [torch.randn(4, 5, 6)]
    with trainable(model):
        with mode():
            sf.convert_norms_(model)
            sf.fit_norms_(model, batches)
        model.train()


def test_fused_and_loaded_models_are_ordinary(mode: object, tmp_path: Path) -> None:
    model, x = faded(), torch.randn(4, 5, 6)
    with mode():
        fused, report = sf.fuse(model, x)
        sf.save_fused(fused, tmp_path / "fused.safetensors")
    assert report.num_folded == 1
    skeleton = Block()
    with mode():
        loaded = sf.load_fused(skeleton, tmp_path / "fused.safetensors")
    for each in (fused, loaded):
        sf.verify(model, each, x)
        with trainable(copy.deepcopy(each)):
            pass


def test_audits_do_not_depend_on_the_mode(mode: object) -> None:
    model, batches = Block().eval(), [torch.randn(4, 5, 6)]
    expected = sf.audit(model, batches=batches)
    with mode():
        assert sf.audit(model, batches=batches).costs == expected.costs


@pytest.fixture
def sharded() -> Iterator[nn.Module]:
    """A faded model whose parameters are DTensors, on one rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = faded().eval()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        yield model
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("surgery", [sf.fuse, sf.audit, sf.deploy])
def test_sharded_models_are_refused_by_the_first_such_tensor(sharded: nn.Module, surgery: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"embed\.weight is sharded over ranks"):
        surgery(sharded, torch.randn(4, 5, 6))


@pytest.mark.parametrize("surgery", [sf.fuse, sf.deploy, lambda model, x: sf.verify(model, model, x)])
def test_models_without_values_are_refused(surgery: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="is on the meta device and has no values; load the weights first"):
        surgery(faded().eval().to("meta"), torch.randn(4, 5, 6))
