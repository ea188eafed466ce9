"""One run in several processes: each takes its share of a step, and sums and gradients are added up."""
