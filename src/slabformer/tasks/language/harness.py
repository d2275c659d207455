"""lm-evaluation-harness through its Python API: the nine tasks that were published, and task files of one's own.

A task file is JSON lines ``{"question": ..., "choices": [...], "answer": index}``, or a YAML file in the harness's own
format. The nine need the hub; files need nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slabformer._extras import require
from slabformer._files import read_text
from slabformer.tasks.engine.documents import check_yaml, parse_json

#: task in the harness -> its name in the paper, and percent right there with RMSNorm and with PRepBN
PUBLISHED = {
    "arc_challenge": ("ARC-c", 22.95, 23.55),
    "arc_easy": ("ARC-e", 46.13, 44.44),
    "boolq": ("BoolQ", 59.27, 60.67),
    "copa": ("COPA", 64.0, 66.0),
    "hellaswag": ("HellaSwag", 33.19, 32.76),
    "piqa": ("PIQA", 64.36, 64.04),
    "winogrande": ("WinoGrande", 49.09, 49.72),
    "openbookqa": ("OBQA", 29.6, 30.0),
    "sciq": ("SciQ", 75.3, 76.8),
}
MEAN_PUBLISHED = (49.32, 49.78)
FIELDS = {"question": str, "choices": list, "answer": int}


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Share of questions answered right.

    Attributes:
        acc: By the likeliest choice.
        acc_norm: By the likeliest a byte; None where the task has no such measure.
        stderr: Standard error of ``acc``.
        questions: How many were asked.
    """

    acc: float
    acc_norm: float | None
    stderr: float | None
    questions: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, TaskResult]:
    """Zero-shot accuracy of ``model`` on each of ``tasks``.

    Args:
        model: A causal language model in eval mode, fused or not.
        tokenizer: Its own.
        tasks: Names of the harness, or files.
        batch_size: Texts at once.
        limit: Questions of each task; all by default.

    Raises:
        ValueError: If a task is unknown, or a file is not a task.
        ImportError: If the harness is missing; names the extra.
    """
    harness = require("lm_eval", extra="lm-eval")
    adapter = require("lm_eval.models.huggingface", extra="lm-eval").HFLM
    folders = sorted({str(Path(name).parent) for name in tasks if Path(name).suffix.lower() in YAML})
    named = any(Path(name).suffix.lower() not in FILES for name in tasks)  # the harness's take seconds to list
    manager = require("lm_eval.tasks", extra="lm-eval").TaskManager(include_path=folders, include_defaults=named)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    given = [_task(name, manager) for name in tasks]
    wrapped = adapter(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    found = harness.simple_evaluate(
        model=wrapped,
        tasks=given,
        num_fewshot=0,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return {name: _result(found, name) for name in found["results"]}


def choices_task(path: Path) -> dict[str, Any]:
    """The harness's description of a JSON lines file of multiple-choice questions.

    Raises:
        ValueError: If a line is no question with choices and the index of the right one.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no questions")
    for number, line in enumerate(lines, 1):
        _check_question(line, f"{path}, line {number}")
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }


def _task(name: str, manager: Any) -> str | dict[str, Any]:
    path = Path(name)
    if path.suffix.lower() in FILES:
        if not path.is_file():
            raise FileNotFoundError(f"no task file {name!r}")
        return FILES[path.suffix.lower()](path)
    if name not in manager.all_tasks:
        raise ValueError(
            f"unknown task {name!r}; name one of lm-evaluation-harness, 'published', or give a .jsonl file"
        )
    return name


def _harness_name(path: Path) -> str:
    """What a YAML file in the harness's format calls its task."""
    text = read_text(path)
    try:
        check_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    found = re.search(r"^task:\s*['\"]?([^'\"\s]+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} names no task; it needs a line 'task: NAME'")
    return found[1]


#: suffixes of task files in the harness's own format, tags and all, which it reads itself
YAML = (".yaml", ".yml")
#: how a task is read from a file, by its suffix
FILES: dict[str, Callable[[Path], str | dict[str, Any]]] = {
    ".jsonl": choices_task,
    **dict.fromkeys(YAML, _harness_name),
}


def _check_question(line: str, where: str) -> None:
    try:
        question = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    for name, kind in FIELDS.items():
        if not isinstance(question, dict) or not isinstance(question.get(name), kind):
            raise ValueError(f"{where} lacks {name!r} ({kind.__name__}); a question needs {', '.join(FIELDS)}")
    if not 0 <= question["answer"] < len(question["choices"]):
        raise ValueError(f"{where}: answer {question['answer']} is none of {len(question['choices'])} choices")


def _result(found: dict[str, Any], task: str) -> TaskResult:
    row = found["results"][task]
    error = row.get("acc_stderr,none")
    return TaskResult(
        acc=row["acc,none"],
        acc_norm=row.get("acc_norm,none"),
        stderr=error if isinstance(error, float) else None,
        questions=found["n-samples"][task]["effective"],
    )
