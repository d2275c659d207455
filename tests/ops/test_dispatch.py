from __future__ import annotations

import pytest
import torch

from slabformer.ops import dispatch
from slabformer.ops.dispatch import has_kernel, runs_kernels
from slabformer.ops.linear_attention import linear_attention


class OnGPU:
    """What :func:`has_kernel` asks of a tensor, without one."""

    def __init__(
        self, N: int = 196, D: int = 32, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", B: int = 2
    ) -> None:
        self.shape, self.dtype, self.device = (B, 3, N, D), dtype, torch.device(device)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "runs_kernels", lambda device: True)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("tensor", "answer"),
    [
        (OnGPU(), True),
        (OnGPU(dtype=torch.float16), True),
        (OnGPU(dtype=torch.float32), True),
        (OnGPU(D=16), True),
        (OnGPU(D=128), True),
        (OnGPU(N=16384, D=24), True),
        (OnGPU(device="cpu"), False),
        (OnGPU(dtype=torch.float64), False),
        (OnGPU(D=8), False),
        (OnGPU(D=160), False),
        (OnGPU(N=7), False),
        (OnGPU(B=0), False),
    ],
    ids=[
        "bf16",
        "fp16",
        "fp32",
        "narrow",
        "wide",
        "odd",
        "cpu",
        "fp64",
        "too narrow",
        "too wide",
        "too short",
        "empty",
    ],
)
def test_the_table_decides(tensor, answer):
    assert has_kernel(tensor, tensor, tensor) is answer


@pytest.mark.usefixtures("_gpu")
def test_mixed_dtypes_are_composed():
    assert not has_kernel(OnGPU(), OnGPU(), OnGPU(dtype=torch.float16))


@pytest.mark.usefixtures("_gpu")
def test_transforms_that_kernels_do_not_know_are_composed():
    answers = []

    def ask(x):
        answers.append(has_kernel(OnGPU(), OnGPU(), OnGPU()))
        return x.sum()

    torch.func.vmap(ask)(torch.ones(2, 2))
    torch.func.grad(ask)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        ask(torch.ones(2))
    assert answers == [False] * 3
    ask(torch.ones(2))
    assert answers[-1]


def test_a_cpu_runs_no_kernels():
    assert not runs_kernels(torch.device("cpu"))


@pytest.fixture
def _newest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.delenv(dispatch.KERNELS, raising=False)
    monkeypatch.setattr(dispatch._Asked, "wanted", None)


@pytest.mark.usefixtures("_newest_gpu")
def test_old_gpus_and_those_without_triton_run_no_kernels(monkeypatch):
    cuda = torch.device("cuda")
    dispatch.use_kernels()
    assert runs_kernels(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not runs_kernels(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert not runs_kernels(cuda)


@pytest.mark.usefixtures("_newest_gpu")
def test_kernels_are_off_where_they_were_never_timed_unless_asked_for(monkeypatch):
    cuda = torch.device("cuda")
    assert not runs_kernels(cuda)
    monkeypatch.setattr(dispatch, "TIMED_GPUS", {"NVIDIA H100"})
    assert runs_kernels(cuda)
    monkeypatch.setenv(dispatch.KERNELS, "0")
    assert not runs_kernels(cuda)
    monkeypatch.setattr(dispatch, "TIMED_GPUS", set())
    monkeypatch.setenv(dispatch.KERNELS, "1")
    assert runs_kernels(cuda)
    dispatch.use_kernels(False)
    assert not runs_kernels(cuda)
    dispatch.use_kernels(None)
    monkeypatch.setenv(dispatch.KERNELS, "yes")
    with pytest.raises(ValueError, match="SLABFORMER_KERNELS must be 0 or 1, got 'yes'"):
        runs_kernels(cuda)


def test_thresholds_name_their_measurement():
    for threshold in dispatch.THRESHOLDS.values():
        assert threshold.measurement == "unmeasured" or threshold.measurement.endswith((".csv", ".md"))


def test_the_question_is_answered_while_compiling():
    q = torch.randn(1, 2, 7, 16)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: (linear_attention(q, q, q), runs_kernels(q.device)), fullgraph=True, backend="eager"
    )
    out, answer = compiled(q)
    assert torch.equal(out, linear_attention(q, q, q))
    assert answer is False
