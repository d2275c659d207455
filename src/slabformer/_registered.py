"""What torch and timm look up by name, our operators and models, without waiting for either where nobody imports it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: library -> our modules that register something with it
REGISTERING = {"torch": ("slabformer.ops.native.linear_attention",), "timm": ("slabformer.models",)}
#: room -> those of these libraries that its modules import, where it is not torch alone
LIBRARIES: dict[str, tuple[str, ...]] = {"models": ("torch", "timm"), "settings": (), "cli": ()}
#: held by the one thread that imports a public name, or registers: two that begin with different modules of a package
#: may come to wait for each other, which Python ends with an error
_turn = threading.RLock()
#: after which an import goes on out of turn, since whoever has the turn may wait for what is being imported here
PATIENCE_SECONDS = 10.0


class Watch(MetaPathFinder):
    """Finds these libraries where the other finders do, and registers what is ours when their import has ended."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders say, with a loader that goes on to register; None for all other modules."""
        if fullname not in REGISTERING:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            _extend(spec.loader, fullname)
        return spec


def register_ours() -> None:
    """Register with what has been imported now, with the rest when it is; called once, by `slabformer` itself."""
    if not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())
    for library in REGISTERING:
        if sys.modules.get(library) is not None:
            _register(library)


def import_in_turn(name: str) -> ModuleType:
    """Our module ``name``, after the libraries that it needs.

    Their imports end with registering, which waits for its turn: they must not be waited for by whoever has it.
    """
    room = name.split(".")[1]
    for library in () if room.startswith("_") else LIBRARIES.get(room, ("torch",)):
        if importlib.util.find_spec(library) is not None:
            importlib.import_module(library)
    with _in_turn():
        return importlib.import_module(name)


@contextmanager
def _in_turn() -> Iterator[None]:
    has_turn = _turn.acquire(timeout=PATIENCE_SECONDS)
    try:
        yield
    finally:
        if has_turn:
            _turn.release()


def _extend(loader: object, library: str) -> None:
    """Change the loader in place: its class and all else that other libraries ask of it stay as they are."""
    load = loader.exec_module  # type: ignore[attr-defined]

    def load_and_register(module: ModuleType) -> None:
        load(module)
        if module.__name__ == library:  # a zip file has one loader for all its modules
            _register(library)

    loader.exec_module = load_and_register  # type: ignore[attr-defined]


def _register(library: str) -> None:
    try:
        with _in_turn():
            for module in REGISTERING[library]:
                importlib.import_module(module)
    except Exception as error:  # with a release that is too old for us: importing it must succeed all the same
        warnings.warn(f"nothing of slabformer is registered with {library}: {error}", stacklevel=2)
