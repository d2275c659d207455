"""One training step as a cell: loss, gradients, clipping, AdamW and the average of the weights in one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slabformer.mindspore.cells import buffer
from slabformer.mindspore.runtime import require

mindspore = require()
ops = mindspore.ops
if TYPE_CHECKING:
    from mindspore import nn
else:
    nn = mindspore.nn
Tensor = Any
#: kept from dividing by zero, as torch's clipping has it
TINY = 1e-6


@dataclass(frozen=True)
class Group:
    """Parameters that move alike.

    Attributes:
        names: Of the parameters.
        weight_decay: Decoupled from the gradient.
        betas: Weights of the past in the two moments.
        eps: Added to the root of the second one.
    """

    names: Sequence[str]
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class AdamW(nn.Cell):
    """AdamW as torch computes it, with correction for the first steps, by MindSpore's one kernel a parameter.

    That kernel knows no correction; it goes into the rate, ``eps`` and the decay that the kernel is given. ``rates``
    are written between steps, without compiling anew.

    Args:
        parameters: Those to train.
        groups: Each parameter is in one.
    """

    def __init__(self, parameters: Sequence[Any], groups: Sequence[Group]) -> None:
        super().__init__(auto_prefix=False)
        named = {stored.name: stored for stored in parameters}
        order = [(named[name], index) for index, group in enumerate(groups) for name in group.names]
        self.weights = mindspore.ParameterTuple([stored for stored, _ in order])
        self.group_of = tuple(index for _, index in order)
        self.exp_avg = self.weights.clone("exp_avg", "zeros")
        self.exp_avg_sq = self.weights.clone("exp_avg_sq", "zeros")
        self.rates = mindspore.ParameterTuple([buffer((), name=f"rate.{index}") for index in range(len(groups))])
        self.steps_done = buffer((), name="steps_done")
        self.decays = tuple(float(group.weight_decay) for group in groups)
        self.betas = tuple((float(group.betas[0]), float(group.betas[1])) for group in groups)
        self.eps = tuple(float(group.eps) for group in groups)
        self.kernel = ops.AdamWeightDecay()

    def construct(self, gradients: Any) -> Any:
        """Move the weights; the gradients are in their order."""
        step = self.steps_done + 1.0
        done = (ops.assign(self.steps_done, step),)
        rates, eps, decays = (), (), ()
        for i in range(len(self.betas)):
            of_second = ops.sqrt(1.0 - ops.pow(self.betas[i][1], step))
            ratio = of_second / (1.0 - ops.pow(self.betas[i][0], step))
            rates += (self.rates[i] * ratio,)  # type: ignore[assignment]
            eps += (self.eps[i] * of_second,)  # type: ignore[assignment]
            decays += (self.decays[i] / ratio,)  # type: ignore[assignment]
        for i in range(len(self.weights)):
            group = self.group_of[i]
            first, second = self.betas[group]
            moved = self.kernel(
                self.weights[i],
                self.exp_avg[i],
                self.exp_avg_sq[i],
                rates[group],
                first,
                second,
                eps[group],
                decays[group],
                gradients[i],
            )
            done += (moved,)  # type: ignore[assignment]
        return done


class Average(nn.Cell):
    """Exponential moving average of tensors; ``decay`` is written between steps."""

    def __init__(self, stored: Sequence[Any]) -> None:
        super().__init__(auto_prefix=False)
        self.stored = mindspore.ParameterTuple(stored)
        self.average = self.stored.clone("average", "same")
        for averaged in self.average:
            averaged.requires_grad = False
        self.decay = buffer((), name="decay")

    def construct(self) -> Any:
        """Take in what is stored."""
        done = ()
        for i in range(len(self.stored)):
            moved = self.average[i] + (1.0 - self.decay) * (self.stored[i] - self.average[i])
            done += (ops.assign(self.average[i], moved),)  # type: ignore[assignment]
        return done


class WithLoss(nn.Cell):
    """Mean cross-entropy of a model's logits against distributions over classes, in float32."""

    def __init__(self, model: Any) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, images: Tensor, targets: Tensor, scale: Tensor) -> Any:
        """The loss times ``scale``."""
        logits = ops.cast(self.model(images), mindspore.float32)
        return -ops.mean(ops.sum(targets * ops.log_softmax(logits, -1), -1)) * scale


class TrainStep(nn.Cell):
    """What ``mindspore.train.Model`` calls with each batch.

    Args:
        model: Trained.
        optimizer: Of its parameters.
        average: Of its tensors, if there is one.
        clip_norm: Largest norm of the gradient; None does not clip.
        reducer: Averages gradients over processes, if there are several.

    Shape:
        images ``(B, 3, H, W)``, targets ``(B, num_classes)`` and the number of the step to the loss, the norm of the
        gradient before it was clipped, and the number.
    """

    def __init__(
        self,
        model: Any,
        optimizer: AdamW,
        average: Average | None = None,
        clip_norm: float | None = None,
        reducer: Any = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.optimizer, self.average, self.reducer = model, optimizer, average, reducer
        self.clip_norm = clip_norm
        self.loss_scale = buffer((), name="loss_scale", init="ones")
        self.gradients = mindspore.value_and_grad(WithLoss(model), None, optimizer.weights)

    def construct(self, images: Tensor, targets: Tensor, step: Tensor) -> Any:
        """See the class."""
        scale = self.loss_scale * 1.0
        loss, gradients = self.gradients(images, targets, scale)
        if self.reducer is not None:
            gradients = self.reducer(gradients)
        squares = ops.zeros((), mindspore.float32)
        for gradient in gradients:
            squares = squares + ops.sum(gradient * gradient)
        norm = ops.sqrt(squares) / scale
        share = 1.0 / scale
        if self.clip_norm is not None:
            share = share * ops.minimum(self.clip_norm / (norm + TINY), ops.ones((), mindspore.float32))
        scaled = ()
        for gradient in gradients:
            scaled += (gradient * share,)  # type: ignore[assignment]
        loss = ops.depend(loss / scale, self.optimizer(scaled))
        if self.average is not None:
            loss = ops.depend(loss, self.average())
        return loss, norm, step


class Forward(nn.Cell):
    """A model under a cell of its own, which MindSpore compiles by itself."""

    def __init__(self, model: Any) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, images: Tensor) -> Tensor:
        """What the model returns."""
        return self.model(images)
