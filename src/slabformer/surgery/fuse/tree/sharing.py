"""Which modules hold which parameters, where a bias would go, and what shares them: one for each place if need be."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from slabformer._torch import buffer_slots, parameter_slots, unsaved_buffers
from slabformer.surgery.fuse.tree.fold import set_module
from slabformer.surgery.reasons import Reason, RefusalError


class Owners:
    """Parameters and buffers of a model by name, ties resolved.

    Attributes:
        tied: First names of those that were refused because two modules hold them.
        shared: First names of those that other calls of their module bar, where that has several names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tied: set[str] = set()
        self.shared: set[str] = set()
        self._named = dict(model.named_modules(remove_duplicate=False))
        self._first: dict[Tensor, str] = {}
        first = self._first
        holders: dict[str, dict[tuple[nn.Module, str], str]] = {}
        parameters, buffers = (named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers))
        for name, tensor in (*parameters, *buffers):
            first.setdefault(tensor, name)
            module, leaf = self.module(name), name.rpartition(".")[2]
            holders.setdefault(first[tensor], {}).setdefault((module, leaf), name)
        self._holders = {name: list(found.values()) for name, found in holders.items()}

    def names_in(self, module: nn.Module) -> list[str]:
        """First names of all parameters inside ``module``."""
        return [self._first[parameter] for parameter in module.parameters()]

    def module(self, parameter: str) -> nn.Module:
        """The module that holds ``parameter``."""
        return self._named[parameter.rpartition(".")[0]]

    def is_saved(self, name: str) -> bool:
        """Whether ``name`` is in the state dict: a parameter, or a buffer that is persistent."""
        return name.rpartition(".")[2] not in unsaved_buffers(self.module(name))

    def need_single(self, parameter: str) -> None:
        """Refuse a parameter that two modules hold.

        Raises:
            RefusalError: Naming the other one.
        """
        holders = self._holders[parameter]
        if len(holders) > 1:
            self.tied.add(parameter)
            raise RefusalError(Reason.TIED, f"{holders[0]} is tied with {holders[1]}")

    def other_names(self, parameter: str) -> str:
        """A clause that names the other places of the module that holds ``parameter``; empty where it has none."""
        module = self.module(parameter)
        others = [name for name, other in self._named.items() if other is module][1:]
        if not others:
            return ""
        self.shared |= {self._first[own] for own in parameter_slots(module).values() if own is not None}
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f", one layer with {others[0]}{more},"

    def new_bias(self, weight: str) -> str:
        """Name of the bias to create beside ``weight``.

        Raises:
            RefusalError: If the module has no place for one.
        """
        prefix, dot, leaf = weight.rpartition(".")
        bias = leaf.removesuffix("weight") + "bias"
        slots = parameter_slots(self.module(weight))
        if not leaf.endswith("weight") or bias not in slots or slots[bias] is not None:
            raise RefusalError(Reason.NO_BIAS, f"{display(weight)} has no bias to take the shift")
        return f"{prefix}{dot}{bias}"


def display(weight: str) -> str:
    """The module that ``weight`` belongs to; a weight of another name in full."""
    prefix, _, leaf = weight.rpartition(".")
    return prefix if leaf == "weight" and prefix else weight


