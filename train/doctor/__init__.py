"""``fastmae doctor``: this machine, the processes of a run, and what would make it fail or slow."""
