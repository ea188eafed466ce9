"""Replies that keep to a grammar: a JSON schema or a form of tool call in, the tokens that may come next out.

llguidance does the work, in Rust and with limits of its own on what a grammar may cost; sizes are bounded before it
sees them. Leaves out what the grammar is for: routes/ and tools.py.

Shapes: V vocabulary.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapis.errors import DataError, LapisError, MissingExtra
from lapis.text.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

SCHEMA_LIMIT = 100_000  # characters of a schema
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON that fits a schema. Raises DataError for one that is too large or cannot be followed."""
    text = json.dumps(schema)
    if len(text) > SCHEMA_LIMIT:
        raise DataError(f"the schema has {len(text):,} characters; the limit is {SCHEMA_LIMIT:,}")
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": r"[ \n]{0,16}"})
    except ValueError as error:
        raise DataError(f"the schema cannot be followed: {first_line(str(error))}") from None


def lark_grammar(lark: str) -> str:
    """A grammar written for Lark."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(lark)


class Grammars:
    """The grammars of one model. Raises MissingExtra where llguidance is not installed."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise MissingExtra("llguidance", "serve") from None
        self._tokenizer: LLTokenizer = LLTokenizer(
            json.dumps(tokenizer.document()), n_vocab=vocab, eos_token=list(tokenizer.end_ids) or None
        )
        self._made = lru_cache(maxsize=64)(self._make)

    def check(self, grammar: str) -> None:
        """Raises DataError for a grammar that cannot be followed, or that nothing can fulfil."""
        self._made(grammar)

    def constraint(self, grammar: str) -> "Constraint":
        """A new constraint, at its beginning."""
        return Constraint(self._made(grammar).deep_copy())

    def _make(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()  # a schema that is nothing but itself is seen through only now
        if trial.is_error():
            why = trial.get_error()
            if why.startswith("NoExtension"):
                raise DataError("the schema cannot be followed: no text fulfils it")
            raise DataError(f"the schema cannot be followed: {first_line(why)}")
        return matcher


class Constraint:
    """What one reply may say next."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def allow(self, logits_1V: Tensor) -> Tensor:
        """Logits with every token at -inf that the grammar does not allow; the end tokens where it may end.

        Raises:
            LapisError: Where the grammar went beyond its limits.
        """
        words = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise LapisError(f"the grammar was stopped: {first_line(self._matcher.get_error())}")
        bits_N = torch.frombuffer(words, dtype=torch.uint8)
        allowed_V = (bits_N[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()
        size = min(len(allowed_V), logits_1V.shape[-1])
        result_1V = torch.full_like(logits_1V, -math.inf)
        result_1V[:, :size] = logits_1V[:, :size].masked_fill(~allowed_V[:size].to(logits_1V.device), -math.inf)
        return result_1V

    def take(self, token: int) -> None:
        """Goes on after a token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def first_line(text: str) -> str:
    """The first line of a library's message, short and printable."""
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return "".join(c for c in line if c.isprintable())[:200]
