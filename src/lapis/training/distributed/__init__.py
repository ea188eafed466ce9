"""The shares of a step and of a state that several processes have in; their sums, and one run and its checkpoints, out."""
