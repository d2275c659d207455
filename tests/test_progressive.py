from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from golden import fill
from slabformer import PRepBN, ProgressiveSchedule, convert_norms_, fit_norms_, token_mask
from slabformer.nn.controls import prepbn_modules
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close

C = 8
GOLDEN = Path(__file__).parent / "golden" / "prepbn_training.npz"
PUBLISHED = {
    "norm.weight": "norm1.weight",
    "norm.bias": "norm1.bias",
    "rep.eta": "norm2.alpha",
    "rep.weight": "norm2.bn.weight",
    "rep.bias": "norm2.bn.bias",
    "rep.running_mean": "norm2.bn.running_mean",
    "rep.running_var": "norm2.bn.running_var",
}


class Net(nn.Module):
    """Two residual blocks, checkpointed or compiled on request."""

    def __init__(self, reentrant: bool | None = None, compiled: str | None = None, dtype: Any = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(PRepBN(C), nn.Linear(C, C), nn.Tanh()) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks).to(dtype)
        self.reentrant = reentrant
        if compiled:
            for block in blocks:
                block.compile(backend=compiled, fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


def train(model: nn.Module, steps: int = 6, mask: Tensor | None = None, **schedule: Any) -> list[Tensor]:
    """Parameters, gradients, statistics and input gradients after some steps through all phases."""
    settings = {"warmup": 1 / 3, "fade": 1 / 3, **schedule}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    progress = ProgressiveSchedule(model, steps, optimizer=optimizer, **settings)
    generator = torch.Generator().manual_seed(1)
    parameter = next(model.parameters())
    results = []
    for _ in range(steps):
        x = (1 + torch.randn(2, 5, C, generator=generator)).to(parameter.dtype).requires_grad_()
        optimizer.zero_grad()
        with token_mask(model, mask):
            model(x).square().mean().backward()
        optimizer.step()
        progress.step()
        results.append(x.grad)
    assert progress.finished
    named = [*model.named_parameters(), *model.named_buffers()]
    return [*results, *(value.detach().clone() for _, value in named), *(p.grad for p in model.parameters())]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, tolerance)


def test_linear_schedule_reproduces_the_published_training() -> None:
    golden = np.load(GOLDEN)
    norm = PRepBN(C, eps=1e-6)
    for ours, theirs in PUBLISHED.items():
        value = norm.state_dict()[ours]
        value.copy_(torch.from_numpy(fill.values(theirs, tuple(value.shape))))
    schedule = ProgressiveSchedule(norm, 6, warmup=2 / 6, fade=3 / 6, warm_statistics=False)
    inputs = torch.from_numpy(golden["inputs"]).float()
    for step in range(6):
        x = inputs[step].clone().requires_grad_()
        y = norm(x)
        (y * inputs[6]).sum().backward()
        schedule.step()
        assert_close(y, torch.from_numpy(golden["outputs"][step]), 1e-6)
        assert_close(x.grad, torch.from_numpy(golden["input_grads"][step]), 1e-6)
    for ours, theirs in PUBLISHED.items():
        assert_close(norm.state_dict()[ours], torch.from_numpy(golden[f"final.{theirs}"]), 1e-6)
        if "running" not in ours:
            assert_close(norm.get_parameter(ours).grad, torch.from_numpy(golden[f"grad.{theirs}"]), 1e-6)
    assert norm.rep.num_batches_tracked == int(golden["final.norm2.bn.num_batches_tracked"])
    assert norm.phase == "done"
    assert_close(norm.eval()(inputs[6]), torch.from_numpy(golden["eval_output"]), 1e-6)


