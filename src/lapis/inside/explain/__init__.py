"""A model and a text in, what the model does with it out: measured once, as data and as one page."""
