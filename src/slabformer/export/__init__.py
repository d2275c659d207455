"""Files for other runtimes, each checked against PyTorch before it is kept.

`model` writes one forward as ONNX or in torch.export's format; begin there. `decoder` writes a language model with its
cache as inputs and outputs. `detector` writes a detector, which `static_detector` first rewrites as a function of one
image with every shape known beforehand.
"""
