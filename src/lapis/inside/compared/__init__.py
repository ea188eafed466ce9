"""Two models in, what their activations say of the difference out: means over texts, patched passes, vectors."""
