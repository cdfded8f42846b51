"""A model of training on many GPUs."""
