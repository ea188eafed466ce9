"""Data in, batches and their summed loss out: what is learned, one class for each kind, and their table."""
