"""A public model and real text in; the tour's story about them, its scores and its page out."""