@pytest.mark.parametrize(
    ("settings", "gammas", "phases"),
    [
        ({"fade": 0.8}, [1, 0.75, 0.5, 0.25, 0, 0], "FFFFDD"),
        ({"warmup": 0.4, "fade": 0.4}, [1, 1, 1, 0.5, 0, 0], "WWFFDD"),
        ({"warmup": 0.2, "fade": 0.8}, [1, 1, 0.75, 0.5, 0.25, 0], "WFFFFD"),
        ({"fade": 0.6, "shape": "cosine"}, [1, 0.75, 0.25, 0, 0, 0], "FFFDDD"),
        ({"fade": 1e-6}, [1, 0, 0, 0, 0, 0], "FDDDDD"),
    ],
    ids=["linear", "warmup", "to_the_end", "cosine", "at_once"],
)
def test_gamma_and_phase_at_every_step(settings: dict[str, Any], gammas: list[float], phases: str) -> None:
    norm = PRepBN(C)
    schedule = ProgressiveSchedule(norm, total_steps=5, **settings)
    seen = []
    for gamma in gammas:
        assert schedule.gamma == pytest.approx(gamma, abs=1e-12)
        assert float(norm.gamma) == pytest.approx(gamma, abs=1e-7)
        assert schedule.finished == (gamma == 0)
        assert norm.phase == schedule.phase
        seen.append(norm.phase[0].upper())
        schedule.step()
    assert "".join(seen) == phases


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100, 300_000])
@pytest.mark.parametrize("warmup", [0, 1 / 3, 0.5, 0.6, 0.9, 0.999])
def test_schedule_never_ends_after_training(total: int, warmup: float) -> None:
    schedule = ProgressiveSchedule(PRepBN(C), total, warmup=warmup, fade=1 - warmup)
    assert schedule.warmup_steps + schedule.fade_steps <= total
    schedule.load_state_dict({**schedule.state_dict(), "step": total - 1})
    schedule.step()
    assert schedule.finished


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number of at least 1"),
        ({"total_steps": 2.5}, "got 2.5"),
        ({"warmup": -0.1}, "warmup must be at least 0"),
        ({"fade": 0.0}, "fade above 0"),
        ({"fade": float("nan")}, "fade above 0"),
        ({"warmup": float("nan")}, "warmup must be at least 0"),
        ({"warmup": 0.3}, "end after training: warmup 0.3"),
        ({"fade": 1.1}, "end after training"),
        ({"shape": "step"}, "shape must be 'linear' or 'cosine', got 'step'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_change_nothing(settings: dict[str, Any], message: str) -> None:
    norm = PRepBN(C)
    norm.set_gamma(0.5)
    with pytest.raises(ValueError, match=message):
        ProgressiveSchedule(norm, **{"total_steps": 10, **settings})
    assert norm.gamma == 0.5


def test_model_without_prepbn_is_refused() -> None:
    with pytest.raises(ValueError, match="call convert_norms_"):
        ProgressiveSchedule(nn.LayerNorm(C), 10)


def unconverted() -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C))


def test_optimizer_built_before_conversion_is_refused_when_given() -> None:
    model = unconverted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norms_(model)
    with pytest.raises(ValueError, match=r"3 parameters of the norms \(first: 1.rep.weight\); build it after"):
        ProgressiveSchedule(model, 10, optimizer=optimizer)


def test_optimizer_built_before_conversion_is_noticed_at_the_first_step() -> None:
    model = unconverted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norms_(model)
    schedule = ProgressiveSchedule(model, 10)
    model(torch.randn(3, C)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="build it after convert_norms_"):
        schedule.step()


