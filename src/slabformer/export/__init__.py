"""Files for other runtimes, each checked against PyTorch before it is kept.

`model` writes one forward as ONNX or in torch.export's format; begin there. `signature` names what goes in and comes
out, `onnx_file` and `exporter` write, `program` and `openvino_run` run what was written, and `refusals` says in one
line what an engine does not take. `map_form` rewrites a model as engines like it in floating point, with `maps`,
`heads_first` for linear attention and `gathered_windows` for shifted windows; `token_form` is what it shares with the
form for integers. `decoder` writes a language model with its cache as inputs and outputs. `detector` writes a detector,
which `static_detector` first rewrites as a function of one image with every shape known beforehand. `signal_stack`
keeps a library from leaving its own signal stack behind.
"""
