"""Base and chat in, what chat learned out as a small file; such files and a model in, a graft out."""
