"""One optimizer update from the batches of an accumulation window."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from slabformer._torch import NormBase
from slabformer.nn.repbn import RepBN
from slabformer.tasks.engine.devices import to_device
from slabformer.tasks.engine.parts import LoopConfig, StepFn, num_samples
from slabformer.tasks.engine.seeds import reseed

if TYPE_CHECKING:
    from accelerate import Accelerator

#: name of the whole loss among its parts
TOTAL = "loss"


class TrainStep(nn.Module):
    """Model and loss as one module: DDP and autocast wrap this one and leave the model as it is."""

    def __init__(self, model: nn.Module, step_fn: StepFn) -> None:
        super().__init__()
        self.model, self.step_fn = model, step_fn

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The mean loss over ``batch`` as :data:`TOTAL`, and its parts if there are any."""
        losses = self.step_fn(self.model, batch)
        return (
            {TOTAL: losses} if isinstance(losses, Tensor) else {TOTAL: torch.stack([*losses.values()]).sum(), **losses}
        )


class Update:
    """Gradients of a window, then the optimizer's step; in between one may look at what came out.

    Args:
        accelerator: Device, precision and ranks.
        model: Not wrapped.
        optimizer: Of its parameters.
        step_fn: ``step_fn(model, batch) -> loss``.
        config: Seed, clipping and compilation.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, step_fn: StepFn, config: LoopConfig
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.config = accelerator, model, optimizer, config
        compiled = cast(nn.Module, torch.compile(model)) if config.compile else model
        self.train_step = accelerator.prepare_model(TrainStep(compiled, step_fn))
        if isinstance(self.train_step, DistributedDataParallel):
            # gamma is the same on all ranks, RepBN shares its statistics itself, and the step averages what others hold
            self.train_step.broadcast_buffers = False
        self._stepper = accelerator.prepare_optimizer(optimizer)
        #: of the last gradient, before it was clipped
        self.grad_norm: Tensor | None = None

    def gradients(self, window: list[Any], step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Gradients of the mean loss over all samples in ``window``, clipped.

        Returns:
            The loss as :data:`TOTAL` with its parts, and values of which none may be NaN or infinite; nothing is read
            back from the device.
        """
        reseed(self.config.seed, step, self.accelerator.process_index)
        sizes = [num_samples(batch) for batch in window]
        parts: list[dict[str, Tensor]] = []
        for index, batch in enumerate(window):
            batch = to_device(batch, self.accelerator.device)
            last = index == len(window) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.train_step):
                share = sizes[index] / sum(sizes)
                losses = {name: loss * share for name, loss in self.train_step(batch).items()}
                self.accelerator.backward(losses[TOTAL])
            parts.append({name: loss.detach() for name, loss in losses.items()})
        means = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        norm = self.grad_norm = self._clip()
        # a loss scaler meets infinite gradients as a rule and skips the step
        return means, [means[TOTAL], norm] if self.accelerator.scaler is None else [means[TOTAL]]

    def apply(self) -> None:
        """Move the weights, then give all ranks the same statistics."""
        self._stepper.step()
        self._stepper.zero_grad()
        if self.accelerator.num_processes > 1:
            average_statistics_(self.model)

    def _clip(self) -> Tensor:
        """Clip the gradient where asked; returns its norm before."""
        self.accelerator.unscale_gradients(self._stepper)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.config.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        return norm


@torch.no_grad()
def average_statistics_(model: nn.Module) -> None:
    """Give every rank the mean over ranks of the running statistics that norms have taken from their rank's data alone.

    That is BatchNorm's own rule: the average of batches' statistics. Evaluation, the EMA and checkpoints are then the
    same whichever rank they come from. RepBN that shares its batch statistics already holds the same everywhere.
    """
    norms = [module for module in model.modules() if isinstance(module, NormBase)]
    own = [norm for norm in norms if not (isinstance(norm, RepBN) and norm.sync is not None and norm.sync.active)]
    statistics = [buffer for norm in own for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    if not statistics:
        return
    flat = torch.cat([buffer.double() for buffer in statistics])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(mean)
