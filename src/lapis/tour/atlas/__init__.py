"""The book's small world: a seed in, texts, chats and four tiny models of fourteen countries out."""
