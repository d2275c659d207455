"""Two forwards side by side: a model that still has its norms, and the one that loses them, norm by norm."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.nn.prepbn import PRepBN
from slabformer.surgery.fuse.tree.copies import copy_model

#: what is computed in a norm's place, from its input
StandIn = Callable[[Tensor], Tensor]


class _Abandoned(BaseException):
    """Ends a paused forward; no `except Exception` of a model's holds it up."""


class TeacherForwards:
    """Forwards of a model with its old norms, in a thread of their own that pauses at every norm.

    Of the teacher no more is in memory than what its forward holds at the norm where it pauses: its weights are the
    model's, and nothing is recorded. Never do two threads run at once, so results do not depend on timing.

    Args:
        model: Converted; a copy of its modules that shares all parameters computes the old norms.
        names: Of its PRepBN modules, those that a forward pauses at.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, PRepBN]) -> None:
        self._model = copy_model(model, lambda tensor: tensor, needed_by="fit_norms_").eval()
        self._turn, self._answered = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: tuple[str, Tensor] | BaseException | None = None
        self._abandoned = False
        for name in names:
            norm = self._model.get_submodule(name)
            assert isinstance(norm, PRepBN)
            _stand_in(norm, self._pausing(name, norm.norm))

    def _pausing(self, name: str, norm: nn.Module) -> StandIn:
        def forward(x: Tensor) -> Tensor:
            y = norm(x).to(x.dtype)
            self._pause((name, y))
            return y

        return forward

    def _pause(self, answer: tuple[str, Tensor]) -> None:
        self._answer = answer
        self._answered.release()
        self._turn.acquire()
        if self._abandoned:
            raise _Abandoned

    @contextmanager
    def of(
        self, call: Callable[[nn.Module, Any], Any], batch: Any
    ) -> Iterator[Callable[[], tuple[str, Tensor] | None]]:
        """A forward on ``batch``, for the time of a block, as a function that goes on to the next norm.

        It returns the norm's name and output, or None when the forward is done, and raises what the forward raises.
        """
        self._abandoned = False
        context, state = contextvars.copy_context(), _thread_state()

        def run() -> None:
            self._turn.acquire()
            self._answer = None
            try:
                if not self._abandoned:
                    with ExitStack() as stack:
                        for manager in state:
                            stack.enter_context(manager)
                        call(self._model, batch)
                    self._answer = None
            except BaseException as error:  # it is raised where the next norm was asked for
                self._answer = error
            finally:
                self._answered.release()

        def proceed() -> tuple[str, Tensor] | None:
            if not thread.is_alive():  # the forward was done before
                return None
            self._turn.release()
            self._answered.acquire()
            answer, self._answer = self._answer, None
            if not isinstance(answer, tuple):
                thread.join()
            if isinstance(answer, BaseException):
                raise answer
            return answer

        thread = threading.Thread(target=context.run, args=(run,), name="teacher of fit_norms_", daemon=True)
        thread.start()
        try:
            yield proceed
        finally:
            self._abandoned = True
            self._turn.release()
            thread.join()
            self._turn, self._answered = threading.Semaphore(0), threading.Semaphore(0)
            self._answer = None


def _thread_state() -> list[AbstractContextManager[Any]]:
    """What torch keeps for each thread, as the calling one has it; without gradients."""
    state: list[AbstractContextManager[Any]] = [torch.no_grad()]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for kind in {"cpu", *([] if accelerator is None else [accelerator.type])}:
        if torch.amp.is_autocast_available(kind):
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            state.append(torch.autocast(kind, dtype, enabled))
    if accelerator is not None and accelerator.type == "cuda":
        state.append(torch.cuda.stream(torch.cuda.current_stream()))
    default = torch.get_default_device()
    return [*state, default] if default.type != "cpu" else state


@contextmanager
def replaced(norms: Mapping[str, PRepBN], compute: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Compute ``compute(name, x)`` in the place of each norm, inside the block.

    Raises:
        ValueError: From a norm that another thread calls, where ``compute`` would wait for itself.
    """
    here = threading.get_ident()

    def place(name: str) -> StandIn:
        def forward(x: Tensor) -> Tensor:
            if threading.get_ident() != here:
                raise ValueError(
                    f"{name} was called from another thread; forward= must call the model that it is given, "
                    "and nn.DataParallel must be unwrapped"
                )
            return compute(name, x)

        return forward

    before = {norm: vars(norm).get("forward") for norm in norms.values()}
    try:
        for name, norm in norms.items():
            _stand_in(norm, place(name))
        yield
    finally:
        for norm, own in before.items():
            vars(norm).pop("forward", None)
            if own is not None:
                vars(norm)["forward"] = own


def _stand_in(norm: PRepBN, forward: StandIn) -> None:
    """Compute ``forward`` instead of the norm; hooks on it go on as they do."""
    vars(norm)["forward"] = forward
