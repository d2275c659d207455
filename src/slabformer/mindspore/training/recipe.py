"""What of a recipe has a counterpart in MindSpore; the rest is refused by name."""

from __future__ import annotations

from slabformer.tasks.classification.config import TrainConfig

#: optimizers by timm's name, and the arguments that they take
OPTIMIZERS = {"adamw": ("betas", "eps")}


def check_recipe(config: TrainConfig) -> None:
    """Refuse settings that MindSpore has no counterpart for, before anything is read or written.

    Raises:
        ValueError: With the first such setting, its value, and what to do.
    """
    refused = {
        "teacher": (config.teacher is not None, config.teacher, "distil with `slab train`"),
        "compile": (config.compile, config.compile, "graph mode compiles by itself, leave it out"),
        "accumulate": (config.accumulate > 1, config.accumulate, "take a larger batch_size, or more processes"),
        "gamma.align": (config.gamma.align > 0, config.gamma.align, "set it to 0"),
        "optimizer.name": (
            config.optimizer.name not in OPTIMIZERS,
            config.optimizer.name,
            f"use {' or '.join(OPTIMIZERS)}",
        ),
        **{
            f"optimizer.args.{name}": (
                name not in OPTIMIZERS.get(config.optimizer.name, (name,)),
                value,
                f"{config.optimizer.name} takes {' and '.join(OPTIMIZERS.get(config.optimizer.name, ()))}",
            )
            for name, value in config.optimizer.args.items()
        },
    }
    for name, (has_none, value, advice) in refused.items():
        if has_none:
            raise ValueError(f"{name} ({value!r}) has no counterpart in MindSpore; {advice}")
