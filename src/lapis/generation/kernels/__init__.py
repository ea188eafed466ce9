"""A model's layers in, the same layers with weights laid out for generating out: products, norms, attention.

The processor's own C compiler makes the kernels for it (kernels.c) where there is one; else oneDNN's are used.
"""
