"""What a model costs as it is trained and as it is deployed, told without weights and without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from slabformer._torch import storage_identity
from slabformer.measure.timing import count_macs, count_parameters
from slabformer.nn import PRepBN, RepBN


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, and multiply-adds of one image in matrix products, convolutions and attention.

    Attributes:
        deployed_macs: The same as ``macs``: a norm takes part in none of them.
        deployed_parameters: With every norm folded: without theirs, with the biases that their shifts need.
    """

    parameters: int
    macs: int
    deployed_parameters: int
    deployed_macs: int


def cost_of(model: nn.Module, image: Tensor) -> Cost:
    """Cost of ``model``, which may lie on the meta device, for ``image`` ``(1, C, H, W)`` on the same.

    One forward finds the Linears and Convs without bias that read a norm's output: folding the norm gives them one.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, (PRepBN, RepBN))]
    of_norms = {id(parameter): parameter.numel() for norm in norms for parameter in norm.parameters()}
    parameters = count_parameters(model)
    with _Readers(model, norms) as readers:
        macs = count_macs(model, (image,))
    return Cost(
        parameters=parameters,
        macs=macs,
        deployed_parameters=parameters - sum(of_norms.values()) + sum(layer.weight.shape[0] for layer in readers.found),
        deployed_macs=macs,
    )


class _Readers:
    """While open, finds the Linears and Convs without bias that read what a norm has written, by its storage."""

    def __init__(self, model: nn.Module, norms: Sequence[nn.Module]) -> None:
        self.written: list[Tensor] = []  # held, so that no other tensor takes their place
        self.found: set[nn.Linear | nn.Conv2d] = set()
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is None]
        self.handles = [norm.register_forward_hook(self._write) for norm in norms]
        self.handles += [layer.register_forward_pre_hook(self._read) for layer in layers]

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _write(self, norm: nn.Module, inputs: object, output: Tensor) -> None:
        self.written.append(output)

    def _read(self, layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if any(storage_identity(inputs[0]) == storage_identity(written) for written in self.written):
            self.found.add(layer)
