"""Private names of other packages are found by name, and named where they are missing."""

from __future__ import annotations

import pytest
import torch

from slabformer._private import MissingPrivateNameError, private


def test_attributes_and_modules_that_nobody_imported_are_found() -> None:
    assert private("torch._C._jit_set_profiling_mode", ("1", "2")) is torch._C._jit_set_profiling_mode
    assert private("json.tool.main", ("1", "2")).__module__ == "json.tool"


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        (("2.11", "2.14"), "checked with torch 2.11 to 2.14: install"),
        (("2.11", "2.11"), "checked with torch 2.11: install"),
    ],
)
def test_a_missing_name_is_told_with_the_versions_that_have_it(versions: tuple[str, str], told: str) -> None:
    with pytest.raises(MissingPrivateNameError, match=rf"^torch .* has no torch\._C\._gone, .*{told}"):
        private("torch._C._gone", versions)
