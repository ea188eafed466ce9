"""Minutes in, the size of a story out, with threads, precision and lessons."""
