"""A model and a prompt in, what happens on the way out: every layer's words, attention maps, contributions."""
