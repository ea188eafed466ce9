"""Output tensors and their kernels in, a model folder out: streamed tile by tile, journaled, committed whole."""
