"""Gradients in, updates out: optimizers, the learning rate of a step, averages of the weights."""
