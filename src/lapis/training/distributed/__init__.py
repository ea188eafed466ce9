"""The shares of several processes in a step and in a state, in; their sums, one run and its checkpoints, out."""
