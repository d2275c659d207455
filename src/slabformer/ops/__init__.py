"""Functions on tensors. Needs torch alone and knows no module."""
