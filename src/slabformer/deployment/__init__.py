"""From a trained model to the fastest form of it that was verified: in this process, or as a folder for any.

`deploy` tries step after step, measures each on top of those that were taken, and keeps what verifies and is faster;
begin there. `steps` is the table of them. `native` puts our C++ attention in, `compiled` is ``torch.compile`` for
inference. `targets` are the runtimes that a model can be written for, `targeted` builds and verifies what a plan asks
for, and `artifact` is the folder that is written and loaded. `detector` fuses a detector's backbone and compares its
detections.
"""
