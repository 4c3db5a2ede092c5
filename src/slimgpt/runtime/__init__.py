"""What every command needs around its work: files, locks, the run directory, processes."""
