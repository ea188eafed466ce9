"""A command line in, calls of the API and their results on the terminal out; one file per command, no logic."""
