"""Change a model: what was decided is carried out on the module tree, in float64.

`fold` says what a decision consists of and carries it out; begin there. `norms` says what the tree holds, `copies`
makes the models that are traced and tried in the model's place, `sharing` knows who holds which parameter and separates
shared layers, `size` fixes input sizes. `files` saves what came out.
"""
