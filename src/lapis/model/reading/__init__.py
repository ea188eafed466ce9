"""A folder of any causal model in, one to run and look into out: lapis' own, or transformers' behind its face."""
