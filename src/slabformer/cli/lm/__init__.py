"""`slab lm`: the same verbs for language models."""

#: verb -> (module, what it does)
VERBS = {
    "train": ("slabformer.cli.lm.train", "train a LLaMA while its RMSNorms fade out"),
}
