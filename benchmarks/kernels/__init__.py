"""Kernels and attention: measured, and their resources counted without a GPU."""
