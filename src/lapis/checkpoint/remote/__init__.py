"""Addresses of files elsewhere in, checked bytes out; nothing of a file that is read in ranges is kept."""
