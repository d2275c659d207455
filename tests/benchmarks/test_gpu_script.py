"""`benchmarks/gpu.sh` and what it runs on a GPU, as far as a machine without one shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attention
import compare
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import slabformer as sf
from slabformer.bench.ceiling import ceiling_of

SCRIPT = Path(attention.__file__).with_name("gpu.sh")


def gpu_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False, timeout=1200
    )


def test_mistakes_cost_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (("--output", str(tmp_path)), "torch finds no CUDA device here; --dry-run tries the steps without one"),
        (("--output",), "--output needs a folder"),
        (("--quick",), "no option --quick"),
    ):
        done = gpu_sh(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "--dry-run" in gpu_sh("--help").stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_step_runs_at_toy_sizes(tmp_path: Path) -> None:
    done = gpu_sh("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "6 steps done, 0 failed" in done.stdout
    assert (tmp_path / "models_float32" / "compare.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "name",
    ["slab_deit_tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("slab_swin_tiny", "slab_pvt_tiny"))],
)
def test_forms_of_the_comparison_run_on_fake_gpu_tensors(name: str) -> None:
    fused, _ = sf.fuse(compare.trained_looking(name, 224), torch.randn(1, 3, 224, 224))
    models = (fused, compare.baseline(name, 224), ceiling_of(fused))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for model in models:
            logits = model.to("cuda", torch.bfloat16)(torch.empty(2, 3, 224, 224, device="cuda", dtype=torch.bfloat16))
            assert (logits.device.type, tuple(logits.shape)) == ("cuda", (2, 1000))
