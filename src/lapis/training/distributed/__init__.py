"""The shares of a step that several processes computed in, their sums and gradients out."""
