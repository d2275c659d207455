"""What fit_norms_ costs on a BERT-base of random weights: CPU seconds and peak memory, beside plain forwards.

    python benchmarks/fit_cost.py                                # 4 batches of 16 x 128 tokens, one thread
    python benchmarks/fit_cost.py --num-batches 16 --tokens 64

Each is measured in a process of its own: weights and library alone, forwards of the batches, the fit on them. Writes
benchmarks/results/conversion/fit_cost.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import slabformer as sf
from slabformer.measure.timing import Machine

RESULTS = Path(__file__).parent / "results" / "conversion" / "fit_cost.json"
WORK = ("nothing", "forward", "fit")


def measure(work: str, num_batches: int, batch_size: int, tokens: int) -> dict[str, float]:
    """CPU seconds of ``work`` and the most memory that the process ever held, in MiB."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    sf.convert_norms_(model)
    ids = torch.randint(1000, 30000, (num_batches, batch_size, tokens))
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    begun = time.process_time()
    if work == "forward":
        with torch.no_grad(), sf.blended(model):
            for batch in batches:
                model(**batch)
    elif work == "fit":
        sf.fit_norms_(model, batches)
    seconds = time.process_time() - begun
    return {"cpu_seconds": round(seconds, 1), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    asked = vars(parser.parse_args())
    result: dict[str, object] = dict(asked)
    for work in WORK:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result[work] = pool.apply(measure, (work, *asked.values()))
            print(work, result[work], flush=True)
    result["machine"] = asdict(Machine.here(torch.device("cpu")))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
