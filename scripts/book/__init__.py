"""The book: chapters of docs/book in, notebooks and a site that works offline out."""
