"""Integers end to end: a fused model in eight bits, since no norm asks for floats any more.

`openvino` calibrates, quantises and compares; begin there; `onnx_file` does it for ONNX, and `calibration` for both.
Before anything is rounded, `integer_form` rewrites a model as integer runtimes like it, with `integer_attention` for
linear attention.
"""
