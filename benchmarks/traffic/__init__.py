"""A training step's kernels, what they read and write, and how long that would take on a GPU that is only described."""
