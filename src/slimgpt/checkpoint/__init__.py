"""What is written to and read from a model directory."""
