"""`slab lm eval`: perplexity of a text, and accuracy on multiple-choice tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.table import Table

from slabformer.cli.data import progress_bar
from slabformer.cli.lm.common import add_model_options, load
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import NonEmptyStr, PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL_PUBLISHED = "published"


def parser() -> Parser:
    """Options of `slab lm eval`."""
    from slabformer.tasks.language.rows import Unit

    made = Parser(
        "slab lm eval",
        "Measure the perplexity of a text with a sliding window, and the zero-shot accuracy on tasks of "
        "lm-evaluation-harness or on files of questions.",
        [
            "slab lm eval runs/llama_micro_prepbn --data book.txt",
            "slab lm eval runs/llama_micro_prepbn --tasks quiz.jsonl --fused",
            "slab lm eval llama-350m --tasks published --json",
        ],
        json_files=True,
    )
    add_model_options(made)
    made.add_argument(
        "--data",
        type=NonEmptyStr | None,
        help="text for perplexity: a file, folder or pattern, hf:NAME for a data set of the hub, or pydoc (Python's "
        "own documentation)",
    )
    made.add_argument("--document", type=Unit, default="file", help="unit of text that is a document")
    made.add_argument("--split", type=NonEmptyStr, default="test", help="split of a data set of the hub")
    made.add_argument(
        "--text-field", type=NonEmptyStr, default="text", help="name of the field or column that holds the text"
    )
    made.add_argument("--max-documents", type=PositiveInt | None, help="stop after this many documents")
    made.add_argument(
        "--stride", type=PositiveInt | None, help="tokens from one window to the next; by default half the context"
    )
    made.add_argument(
        "--tasks",
        type=NonEmptyStr,
        nargs="+",
        default=[],
        help="names of tasks in lm-evaluation-harness, .jsonl files, or 'published' for the paper's nine tasks",
    )
    made.add_argument("--limit", type=PositiveInt | None, help="largest number of questions per task")
    made.add_argument("--batch-size", type=PositiveInt, default=8, help="texts per batch")
    made.add_argument("--fused", action="store_true", help="fold the norms before evaluating")
    return made


def run(config: Namespace) -> Outcome:
    """Evaluate."""
    from slabformer.tasks.language.fusing import fuse_language_model

    if config.data is None and not config.tasks:
        raise ValueError("nothing to evaluate on; give --data TEXT, --tasks NAMES, or both")
    model, tokenizer = load(config)
    if config.fused:
        model, _ = fuse_language_model(model)
    figures: dict[str, Any] = {}
    shown: list[Table] = []
    if config.data is not None:
        figures["perplexity"] = _perplexities(config, model, tokenizer)
        shown.append(_perplexity_table(config.model, figures["perplexity"]))
    if config.tasks:
        figures["tasks"] = _tasks(config, model, tokenizer)
        shown.append(_task_table(config.model, figures["tasks"]))
    return Outcome(data=figures, shown=shown)


def _perplexities(
    config: Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    import slabformer as sf
    from slabformer.nn.controls import prepbn_modules
    from slabformer.tasks.language.evaluate import read_documents, sliding_perplexity

    documents = read_documents(
        config.data,
        document=config.document,
        split=config.split,
        text_field=config.text_field,
        max_documents=config.max_documents,
    )
    options = {"stride": config.stride, "batch_size": config.batch_size}
    rows = {}
    with progress_bar("perplexity", len(documents)) as advance:
        rows["fused" if config.fused else "deployed"] = sliding_perplexity(
            model, tokenizer, documents, **options, progress=advance
        )
    norms = list(prepbn_modules(model).values())
    if any(norm.phase != "done" for norm in norms):
        with sf.blended(model), progress_bar("blend", len(documents)) as advance:
            gamma = max(float(norm.gamma) for norm in norms)
            rows[f"blend, gamma {gamma:.2f}"] = sliding_perplexity(
                model, tokenizer, documents, **options, progress=advance
            )
    return rows


def _tasks(config: Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    from slabformer.tasks.language.harness import PUBLISHED, evaluate_tasks

    names = [task for name in config.tasks for task in (PUBLISHED if name == ALL_PUBLISHED else [name])]
    found = evaluate_tasks(model, tokenizer, names, batch_size=config.batch_size, limit=config.limit)
    return {name: result.to_dict() for name, result in found.items()}


def _perplexity_table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    table = Table("form", title=title)
    for heading in ("perplexity", "nats/token", "bits/byte", "tokens"):
        table.add_column(heading, justify="right")
    for form, row in rows.items():
        figures = (f"{row['perplexity']:.3f}", f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}")
        table.add_row(form, *figures, f"{row['tokens']:,}")
    return table


def _task_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    from slabformer.tasks.language.harness import MEAN_PUBLISHED, PUBLISHED

    table = Table("task", title=title)
    for heading in ("acc %", "+-", "acc_norm %", "questions", "published RMSNorm", "published PRepBN"):
        table.add_column(heading, justify="right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    for name, row in rows.items():
        title, *published = PUBLISHED.get(name, (name, None, None))
        figures = (percent(row["acc"]), percent(row["stderr"]), percent(row["acc_norm"]), f"{row['questions']:,}")
        table.add_row(title, *figures, *("-" if value is None else f"{value:.2f}" for value in published))
    if rows.keys() >= PUBLISHED.keys():
        mean = sum(rows[name]["acc"] for name in PUBLISHED) / len(PUBLISHED)
        table.add_section()
        table.add_row("mean", percent(mean), "", "", "", *(f"{value:.2f}" for value in MEAN_PUBLISHED))
    return table
