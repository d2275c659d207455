"""The `slab` command: parse, call, print."""
