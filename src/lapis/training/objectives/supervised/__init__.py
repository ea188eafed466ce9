"""Rows or labeled examples in, cross entropy out: next tokens, hidden tokens, classes."""
