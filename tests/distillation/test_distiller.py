from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel

import slabformer as sf
from distributed import run_ranks
from slabformer import Distiller, Teacher
from slabformer.nn.controls import repbn_modules
from students import bert, classifier, converted, tokens, vit
from tolerances import EXACT, FLOAT32, assert_close

IMAGES = (4, 3, 16, 16)


def half_faded(model: nn.Module, gamma: float = 0.5) -> nn.Module:
    for module in model.modules():
        if isinstance(module, sf.PRepBN):
            module.set_gamma(gamma)
    return model


def train(model: nn.Module, batches: list[Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
    """The loop of the documentation; ``state`` is what it returned after fewer batches."""
    distiller = Distiller(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = sf.ProgressiveSchedule(model, total_steps=6, optimizer=optimizer)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "distiller": distiller}
    for name, part in parts.items():
        if state is not None:
            part.load_state_dict(state[name])
    for index, batch in batches:
        torch.manual_seed(index)
        distiller(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


@pytest.mark.parametrize(
    ("model", "batch", "parts"),
    [
        (lambda: converted(bert()), tokens(valid=4), {"features", "cosine", "pooled", "hidden"}),
        (lambda: converted(vit()), {"pixel_values": torch.randn(IMAGES)}, {"features", "pooled", "hidden"}),
        (lambda: converted(classifier()), torch.randn(IMAGES), {"logits", "hidden"}),
        (lambda: converted(classifier(num_classes=0)), (torch.randn(IMAGES), torch.zeros(4)), {"features", "hidden"}),
    ],
    ids=["bert", "vit", "classifier", "features"],
)
def test_a_student_before_fading_is_its_own_teacher_and_a_faded_one_is_not(model: Any, batch: Any, parts: Any) -> None:
    student = model()
    distiller = Distiller(student)
    found = distiller.compare(batch)
    assert parts <= found.parts.keys()
    assert found.loss.item() < 1e-6
    half_faded(student)
    found = distiller.compare(batch)
    assert_close(found.loss, torch.stack([*found.parts.values()]).sum(), FLOAT32)
    found.loss.backward()
    assert all(part.item() > 1e-8 for part in found.parts.values())
    trained = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert sum(gradient.abs().sum() for gradient in trained) > 0


def test_a_loop_of_ones_own_comes_nearer_to_the_teacher() -> None:
    student, batch = converted(bert()), tokens(16)
    sf.fit_norms_(student, [batch])
    distiller = Distiller(student)
    half_faded(student, 0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = distiller(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_teacher_runs_once_a_batch_and_not_at_all_with_targets() -> None:
    student, batch = half_faded(converted(bert()), 1.0), tokens()
    distiller = Distiller(student)
    calls: list[int] = []
    distiller.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    loss = distiller(batch)
    assert len(calls) == 1
    targets = distiller.targets(batch)
    again = [distiller(batch, targets=targets) for _ in range(3)]
    assert len(calls) == 2
    for other in again:
        assert_close(other, loss, EXACT)


def test_dropout_is_off_unless_asked_for() -> None:
    batch = tokens()
    distiller = Distiller(converted(bert(dropout=0.3)))
    plain = Distiller(converted(bert()))
    assert_close(distiller(batch), plain(batch), EXACT)
    assert all(norm.training for norm in repbn_modules(distiller.student).values())
    distiller.student.train()
    assert_close(distiller(batch), plain(batch), EXACT)
    kept = Distiller(converted(bert(dropout=0.3)), dropout=True)
    assert kept(batch).item() != kept(batch).item()
    first, second = kept.targets(batch), kept.targets(batch)
    assert_close(*(targets.outputs["['last_hidden_state']"].tensor for targets in (first, second)), EXACT)


def test_stochastic_depth_is_off_unless_asked_for() -> None:
    images = torch.randn(IMAGES)
    losses = [Distiller(converted(classifier(drop_path_rate=rate)))(images) for rate in (0.0, 0.5)]
    assert_close(*losses, EXACT)
    kept = Distiller(converted(classifier(drop_path_rate=0.5)), dropout=True)
    assert len({kept(images).item() for _ in range(4)}) > 1


def test_checkpointed_activations_are_computed_again_without_dropout() -> None:
    gradients = []
    for dropout, checkpoints in ((0.0, False), (0.3, True)):
        student = converted(bert(dropout=dropout))
        distiller = Distiller(student)
        half_faded(student)
        if checkpoints:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        ran: list[int] = []
        student.encoder.layer[0].attention.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        distiller(tokens()).backward()
        assert len(ran) == 1 + checkpoints
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, FLOAT32)


def test_padding_counts_neither_in_losses_nor_in_statistics() -> None:
    batch = tokens(valid=3)
    other = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    found = []
    for one in (batch, other):
        student = converted(bert())
        distiller = Distiller(student)
        half_faded(student)
        found.append((distiller(one), [norm.running_var for norm in repbn_modules(student).values()]))
    assert_close(found[0][0], found[1][0], FLOAT32)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert_close(ours, theirs, FLOAT32)


def test_another_model_teaches_without_being_copied_unless_it_shares_tensors() -> None:
    student, teacher = converted(classifier()), classifier(seed=1)
    distiller = Distiller(student, teacher)
    assert distiller.teacher.model is teacher
    assert distiller(torch.randn(IMAGES)).item() > 1e-3
    teacher.head = student.head
    assert Distiller(student, teacher).teacher.model is not teacher


def test_a_run_that_goes_on_is_bit_for_bit_the_one_that_was_not_interrupted() -> None:
    batches = [(index, tokens(valid=4, seed=index)) for index in range(6)]
    whole = train(converted(bert(dropout=0.1)), batches)
    half = train(converted(bert(dropout=0.1)), batches[:3])
    rest = train(converted(bert(dropout=0.1)), batches[3:], half)
    for name, tensor in whole["model"].items():
        assert_close(rest["model"][name], tensor, EXACT)


def test_another_teacher_or_setting_is_not_gone_on_with() -> None:
    state = Distiller(converted(bert())).state_dict()
    Distiller(converted(bert())).load_state_dict(state)
    with pytest.raises(ValueError, match=r"cannot go on: teacher was '[0-9a-f]+', now '[0-9a-f]+'"):
        Distiller(converted(bert()), bert(seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"cannot go on: temperature was 1.0, now 2.0"):
        Distiller(converted(bert()), temperature=2.0).load_state_dict(state)


def rank_gradients(rank: int, num_ranks: int) -> list[Tensor]:
    student = converted(bert())
    sf.sync_norms_(student)
    distiller = Distiller(student)
    half_faded(student)
    wrapped = DistributedDataParallel(student)
    distiller(tokens(valid=4, seed=rank), model=wrapped).backward()
    assert dist.is_initialized()
    return [parameter.grad for parameter in student.parameters() if parameter.grad is not None]


def test_ranks_end_up_with_the_same_gradients(tmp_path: Path) -> None:
    first, second = run_ranks(rank_gradients, tmp_path)
    assert len(first) > 10
    for ours, theirs in zip(first, second, strict=True):
        assert_close(ours, theirs, EXACT)
    assert sum(gradient.abs().sum() for gradient in first) > 0


def test_a_block_called_several_times_is_compared_each_time() -> None:
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=3,
    )
    student = converted(AlbertModel(config, add_pooling_layer=False).train())
    distiller = Distiller(student)
    assert len(distiller.blocks) == 1
    targets = distiller.targets(tokens())
    assert [len(calls) for calls in targets.blocks.values()] == [3]
    half_faded(student)
    assert distiller(tokens()).item() > 0


def test_a_compiled_student_is_compared_on_every_batch() -> None:
    student = half_faded(converted(bert()), 1.0)
    distiller = Distiller(student)
    half_faded(student)
    compiled = torch.compile(student, backend="eager")
    student.eval()
    for seed in range(3):
        assert_close(distiller(tokens(seed=seed), model=compiled), distiller(tokens(seed=seed)), FLOAT32)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
def test_bfloat16_students_are_compared_in_float32(autocast: bool) -> None:
    student = converted(classifier())
    student = student if autocast else student.bfloat16()
    distiller = Distiller(student)
    half_faded(student)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = distiller(torch.randn(IMAGES).to(next(student.parameters()).dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)


def test_a_weight_of_zero_computes_nothing() -> None:
    distiller = Distiller(converted(bert()), weights={"hidden": 0, "pooled": 0, "similarity": 1, "tokens": 2})
    assert distiller.blocks == {}
    assert distiller.compare(tokens()).parts.keys() == {"features", "cosine", "similarity", "tokens"}


def test_weights_scale_their_losses() -> None:
    student, batch = converted(classifier()), torch.randn(IMAGES)
    one, three = (Distiller(student, weights={"logits": weight}) for weight in (1, 3))
    half_faded(student).eval()
    assert_close(three.compare(batch).parts["logits"], 3 * one.compare(batch).parts["logits"], FLOAT32)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda model: model, "it holds no PRepBN"),
        (lambda model: half_faded(converted(model)), r"blocks.0.norm1 is at gamma 0.5"),
        (lambda model: (sf.convert_norms_(model, progressive=False), model)[1], "9 of its norms are gone"),
    ],
    ids=["not converted", "fading", "gone"],
)
def test_a_student_without_its_norms_is_no_teacher(prepare: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be its own teacher: {words}; take it before"):
        Distiller(prepare(classifier()))


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (lambda: classifier(num_classes=7), r"another output than the student: \(4, 7\) instead of \(4, 5\)"),
        (lambda: nn.Identity(), r"\(4, 3, 16, 16\) instead of \(4, 5\)"),
        (lambda: bert(), r"the teacher \(BertModel\) cannot run on a batch of type Tensor of shape \(4, 3, 16, 16\)"),
    ],
    ids=["classes", "output", "inputs"],
)
def test_a_teacher_of_another_kind_is_refused_in_one_line(teacher: Any, words: str) -> None:
    distiller = Distiller(converted(classifier()), teacher())
    with pytest.raises(ValueError, match=words) as error:
        distiller(torch.randn(IMAGES))
    assert "\n" not in str(error.value)


def test_a_teacher_is_no_name() -> None:
    with pytest.raises(TypeError, match=r"the teacher must be a model or a slabformer.Teacher, got str"):
        Distiller(converted(classifier()), "deit_tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": {"logit": 1}}, "unknown loss 'logit'; it must be one of logits, features"),
        ({"weights": {"logits": -1}}, "logits must be at least 0, got -1"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"blocks": ["blocks.9"]}, "no module 'blocks.9' to compare"),
        ({"kind": "labels"}, "kind must be"),
    ],
    ids=["unknown", "negative", "temperature", "block", "kind"],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Distiller(converted(classifier()), **arguments)


