"""Training N at once: losses, clipping, sampling and `fit`."""
