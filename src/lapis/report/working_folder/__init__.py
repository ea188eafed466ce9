"""Folders that lapis wrote in, the rows of their curves, merges and scores out."""
