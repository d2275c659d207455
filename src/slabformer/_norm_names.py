"""What norms are called where models are built with them; what they are stands in the table, `nn.norms`.

Options and recipes are checked against these names before torch is imported.
"""

from __future__ import annotations

from typing import Annotated

from slabformer.settings import Known

#: rows of the table that models are built with
BUILT_IN = ("prepbn", "repbn", "batchnorm", "layernorm", "rmsnorm", "dyt")
#: rows from outside, as :func:`slabformer.register_norm` adds them
REGISTERED: list[str] = []


def norm_names() -> list[str]:
    """Names that models take as ``norm``."""
    return [*BUILT_IN, *REGISTERED]


NormName = Annotated[str, Known(norm_names)]
#: of the maps of a detector's backbone
OutputNormName = Annotated[str, Known(lambda: [*norm_names(), "none"])]
