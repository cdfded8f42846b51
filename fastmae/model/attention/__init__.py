"""Attention by its fastest backend: probed, and timed, on the shapes of the run."""
