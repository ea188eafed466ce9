"""A YAML file, a mapping or a line of arithmetic in, a checked recipe out: methods, models, parameters, stages."""
