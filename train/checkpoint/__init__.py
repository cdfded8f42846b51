"""Checkpoints: written beside training, complete or ignored, read by any world size."""
