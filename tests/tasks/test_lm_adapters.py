"""Norms beside the adapters of PEFT: saved with them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

import slabformer as sf
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.language.callback import ProgressiveCallback
from tolerances import EXACT, assert_close

TOKENS = torch.randint(0, 48, (24, 12), generator=torch.Generator().manual_seed(1))


def converted() -> tuple[LlamaForCausalLM, list[str]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=48, max_position_embeddings=16, **sizes))
    return model, sf.convert_norms_(model)


def adapted(with_norms: bool = True) -> nn.Module:
    peft = pytest.importorskip("peft")
    model, names = converted()
    saved = {"modules_to_save": names} if with_norms else {}
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **saved))


def trainer_of(model: nn.Module, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 6}
    settings |= {"save_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(
        model, args, train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS], callbacks=[*callbacks]
    )


class StopAt3(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 3


class Adapted(nn.Module):
    """What the callback knows an adapted model by."""

    def __init__(self) -> None:
        super().__init__()
        self.peft_config = {"default": object()}
        self.norm = sf.PRepBN(4)


def begin(model: nn.Module) -> ProgressiveCallback:
    callback: Any = ProgressiveCallback()
    args = TrainingArguments(report_to="none", use_cpu=True)
    callback.on_train_begin(args, TrainerState(max_steps=4), None, model=model)
    return callback


def test_adapters_that_would_be_saved_without_the_norms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"without 1 norms \(first: norm\); pass modules_to_save=slabformer.convert"):
        begin(Adapted())


def test_norms_that_peft_saves_are_faded_and_their_originals_left_alone() -> None:
    model = Adapted()
    original = model.norm
    copies = nn.ModuleDict({"default": sf.PRepBN(4)})
    model.norm = nn.Module()
    model.norm.original_module, model.norm.modules_to_save = original, copies
    assert list(prepbn_modules(model)) == ["norm.modules_to_save.default"]
    callback = begin(model)
    for _ in range(4):
        assert callback.schedule is not None
        callback.schedule.step()
    assert (float(original.gamma), float(copies["default"].gamma)) == (1, 0)


def test_names_that_reach_into_the_norms_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    names = ["input_layernorm", "post_attention_layernorm", "norm"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names)
    with pytest.raises(ValueError, match=r"also reaches into .*; write 'model.norm' where it says 'norm'"):
        trainer_of(peft.get_peft_model(converted()[0], config), tmp_path, ProgressiveCallback()).train()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[*names[:2], "model.norm"])
    trainer_of(peft.get_peft_model(converted()[0], config), tmp_path, ProgressiveCallback()).train()


def test_plain_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without 3 norms .*input_layernorm\); pass modules_to_save="):
        trainer_of(adapted(with_norms=False), tmp_path, ProgressiveCallback()).train()


def test_norms_are_saved_with_the_adapter_and_loaded_with_it(tmp_path: Path) -> None:
    model = adapted()
    trainer_of(model, tmp_path, ProgressiveCallback(fade=1.0)).train()
    peft = pytest.importorskip("peft")
    for folder, gamma in (("checkpoint-3", 0.5), ("checkpoint-6", 0.0)):
        loaded = peft.PeftModel.from_pretrained(converted()[0], str(tmp_path / folder))
        assert {float(norm.gamma) for norm in prepbn_modules(loaded).values()} == {gamma}
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits
        assert_close(loaded.eval()(input_ids=TOKENS).logits, expected, EXACT)
    merged = loaded.merge_and_unload()
    _, report = sf.fuse(merged, (), {"input_ids": TOKENS[:2], "use_cache": False})
    assert report.num_folded == 3


def test_training_with_adapters_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = adapted()
    trainer_of(whole, tmp_path / "whole", ProgressiveCallback(fade=1.0)).train()
    trainer_of(adapted(), tmp_path / "halves", ProgressiveCallback(fade=1.0), StopAt3()).train()
    resumed = adapted()
    checkpoint = str(tmp_path / "halves" / "checkpoint-3")
    trainer_of(resumed, tmp_path / "halves", ProgressiveCallback(fade=1.0)).train(resume_from_checkpoint=checkpoint)
    for name, value in whole.state_dict().items():
        assert_close(resumed.state_dict()[name], value, EXACT)
