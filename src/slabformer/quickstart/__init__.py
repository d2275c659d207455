"""The main job: a SLAB model's whole life on real images, next to its LayerNorm baseline, in minutes."""
