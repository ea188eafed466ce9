"""Documents, chats and pairs in, rows of token ids with loss masks out: packed, mixed, with an exact place in them."""
