"""A report of this machine's GPU under a clock: items of pytest, each a program of its own, those worth most first."""
