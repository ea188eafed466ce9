"""Text: tokenizers, chat templates, corpora, and rows of tokens to train on."""
