"""Pretraining: set up, trained, logged, stopped and resumed."""
