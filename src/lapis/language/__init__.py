"""A model and text of one's own language in, a tokenizer, a model and figures of that language out."""
