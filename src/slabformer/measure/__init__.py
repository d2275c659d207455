"""Figures about one model: seconds, bytes, operations, and how far one form of it is from another.

`timing` is the clock: several models in turns in one process, so that noise hits all of them alike; begin there.
`rows` is one row of a benchmark. `flops`, `cost` and `roofline` count what a forward must do and what this machine
could reach. `equality` and `detections` say how near a deployed form must be to what it was made of. `allocator` tells
the C library to keep memory. Nothing here changes a model.
"""
