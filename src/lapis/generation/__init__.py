"""A model and a prompt in, text out: sampling, streaming, batches, conversations."""
