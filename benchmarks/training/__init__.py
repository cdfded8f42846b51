"""A training step against the reference and its best rival."""
