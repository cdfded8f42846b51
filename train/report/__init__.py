"""The page about a run, from its log."""
