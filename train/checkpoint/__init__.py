"""Checkpoints: written beside training, complete or ignored, read by any number of processes."""
