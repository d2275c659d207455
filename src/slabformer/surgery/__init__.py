"""Passes over any ``nn.Module``: convert, fit, recalibrate, fuse, verify. Knows no model."""
