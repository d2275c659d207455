"""`slab detect`: the same verbs for Mask R-CNN."""

#: verb -> (module, what it does)
VERBS = {
    "train": ("slabformer.cli.detect.train", "train Mask R-CNN on a backbone whose LayerNorm fades out or is gone"),
    "eval": ("slabformer.cli.detect.eval", "box and mask AP of a detector on a data set"),
    "fuse": ("slabformer.cli.detect.fuse", "fold the norms of a detector's backbone, compare detections, save"),
    "predict": ("slabformer.cli.detect.predict", "boxes, masks, names and scores of what is on pictures"),
    "export": ("slabformer.cli.detect.export", "write a detector as ONNX, compared with PyTorch on images"),
    "bench": ("slabformer.cli.detect.bench", "time a detector against its LayerNorm baseline, fused and not"),
    "check-data": ("slabformer.cli.detect.check_data", "what a data set holds, and what is wrong with it"),
    "browse": ("slabformer.cli.detect.browse", "draw what training sees: augmented images with their objects"),
    "digits": ("slabformer.cli.detect.digits", "write the embedded data set as COCO files"),
}
