"""How fast a model is, and how fast it could be: benchmarks and their reports.

`compare` times a classifier against itself fused, its LayerNorm baseline and its ceiling (`ceiling`); begin there,
then read `report`. `zoo` runs many models into one table. `decoding` times a language model, `detector` a detector,
each with its report beside it.
"""
