"""Minutes in, the size of a story out, with the threads, the precision and the first weights of its models."""
