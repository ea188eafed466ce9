"""Pairs of replies in, a loss that prefers the chosen one out, with or without a reference model."""
