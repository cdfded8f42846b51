"""Kernels and attention, measured and, without a GPU, counted."""
