"""How near a trained model is to itself when all its norms have just been replaced, before any training.

    python benchmarks/start.py                      # both models, three starts
    python benchmarks/start.py --models minilm --starts fit

MiniLM (13 post-norm LayerNorms): cosine between its embeddings of 2,000 glosses and the original's, Spearman's
correlation of the similarities of 1,000 of them, and how often the first word of a synset finds its gloss among the
2,000 (R@1). ViT-S/14 (25 pre-norm LayerNorms): cosine of class tokens, and 10-nearest-neighbour accuracy on
Fashion-MNIST. Starts: as converted, as converted with the published eta, and fitted. Calibration data is none of the
test's. Needs onnx, onnxruntime, scipy and transformers. Writes benchmarks/results/conversion/start.json and start.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from scipy.stats import spearmanr
from subjects import as_photos, fashion_mnist, glosses, minilm, sentence_embeddings, token_batches, vit_small
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
from slabformer.measure.timing import Machine

RESULTS = Path(__file__).parent / "results" / "conversion"
STARTS = ("original", "converted", "published", "fit")
Metrics = dict[str, float]


class MiniLM:
    """Sentences.

    Args:
        num_tested: Glosses that are embedded.
        num_fitted: Glosses that norms are fitted to.
    """

    def __init__(self, num_tested: int, num_fitted: int) -> None:
        self.model, tokenizer = minilm()
        found = glosses()
        tested, fitted = found[:num_tested], found[num_tested : num_tested + num_fitted]
        tested.sort(key=lambda gloss: len(gloss.meaning))  # less padding
        self.meanings = token_batches(tokenizer, [gloss.meaning for gloss in tested], 50)
        self.words = token_batches(tokenizer, [gloss.word for gloss in tested], 250)
        self.batches = token_batches(tokenizer, [gloss.meaning for gloss in fitted])
        self.expected = sentence_embeddings(self.model, self.meanings)

    def measure(self, model: nn.Module) -> Metrics:
        """Held against the original."""
        meanings, words = sentence_embeddings(model, self.meanings), sentence_embeddings(model, self.words)
        found = (words @ meanings.T).argmax(1)
        return {
            "cosine": float((meanings * self.expected).sum(1).mean()),
            "spearman": float(spearmanr(_similarities(meanings), _similarities(self.expected)).statistic),
            "recall_at_1": float((found == torch.arange(len(found))).float().mean()),
        }


def _similarities(rows: Tensor) -> Tensor:
    """Of every pair of every other row."""
    rows = rows[::2]
    return (rows @ rows.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))]


class ViTSmall:
    """Images.

    Args:
        num_tested: Test images; five times as many training images are their neighbours.
        num_fitted: Training images that norms are fitted to, none of those.
        size: Their height and width.
    """

    def __init__(self, num_tested: int, num_fitted: int, size: int) -> None:
        self.model = vit_small()
        images, labels = fashion_mnist("train")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        known, fitted = chosen[: 5 * num_tested], chosen[5 * num_tested :][:num_fitted]
        tested, self.expected_labels = fashion_mnist("test")
        self.tested, self.expected_labels = as_photos(tested[:num_tested], size), self.expected_labels[:num_tested]
        self.known, self.known_labels = as_photos(images[known], size), labels[known]
        self.batches = as_photos(images[fitted], size).split(32)
        self.expected = self._features(self.model, self.tested)

    @staticmethod
    @torch.no_grad()
    def _features(model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([F.normalize(model(part).pooler_output, dim=-1) for part in images.split(50)])

    def measure(self, model: nn.Module) -> Metrics:
        """Held against the original."""
        tested, known = self._features(model, self.tested), self._features(model, self.known)
        votes = F.one_hot(self.known_labels[(tested @ known.T).topk(10).indices], 10).sum(1)
        return {
            "cosine": float((tested * self.expected).sum(1).mean()),
            "accuracy_10nn": float((votes.argmax(1) == self.expected_labels).float().mean()),
        }


def started(subject: MiniLM | ViTSmall, start: str) -> tuple[nn.Module, float]:
    """A copy of the model, with the norms that ``start`` gives it, and the CPU seconds that it took."""
    model = copy.deepcopy(subject.model)
    begun = time.process_time()
    if start != "original":
        sf.convert_norms_(model, eta="published" if start == "published" else None)
        if start == "fit":
            sf.fit_norms_(model, subject.batches)
        else:
            sf.recalibrate_(model, subject.batches)
    return model.eval(), time.process_time() - begun


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["minilm", "vit_small"], default=["minilm", "vit_small"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--num-tested", type=int, help="glosses (2,000) and images (400)")
    parser.add_argument("--num-fitted", type=int, default=512, help="glosses and images that norms are fitted to")
    parser.add_argument("--size", type=int, default=98, help="of images")
    asked = parser.parse_args()
    made: dict[str, Callable[[], MiniLM | ViTSmall]] = {
        "minilm": lambda: MiniLM(asked.num_tested or 2000, asked.num_fitted),
        "vit_small": lambda: ViTSmall(asked.num_tested or 400, asked.num_fitted, asked.size),
    }
    path = RESULTS / "start.json"
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    for name in asked.models:
        subject = made[name]()
        for start in asked.starts:
            model, seconds = started(subject, start)
            row = {"model": name, "start": start, "seconds": round(seconds, 1), "num_fitted": asked.num_fitted}
            row |= {key: round(value, 4) for key, value in subject.measure(model).items()}
            print(row, flush=True)
            results["rows"] = [r for r in results["rows"] if (r["model"], r["start"]) != (name, start)] + [row]
            results["machine"] = asdict(Machine.here(torch.device("cpu")))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(results["rows"]))


def table(rows: list[dict[str, object]]) -> str:
    """One line for each start of each model."""
    names = ("model", "start", "cosine", "spearman", "recall_at_1", "accuracy_10nn", "seconds")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
