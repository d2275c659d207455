"""Linear attention alone, against softmax attention: from 32 tokens to 65,536, forward, or with its gradients.

    python benchmarks/attention.py                                        # one CPU thread, float32
    python benchmarks/attention.py --quick                                # a minute, to see that it works
    python benchmarks/attention.py --device cuda --dtype bfloat16 --batch-size 16
    python benchmarks/attention.py --device cuda --dtype bfloat16 --batch-size 16 --backward

All forms of a length take turns in one process, and none is timed before it equals the float64 reference. Softmax ends
where one call would take too long. Writes CSV, Markdown and a picture into benchmarks/results/attention (or --output):
the time of each form, memory for each token, the share of the machine's floor, from how many tokens on the linear form
is the faster one, and the slope of its time against the number of tokens, beside that of a plain copy of as many bytes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from attention_table import NOT_LINEAR, Row, draw, markdown
from torch import Tensor
from torch.nn import functional as F

from slabformer.measure.allocator import keep_memory
from slabformer.measure.roofline import Ceilings, Work, measure_ceilings
from slabformer.measure.timing import Machine, memory_of, num_threads, quantile, time_interleaved
from slabformer.ops.dispatch import has_kernel, use_kernels
from slabformer.ops.linear_attention import linear_attention
from slabformer.ops.reference import linear_attention_reference
from slabformer.surgery.verify import VerificationError

RESULTS = Path(__file__).parent / "results" / "attention"
LENGTHS = (32, 49, 196, 784, 3136, 4096, 8192, 16384, 32768, 65536)
QUICK_LENGTHS = (49, 196, 784, 3136)
#: tokens of the inputs that forms are held against the reference with
VERIFIED_LENGTH = 196
#: largest difference from the reference over its root mean square
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
#: seconds of one call beyond which softmax is not asked for more tokens
LONGEST_CALL = 4.0

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def forms_for(device: torch.device) -> dict[str, Form]:
    """Every form by name: one call on queries, keys and values ``(B, num_heads, N, D)``."""
    forms: dict[str, Form] = {
        "linear": linear_attention,
        "linear, compiled": torch.compile(linear_attention, dynamic=False),
        "linear, composed": partial(linear_attention, order="linear"),
        "softmax": F.scaled_dot_product_attention,
    }
    if device.type == "cpu":
        del forms["linear, composed"]  # the same as "linear"
        forms["linear, C++"] = partial(linear_attention, native=True)
    elif importlib.util.find_spec("flash_bla") is not None:
        forms["flash_bla"] = _flash_bla
    return forms


def _flash_bla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_bla.ops.linear_attn.fused import linear_attention as theirs

    return theirs(q.relu(), k.relu(), v)


def packed(N: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a model's projection leaves them: heads of one tensor ``(B, N, 3 C)``."""
    torch.manual_seed(0)
    B, num_heads, D = options.batch_size, options.num_heads, options.head_dim
    tokens = torch.randn(B, N, 3 * num_heads * D, device=options.device, dtype=getattr(torch, options.dtype))
    q, k, v = (t.unflatten(-1, (num_heads, D)).transpose(1, 2) for t in tokens.chunk(3, -1))
    return tuple(t.requires_grad_() for t in (q, k, v)) if options.backward else (q, k, v)


def verify_form(name: str, form: Form, options: argparse.Namespace) -> None:
    """Hold a linear form against the float64 reference.

    Raises:
        VerificationError: If it computes something else.
    """
    q, k, v = packed(VERIFIED_LENGTH, options)
    expected = linear_attention_reference(q, k, v)
    error = (form(q, k, v).double() - expected).abs().max() / expected.square().mean().sqrt()
    if not error <= TOLERANCE[q.dtype]:
        raise VerificationError(f"{name} differs from the reference by {error:.1e} of its scale")


def call_of(form: Form, tensors: tuple[Tensor, Tensor, Tensor], backward: bool) -> Callable[[], object]:
    """One forward, or one forward and its gradients."""
    if not backward:
        return partial(form, *tensors)
    grad = torch.ones_like(tensors[0])

    @torch.enable_grad()
    def step() -> object:
        return torch.autograd.grad(form(*tensors), tensors, grad)

    return step


