"""Change a model: a plan is carried out on the module tree, in float64.

`plan` is what a decision consists of and `fold` carries it out; begin there. `norms`, `pads` and `owners` say what the
tree holds, `copies` makes the models that are traced and tried in the model's place, `ties` separates shared layers,
`size` fixes input sizes. `files` and `plain` save what came out.
"""
