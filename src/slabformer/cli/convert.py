"""`slab convert`: a trained model loses its norms, held against itself on data without labels."""

from __future__ import annotations

from jsonargparse import Namespace, set_parsing_settings

from slabformer.cli.options import add_settings
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.recipe import config_of, ending_well, name_sections, outcome_of
from slabformer.converting.config import ConvertConfig
from slabformer.settings import NonEmptyStr

#: what is said of a run, beside how near it came
COUNTS = ("norms_folded", "norms_kept", "norms_left", "attentions_linear", "attentions_kept")


def parser() -> Parser:
    """Options of `slab convert`: a model, its data, and the other fields of :class:`ConvertConfig`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = Parser(
        "slab convert",
        "Remove the norms of a trained model on data without labels: fit, fade, distil from the original, recalibrate, "
        "fuse, verify, report. With --attention, softmax attention becomes linear too, aligned block by block. A run "
        "that was stopped resumes from its output folder.",
        [
            "slab convert model.safetensors --data photos/ -o runs/convert",
            "slab convert vit.safetensors --data photos/ -o runs/linear --attention all",
            "slab convert encoder --data sentences.txt -o runs/encoder --budget 0.01",
        ],
    )
    made.add_argument(
        "model",
        type=NonEmptyStr,
        help="a .safetensors file that slab wrote, the name of a model in timm, or a folder of transformers",
    )
    add_settings(made, ConvertConfig, skip={"model"})
    name_sections(made, ConvertConfig)
    return made


def to_convert_config(config: Namespace) -> ConvertConfig:
    """The parsed options as a :class:`ConvertConfig`."""
    return config_of(parser(), config, ConvertConfig)


def run(config: Namespace) -> Outcome | None:
    """Convert as the options say; exit code 143 after SIGTERM, 130 after SIGINT, 1 if it fails."""
    from slabformer.converting.run import convert
    from slabformer.tasks.engine.console import ConsoleObserver

    with ending_well():
        result = convert(to_convert_config(config), observers=[ConsoleObserver()])
    summary = result.summary
    counts = {name: summary[name] for name in COUNTS if name in summary}
    return outcome_of(result, {**summary["fused"], **counts})
