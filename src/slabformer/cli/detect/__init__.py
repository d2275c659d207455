"""`slab detect`: the same verbs for Mask R-CNN."""

#: verb -> (module, what it does)
VERBS = {
    "train": ("slabformer.cli.detect.train", "train Mask R-CNN on a backbone whose LayerNorm fades out or is gone"),
}
