"""Pictures, and the data that only pictures need: data in, a matplotlib ``Figure`` out.

`plots` holds the style and the common figures; begin there. `comparison` reads measured models and
`comparison_picture` draws accuracy against speed. `attention_maps` computes which token attends to which, and
`attention_picture` draws it.
"""
