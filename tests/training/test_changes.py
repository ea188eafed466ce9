"""What may be another when a run goes on: held-out data is told from other; replies keep what they were made with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapis.errors import TrainingError
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.corpus.labels import Labeled
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.certificate.certificate import CERTIFICATE
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.loop.state import CheckpointJournal
from lapis.training.objectives.policy.policy import GRPO, PPO
from lapis.training.objectives.preference.preference import DPO
from lapis.training.objectives.supervised.classify import Classify
from lapis.training.objectives.supervised.masked import Masked
from lapis.training.objectives.supervised.next_token import Causal

Make = Callable[[], Transformer]
TEXTS = [f"The cat number {i} sat on the mat." for i in range(24)]
PROMPTS = [{"prompt": f"Where does cat {i} sleep?"} for i in range(6)]
PAIRS = [{**row, "chosen": "On the mat.", "rejected": "Nowhere."} for row in PROMPTS]


@pytest.fixture(scope="module")
def masking() -> Tokenizer:
    return train_tokenizer(TEXTS, 300, "masked")


def texts(count: int, word: str = "cat") -> list[Document]:
    return [Document(text.replace("cat", word), Path("t.txt"), i) for i, text in enumerate(TEXTS[:count])]


def labels(count: int, word: str = "cat") -> list[Labeled]:
    return [Labeled(text.replace("cat", word), "ab"[i % 2], Path("l.tsv"), i) for i, text in enumerate(TEXTS[:count])]


def pairs_file(folder: Path, count: int, word: str = "cat") -> str:
    path = folder / f"{word}-{count}.jsonl"
    path.write_text("".join(json.dumps(row).replace("cat", word) + "\n" for row in PAIRS[:count]))
    return str(path)


def prompts(count: int, word: str = "cat") -> list[dict[str, str]]:
    return [{"prompt": row["prompt"].replace("cat", word)} for row in PROMPTS[:count]]


@pytest.fixture(params=["causal", "masked", "classify", "dpo", "grpo"])
def described(request: Any, tokenizer: Tokenizer, masking: Tokenizer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What a run of an objective is, with `count` held-out records in which each cat is a `word`; 0 holds none out."""

    def made(count: int, word: str = "cat") -> Any:
        held: dict[str, Callable[[], Any]] = {
            "causal": lambda: Causal(tokenizer, texts(9), context=32, valid=texts(count, word) if count else None),
            "masked": lambda: Masked(masking, texts(9), context=32, valid=texts(count, word) if count else None),
            "classify": lambda: Classify(tokenizer, labels(9), valid=labels(count, word) if count else None),
            "dpo": lambda: DPO(
                tokenizer, pairs_file(tmp_path, 6), valid=pairs_file(tmp_path, count, word) if count else None
            ),
            "grpo": lambda: GRPO(
                tokenizer, PROMPTS, rewards="ends", context=64, max_tokens=8,
                valid=prompts(count, word) if count else None,
            ),
        }  # fmt: skip
        return held[request.param]()

    return lambda *given: json.loads(json.dumps(made(*given).describe()))


def journal(folder: Path, noted: dict[str, Any], allowed: tuple[str, ...] = ()) -> CheckpointJournal:
    """That of a run which was stopped after step 3."""
    shutil.rmtree(folder / "journal", ignore_errors=True)
    made = CheckpointJournal(folder / "journal", allowed)
    made.begin({"wanted": noted, "threads": 1, "precision": "float32"})
    (made.folder / "step-3").mkdir()
    return made


def test_other_held_out_data_is_another_run(described: Any, tmp_path: Path) -> None:
    """As many records of other words, more of them, and none at first; each is one change, which `valid` allows."""
    noted = described(4)
    assert journal(tmp_path, noted).earlier(described(4)) is not None
    for before, now in (
        (noted, described(4, "dog")),
        (noted, described(6)),
        (described(0), noted),
        (noted, described(0)),
    ):
        with pytest.raises(
            TrainingError, match=r"differs: .*valid.* was .*, is .*allow it with --allow-change valid, or"
        ):
            journal(tmp_path, before).earlier(now)
        facts = journal(tmp_path, before, ("valid",)).earlier(now)
        assert facts is not None and facts["wanted"] == now


