"""A model of many GPUs, on paper."""
