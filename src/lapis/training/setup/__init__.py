"""Settings in, a model ready to train out: what to start from, what to tune, what fits into memory, what is fastest."""
