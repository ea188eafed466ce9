"""Batches in, updated weights and checkpoints out: the one loop, its state, its curve and how it stops."""
