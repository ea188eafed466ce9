"""A tokenizer in, what a GGUF file says of it out, and text to ids as that file is read."""
