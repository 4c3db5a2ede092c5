"""What decides which units go; one file for each method."""
