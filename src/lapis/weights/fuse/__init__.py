"""An adapter and its base in, one model folder out, tensor by tensor; no model is ever built."""