def measure(N: int, forms: dict[str, Form], ceilings: Ceilings, options: argparse.Namespace) -> list[Row]:
    """One row a form, all timed in turns."""
    torch._dynamo.reset()  # it compiles one function for 8 lengths, and runs it uncompiled for the ninth
    device = torch.device(options.device)
    tensors = packed(N, options)
    calls = {name: call_of(form, tensors, options.backward) for name, form in forms.items()}
    source = torch.randn(2 * tensors[0].numel(), device=device).to(tensors[0].dtype)  # half of what the form moves
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    turns = time_interleaved(calls, seconds=options.seconds, device=device)
    floor = linear_work(tensors, options.backward).floor(ceilings)
    num_tokens = options.batch_size * N
    rows = []
    for name, call in calls.items():
        memory = memory_of(call, device)
        seconds = quantile(turns[name], 0.5)
        row = Row(
            form=name,
            backend=backend_of(name, tensors),
            backward=options.backward,
            num_tokens=N,
            batch_size=options.batch_size,
            num_heads=options.num_heads,
            head_dim=options.head_dim,
            p50_ms=1e3 * seconds,
            p90_ms=1e3 * quantile(turns[name], 0.9),
            bytes_per_token=None if memory is None else memory / num_tokens,
            of_floor=None if name in NOT_LINEAR else floor / seconds,
        )
        print(row, flush=True)
        rows.append(row)
    return rows


def backend_of(form: str, tensors: tuple[Tensor, Tensor, Tensor]) -> str:
    """What runs: kernels of ours, or torch's."""
    if form == "linear, C++" and has_kernel(*tensors, native=True):
        return "C++"
    return "triton" if form in ("linear", "linear, compiled") and has_kernel(*tensors) else "torch"


def linear_work(tensors: tuple[Tensor, Tensor, Tensor], backward: bool) -> Work:
    """What the linear form cannot do without: each of q, k, v and the output once; backward, their gradients too."""
    B, num_heads, N, D = tensors[0].shape
    size = tensors[0].numel() * tensors[0].element_size()
    products = 2 * B * num_heads * N * D * D
    forward = Work(flops=2 * products, bytes=4 * size)
    return Work(flops=7 * products, bytes=11 * size) if backward else forward


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of an image")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--backward", action="store_true", help="forward and gradients of q, k and v")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, for each length")
    parser.add_argument("--quick", action="store_true", help="short sequences, half a second each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.seconds = QUICK_LENGTHS, 0.5
    return options


def main() -> None:
    options = parse()
    keep_memory()  # for all forms alike
    use_kernels()  # on a GPU that they are timed on for the first time, too
    device = torch.device(options.device)
    forms = forms_for(device)
    with num_threads(options.threads if options.device == "cpu" else None):
        machine = Machine.here(device)
        for name in [name for name in forms if name != "softmax"]:
            verify_form(name, forms[name], options)
        ceilings = measure_ceilings(device, getattr(torch, options.dtype))
        rows: list[Row] = []
        for N in sorted(options.lengths):
            softmax = [row for row in rows if row.form == "softmax"]
            if softmax and softmax[-1].p50_ms * (N / softmax[-1].num_tokens) ** 2 > 1e3 * LONGEST_CALL:
                forms.pop("softmax", None)
            rows += measure(N, forms, ceilings, options)
    write(rows, machine, ceilings, options)


def write(rows: list[Row], machine: Machine, ceilings: Ceilings, options: argparse.Namespace) -> None:
    """The table, the Markdown and the picture, named after device, dtype and direction."""
    options.output.mkdir(parents=True, exist_ok=True)
    stem = f"{options.device}_{options.dtype}" + "_backward" * options.backward
    here = {**machine.columns(), "dtype": options.dtype}
    with (options.output / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*asdict(rows[0]), *here])
        writer.writeheader()
        writer.writerows(asdict(row) | here for row in rows)
    (options.output / f"{stem}.md").write_text(markdown(rows, f"{machine}; {ceilings}"))
    draw(rows, options.output / f"{stem}.png", f"{options.device}, {options.dtype}")


if __name__ == "__main__":
    main()
