"""Packed equals unpacked, and loss lies on the assistant's tokens alone."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lapis.errors import DataError
from lapis.model.transformer import Transformer
from lapis.text.chat.chat import encode_chat
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.packing import pack
from lapis.text.rows.rows import IGNORE, Cursor
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.supervised.next_token import Causal, Chat, next_token_loss

Make = Callable[[], Transformer]


def alone(model: Transformer, ids: list[int], targets: list[int]) -> tuple[torch.Tensor, int]:
    """One document in a batch of its own, with torch's own cross entropy."""
    logits = model(torch.tensor([ids]))[0]
    labels = torch.tensor(targets)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), int((labels != IGNORE).sum())


def test_packed_documents_have_the_loss_of_each_alone(
    new_model: Make, tokenizer: Tokenizer, documents: list[Document]
) -> None:
    first, second = new_model(), new_model()
    texts = documents[:3]
    end = tokenizer.eos_id
    assert end is not None
    total, count = torch.zeros(()), 0
    for document in texts:
        ids = [end, *tokenizer.encode(document.text)]
        nats, n = alone(first, ids, [*ids[1:], end])
        total, count = total + nats, count + n
    total.backward()  # type: ignore[no-untyped-call]

    objective = Causal(tokenizer, pack(texts, tokenizer, length=count))  # all in one row
    batch, _ = objective.examples.batch(Cursor(), 1)
    assert int(batch.segments_BT.max()) == 3
    packed, supervised, metrics = objective.loss(second, batch)
    packed.backward()  # type: ignore[no-untyped-call]

    assert supervised == count == metrics["tokens"]
    assert metrics["bytes"] == pytest.approx(sum(len(d.text.encode()) for d in texts))
    assert packed.item() == pytest.approx(total.item(), rel=1e-6)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_packed_chats_have_the_loss_of_each_alone(
    new_model: Make, tokenizer: Tokenizer, chats: list[ChatRecord]
) -> None:
    model = new_model()
    objective = Chat(tokenizer, chats[:4], context=256)
    expected, count = 0.0, 0
    for chat in chats[:4]:
        ids, learned = encode_chat(tokenizer, chat.messages)
        targets = [i if own else IGNORE for i, own in zip(ids, learned, strict=True)]
        nats, n = alone(model, ids[:-1], targets[1:])
        expected, count = expected + nats.item(), count + n
    batch, _ = objective.examples.batch(Cursor(), objective.rows)
    loss, supervised, _ = objective.loss(model, batch)
    assert supervised == count
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_assistant_text_and_its_end_token_are_supervised(tokenizer: Tokenizer, chats: list[ChatRecord]) -> None:
    objective = Chat(tokenizer, chats[:1], context=256)
    batch, _ = objective.examples.batch(Cursor(), 1)
    targets = [int(t) for t in batch.targets_BT[0] if t != IGNORE]
    assert tokenizer.decode(targets) == "Under tree 0.<|im_end|>To 0.<|im_end|>"


def test_any_head_gives_the_loss(new_model: Make, tokenizer: Tokenizer, documents: list[Document]) -> None:
    """The plain head runs in blocks; one that is wrapped (an adapter) runs as it is."""
    model = new_model()
    batch, _ = Causal(tokenizer, documents[:8], context=32).examples.batch(Cursor(), 2)
    blocks, _ = next_token_loss(model, batch)
    model.head = torch.nn.Sequential(model.head)
    whole, _ = next_token_loss(model, batch)
    assert blocks.item() == pytest.approx(whole.item(), rel=1e-6)


def test_rows_of_the_wrong_kind_or_tokenizer_are_refused(
    tokenizer: Tokenizer, documents: list[Document], chats: list[ChatRecord]
) -> None:
    rows = pack(documents, tokenizer, length=32)
    with pytest.raises(DataError, match="learns from chats"):
        Chat(tokenizer, rows)
    rows.info["tokenizer"] = "another"
    with pytest.raises(DataError, match="another tokenizer"):
        Causal(tokenizer, rows)


def test_the_sample_answers_the_first_chat(new_model: Make, tokenizer: Tokenizer, chats: list[ChatRecord]) -> None:
    sample = Chat(tokenizer, chats, context=256).sample(new_model())
    assert re.match(r"Where does cat \d+ sleep\? -> ", sample), sample  # no word of the template
    assert isinstance(Causal(tokenizer, [Document("a b c", chats[0].file, 1)], context=8).sample(new_model()), str)
