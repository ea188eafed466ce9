"""Reading preference pairs: what is accepted, what is refused in one line, and what is cut and counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapis.errors import DataError
from lapis.text.chat.chat import encode_prompt, render
from lapis.text.corpus.pairs import pairs
from lapis.text.rows.pair_rows import Paired, encode_reply
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

USER = {"role": "user", "content": "Where does cat 3 sleep?"}
GOOD, BAD = "Under tree 3.", "Look for yourself."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"Cat {i} sleeps under tree {i}. Look for yourself." for i in range(60)], 300)


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write(folder: Path, *records: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": USER["content"], "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD, "source": "somewhere"},
        {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
        {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
        {"prompt": USER["content"], "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(record: dict[str, Any], tmp_path: Path) -> None:
    (pair,) = pairs(write(tmp_path, record))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], said(GOOD), said(BAD))
    assert pair.where.endswith("pairs.jsonl line 1") and pair.margin is None


WHOLE = {"prompt": "Hello?", "chosen": "Hello.", "rejected": "What."}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "Hello."}, "chosen and rejected are the same reply; nothing is preferred, remove the record"),
        ({"rejected": " \n"}, "rejected is an empty reply; remove the record"),
        ({"chosen": [said("")], "rejected": [said("x")]}, "chosen is an empty reply; remove the record"),
        ({"prompt": ""}, "prompt is empty; a reply needs something that it replies to"),
        ({"prompt": []}, "prompt is empty; expected text or a list of messages"),
        ({"prompt": None}, "the field prompt is missing; "),
        ({"prompt": 3}, "prompt is a number; expected text or a list of messages"),
        ({"chosen": ["Hello."], "rejected": ["x"]}, "chosen[0] is text; expected an object with role and content"),
        ({"chosen": None}, "chosen is null, rejected is text; give both as text or both as messages"),
        ({"prompt": [USER, said("Yes?")]}, "the prompt ends with the assistant's message; a reply follows somebody"),
        ({"chosen": [USER, said("a")], "rejected": [{**USER, "content": "b"}, said("c")], "prompt": None},
         "chosen and rejected part at message 1, before the reply; the prompts of a pair have to agree"),
        ({"chosen": [USER, said("a")], "rejected": [USER, said("c")]},
         "prompt and chosen part at message 1; the prompts of a pair have to agree"),
        ({"chosen": [USER], "rejected": [USER]}, "chosen ends with a message of user; its last message has to be"),
        ({"margin": "much"}, "margin is 'much'; expected a number"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE, {**WHOLE, **change})
    with pytest.raises(DataError) as caught:
        list(pairs(path))
    assert str(caught.value).startswith(f"{path} line 2: {message}") and "\n" not in str(caught.value)


def test_a_missing_field_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='the field rejected is missing; did you mean "reject"'):
        list(pairs(write(tmp_path, {"prompt": "a", "chosen": "b", "reject": "c"})))


def test_a_reply_is_what_the_template_puts_after_the_prompt(tokenizer: Tokenizer) -> None:
    prompt = [{"role": "system", "content": "Short."}, USER, said("Tree 2."), {**USER, "content": "And cat 4?"}]
    reply = encode_reply(tokenizer, prompt, said(GOOD))
    assert reply.ids[: reply.first].tolist() == encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(reply.ids[reply.first : reply.last].tolist()) == f"{GOOD}<|im_end|>"
    assert tokenizer.decode(reply.ids.tolist()) == render(tokenizer, [*prompt, said(GOOD)])
    assert reply.spoken.ids[-1] == tokenizer.id("<|im_end|>") and len(reply) == reply.last - reply.first


def test_what_is_too_long_is_cut_or_dropped_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long, far = GOOD * 9, {"prompt": USER["content"] * 20, "chosen": GOOD, "rejected": BAD}
    path = write(
        tmp_path,
        {"prompt": "Cat 1?", "chosen": GOOD, "rejected": BAD, "margin": 2},
        {"prompt": "Cat 2?", "chosen": long, "rejected": BAD},
        {"prompt": "Cat 3?", "chosen": long + "1", "rejected": long + "2"},  # the same once they are cut
        far,
    )
    cut = Paired.read(path, tokenizer, 48)
    assert cut.counts["pairs"] == 2 and cut.counts["dropped_long"] == 2 and cut.counts["cut_replies"] == 1
    assert max(len(reply.ids) for reply in cut.replies) == 48 and cut.margins.tolist() == [2, 0]
    whole = Paired.read(path, tokenizer, 48, too_long="drop")
    assert len(whole) == 1 and whole.counts["dropped_long"] == 3 and whole.counts["cut_tokens"] == 0
    assert len({cut.digest, whole.digest, Paired.read(path, tokenizer, 49).digest}) == 3
    with pytest.raises(DataError, match="no pair is left to learn from: all 1 are longer than 48 tokens"):
        Paired.read(write(tmp_path, far), tokenizer, 48)


def test_a_mismatched_reply_takes_another_pairs_words(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE, {"prompt": "Cat 2?", "chosen": GOOD, "rejected": BAD})
    data = Paired.read(path, tokenizer, 64)
    first, second = data.mismatched(0), data.mismatched(1)
    assert np.array_equal(first.ids[: first.first], data.replies[0].ids[: first.first])
    assert tokenizer.decode(first.ids[first.first :].tolist(), True) == GOOD  # chosen, then rejected in turn
    assert tokenizer.decode(second.ids[second.first :].tolist(), True) == WHOLE["rejected"]
