"""Training of classifiers on ``mindspore.train.Model``, by the recipes of `slab train`."""
