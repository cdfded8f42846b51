"""Attention by whoever computes it fastest: backends by name, tried and measured on the shapes of the run."""
