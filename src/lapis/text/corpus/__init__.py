"""Files and data sets in, documents, chats, pairs, labeled texts and pictures out, each with its file and line."""
