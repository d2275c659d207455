"""Why a norm is not folded: raised where the reason is found, told in the report."""

from __future__ import annotations


class RefusalError(Exception):
    """Why a norm cannot be folded, in words that complete "kept as Affine: ..."."""
