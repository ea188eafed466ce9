"""A tour's settings in; its folder, the size of its story, threads, precision and first weights out."""
