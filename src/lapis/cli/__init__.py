"""The command line: one file per command group. Parse, call the API, show; no logic here."""
