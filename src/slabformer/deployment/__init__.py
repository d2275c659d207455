"""From a trained model to the fastest form of it that was verified, in this process.

`deploy` tries step after step, measures each on top of those that were taken, and keeps what verifies and is faster;
begin there. `steps` is the table of them: a new target is one class. `native` puts our C++ attention in, `compiled` is
``torch.compile`` for inference. `detector` fuses a detector's backbone and compares its detections.
"""
