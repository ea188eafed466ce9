"""A model, its new tokens and text of the language in, rows that are made by running the model out."""
