"""Token ids of requests in, pieces of their replies out, from one batch that requests join and leave."""
