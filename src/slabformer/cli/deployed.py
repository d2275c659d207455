"""What `slab deploy` takes, one class a kind of model: how it is loaded, called, compared, and described."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.table import Table
from rich.text import Text

from slabformer.cli.common import example_images, is_file, load_with_weights
from slabformer.cli.forms import agreement_of, calibration_of, evaluated

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slabformer.deployment.deploy import Deployed
    from slabformer.deployment.kinds import KindName
    from slabformer.export.static_decoder import StaticDecoder
    from slabformer.export.static_detector import StaticDetector

logger = logging.getLogger(__name__)
#: of a language model: of the prompt that it is timed on, and that are written to compare
PROMPT, WRITTEN = 16, 32
#: pictures that a detector is compared on
PICTURES = 4
#: what a form is compared on, as data and as what is shown
Compared = tuple[dict[str, Any], list[Any]]


class Subject(ABC):
    """A model to deploy.

    Args:
        config: Options of `slab deploy`.

    Attributes:
        axes: Of any length, by input; the batch's where None.
        title: For the picture.

    Raises:
        ValueError: If an option is for another kind of model.
    """

    kind: KindName = "model"
    #: options that other kinds alone have
    foreign: Sequence[str] = ()
    words = "this model"
    axes: Mapping[str, Mapping[int, str]] | None = None

    def __init__(self, config: Namespace) -> None:
        from slabformer.deployment.kinds import KINDS
        from slabformer.deployment.targets.table import AUTO

        self.config, self.title = config, Path(config.model).name
        if config.target != AUTO:
            KINDS[self.kind].check_target(config.target)
        if config.dtype == "int8" and self.kind != "model":
            raise ValueError(f"int8 is for classifiers; deploy {self.words} in another --dtype")
        for option in self.foreign:
            if getattr(config, option) is not None:
                raise ValueError(f"{self.words} has no --{option.replace('_', '-')}; leave it out")

    @abstractmethod
    def load(self) -> tuple[nn.Module, Any]:
        """The model, and the inputs to time it on."""

    @abstractmethod
    def compared(self, model: Any, deployed: Deployed) -> Compared:
        """What was deployed beside the model."""

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """How what there is becomes an input."""

    def class_names(self) -> list[str]:
        """By label."""
        return []

    def calibration(self) -> Sequence[Any]:
        """Batches that show the ranges of activations."""
        return []


class Classifier(Subject):
    """Images to classes."""

    foreign = ("context", "size")
    words = "a classifier"

    def __init__(self, config: Namespace) -> None:
        super().__init__(config)
        if config.dtype == "int8" and config.data is None:
            raise ValueError("int8 needs images that show the ranges of activations; give --data")

    def load(self) -> tuple[nn.Module, Tensor]:
        """See :class:`Subject`."""
        model, self.info = load_with_weights(self.config)
        self.title = self.info.model
        return model, example_images(self.info, batch_size=self.config.images)

    def calibration(self) -> Sequence[Any]:
        """See :class:`Subject`."""
        return calibration_of(self.config, self.info)

    def compared(self, model: nn.Module, deployed: Deployed) -> Compared:
        """Accuracy of the model and of what was deployed, and how often they agree."""
        from slabformer.deployment.targets.table import target_called

        if self.config.data is None:
            return {}, []
        fixed = not target_called(deployed.report.taken).any_batch
        forms = {"model": model, "deployed": in_parts(deployed, self.config.images) if fixed else deployed}
        results = dict(evaluated(self.config, self.info, forms))
        alike = agreement_of(self.config, self.info, forms)
        table = Table(caption=f"top-1 class alike on {alike:.2%} of the images")
        table.add_column("form")
        for heading in ("top-1 %", "loss"):
            table.add_column(heading, justify="right")
        for name, result in results.items():
            table.add_row(name, f"{100 * result.top1:.2f}", f"{result.loss:.4f}")
        return {"accuracy": {name: result.to_dict() for name, result in results.items()}, "same_top1": alike}, [table]

    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes an input: resized, cropped, scaled to [0, 1], normalised."""
        channels, height, width = self.info.input_size
        return {
            "channels": channels,
            "height": height,
            "width": width,
            "mean": list(self.info.mean),
            "std": list(self.info.std),
            "interpolation": self.info.interpolation,
            "crop_pct": self.info.crop_pct,
        }

    def class_names(self) -> list[str]:
        """See :class:`Subject`."""
        return self.info.class_names


