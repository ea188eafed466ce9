"""Minutes and a language in, six small models, their scores and one page out: the whole of lapis as one story."""
