"""Keys of people, things and places in, the words of one language out, in every form that its sentences need.

One file for each language; every form is written there, none is guessed.
"""
