"""The command line: one file per command, and the console's signals."""
