"""What stands in for a norm is called as the norm was: with further arguments, as long as they hold their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from slabformer._torch import forward_pre_hooks
from slabformer.nn import PRepBN, RepBN
from slabformer.nn.affine import Affine, Folded


class OneInput:
    """A forward pre-hook: leaves out arguments of a former norm that hold their defaults, and refuses all others.

    Args:
        kind: Class of the norm that was converted.
        optional: Its further arguments and their defaults.
    """

    def __init__(self, kind: str, optional: Mapping[str, Any]) -> None:
        self.kind, self.optional = kind, dict(optional)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs without them.

        Raises:
            TypeError: If one holds anything but its default.
        """
        further = dict(zip(self.optional, args[1:], strict=False))
        further |= {name: value for name, value in kwargs.items() if name in self.optional}
        for name, value in further.items():
            default = self.optional[name]
            if value is not default and not (isinstance(value, (int, float, str)) and value == default):
                raise TypeError(
                    f"a {self.kind} that was converted as a norm of one input is given {name!r} too; "
                    "leave it as it is: convert_norms_(model, filter=lambda module, name: ...)"
                )
        return args[:1], {name: value for name, value in kwargs.items() if name not in self.optional}


def take_one_input_(new: nn.Module, norm: nn.Module) -> None:
    """Let ``new``, which takes one input, be called as ``norm`` was, whose place it takes."""
    hook = one_input_hook(norm)
    if hook is None and (optional := optional_arguments(norm)):
        hook = OneInput(type(norm).__name__, optional)
    if hook is not None and one_input_hook(new) is None:
        new.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def one_input_hook(module: nn.Module) -> OneInput | None:
    """The hook that :func:`take_one_input_` gave ``module``, if it did."""
    return next((hook for hook in forward_pre_hooks(module).values() if isinstance(hook, OneInput)), None)


def optional_arguments(norm: nn.Module) -> dict[str, Any]:
    """Further arguments of a norm's forward, which may be left out, and their defaults; ours have none."""
    if isinstance(norm, (PRepBN, RepBN, Affine, Folded)):
        return {}
    return {argument.name: argument.default for argument in arguments(norm)[1:]}


def arguments(module: nn.Module) -> list[inspect.Parameter]:
    """Those of the forward of ``module``, but for ``*args`` and ``**kwargs``."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        arguments = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # code without a signature, which takes what it takes
        return []
    return [argument for argument in arguments if argument.kind not in several]
