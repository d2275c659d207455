"""Read a model: one flat graph in which every norm is an opaque call, and how channels move through it.

`trace` makes the graph; begin there. `labels` are channel numbers per element, `rules` has a row for each operation
that moves them, `flow` follows them downstream. `sites` and `parts` find the layers and the parameters that could take
a norm over; `memory` knows what is changed in place; `marks` are the opaque calls. Nothing here decides anything.
"""
