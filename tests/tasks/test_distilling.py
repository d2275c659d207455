"""transformers' Trainer with a distillation's loss: a BERT on text, a ViT on images, with labels and without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainingArguments

import slabformer as sf
from slabformer.tasks.language.callback import ProgressiveCallback
from slabformer.tasks.language.distilling import DistillationTrainer
from students import bert, converted, tokens, vit
from tolerances import EXACT, FLOAT32, assert_close

Rows = list[dict[str, Tensor]]


def text(count: int = 16) -> Rows:
    batch = tokens(count, valid=4)
    return [{name: value[index] for name, value in batch.items()} for index in range(count)]


def pictures(count: int = 16) -> Rows:
    return [{"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(count)]


def trainer_of(model: PreTrainedModel, folder: Path, rows: Rows, steps: int = 4, **changes: Any) -> DistillationTrainer:
    own = {name: changes.pop(name) for name in ("distiller", "label_weight") if name in changes}
    settings: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    settings |= {"report_to": [], "use_cpu": True, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **settings | changes)
    callbacks = [ProgressiveCallback(fade=0.5)]
    return DistillationTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks, **own)


@pytest.mark.parametrize(("make", "rows"), [(bert, text()), (vit, pictures())], ids=["bert", "vit"])
def test_a_model_loses_its_norms_in_a_trainer_without_labels(make: Any, rows: Rows, tmp_path: Path) -> None:
    model = converted(make())
    trainer = trainer_of(model, tmp_path, rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4
    assert losses[0] < 1e-4 < losses[-1]
    assert trainer.state.log_history[-2]["gamma"] == 0
    model.eval()
    with torch.no_grad():
        expected = [trainer.distiller(trainer.data_collator(half)).item() for half in (rows[:8], rows[8:])]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert all(float(norm.gamma) == 0 for norm in model.modules() if isinstance(norm, sf.PRepBN))


def test_a_run_that_goes_on_is_bit_for_bit_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, halved, again = (converted(bert(dropout=0.1)) for _ in range(3))
    trainer_of(whole, tmp_path / "whole", text()).train()
    trainer_of(halved, tmp_path / "halved", text()).train()
    trainer_of(again, tmp_path / "halved", text()).train(resume_from_checkpoint=str(tmp_path / "halved/checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        assert_close(again.state_dict()[name], tensor, EXACT)


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    model = converted(bert())
    for norm in model.modules():
        if isinstance(norm, sf.PRepBN):
            norm.set_gamma(0.5)
    teacher = bert(seed=1)
    trainer = trainer_of(model, tmp_path, text(), distiller=teacher, gradient_accumulation_steps=2)
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer.data_collator(text()[:4])
    before = copy.deepcopy(model.state_dict())
    loss = trainer.training_step(model, dict(batch), num_items_in_batch=torch.tensor(99))
    model.load_state_dict(before)
    assert_close(2 * loss, trainer.distiller(batch).detach(), FLOAT32)


def test_labels_count_beside_the_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()
    rows = [row | {"labels": torch.tensor(index % 3)} for index, row in enumerate(text())]
    trainer = trainer_of(converted(model), tmp_path, rows, label_weight=2.0)
    batch = trainer.data_collator(rows[:4])
    with torch.no_grad(), sf.blended(model):
        loss, output = trainer.compute_loss(model, dict(batch), return_outputs=True)
        assert_close(loss, trainer.distiller(batch) + 2 * model(**batch).loss, FLOAT32)
    assert output.logits.shape == (4, 3)
    without = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="do batches hold labels"):
        trainer.compute_loss(model, without)


def test_a_distiller_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the distiller is of another model than the Trainer's"):
        trainer_of(converted(bert()), tmp_path, text(), distiller=sf.Distiller(converted(bert())))
