"""Read a model: one flat graph in which every norm is an opaque call, and how channels move through it.

`trace` makes the graph; begin there. `rules` has a row for each operation that moves channels, `flow` follows them
downstream, upstream and through memory, `parts` finds the parameters that a layer's weight is made of. Nothing here
decides anything.
"""
