"""`slab mindspore`: classifiers in MindSpore."""

#: verb -> (module, what it does)
VERBS = {
    "train": ("slabformer.cli.mindspore.train", "train a classifier by a recipe of `slab train`, in graph mode"),
    "eval": ("slabformer.cli.mindspore.eval", "measure the accuracy that a model has in MindSpore"),
    "convert": ("slabformer.cli.mindspore.convert", "write weights as .ckpt, or those of a .ckpt as .safetensors"),
    "export": (
        "slabformer.cli.mindspore.export",
        "write a fused model for MindSpore: source, .ckpt and MINDIR, each checked against PyTorch",
    ),
    "verify": ("slabformer.cli.mindspore.verify", "compare what was exported with PyTorch"),
}
