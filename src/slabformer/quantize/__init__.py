"""Integers end to end: a fused model in eight bits, since no norm asks for floats any more.

`openvino` calibrates, quantises and compares; begin there. Before anything is rounded, `integer_form` rewrites a model
as integer runtimes like it, with `integer_attention` for linear attention and `integer_windows` for shifted windows.
`signal_stack` keeps a library from leaving its own signal stack behind.
"""