def test_blocks_of_another_width_are_not_compared_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = converted(classifier()), classifier(embed_dim=24, num_heads=3)
    distiller = Distiller(student, teacher)
    with caplog.at_level("INFO"):
        assert [distiller.compare(torch.randn(IMAGES)).parts.keys() for _ in range(2)] == [{"logits"}, {"logits"}]
    assert caplog.text.count("blocks of the teacher return other shapes") == 1
    distiller = Distiller(student, teacher, blocks=["blocks.0"])
    with pytest.raises(ValueError, match=r"blocks.0 returns \(4, 17, 64\), the teacher's blocks.0 \(4, 17, 24\)"):
        distiller(torch.randn(IMAGES))


def test_a_teacher_taken_before_conversion_serves_and_follows_no_student() -> None:
    model, images = classifier(), torch.randn(IMAGES)
    teacher = Teacher(model)
    distiller = Distiller(half_faded(converted(model)), teacher)
    assert distiller.teacher is teacher
    assert distiller(images).item() > 0


def test_reentrant_checkpointing_is_refused_where_it_loses_the_gradient() -> None:
    class Checkpointed(nn.Module):
        """A stem, and a block whose inside is computed again in backward."""

        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.stem, self.reentrant = nn.Linear(6, 6), reentrant
            self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            def inside(x: Tensor) -> Tensor:
                return 2 * self.block(x)

            x = self.stem(x)
            return checkpoint(inside, x, use_reentrant=self.reentrant) if self.training else inside(x)

    for reentrant in (False, True):
        distiller = Distiller(converted(Checkpointed(reentrant)), blocks=["block"])
        with pytest.raises(ValueError, match="no gradient reaches the output of block") if reentrant else nullcontext():
            distiller(torch.randn(4, 6)).backward()
