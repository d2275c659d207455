"""The table of targets, and how one of your own joins it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from slabformer.deployment.targets.aot_inductor import AotInductor
from slabformer.deployment.targets.base import Target
from slabformer.deployment.targets.core_ml import CoreMl
from slabformer.deployment.targets.executorch import ExecuTorch
from slabformer.deployment.targets.onnx_runtime import OnnxRuntime
from slabformer.deployment.targets.openvino import OpenVino
from slabformer.deployment.targets.tensor_rt import TensorRt
from slabformer.deployment.targets.torch_export import TorchExport

AUTO = "auto"
#: by name, in the order in which "auto" tries them: what is built fastest first
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(OnnxRuntime(), OpenVino(), TorchExport(), ExecuTorch(), AotInductor()),
        *(TensorRt(), CoreMl()),  # not run here, and not in "auto"
    )
}


class RegisteredTarget:
    """A target that :func:`register_target` added.

    Attributes:
        target: It.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def remove(self) -> None:
        """Take it out of the table again; a second time does nothing."""
        if TARGETS.get(self.target.name) is self.target:
            del TARGETS[self.target.name]


def register_target(target: Target) -> RegisteredTarget:
    """Add a target, which ``sf.deploy(target=)`` and ``sf.load_deployed`` know from then on.

    Returns:
        A handle whose ``remove()`` takes it out again.

    Raises:
        TypeError: If ``target`` is no :class:`Target`.
        ValueError: If its name is taken.
    """
    if not isinstance(target, Target):
        raise TypeError(f"register_target needs a Target, got {type(target).__name__}")
    if target.name == AUTO or target.name in TARGETS:
        raise ValueError(f"there is a target {target.name!r} already; give yours another name")
    TARGETS[target.name] = target
    return RegisteredTarget(target)


def target_called(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"target must be one of {', '.join((AUTO, *TARGETS))}, got {name!r}{hint}")
    return TARGETS[name]


def usable(name: str, dtype: str) -> tuple[Sequence[Target], list[str]]:
    """The targets that ``name`` stands for, and why others are left out.

    Args:
        name: Of a target, or "auto" for all that are installed and compute in ``dtype``.
        dtype: Of weights and arithmetic.

    Raises:
        ImportError: If a package of the one that was named is missing; names the extra.
        ValueError: If there is no such target, it has no ``dtype``, or nothing is installed that has.
    """
    if name != AUTO:
        target = target_called(name)
        target.check_installed()
        target.check_dtype(dtype)
        return [target], []
    found, notes = [], []
    for target in (each for each in TARGETS.values() if each.in_auto):
        try:
            target.check_installed()
            target.check_dtype(dtype)
        except (ImportError, ValueError) as error:
            notes.append(f"{target.name} not tried: {error}")
        else:
            found.append(target)
    if not found:
        raise ValueError(f"no target that is installed has {dtype}: {'; '.join(notes)}")
    return found, notes
