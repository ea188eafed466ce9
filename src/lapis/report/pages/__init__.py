"""Logs, JSON and pages of other commands in, whole pages out: of training, of a plan, of a working folder."""
