"""Checkpoints in, checkpoint out: differences, merges and grafts by streaming; no model is ever built."""
