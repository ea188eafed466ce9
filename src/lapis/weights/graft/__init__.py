"""Base, chat and onto in, onto + scale * (chat - base) out, tensor by tensor."""
