"""Every objective says how far it is while it computes on held-out data, and before the first step."""

from collections.abc import Callable
from typing import Any

import pytest

from lapis.model.transformer import Transformer, put_head
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.corpus.labels import Labeled
from lapis.text.corpus.pairs import Pair
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.loop.progress import LogLines, Silent, show_share
from lapis.training.objectives import OBJECTIVES, objective_class
from lapis.training.setup.start import start_model

BERT = {"family": "bert", "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48}


class Stages(Silent):
    """Keeps what it is told of stages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def stage(self, text: str) -> None:
        self.texts.append(text)


def data_of(name: str, documents: list[Document], chats: list[ChatRecord]) -> tuple[Any, dict[str, Any]]:
    """Data that an objective learns from, and the options that it cannot do without."""
    if name == "chat":
        return chats, {}
    if name == "classify":
        return [Labeled(d.text, ["odd", "even"][d.line % 2], d.file, d.line) for d in documents], {}
    if name in ("causal", "masked"):
        return documents, {}
    if name in ("grpo", "rloo", "ppo"):
        prompts = [{"prompt": f"Where does cat {i} sleep?"} for i in range(4)]
        return prompts, {"rewards": lambda prompt, reply, record: len(reply), "max_tokens": 4, "kl": 0.1}
    pairs = [
        Pair(c.messages[:1], c.messages[1], {"role": "assistant", "content": "No."}, c.file, c.line) for c in chats
    ]
    return pairs, {}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_says_how_far_an_evaluation_is(
    name: str, tokenizer: Tokenizer, documents: list[Document], chats: list[ChatRecord],
    new_model: Callable[[], Transformer], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for place in ("model.scoring", "training.objectives.supervised.next_token"):
        monkeypatch.setattr(f"lapis.{place}.BATCH_TOKENS", 64)
    kind: Any = objective_class(name)
    data, more = data_of(name, documents, chats)
    if name == "masked":
        tokenizer = train_tokenizer([document.text for document in documents], tokenizer.rows, "masked")
    objective = kind(tokenizer, data, context=48, valid=data, **more)
    model = start_model(None, BERT, objective, context=48, seed=0) if name == "masked" else new_model()
    heads = {"language": "lm", "masked": "masked", "classes": "classes", "scalar": "scalar"}
    if heads[kind.head] != model.config.head:
        put_head(model, heads[kind.head], objective.class_names)
    watch = Stages()
    objective.heard = show_share(watch, "starting")
    objective.begin(model)
    if kind.computes_first:
        assert any("%" in text for text in watch.texts)
    watch.texts.clear()
    objective.heard = show_share(watch, "evaluating held-out data")
    assert objective.evaluate(model)
    shares = [int(text.split("  ")[1].rstrip("%")) for text in watch.texts if "%" in text]
    assert shares and shares == sorted(shares) and shares[-1] <= 100


def test_a_run_of_one_step_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"step": 1, "loss": 1.5, "share": 1.0, "tokens_per_second": 8.0, "seconds_left": 0.0}
    for first, lines in ((row, 1), ({**row, "share": 0.5}, 2)):
        watch = LogLines("run")
        watch.step(first)
        watch.row(row)
        watch.close()
        assert capsys.readouterr().err.count("run") == lines