def test_right_optimizers_pass_split_or_frozen() -> None:
    model = unconverted()
    convert_norms_(model)
    model[1].norm.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD([p], 0.1) for p in parameters]
    schedule = ProgressiveSchedule(model, 2)
    model(torch.randn(3, C)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    schedule.step()
    assert schedule.gamma < 1


def test_forgotten_schedule_leaves_no_hook_behind() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks

    before = len(_global_optimizer_post_hooks)
    schedule = ProgressiveSchedule(PRepBN(C), 10)
    assert len(_global_optimizer_post_hooks) == before + 1
    del schedule
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("at", range(7))
def test_state_dict_goes_on_exactly_where_it_stood(shape: str, at: int) -> None:
    norm, resumed = PRepBN(C), PRepBN(C)
    schedule = ProgressiveSchedule(norm, 6, warmup=0.3, fade=0.5, shape=shape, warm_statistics=False)
    for _ in range(at):
        schedule.step()
    resumed.load_state_dict(norm.state_dict())
    other = ProgressiveSchedule(resumed, total_steps=99, fade=0.2)
    other.load_state_dict(schedule.state_dict())
    for _ in range(7 - at):
        assert (schedule.gamma, schedule.phase) == (other.gamma, other.phase)
        assert (norm.gamma, norm.phase) == (resumed.gamma, resumed.phase)
        assert norm.rep.warm_statistics == resumed.rep.warm_statistics
        schedule.step()
        other.step()
    assert all(isinstance(value, (int, str)) for value in schedule.state_dict().values())


def test_foreign_state_is_refused() -> None:
    schedule = ProgressiveSchedule(PRepBN(C), 6)
    with pytest.raises(ValueError, match="not a ProgressiveSchedule state"):
        schedule.load_state_dict({"last_epoch": 3})


def test_statistics_of_the_published_rule_stand_still_while_gamma_is_held() -> None:
    for warm_statistics in (True, False):
        norm = PRepBN(C)
        schedule = ProgressiveSchedule(norm, 4, warmup=0.5, fade=0.5, warm_statistics=warm_statistics)
        for _ in range(2):
            norm(torch.randn(3, C))
            schedule.step()
        assert norm.rep.num_batches_tracked == (2 if warm_statistics else 0)


def test_gradient_accumulation_moves_gamma_once_an_optimizer_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = ProgressiveSchedule(model, 4, fade=1.0, optimizer=optimizer)
    for step in range(4):
        for _ in range(3):
            assert all(norm.gamma == 1 - step / 4 for norm in prepbn_modules(model).values())
            model(torch.randn(2, 3, C, dtype=torch.float64)).mean().backward()
        optimizer.step()
        schedule.step()
    assert model.blocks[0][0].rep.num_batches_tracked == 12


MASKS = {"no_mask": None, "mask": torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing_changes_nothing(reentrant: bool, mask: Tensor | None) -> None:
    assert_all_close(train(Net(reentrant), mask=mask), train(Net(), mask=mask), ALGEBRA)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_backward_outside_the_mask_block_is_refused_under_checkpointing(reentrant: bool) -> None:
    model = Net(reentrant)
    ProgressiveSchedule(model, 10)
    x = torch.randn(2, 5, C, dtype=torch.float64, requires_grad=True)
    with token_mask(model, MASKS["mask"]):
        loss = model(x).mean()
    with pytest.raises(RuntimeError, match="keep backward\\(\\) inside"):
        loss.backward()


class NoSync(TorchDispatchMode):
    """Refuses whatever reads a tensor's values on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(op in name for op in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointed"])
def test_training_never_reads_back_from_the_device(reentrant: bool | None, mask: Tensor | None) -> None:
    with NoSync():
        train(Net(reentrant), mask=mask)


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no_mask", "mask"])
def test_compiles_once_a_phase(masked: bool) -> None:
    model, counter = Net(), CompileCounter()
    schedule = ProgressiveSchedule(model, 9, warmup=1 / 3, fade=1 / 3)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for step in range(9):
        mask = torch.rand(2, 5) > 0.2 if masked else None
        with token_mask(model, mask):
            compiled(1 + torch.randn(2, 5, C, dtype=torch.float64)).mean().backward()
        schedule.step()
        frames.append(counter.frame_count)
        assert model.blocks[0][0].rep.num_batches_tracked == step + 1
    assert frames == [1, 1, 1, 2, 2, 2, 3, 3, 3]


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpoint_inside"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TF32.*:UserWarning")  # of torch's own compiler
def test_compiled_training_equals_eager(backend: str, reentrant: bool | None) -> None:
    model = Net(reentrant, dtype=torch.float32)
    expected = train(Net(dtype=torch.float32), steps=3, mask=MASKS["mask"])
    model.compile(backend=backend, fullgraph=True)
    assert_all_close(train(model, steps=3, mask=MASKS["mask"]), expected, FLOAT32)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False], ids=["reentrant", "not"])
@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TF32.*:UserWarning")
def test_compiled_blocks_inside_checkpoints_count_once(backend: str, reentrant: bool) -> None:
    expected = train(Net(dtype=torch.float32), steps=3)
    actual = train(Net(reentrant, compiled=backend, dtype=torch.float32), steps=3)
    assert_all_close(actual, expected, FLOAT32)


def test_fitted_start_then_training_stays_finite_from_huge_activations() -> None:
    model = Net()
    x = 1e4 * torch.randn(4, 5, C, dtype=torch.float64)
    fit_norms_(model, [x])
    schedule = ProgressiveSchedule(model, 3, fade=1.0)
    for _ in range(3):
        assert model(x).isfinite().all()
        schedule.step()


def test_cosine_is_a_half_cosine() -> None:
    schedule = ProgressiveSchedule(PRepBN(C), 100, fade=1.0, shape="cosine")
    for step in range(100):
        assert schedule.gamma == pytest.approx((1 + math.cos(math.pi * step / 100)) / 2, abs=1e-12)
        schedule.step()


def test_resumed_training_is_bit_identical() -> None:
    straight = Net()
    optimizer = torch.optim.SGD(straight.parameters(), 0.1, momentum=0.9)
    schedule = ProgressiveSchedule(straight, 8, warmup=0.25, fade=0.5)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: ProgressiveSchedule, seed: int) -> None:
        x = torch.randn(2, 5, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()

    saved = []
    for seed in range(8):
        saved.append(copy.deepcopy((straight.state_dict(), optimizer.state_dict(), schedule.state_dict())))
        step(straight, optimizer, schedule, seed)
    for at, (weights, momenta, progress) in enumerate(saved):
        resumed = Net()
        optimizer = torch.optim.SGD(resumed.parameters(), 0.1, momentum=0.9)
        schedule = ProgressiveSchedule(resumed, 8, warmup=0.25, fade=0.5)
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(momenta)
        schedule.load_state_dict(progress)
        for seed in range(at, 8):
            step(resumed, optimizer, schedule, seed)
        for name, value in resumed.state_dict().items():
            assert_close(value, straight.state_dict()[name], EXACT)
