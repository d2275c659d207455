"""`slab lm`: the same verbs for language models."""

#: verb -> (module, what it does)
VERBS = {
    "train": ("slabformer.cli.lm.train", "train a LLaMA while its RMSNorms fade out"),
    "eval": ("slabformer.cli.lm.eval", "perplexity of a text, and accuracy on multiple-choice tasks"),
    "generate": ("slabformer.cli.lm.generate", "go on with a text"),
    "import": ("slabformer.cli.lm.importing", "the published LLaMA's folder into safetensors"),
    "fuse": ("slabformer.cli.lm.fuse", "fold every norm into its neighbours, verify, save"),
    "bench": (
        "slabformer.cli.lm.bench",
        "how fast it writes, fused and not, beside its RMSNorm baseline and its ceiling",
    ),
    "export": ("slabformer.cli.lm.export", "write ONNX with cache inputs, checked against PyTorch"),
}
