"""What is installed, and what of it cannot work together."""
