"""Programs that run: the command line, pretraining, and what a run needs around the model."""
