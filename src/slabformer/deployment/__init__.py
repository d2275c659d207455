"""From a trained model to a fast one: variants and their speed, export, plots."""
