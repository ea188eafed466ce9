"""Which token is which: vocabularies are compared by the token's string, never by its number.

A vocabulary is read by text/tokenizer/vocabulary.py; here is what two of them have to do with each other.
"""

from collections.abc import Sequence

from lapis.checkpoint import Checkpoint
from lapis.text.tokenizer.folder import has_file
from lapis.text.tokenizer.vocabulary import Vocabulary as Vocabulary
from lapis.text.tokenizer.vocabulary import read_vocabulary


def open_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a checkpoint, an adapter's own before its base's; None where it has none that is text."""
    if checkpoint.adapter is not None and has_file(checkpoint.adapter.root, "tokenizer.json"):
        return read_vocabulary(checkpoint.adapter.root, checkpoint.config)
    return read_vocabulary(checkpoint.beside(), checkpoint.config)


def template_tokens(chat: Vocabulary, base: Vocabulary | None) -> list[str]:
    """The tokens that only chatting gave a meaning: whose rows a base model, and its continuation, never trained.

    These are the added tokens whose text stands in the chat template, and the chat model's end tokens, save those that
    the base itself names as begin, end or padding, for these it has trained.
    """
    written = {
        token
        for token in chat.added
        if chat.template and token in chat.template and (token in chat.special or _is_tag(token))
    }
    known = set(base.named.values()) | {t for t, i in base.ids.items() if i in base.ends} if base else set()
    ends = {token for token, i in chat.ids.items() if i in chat.ends}
    return sorted(written | (ends - known), key=lambda token: chat.ids[token])


def relation(one: Vocabulary, other: Vocabulary, rows: tuple[int, int] = (0, 0)) -> str:
    """How `one` relates to `other` by token string: equal, padded, extended, reduced, permuted or different.

    rows: embedding rows of both; "padded" is equal tokens with a different number of rows.
    """
    if one.ids == other.ids:
        return "equal" if rows[0] == rows[1] else "padded"
    shared = one.ids.keys() & other.ids.keys()
    same_place = all(one.ids[token] == other.ids[token] for token in shared)
    if not same_place:
        return "permuted" if len(shared) == len(one.ids) == len(other.ids) else "different"
    if len(shared) == len(other.ids):
        return "extended"
    return "reduced" if len(shared) == len(one.ids) else "different"


def rows_for(tokens: Sequence[str | None], other: Vocabulary) -> list[int]:
    """For each token its row in `other`; -1 where it has none."""
    return [-1 if token is None else other.ids.get(token, -1) for token in tokens]


def _is_tag(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in {("<", ">"), ("[", "]")}
