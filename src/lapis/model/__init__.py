"""A config and tensors in, logits out: one configurable transformer, its adapters, loading, counting, saving."""
