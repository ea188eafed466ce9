"""Two checkpoints in, a table of what changed out: per tensor, layer, component and embedding row."""
