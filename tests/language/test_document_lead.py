"""What a document begins with is one rule: rows are calibrated behind it, models trained, scored and drawn from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.checkpoint import open_checkpoint
from lapis.evaluation.choices import Choice, scored_choices
from lapis.evaluation.text import score_text
from lapis.generation.generate import encode
from lapis.language.card.folder import read_chats
from lapis.language.card.scores import HeldOutText, score_model
from lapis.language.rows import distill as distilling
from lapis.language.rows.calibrate import _rows
from lapis.model.load import load
from lapis.planning.gather import _sequences
from lapis.planning.held_out import make_held_out
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.extend import ExtendableTokenizer
from lapis.text.tokenizer.tokenizer import Tokenizer

from .conftest import MALAY, make, write
from .test_card_few import talk


def begin(folder: Path, *, bos: str | None, eos: str | None, adds: bool = False) -> Tokenizer:
    """Names the tokens of a folder's tokenizer; adds: whether it puts BOS before every text."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"bos_token": bos, "eos_token": eos}
    config = {name: value for name, value in config.items() if name not in named}
    config |= {name: token for name, token in named.items() if token is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if adds:
        whole = json.loads((folder / "tokenizer.json").read_text())
        before = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        whole["post_processor"] = {
            "type": "TemplateProcessing", "single": before, "pair": [*before, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [Tokenizer.open(folder).id(str(bos))], "tokens": [bos]}},
        }  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    return Tokenizer.open(folder)


@pytest.mark.parametrize(
    ("bos", "eos", "adds", "lead"),
    [
        ("<|im_start|>", "<|im_end|>", False, "<|im_end|>"),
        ("<|im_start|>", "<|im_end|>", True, "<|im_start|>"),
        (None, "<|im_end|>", False, "<|im_end|>"),
        ("<|im_start|>", None, False, "<|im_start|>"),
        (None, None, False, None),
    ],
)
def test_documents_begin_with_what_the_tokenizer_adds(
    bos: str | None, eos: str | None, adds: bool, lead: str | None, tmp_path: Path
) -> None:
    tokenizer = begin(make(tmp_path / "base", 0), bos=bos, eos=eos, adds=adds)
    assert tokenizer.document_lead == (None if lead is None else tokenizer.id(lead))


@pytest.mark.parametrize("adds", [False, True])
def test_everything_reads_documents_behind_one_token(
    adds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "base", 0)
    tokenizer = begin(folder, bos="<|im_start|>", eos="<|im_end|>", adds=adds)
    lead = tokenizer.document_lead
    assert lead == (tokenizer.bos_id if adds else tokenizer.eos_id)
    text = write(tmp_path / "text.jsonl", MALAY)
    found: dict[str, Any] = {"packed": pack(text, tokenizer, length=16).arrays([0])[0].ravel()[0]}

    def scored(name: str) -> Any:
        def nll(model: Any, sequences: Any, **_: Any) -> list[float]:
            found.setdefault(name, sequences[0].ids[0])
            return [1.0] * len(sequences)

        return nll

    model = load(folder, torch.float32)
    monkeypatch.setattr("lapis.evaluation.text.nll", scored("score_text"))
    score_text(model, tokenizer, ["Apa itu"])
    monkeypatch.setattr("lapis.language.card.scores.nll", scored("card"))
    score_model(folder, {"target": HeldOutText(MALAY[:2])})
    base = ExtendableTokenizer.open(folder)
    gained = base.learn(base.count_words(MALAY), 20)
    found["calibrated"] = _rows(base, gained, MALAY, 0, 100)[0][0][0]

    def chosen(snippets: Any, *_: Any) -> list[Any]:
        found["distilled"] = next(iter(snippets)).new[0]
        raise InterruptedError

    monkeypatch.setattr(distilling, "choose_snippets", chosen)
    with pytest.raises(InterruptedError):
        rows = torch.zeros(20, 32)
        distilling.distill(open_checkpoint(folder), base, gained, MALAY, rows, snippets=1)
    held = make_held_out(tokenizer, read_chats([talk(tmp_path / "chats.jsonl", "Apa?")]), ["Apa itu"])
    found["planned"] = held.text[0].ids[0]
    found["gathered"] = next(iter(_sequences(tokenizer, [text], None, 32, 64))).ids[0]
    found["drawn"] = encode(model, tokenizer, "")[0]
    found["chosen"] = scored_choices(tokenizer, Choice("", ("a", "b"), 0), 32)[0].ids[0]
    assert found == dict.fromkeys(found, lead) and len(found) == 9
