from __future__ import annotations

import pytest
import timm

import slabformer  # noqa: F401  (registers the models)
from reference_files import GOLDEN, description
from slabformer.models.weights.published import BY_MODEL, PUBLISHED

CONFIGS = sorted(path.stem for path in GOLDEN.glob("*.json") if "parameters" in description(path.stem))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_reference_model_is_in_the_table_with_its_parameters(name):
    if name in PUBLISHED:
        assert PUBLISHED[name].num_params == description(name)["parameters"]
    else:
        assert name.startswith(("detection_", "llama_"))


def test_names_are_unique():
    assert len(PUBLISHED) == len(BY_MODEL) == 22
    files = [row.file for row in PUBLISHED.values() if row.file]
    assert len(files) == len(set(files)) == 12


@pytest.mark.parametrize("name", sorted(name for name in BY_MODEL if timm.is_model(name)))
def test_registered_models_point_to_the_released_file(name):
    config = timm.models.get_pretrained_cfg(name)
    assert (config.url or None) == BY_MODEL[name].url
    assert config.input_size == (3, 224, 224)
