"""What can be converted: image models of timm, folders of transformers with text or images; each brings its data."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer.converting.config import ConvertConfig
from slabformer.converting.order import StepOrder
from slabformer.models.weights.hub import is_shared
from slabformer.tasks.classification.augment import AugmentConfig, eval_transform, train_transform
from slabformer.tasks.classification.config import DataConfig
from slabformer.tasks.classification.data import ImageLoader, Samples
from slabformer.tasks.classification.sources import open_source
from slabformer.tasks.engine.order import OrderedLoader
from slabformer.tasks.saved_model import ModelInfo, create_model, load_model, save_model

#: what images go through on their way to student and teacher alike
AUGMENT = AugmentConfig(scale=(0.5, 1.0), auto_augment=None, color_jitter=0.0, re_prob=0.0, mixup=0.0, cutmix=0.0)
CONFIG = "config.json"


class Subject(ABC):
    """A trained model and what it is run on.

    Attributes:
        model: In eval mode, with its norms.
        held_out: Batches that are not trained on.
    """

    model: nn.Module
    held_out: list[Any]
    _make_loader: Callable[[], OrderedLoader]

    @cached_property
    def loader(self) -> OrderedLoader:
        """Batches to train on; made when asked for, since who only looks at ``held_out`` needs no full batch.

        Raises:
            ValueError: If the data does not fill one batch.
        """
        return self._make_loader()

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, name: str) -> None:
        """Write ``model``, converted or fused, as ``name`` into ``folder``."""

    @abstractmethod
    def fuse(self, model: nn.Module) -> tuple[nn.Module, sf.FuseReport]:
        """:func:`slabformer.fuse` with inputs of this model."""


def open_subject(config: ConvertConfig, rank: int, world_size: int) -> Subject:
    """The model and the data that ``config`` names.

    Raises:
        FileNotFoundError: If there is no such model or no data.
        ValueError: If either cannot be read, or is of another kind.
    """
    kind = FolderSubject if (Path(config.model) / CONFIG).is_file() else ImageSubject
    if Path(config.model).is_dir() and kind is ImageSubject and not is_shared(config.model):
        raise ValueError(f"no model at {config.model!r}: the folder holds no {CONFIG}")
    subject = kind(config, rank, world_size)
    _ = subject.loader  # too little data is told before anything else happens
    return subject


class ImageSubject(Subject):
    """A timm model, by its name or in a file that slab wrote; or one that was ``loaded`` already."""

    def __init__(
        self, config: ConvertConfig, rank: int, world_size: int, loaded: tuple[nn.Module, ModelInfo] | None = None
    ) -> None:
        self.model, self.info = loaded or _image_model(config)
        info = self.info
        data = DataConfig(
            path=config.data,
            labels=False,
            image_size=info.input_size[-1],
            mean=info.mean,
            std=info.std,
            interpolation=info.interpolation,
            crop_pct=info.crop_pct,
            validation_fraction=0.1,
            split_seed=config.split_seed,
        )
        self._make_loader, self.held_out = image_batches(config, data, rank, world_size, lambda images: images)

    def save(self, model: nn.Module, folder: Path, name: str) -> None:
        """One file."""
        save_model(model, folder / f"{name}.safetensors", self.info)

    def fuse(self, model: nn.Module) -> tuple[nn.Module, sf.FuseReport]:
        """See :meth:`Subject.fuse`."""
        return sf.fuse(model, self.held_out[0][:2])


def _image_model(config: ConvertConfig) -> tuple[nn.Module, ModelInfo]:
    name = config.model
    if name.endswith(".safetensors") or is_shared(name) or Path(name).is_file():
        model, info = load_model(name)
        if info.fused:
            raise ValueError(f"{name} holds a fused model, whose norms are gone; give the file before fusing")
    else:
        arguments: dict[str, Any] = {} if config.image_size is None else {"img_size": config.image_size}
        model = create_model(name, pretrained=True, **arguments)
        settings: Any = model.pretrained_cfg
        size = settings["input_size"] if config.image_size is None else (3, config.image_size, config.image_size)
        taken: dict[str, Any] = {key: settings[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        info = ModelInfo(model=name, model_args=arguments, class_names=[], input_size=size, **taken)
    if config.image_size is not None and config.image_size != info.input_size[-1]:
        raise ValueError(f"{name} takes images of {info.input_size[-1]} pixels; leave image_size out")
    return model.eval(), info


class ImageBatches(OrderedLoader):
    """Images as a model takes them, without labels."""

    def __init__(self, loader: ImageLoader, shape: Callable[[Tensor], Any]) -> None:
        super().__init__(loader.order, [])
        self._loader, self._shape = loader, shape

    def __iter__(self) -> Iterator[Any]:
        return (self._shape(images) for images, _ in self._loader)


def image_batches(
    config: ConvertConfig, data: DataConfig, rank: int, world_size: int, shape: Callable[[Tensor], Any]
) -> tuple[Callable[[], OrderedLoader], list[Any]]:
    """What makes the loader of images to train on, and held-out ones; ``shape`` makes the model's input of a tensor."""
    train, validation = (open_source(data, split) for split in ("train", "validation"))  # type: ignore[arg-type]
    transform = eval_transform(data)
    chosen = range(0, len(validation), max(1, len(validation) // config.held_out))
    images = [transform(validation.read(index)[0]) for index in itertools.islice(chosen, config.held_out)]
    held_out = [shape(torch.stack(list(part))) for part in _parts(images, config.batch_size)]

    def make_loader() -> OrderedLoader:
        order = _order(config, len(train), rank, world_size)
        samples = Samples(train, train_transform(data, AUGMENT), config.seed, replace=True)
        return ImageBatches(ImageLoader(samples, order, config.num_workers, data.max_unreadable), shape)

    return make_loader, held_out


class FolderSubject(Subject):
    """A model of transformers in a folder, with its tokenizer or its image processor."""

    def __init__(self, config: ConvertConfig, rank: int, world_size: int) -> None:
        from slabformer.tasks.language.folders import load_encoder_folder

        self.model, self.processor = load_encoder_folder(config.model)
        if self.model.main_input_name == "pixel_values":
            self._make_loader, self.held_out = self._images(config, rank, world_size)
        else:
            self._make_loader, self.held_out = self._texts(config, rank, world_size)

    def _images(
        self, config: ConvertConfig, rank: int, world_size: int
    ) -> tuple[Callable[[], OrderedLoader], list[Any]]:
        settings = self.processor.to_dict() if self.processor is not None else {}
        size = settings.get("size") or {}
        own: Any = size.get("height") or size.get("shortest_edge") or getattr(self.model.config, "image_size", 224)
        data = DataConfig(
            path=config.data,
            labels=False,
            image_size=config.image_size or own,
            mean=tuple(settings.get("image_mean") or (0.5,) * 3),
            std=tuple(settings.get("image_std") or (0.5,) * 3),
            crop_pct=1.0,
            validation_fraction=0.1,
            split_seed=config.split_seed,
        )
        return image_batches(config, data, rank, world_size, lambda images: {"pixel_values": images})

    def _texts(
        self, config: ConvertConfig, rank: int, world_size: int
    ) -> tuple[Callable[[], OrderedLoader], list[Any]]:
        from slabformer.tasks.language.config import DataConfig as TextConfig
        from slabformer.tasks.language.corpus import Corpus, split_documents

        if self.processor is None:
            raise ValueError(f"{config.model} holds no tokenizer; save it there: tokenizer.save_pretrained(folder)")
        text = TextConfig(path=config.data, document="line")
        documents = list(Corpus(text))
        share = replace(text, validation=min(config.held_out, max(1, len(documents) // 10)))
        train, held_out = split_documents(share, documents)
        encode = TextEncoder(self.processor, config.max_length)

        def make_loader() -> OrderedLoader:
            return TextBatches(_order(config, len(train), rank, world_size), train, encode)

        return make_loader, [encode(part) for part in _parts(held_out, config.batch_size)]

    def save(self, model: nn.Module, folder: Path, name: str) -> None:
        """A folder that :func:`slabformer.tasks.language.folders.load_model_folder` reads."""
        from slabformer.tasks.language.folders import save_model_folder

        save_model_folder(model, self.processor, folder / name)  # type: ignore[arg-type]

    def fuse(self, model: nn.Module) -> tuple[nn.Module, sf.FuseReport]:
        """See :meth:`Subject.fuse`."""
        return sf.fuse(model, (), _short(self.held_out[0]))


def _short(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:2] for name, tensor in batch.items()}


class TextEncoder:
    """Texts to the input of a model, padded to the longest of them."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        own = tokenizer.model_max_length
        self.tokenizer, self.max_length = tokenizer, min(max_length, own)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and what else the tokenizer gives."""
        return dict(
            self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        )


class TextBatches(OrderedLoader):
    """Texts, tokenized batch by batch."""

    def __init__(self, order: StepOrder, texts: Sequence[str], encode: TextEncoder) -> None:
        super().__init__(order, [])
        self.texts, self.encode = texts, encode

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.encode([self.texts[index] for index in indices]) for indices in self.order.take())


def _order(config: ConvertConfig, count: int, rank: int, world_size: int) -> StepOrder:
    batches = config.steps // num_parts(config) * config.accumulate
    return StepOrder(count, batches, batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size)


def num_parts(config: ConvertConfig) -> int:
    """Parts of equal length that the steps are divided into, with an evaluation after each."""
    return max(parts for parts in range(1, min(config.evaluations, config.steps) + 1) if config.steps % parts == 0)


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
