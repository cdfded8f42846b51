"""A look before the start: this machine, the processes of a run, and what would make it fail or slow."""
