"""`slab detect`: the same verbs for Mask R-CNN."""

#: verb -> (module, what it does)
VERBS: dict[str, tuple[str, str]] = {}
