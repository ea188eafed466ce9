"""A GGUF file in, checked fields and tensors out; a model's shape and weights in, a GGUF file's out."""