def test_a_run_of_an_older_lapis_goes_on(described: Any, tmp_path: Path) -> None:
    """It noted how many records were held out, or not even that; only what it noted can be another."""
    older = described(4)
    if older["objective"] == "causal":  # which always had digests
        return
    del older["valid"]
    for name in ("positive", "mean"):
        older.get("options", {}).pop(name, None)
    earlier = journal(tmp_path, older)
    facts = earlier.earlier(described(4, "dog"))
    assert facts is not None and facts["wanted"] == described(4, "dog")
    assert earlier.warnings == [
        "the lapis that began this run noted no digest of its held-out data, which is taken as it is"
    ]
    if "held_out" in older["counts"]:
        with pytest.raises(TrainingError, match=r"counts.held_out was 4, is 6"):
            journal(tmp_path, older).earlier(described(6))
    none = described(0)
    del none["valid"]
    earlier = journal(tmp_path, none)
    assert earlier.earlier(described(0)) is not None and not earlier.warnings


def test_held_out_pairs_are_noted_and_certified(new_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch=2, precision="float32", threads=1, sample_every=0, save_every=2, log_every=1)

    def go(valid: str, **more: Any) -> None:
        objective = DPO(tokenizer, pairs_file(tmp_path, 6), context=48, valid=valid)
        train(new_model(), objective, config, tmp_path / "out", **{"watch": Silent(), **more})

    class Ends(Silent):
        def row(self, row: Any) -> None:
            if row["step"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(pairs_file(tmp_path, 4), watch=Ends())
    with pytest.raises(TrainingError, match=r"differs: valid was \w{12}, is \w{12}\. Undo"):
        go(pairs_file(tmp_path, 4, "dog"))
    go(pairs_file(tmp_path, 4, "dog"), allow_change=("valid",))
    facts = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert len(facts["valid"][""]) == 64 and facts["changes"][0]["after_step"] == 2


CONFIG = TrainConfig(steps=8, batch=2, precision="float32", threads=1, sample_every=0, save_every=1, log_every=1)


def worth(prompt: Any, reply: str, record: Any) -> float:
    return len(set(reply)) / 10


@pytest.mark.parametrize(("kind", "config", "options", "line"), [
    (PPO, {"batch": 4}, {}, r"config\.batch was 2, is 4"), (PPO, {"batch": 1}, {}, r"config\.batch was 2, is 1"),
    (GRPO, {}, {"group": 3}, "group was 2, is 3"), (GRPO, {}, {"temperature": 0.5}, r"temperature was 1\.0, is 0\.5"),
    (GRPO, {}, {"rewards": ["ends"]}, "rewards was .*, is .*"),
])  # fmt: skip
def test_replies_keep_what_they_were_made_with(
    kind: Any, config: dict[str, Any], options: dict[str, Any], line: str, new_model: Make, tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A change that is allowed waits until no step learns from earlier replies; refused, it leaves the run alone."""

    def go(stop: int, options: dict[str, Any], more: dict[str, Any], **allow: Any) -> None:
        given = {"rewards": ["length"], "context": 64, "max_tokens": 8, "group": 2, "updates": 3, **options}

        class Ends(Silent):
            def row(self, row: Any) -> None:
                if row["step"] == stop:
                    raise KeyboardInterrupt

        train(new_model(), kind(tokenizer, PROMPTS, **given), replace(CONFIG, **more), tmp_path / "out", watch=Ends(),
              **allow)  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        go(5, {}, {})
    allow = {"allow_change": (*config, *options)}
    with pytest.raises(
        TrainingError, match=f"{line}, but 2 more steps learn from replies that are there already; undo"
    ):
        go(0, options, config, **allow)
    with pytest.raises(KeyboardInterrupt):
        go(7, {}, {})
    go(0, options, config, **allow)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["changes"][0]["after_step"] == 6