def names_of_shared(model: nn.Module) -> list[list[str]]:
    """All names of every parameter that has several: it is in several modules, or its module has several names."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return [names for names in found.values() if len(names) > 1]


class Untied:
    """What was taken apart in a model, so that what stayed equal can be put together again.

    Attributes:
        modules: Those that had several names, outer ones first; the first name keeps the module, the others got copies.
        parameters: The same for parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[nn.Module, list[str]] = {}
        self.parameters: list[list[str]] = []

    def take_apart(self, shared: Collection[str]) -> bool:
        """Let the parameters of these first names be others under each name; False where all were so already."""
        rows = [names for names in names_of_shared(self.model) if names[0] in shared]
        kept: dict[nn.Module, str] = {}
        for name in (name for names in rows for name in names):
            for place in _modules_above(name):
                self._need_own(place, kept)
        for first, *others in rows:
            for name in others:
                _put(self.model, name, nn.Parameter(self.model.get_parameter(first).detach().clone()))
        self.parameters += rows
        return bool(rows)

    def _need_own(self, place: str, kept: dict[nn.Module, str]) -> None:
        """Put a copy at ``place`` if its module was ``kept`` for another; children and tensors stay shared."""
        module = self.model.get_submodule(place)
        if kept.setdefault(module, place) != place:
            set_module(self.model, [place], _copy_alone(module, self.model))
            self.modules.setdefault(module, [kept[module]]).append(place)

    def put_together(self, changed: Collection[str]) -> None:
        """Share again what holds none of the ``changed`` parameters."""
        for places in self.modules.values():
            same = [place for place in places if not any(name.startswith(f"{place}.") for name in changed)]
            if same:
                set_module(self.model, same, self.model.get_submodule(same[0]))
        for names in self.parameters:
            _share(self.model, [name for name in names if name not in changed])


def load_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into ``model``, or put them in the place of parameters on the meta device, which stay shared."""
    shared = names_of_shared(model)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(tensors, assign=on_meta)
    for names in shared if on_meta else ():
        _share(model, names)


def untie_as_in_file_(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let parameters be shared as in a file that holds one tensor for those that ``tied`` maps to the same name."""
    rows = [names for names in names_of_shared(model) if len({tied.get(name, name) for name in names}) > 1]
    Untied(model).take_apart([names[0] for names in rows])
    for names in rows:
        for source in {tied.get(name, name) for name in names}:
            _share(model, [name for name in names if tied.get(name, name) == source])


def note_untied_(model: nn.Module) -> None:
    """Let the configurations in ``model`` say where embedding and head are not tied any more.

    transformers ties again what ``config.tie_word_embeddings`` says is tied, in ``tie_weights()``,
    ``resize_token_embeddings()`` and ``from_pretrained``. Nothing of transformers is imported.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if not hasattr(module, "tie_weights") or config is None:
            continue
        broken = _broken_ties(module)
        for target in broken:
            module.all_tied_weights_keys.pop(target, None)  # type: ignore[operator, union-attr]
        if broken or not _head_is_tied(module):
            for owner in (config, *_text_configs(config)):
                if getattr(owner, "tie_word_embeddings", False):
                    owner.tie_word_embeddings = False


def _broken_ties(module: nn.Module) -> list[str]:
    """Names that transformers would give the parameter of another name, which they do not share now."""
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    own = dict(module.named_parameters(remove_duplicate=False))
    return [target for target, source in tied.items() if own.get(target) is not own.get(source)]


def _head_is_tied(module: Any) -> bool:
    """False only where there are an embedding and a head with weights of their own."""
    try:
        weights = [
            getattr(get(), "weight", None) for get in (module.get_input_embeddings, module.get_output_embeddings)
        ]
    except (AttributeError, NotImplementedError):  # of models without words
        return True
    return None in weights or weights[0] is weights[1]


def _text_configs(config: Any) -> list[Any]:
    """Those nested in ``config`` that ``resize_token_embeddings`` asks."""
    get = getattr(config, "get_text_config", None)
    return [] if get is None else [get(), get(decoder=True)]


def _modules_above(name: str) -> Iterator[str]:
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def _copy_alone(module: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of ``module`` that holds the same children and tensors."""
    memo: dict[int, object] = {}
    for other in model.modules():
        held = (other, *vars(other).values(), *parameter_slots(other).values(), *buffer_slots(other).values())
        memo |= {id(item): item for item in held if isinstance(item, (Tensor, nn.Module)) and item is not module}
    return copy.deepcopy(module, memo)


def _share(model: nn.Module, names: list[str]) -> None:
    for name in names[1:]:
        _put(model, name, model.get_parameter(names[0]))


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    prefix, _, leaf = name.rpartition(".")
    parameter.requires_grad_(model.get_parameter(name).requires_grad)
    setattr(model.get_submodule(prefix), leaf, parameter)  # an LSTM notes that
