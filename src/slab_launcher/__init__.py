"""The `slab` command's entry point."""

from slabformer.cli.main import main

__all__ = ["main"]
