"""What fuse takes in memory on a LLaMA of random weights, beyond the model itself, in units of the model's weights.

    python benchmarks/fuse_memory.py                                  # 12 layers of width 1024 in bfloat16
    python benchmarks/fuse_memory.py --layers 32 --width 4096 --in-place   # 7B; a copy would not fit into 24 GiB

Measured in a process of its own, by what the C library (glibc) has handed out, sampled every millisecond; two tokens,
so that the activations count for little. A copy alone is 1. Writes benchmarks/results/fuse_memory.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slabformer as sf
from slabformer.measure.timing import Machine

RESULTS = Path(__file__).parent / "results" / "fuse_memory.json"


class _Mallinfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


class PeakMemory:
    """Bytes in use at most while it is entered, beyond those at its start."""

    def __enter__(self) -> PeakMemory:
        self._library = ctypes.CDLL("libc.so.6")
        self._library.mallinfo2.restype = _Mallinfo
        self._is_over = threading.Event()
        self._start = self.bytes = self._in_use()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.bytes -= self._start

    def _watch(self) -> None:
        while not self._is_over.wait(0.001):
            self.bytes = max(self.bytes, self._in_use())

    def _in_use(self) -> int:
        info = self._library.mallinfo2()
        return info.uordblks + info.hblkhd


def build(layers: int, width: int, vocabulary: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Norms gone to RepBN, the schedule done."""
    heads = width // 64
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocabulary)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    sf.convert_norms_(model)
    for module in model.modules():
        if isinstance(module, sf.PRepBN):
            module.set_gamma(0)
    return model


def measure(layers: int, width: int, vocabulary: int, dtype: str, in_place: bool) -> dict[str, object]:
    """Fuse once and say what it took."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build(layers, width, vocabulary, getattr(torch, dtype))
    sizes = [parameter.nbytes for parameter in model.parameters()]
    widest = max(parameter.numel() for parameter in model.parameters())
    tokens = torch.tensor([[1, 2]])
    with torch.no_grad():
        model(tokens)
    begun = time.process_time()
    with PeakMemory() as peak:
        report = sf.fuse_(model, tokens) if in_place else sf.fuse(model, tokens)[1]
    seconds = time.process_time() - begun
    return {
        "weights_mib": sum(sizes) >> 20,
        "widest_parameter_in_float64_mib": 8 * widest >> 20,
        "peak_beyond_model_mib": peak.bytes >> 20,
        "over_weights": round(peak.bytes / sum(sizes), 2),
        "cpu_seconds": round(seconds, 1),
        "folded": report.num_folded,
        "kept": report.num_kept,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--in-place", action="store_true", help="fuse_ instead of fuse")
    asked = vars(parser.parse_args())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(measure, tuple(asked.values()))
    print(json.dumps(found, indent=1))
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [row for row in rows if any(row[key] != value for key, value in asked.items())] + [{**asked, **found}]
    machine = asdict(Machine.here(torch.device("cpu")))
    RESULTS.write_text(json.dumps({"rows": rows, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
