"""Distillation for anybody's transformers Trainer, of text or images.

slabformer.convert_norms_(model)
slabformer.fit_norms_(model, batches)
trainer = DistillationTrainer(model, args, train_dataset=data, callbacks=[ProgressiveCallback(fade=0.05)])
trainer.train()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

from slabformer.distillation import Distiller, Teacher
from slabformer.settings import NonNegativeFloat, checked

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class DistillationMixin(_Base):
    """Gives any :class:`transformers.Trainer` the loss of a :class:`slabformer.Distiller`.

    ``class MyTrainer(DistillationMixin, Trainer)`` takes two more arguments. Data needs no labels; evaluation then
    gives the distillation's loss of the deployed form as ``eval_loss``. The teacher is taken when the Trainer is built,
    so a run that goes on from a checkpoint starts from the same model as at first. The loss is a mean over each batch:
    batches accumulate alike, whatever their number of tokens.

    Args:
        args: The Trainer's.
        distiller: Of the Trainer's model; by default the model is its own teacher, see :class:`slabformer.Distiller`.
            A teacher alone will do.
        label_weight: Of the model's own loss beside it, which then needs labels.
        kwargs: The Trainer's.

    Raises:
        ValueError: As :class:`slabformer.Distiller`; or if it is of another model.
    """

    @checked
    def __init__(
        self,
        *args: Any,
        distiller: Distiller | Teacher | nn.Module | None = None,
        label_weight: NonNegativeFloat = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert self.model is not None
        if not isinstance(distiller, Distiller):
            distiller = Distiller(self.model, distiller)
        if distiller.student is not self.model:
            raise ValueError("the distiller is of another model than the Trainer's; build it of the same one")
        self.distiller, self.label_weight = distiller, label_weight
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides it by the batches of a step
        if not label_weight:
            self.label_names, self.can_return_loss = [], True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Student against teacher, plus the weighted loss of the model's own.

        Raises:
            ValueError: If ``label_weight`` is above 0 and the model returns no loss.
        """
        found = self.distiller.compare(inputs, model, keep_labels=self.label_weight > 0)
        loss = found.loss
        if self.label_weight:
            own = found.output.get("loss") if hasattr(found.output, "get") else None
            if own is None:
                raise ValueError(
                    "label_weight needs a loss of the model's own, and it returned none; do batches hold labels?"
                )
            loss = loss + self.label_weight * own
        return (loss, found.output) if return_outputs else loss


class DistillationTrainer(DistillationMixin, Trainer):
    """transformers' Trainer with :class:`DistillationMixin`."""
