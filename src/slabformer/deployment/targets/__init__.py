"""What a deployed model can run on without this library: one file a target, and the table of them.

`base` says what a target is; begin there. `table` holds them by name; a target of your own is registered there.
"""
