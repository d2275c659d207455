"""The whole way of a trained model that loses its norms: fit, fade, distil, recalibrate, fuse, verify, report."""
