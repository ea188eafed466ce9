"""Text in, rows of token ids out: tokenizers, chats by their templates, files of records, packed rows."""
