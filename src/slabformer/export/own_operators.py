"""Programs that bring the C++ attention with them, for a process that has torch and not slabformer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from slabformer.ops.native.operator import attention_library

NATIVE = torch.ops.slabformer.linear_attention_native.default


def bring_attention_(program: torch.export.ExportedProgram) -> Counter[Path]:
    """Let ``program`` call the C++ attention in libraries of its own, wherever it calls that of this process.

    Args:
        program: Exported inside :func:`slabformer.ops.dispatch.native_in_programs`; edited in place.

    Returns:
        The libraries, which another process gives to ``torch.ops.load_library`` first, and how often each is called.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    libraries: Counter[Path] = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is NATIVE:
            q, v = (node.args[place].meta["val"] for place in (0, 2))
            node.target, library = attention_library(q.dtype, q.shape[3], v.shape[3])
            libraries[library] += 1
    program.graph_module.recompile()
    return libraries
