"""Change a model: what was decided is carried out on the module tree, in float64.

`plan` says what a decision consists of; begin there. `values` computes what it makes of each layer, and `fold` writes
that into the tree. `norms` says what the tree holds, `copies` makes the models that are traced and tried in the model's
place, `sharing` knows who holds which parameter and separates shared layers, `size` fixes input sizes. `files` saves
what came out.
"""
