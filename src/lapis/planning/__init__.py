"""Two models and examples in, the layers to tune or to merge out, with evidence and a control."""
