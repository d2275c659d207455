"""The harness on questions that are decided by hand here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from language_models import sentences, trained_looking
from slabformer.tasks.language.config import TokenizerConfig
from slabformer.tasks.language.evaluate import read_documents, sliding_perplexity
from slabformer.tasks.language.fusing import LogitsOf, fuse_language_model
from slabformer.tasks.language.harness import PUBLISHED, choices_task, evaluate_tasks
from slabformer.tasks.language.perplexity import nll_of
from slabformer.tasks.language.tokens import train_tokenizer

QUESTIONS = [
    {"question": first, "choices": [second, third, "fades"], "answer": number % 3}
    for number, (first, second, third) in enumerate(zip(*[iter(sentences(36, length=4))] * 3, strict=True))
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(sentences(200), TokenizerConfig(vocab_size=300), 64)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return


def right_by_hand(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of questions whose likeliest choice, after a space, is the right one."""
    right = 0
    for question in QUESTIONS:
        before = len(tokenizer(question["question"])["input_ids"])
        costs = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer(f"{question['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                nll = nll_of(LogitsOf(model)(ids)[:, :-1], ids[:, 1:])
            costs.append(nll[before - 1 :].sum().item())
        right += costs.index(min(costs)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_questions_of_ones_own_are_answered_as_by_hand_fused_or_not(
    quiz: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = trained_looking()
    expected = right_by_hand(model, tokenizer)
    for form in (model, fuse_language_model(model)[0]):
        result = evaluate_tasks(form, tokenizer, [str(quiz)])["quiz"]
        assert result.acc == pytest.approx(expected)
        assert result.questions == len(QUESTIONS)
        assert result.acc_norm is not None
    assert evaluate_tasks(model, tokenizer, [str(quiz)], limit=5)["quiz"].questions == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_file_in_the_harnesss_own_format_gives_the_same(
    quiz: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {quiz}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\nmetadata: {version: 1.0}\n"
    )
    model = trained_looking()
    found = evaluate_tasks(model, tokenizer, [str(tmp_path / "own.yaml"), str(quiz)])
    assert found["own"].acc == found["quiz"].acc


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no questions"),
        ("no json", "line 1 is not JSON"),
        ('{"question": "a", "choices": ["b"], "answer": 0}\n{"question": "a"}', r"line 2 lacks 'choices' \(list\)"),
        ('{"question": "a", "choices": ["b"], "answer": 1}', "answer 1 is none of 1 choices"),
    ],
    ids=["empty", "json", "field", "answer"],
)
def test_a_file_that_holds_no_questions_is_told(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        choices_task(tmp_path / "quiz.jsonl")


def test_the_published_means_are_those_of_the_tasks() -> None:
    from slabformer.tasks.language.harness import MEAN_PUBLISHED

    for column, mean in enumerate(MEAN_PUBLISHED, 1):
        assert sum(row[column] for row in PUBLISHED.values()) / 9 == pytest.approx(mean, abs=0.006)


# --- perplexity of a text ------------------------------------------------------------------------------------------


def test_perplexity_of_a_text_does_not_depend_on_the_batch_and_counts_every_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model, texts = trained_looking(), [" ".join(sentences(20)), "a layer"]
    one, many = (sliding_perplexity(model, tokenizer, texts, batch_size=size) for size in (1, 4))
    assert one["perplexity"] == pytest.approx(many["perplexity"], rel=1e-5)
    counted = sum(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1 for text in texts)
    assert one["tokens"] == counted
    fused, _ = fuse_language_model(model)
    assert sliding_perplexity(fused, tokenizer, texts)["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_an_empty_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(str(tmp_path / "a.txt"))
