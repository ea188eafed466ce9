"""A tokenizer folder in, token ids out, and text from ids again; new tokenizers are trained and written here."""
