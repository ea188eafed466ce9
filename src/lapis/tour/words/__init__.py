"""The word tables of the built-in world, one file per language: every form is written, none is guessed."""
