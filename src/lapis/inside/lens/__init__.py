"""Hidden states in, words and ranks out: every layer read through the model's own head, or through a tuned one."""
