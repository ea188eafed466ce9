"""A run on sources by weights: resumed twice it is the run that was never stopped; on other data it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lapis.errors import TrainingError
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.mixture import Mixture
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal, Chat

CONFIG = TrainConfig(steps=12, batch=4, accumulate=2, save_every=3, threads=1, precision="float32", lr=1e-3,
                     sample_every=0)  # fmt: skip


@pytest.fixture
def places(documents: list[Document], tmp_path: Path) -> dict[str, float]:
    result = {}
    for name, part, weight in (("one", documents[:60], 0.75), ("two", documents[60:], 0.25)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in part))
        result[str(path)] = weight
    return result


def test_two_resumes_equal_one_run_and_changed_data_is_refused(
    places: dict[str, float],
    tokenizer: Tokenizer,
    new_model: Callable[[], Transformer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(out: str, data: Any = places) -> bytes:
        train(new_model(), Causal(tokenizer, data, context=32), CONFIG, tmp_path / out, watch=Silent())
        return (tmp_path / out / "model.safetensors").read_bytes()

    whole = run("whole")
    real, left = Mixture.take, [0]

    def failing(self: Mixture, rows: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(Mixture, "take", failing)
    for count in (9, 9):  # in the fifth step, and three steps after the checkpoint
        left[0] = count
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    left[0] = 0
    one, two = places
    text = Path(two).read_text()
    Path(two).write_text(text.replace("cat", "dog"))
    with pytest.raises(TrainingError, match=r"two\.jsonl\.digest was \w{12}, is \w{12}\. Undo"):
        run("stopped")
    Path(two).write_text(text)
    with pytest.raises(TrainingError, match=r"one\.jsonl\.weight was 0\.75, is 0\.5"):
        run("stopped", {one: 1, two: 1})
    assert run("stopped") == whole


def test_chats_are_mixed_too_and_coverage_is_told(
    tokenizer: Tokenizer, chats: list[ChatRecord], new_model: Callable[[], Transformer]
) -> None:
    parts = {name: (pack(own, tokenizer, length=64), w) for name, own, w in (("a", chats[:9], 1), ("b", chats[9:], 3))}
    mixed = Chat(tokenizer, Mixture(parts), context=64)
    assert mixed.data.weights == [0.25, 0.75] and mixed.sample(new_model())
    objective = Chat(tokenizer, chats, context=64)
    shares = objective.coverage()
    assert "rows of 64 tokens from 24 chats" in shares[0] and "of tokens carry loss" in shares[1]
    counts = objective.examples.counts
    assert f"{counts['supervised'] / counts['tokens']:.1%} of tokens" in shares[1]
    assert Chat(tokenizer, chats[:1], context=64).coverage()[0].endswith(" from 1 chat")
    assert objective.sample(new_model())
