"""One optimizer step, and what makes it fast: torch.compile, CUDA graphs, sharding over processes."""
