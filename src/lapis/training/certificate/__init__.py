"""A run that has done its steps in, what proves it out: checks on its own model, certificate.json, and their page."""
