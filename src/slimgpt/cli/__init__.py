"""The command line: commands, flags and tables."""
