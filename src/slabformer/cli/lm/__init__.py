"""`slab lm`: the same verbs for language models."""

#: verb -> (module, what it does)
VERBS = {
    "train": ("slabformer.cli.lm.train", "train a LLaMA while its RMSNorms fade out"),
    "eval": ("slabformer.cli.lm.eval", "measure perplexity on a text, and accuracy on multiple-choice tasks"),
    "generate": ("slabformer.cli.lm.generate", "continue a text"),
    "import": ("slabformer.cli.lm.importing", "convert the published LLaMA's folder to safetensors"),
    "fuse": ("slabformer.cli.lm.fuse", "fold every norm into its neighbours, verify, save"),
    "bench": (
        "slabformer.cli.lm.bench",
        "measure decoding speed, fused and unfused, beside the RMSNorm baseline and the ceiling",
    ),
    "export": ("slabformer.cli.lm.export", "write ONNX with cache inputs, checked against PyTorch"),
}
