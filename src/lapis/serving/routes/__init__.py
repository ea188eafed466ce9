"""Bodies of requests in, OpenAI's objects and events out; one file for each route."""
