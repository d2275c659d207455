"""`slab detect`: the same verbs for Mask R-CNN."""

#: verb -> (module, what it does)
VERBS = {
    "train": ("slabformer.cli.detect.train", "train Mask R-CNN on a backbone whose LayerNorm fades out or is gone"),
    "eval": ("slabformer.cli.detect.eval", "measure the box and mask AP of a detector on a data set"),
    "fuse": ("slabformer.cli.detect.fuse", "fold the norms of a detector's backbone, compare detections, save"),
    "predict": ("slabformer.cli.detect.predict", "find objects in images: boxes, masks, classes and scores"),
    "export": ("slabformer.cli.detect.export", "write a detector as ONNX, checked against PyTorch on images"),
    "bench": (
        "slabformer.cli.detect.bench",
        "measure the speed of a detector, fused and unfused, beside its LayerNorm baseline",
    ),
    "check-data": ("slabformer.cli.detect.check_data", "show what a data set holds, and what is wrong with it"),
    "browse": ("slabformer.cli.detect.browse", "draw augmented training images with their objects"),
    "digits": ("slabformer.cli.detect.digits", "write the embedded data set as COCO files"),
}
