"""Chats with some of the text that a model was pre-trained on, so that tuning on the chats forgets less of it.

Shapes: B rows, T places.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lapis.model.transformer import Transformer
from lapis.text.rows.mixture import Draw, draws
from lapis.text.rows.rows import RowBatch
from lapis.training.objectives.objective import Cursor, DataPlace
from lapis.training.objectives.supervised.next_token import Causal, Chat


@dataclass(eq=False, kw_only=True)
class Lessons(Chat):
    """Chats, and beside them text.

    A graft adds what tuning changed. What tuning forgot would be added as well; where a few rows of every batch are
    text, little is forgotten.

    Args:
        text: In both languages. It holds no chat.
        rows_of_text: Of each batch.
    """

    text: Causal
    rows_of_text: int

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "text": self.text.describe(), "rows_of_text": self.rows_of_text}

    def batches(self, state: DataPlace) -> Iterator[tuple[Any, Cursor]]:
        place = state.cursor or {"chats": None, "text": None}
        chats = draws(self.examples, state.rows - self.rows_of_text, state.seed, place["chats"])
        texts = draws(self.text.examples, self.rows_of_text, state.seed, place["text"])
        for (chat, after_chat), (text, after_text) in zip(chats, texts, strict=True):
            yield (chat, text), {"chats": after_chat, "text": after_text}

    def prepare(self, model: Transformer, batch: tuple[Draw, Draw] | Draw | RowBatch) -> RowBatch:
        device = next(model.parameters()).device
        parts = [part.to(device) for part in (batch if isinstance(batch, tuple) else (batch,))]
        return RowBatch(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(RowBatch))
        )
