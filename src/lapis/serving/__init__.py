"""Models and requests in, replies as OpenAI's API has them out."""
