"""Models and held-out material of two languages in, what was won and what was lost out."""
