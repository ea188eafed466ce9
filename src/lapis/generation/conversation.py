"""A conversation with one model: its turns, and what the model has read of them.

Leaves out terminals and servers, which show it: cli/chat.py.
"""

import dataclasses
import time
from collections.abc import Generator
from dataclasses import dataclass

from lapis.errors import DataError
from lapis.generation.generate import Memory, Reply, stream
from lapis.generation.options import Sampling
from lapis.model.reading.readable import ReadableModel
from lapis.text.chat.special_token_guard import template_for
from lapis.text.tokenizer.tokenizer import Tokenizer

Turn = dict[str, str]


@dataclass(frozen=True)
class ReplyStats:
    """How a reply went. stop_reason: as in Reply, or "stopped" where the reader left. seconds: all of it."""

    tokens: int
    stop_reason: str
    seconds: float


class Conversation:
    """Turns with a model, in its own template. Each reply draws anew: with a seed, reply n draws from seed + n.

    system: what the template is given as the system's message; "" gives none. Raises TemplateError where there is no
    chat template.
    """

    def __init__(self, model: ReadableModel, tokenizer: Tokenizer, sampling: Sampling, system: str = "") -> None:
        template_for(tokenizer)
        self.system = system
        self.turns: list[Turn] = []
        self.last_reply: ReplyStats | None = None
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._memory = Memory()
        self._replies = 0

    @property
    def messages(self) -> list[Turn]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def send(self, text: str) -> Generator[str, None, None]:
        """The reply to a text, in pieces. Where the reader leaves early, what came so far is the reply.

        Args:
            text: What the user says.

        Raises:
            DataError: Where the conversation no longer fits the context; the turn is then taken back.
        """
        self.turns.append({"role": "user", "content": text})
        yield from self._reply()

    def retry(self) -> Generator[str, None, None]:
        """Another reply to the last turn, in place of the one before."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise DataError("there is nothing to answer yet; say something first")
        yield from self._reply()

    def reset(self) -> None:
        """Forgets all turns; the system's message stays."""
        self.turns.clear()

    def _reply(self) -> Generator[str, None, None]:
        received: list[str] = []
        reply: Reply | None = None
        start, before = time.perf_counter(), self._replies
        seed = self._sampling.seed
        sampling = self._sampling if seed is None else dataclasses.replace(self._sampling, seed=seed + before)
        self._replies += 1
        pieces = stream(self._model, self._tokenizer, self.messages, sampling, memory=self._memory)
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    reply = end.value
                    break
                except DataError as error:
                    raise DataError(f"{error}, or reset the conversation") from None
                received.append(piece)
                yield piece
        finally:
            seconds = time.perf_counter() - start
            count = len(reply.ids) if reply else len(received)
            self.last_reply = ReplyStats(count, reply.stop_reason if reply else "stopped", seconds)
            if received or reply:
                self.turns.append({"role": "assistant", "content": "".join(received)})
            else:  # no word came: a turn without an answer would stand in the way of the next
                self.turns.pop()
