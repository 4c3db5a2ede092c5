"""Infrastructure of all commands: atomic files, locks, run directory, processes, versions."""
