"""A model folder in, a file for other programs out, and the way back."""
