"""Keys of sentences in, their wordings in one language out.

One file for each language, with the same keys in each. The first wording under the key of a fact ("home", "food", ...)
is the one that chats answer with.
"""
