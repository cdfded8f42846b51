"""The transformer block: its layers, what of it is fused, and the measurement that chooses that."""
