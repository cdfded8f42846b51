"""A training step, compared with the reference and its best rival."""
