"""Tokens to text, piece by piece: no character is split, and a stop text is never half shown.

Leaves out which tokens end a reply (generate.py) and how text becomes tokens (lapis.text).
"""

from collections.abc import Sequence
from typing import Protocol

# what would move a terminal's cursor, change its title or ring its bell, as pictures of itself
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def for_terminal(text: str) -> str:
    """The text with control characters made visible: a model's words must not steer the reader's terminal."""
    return text.translate(_CONTROLS)


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str: ...


class Pieces:
    """The text of a reply while its tokens arrive.

    Decoding starts a few tokens back, in the prompt, because a token's text may depend on the one before (a space at
    the start of a word). What could still become a stop text, or is an unfinished UTF-8 character, is held back.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-4:])
        self._context = 0  # ids before this one are only context
        self._read = len(self._ids)  # the text of ids[context:read] has been taken in
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes in one token; the text that is now certain, often nothing. `stopped` says that a stop text appeared."""
        self._ids.append(token)
        return self._release(self._decoded(final=False), final=False)

    def end(self) -> str:
        """What was held back when no more tokens come."""
        return self._release(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._read], True)
        now = self._tokenizer.decode(self._ids[self._context :], True)
        if len(now) <= len(before) or (now.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _release(self, fresh: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += fresh
        cut = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        self.stopped = cut >= 0
        if cut < 0:
            cut = len(self._held) if final else len(self._held) - self._undecided()
        piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece

    def _undecided(self) -> int:
        """Characters at the end of what is held that a stop text begins with."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
