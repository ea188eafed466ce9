"""The sentences of the built-in world, one file per language, with the same keys in each.

The first wording under a fact's key ("home", "food", "buy", ...) is the one that chats answer with.
"""
