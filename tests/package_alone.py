"""The installed package: run by `make release` outside the repository, in an environment made for it.

It imports, its command answers, its data files are there, and a small model is fused on the command line.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import timm
import torch

import slabformer as sf
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.saved_model import ModelInfo, load_model, save_model

DATA = (
    *("py.typed", "quickstart/report.html.in", "ops/native/linear_attention.cpp", "ops/native/operator.cpp"),
    "ops/native/vectors.h",
    *("recipes/digits.yaml", "recipes/detection_digits.yaml", "recipes/llama_micro_prepbn.yaml"),
)


def slab(*arguments: object) -> str:
    """What the command prints; if it fails, so does this script."""
    command = [str(Path(sys.executable).with_name("slab")), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Try it all."""
    place = Path(str(sf.__file__))
    assert Path(sys.prefix) in place.parents, f"{place} is not the installed package"
    version = importlib.metadata.version("slabformer")
    assert version == sf.__version__, (version, sf.__version__)
    assert slab("--version") == f"slab {version}\n"
    missing = [name for name in DATA if not files("slabformer").joinpath(name).is_file()]
    assert not missing, f"the package lacks {missing}"

    torch.manual_seed(0)
    sizes = {"num_classes": 5}
    model = sf.testing.randomize_norms_(timm.create_model("slab_deit_micro", **sizes))
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    with tempfile.TemporaryDirectory() as folder:
        info = ModelInfo(model="slab_deit_micro", model_args=sizes, class_names=list("abcde"), input_size=(3, 32, 32))
        save_model(model, Path(folder) / "model.safetensors", info)
        slab("fuse", Path(folder) / "model.safetensors", "--output", Path(folder) / "fused.safetensors")
        fused, _ = load_model(Path(folder) / "fused.safetensors")
        assert not repbn_modules(fused)
        result = sf.verify(model.eval(), fused, torch.randn(2, 3, 32, 32))
    print(f"slabformer {version} from {place.parent}: fused, outputs within {result.max_rel:.1e}")


if __name__ == "__main__":
    main()
