"""transformers' Trainer, as a fading model needs it: it stops at a NaN and evaluates both forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerState

import slabformer as sf
from slabformer._transformers import TrainerHooks
from slabformer.nn.controls import prepbn_modules
from slabformer.ops.precision import wide_device
from slabformer.tasks.engine.checkpoint import LAST_FILE, CheckpointFolders
from slabformer.tasks.engine.devices import broadcast, first_of_ranks, told_to_all
from slabformer.tasks.engine.nonfinite import (
    NonFiniteError,
    NonFiniteGuard,
    first_nonfinite_module,
    first_nonfinite_tensor,
)
from slabformer.tasks.language.packing import BlockStream, batches_of
from slabformer.tasks.language.perplexity import Perplexity, perplexity


class LanguageTrainer(TrainerHooks, Trainer):
    """A :class:`transformers.Trainer` over packed blocks.

    A loss that is not finite ends training with :class:`NonFiniteError` before it reaches a checkpoint: at once on a
    CPU, at the next logged or saved step on an accelerator, which is not waited for in between. Evaluation gives the
    perplexity of the deployed form, and of the blend while gamma is above 0. Checkpoints appear when they are complete
    and on the disk, with checksums.

    Args:
        args: The Trainer's.
        record: Told the name of every checkpoint before it appears.
        kwargs: The Trainer's.

    Raises:
        ValueError: If the best checkpoint is to be loaded at the end: the last ones are kept, whatever their scores.
    """

    def __init__(self, *args: Any, record: Callable[[str], None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.load_best_model_at_end:
            raise ValueError(
                "LanguageTrainer keeps the last checkpoints, not the best; leave load_best_model_at_end out"
            )
        self._guard = NonFiniteGuard(self.args.device)
        self._checkpoints = CheckpointFolders(Path(str(self.args.output_dir)), self.args.save_total_limit, record)
        self._place: Path | None = None

    @property
    def net(self) -> PreTrainedModel:
        """The model, not wrapped."""
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def train_to_end(self, checkpoint: Path | None) -> None:
        """Train, from ``checkpoint`` on if there is one: not at all if it was written after the last step."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / LAST_FILE))
        if state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        # the Trainer would take one more step before it looks
        self.restore(checkpoint)
        self.state = state

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As transformers'; of a stream, each process reads and tokenizes its own share."""
        if not isinstance(self.train_dataset, BlockStream):
            return super().get_train_dataloader()
        stream = self.train_dataset.share(self.args.process_index, self.args.world_size)
        # accelerate is not asked to prepare it: it would have the first process read for all
        return DataLoader(stream, self.args.train_batch_size, collate_fn=self.data_collator)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As transformers', watching the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._guard.observe(self.state.global_step, loss)
        if loss.device.type == "cpu":
            self._check_finite(inputs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with gamma, so that TensorBoard sees it too."""
        self._check_finite()
        norms = list(prepbn_modules(self.net).values())
        if norms:
            logs["gamma"] = float(norms[0].gamma)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Perplexity on the held-out blocks; ``blend_perplexity`` too while gamma is above 0."""
        metrics = self._metrics("")
        if any(norm.phase != "done" for norm in prepbn_modules(self.net).values()):
            with sf.blended(self.net):
                metrics |= self._metrics("blend_")
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_perplexity(self) -> Perplexity:
        """Of the model as it is, over the held-out blocks, each process with its share of them."""
        assert isinstance(self.eval_dataset, Dataset)
        indices = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)  # type: ignore[arg-type]
        blocks = (self.eval_dataset[index] for index in indices)
        with self.compute_loss_context_manager():
            own = perplexity(self.net, batches_of(blocks, self.args.eval_batch_size))
        if self.args.world_size == 1:
            return own
        sums = torch.tensor([own.nll, own.tokens], dtype=torch.float64, device=wide_device(self.args.device))
        dist.all_reduce(sums)
        return Perplexity(float(sums[0]), int(sums[1]))

    def recalibrate(self, num_batches: int | None) -> None:
        """Population statistics of the norms over training blocks."""

        def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)

        sf.recalibrate_(self.net, self.training_batches(num_batches), forward=forward)

    def training_batches(self, num_batches: int | None) -> Iterable[dict[str, Tensor]]:
        """Batches as training sees them; all of an epoch for None."""
        return islice(self.get_train_dataloader(), num_batches)

    def _metrics(self, prefix: str) -> dict[str, float]:
        found = self.held_out_perplexity()
        return {f"{prefix}perplexity": found.perplexity, f"{prefix}loss": found.loss}

    def save_checkpoint(self, write: Callable[[], None]) -> None:
        """A checkpoint of a model that is finite, out of sight until it is whole."""
        self._check_finite()
        name = first_of_ranks(first_nonfinite_tensor(self.net.state_dict()))
        if name is not None:
            raise NonFiniteError(f"{name} became non-finite by step {self.state.global_step}; {self._kept()}")
        step, place = self.state.global_step, None
        with ExitStack() as stack:
            with told_to_all():
                if self.is_world_process_zero():
                    place = stack.enter_context(self._checkpoints.writing(step))
            self._place = Path(broadcast(None if place is None else str(place)))
            try:
                with told_to_all(), self._checkpoints.errors_of(step):  # each rank writes the state of its generators
                    write()
            finally:
                self._place = None
            with told_to_all(), self._checkpoints.errors_of(step):
                if place is not None:
                    self._checkpoints.keep_from(place, step)

    def checkpoint_parent(self) -> Path | None:
        """Out of sight while a checkpoint is being written."""
        return self._place

    def _check_finite(self, inputs: dict[str, Any] | None = None) -> None:
        step = self._guard.first_bad_step()
        if step is None:
            return
        culprit = first_of_ranks(
            None if inputs is None else first_nonfinite_module(self.net, partial(self._run, inputs))
        )
        first = f", first in the output of {culprit}" if culprit else ""
        raise NonFiniteError(f"the loss became non-finite in step {step + 1}{first}; {self._kept()}")

    def _run(self, inputs: dict[str, Any]) -> None:
        self.net(**self.on_device(inputs))

    def _kept(self) -> str:
        checkpoint = latest_checkpoint(Path(str(self.args.output_dir)))
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the Trainer in ``folder`` that was written to its end."""
    if not folder.is_dir():
        return None
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{LAST_FILE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
