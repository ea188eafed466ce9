"""A list of messages in, text and ids by the model's own template out, and which of the ids are the assistant's."""