class LanguageModel(Subject):
    """Tokens to the next one, with a static cache."""

    foreign = ("data", "size", "checkpoint", "input_size")
    words, kind = "a language model", "decoder"

    def load(self) -> tuple[StaticDecoder, dict[str, Tensor]]:
        """See :class:`Subject`."""
        from slabformer.cli.lm.common import quiet_transformers
        from slabformer.export.static_decoder import AXES, StaticDecoder
        from slabformer.tasks.language.folders import load_model_folder
        from slabformer.tasks.language.fusing import tokens_for

        quiet_transformers()
        self.axes = AXES
        self.decoder = StaticDecoder(load_model_folder(self.config.model), self.config.context)
        length = max(1, min(PROMPT, self.decoder.context // 2))
        self.prompt = tokens_for(self.decoder.model, self.config.images, length)
        return self.decoder, self.decoder.inputs(self.prompt)

    def compared(self, model: StaticDecoder, deployed: Deployed) -> Compared:
        """What it writes, token by token, beside transformers' ``generate`` with the model as given."""
        from slabformer.export.static_decoder import write_tokens

        count = min(WRITTEN, model.context - self.prompt.shape[1] + 1)
        generate: Any = model.model.generate
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = generate(self.prompt, max_new_tokens=count, **settings)[:, self.prompt.shape[1] :]
        written = write_tokens(deployed, model.inputs(self.prompt), count)
        alike = int((written == expected).cumprod(1).sum())
        told = f"{alike} of {written.numel()} tokens written as transformers' generate writes them"
        if alike < written.numel():
            logger.warning("%s: where two tokens are nearly as likely, %s decides", told, self.config.dtype)
        return {"tokens": written.numel(), "tokens_alike": alike}, [Text(told)]

    def preprocessing(self) -> dict[str, Any]:
        """The cache's length, the vocabulary's size, and where texts end."""
        settings: Any = self.decoder.model.config
        context, ends = self.decoder.context, settings.eos_token_id
        return {"context": context, "vocab_size": settings.vocab_size, "eos_token_id": ends}


class ObjectDetector(Subject):
    """An image to boxes."""

    foreign = ("context", "checkpoint", "input_size")
    words, kind = "a detector", "detector"

    def __init__(self, config: Namespace) -> None:
        super().__init__(config)
        self.axes = {}
        if config.images != 1:
            raise ValueError(f"a detector takes one image at a time, got --images {config.images}; leave it out")

    def load(self) -> tuple[StaticDetector, dict[str, Tensor]]:
        """See :class:`Subject`."""
        from slabformer.cli.detect.common import compared_pictures
        from slabformer.export.detector import shrunk
        from slabformer.export.static_detector import StaticDetector
        from slabformer.tasks.detection.saved import load_detector

        detector, self.info = load_detector(self.config.model)
        height, width = self.config.size or (self.info.size, self.info.max_size)
        self.static = StaticDetector(detector, (height, width))
        self.config.num_images = PICTURES
        pictures = compared_pictures(self.config, self.info)
        self.cases = [self.static.inputs(shrunk(picture, self.static.size)) for picture in pictures]
        return self.static, self.cases[0]

    def compared(self, model: StaticDetector, deployed: Deployed) -> Compared:
        """Its boxes beside the model's, on some pictures."""
        from slabformer.deployment.kinds import KINDS
        from slabformer.deployment.targeted import rtol_of

        result = KINDS["detector"].compare(model, deployed, self.cases, rtol_of(self.config.dtype))
        told = f"the same detections on {len(self.cases)} images, boxes to {result.max_abs:.1e} pixels"
        return {"images": len(self.cases), "max_pixels": result.max_abs}, [Text(told)]

    def preprocessing(self) -> dict[str, Any]:
        """The canvas on which an image in [0, 1] lies at the top left, and the colour around it."""
        height, width = self.static.size
        return {"height": height, "width": width, "canvas": self.static.mean.flatten().tolist()}

    def class_names(self) -> list[str]:
        """Of labels 1, 2, ..."""
        return self.info.class_names


def in_parts(deployed: Deployed, size: int) -> nn.Module:
    """``deployed``, which takes batches of one ``size``, for batches of any: in parts, the last one filled up."""
    import torch
    from torch import nn

    class InParts(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            filled = torch.cat([images, images[-1:].expand(-len(images) % size, *images.shape[1:])])
            return torch.cat([deployed(part) for part in filled.split(size)])[: len(images)]

    return InParts().eval()


def subject_of(config: Namespace) -> Subject:
    """What ``config.model`` is: a language model's folder, a detector's file, or else a classifier.

    Raises:
        ValueError: If an option is for another kind of model, or the file is damaged.
        FileNotFoundError: If there is no such file.
    """
    path = Path(config.model)
    if _is_language_model(path):
        return LanguageModel(config)
    if path.suffix == ".safetensors" and is_file(config.model):
        from slabformer.tasks.saved_file import saved_kind

        if saved_kind(path) == "slabformer.detector":
            return ObjectDetector(config)
    return Classifier(config)


def _is_language_model(folder: Path) -> bool:
    """Whether transformers wrote the folder: its configuration names a type of model, which timm's does not."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "model_type" in settings
