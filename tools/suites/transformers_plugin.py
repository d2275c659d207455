"""pytest plugin: transformers' common tests for our LLaMA.

The tests tell models with a head from models without one by the class names that the auto classes list; ours are listed
here, as transformers lists its own. Its source distribution lacks the tests of `generate` and of the exporters: without
them, the mixins that the common tests inherit from are empty, and this is said.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
from transformers.models.auto import modeling_auto

MIXINS = {"tests.generation.test_utils": "GenerationTesterMixin", "tests.exporters.test_export": "ExportTesterMixin"}
HEADS = {
    "MODEL_MAPPING_NAMES": "SlabLlamaModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "SlabLlamaForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "SlabLlamaForSequenceClassification",
}
_missing: list[str] = []


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def pytest_configure(config: pytest.Config) -> None:
    """List our classes; put empty mixins where the sources have none."""
    for mapping, name in HEADS.items():
        getattr(modeling_auto, mapping)["slab_llama"] = name
    for module, mixin in MIXINS.items():
        if not _is_there(module):
            _missing.append(module)
            package = module.rpartition(".")[0]
            sys.modules.setdefault(package, ModuleType(package))
            sys.modules[module] = ModuleType(module)
            setattr(sys.modules[module], mixin, type(mixin, (), {}))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What is left out."""
    return [f"not in these sources, left out: {module}" for module in _missing]
