"""A model and held-out material in, scores out: texts, chats, choices, classes, preference pairs."""
