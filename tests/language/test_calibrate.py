"""Calibrated rows: as likely as they are frequent, by a recomputation in float64, and nothing else is changed."""

from pathlib import Path
from random import Random

import pytest
import torch

from lapis.checkpoint import open_checkpoint
from lapis.errors import DataError
from lapis.evaluation.text import score_text
from lapis.language.extend import extend
from lapis.language.rows.calibrate import calibrate, direction, scaled_rows
from lapis.model.load import load
from lapis.text.tokenizer.extend import ExtendableTokenizer
from lapis.text.tokenizer.tokenizer import Tokenizer

from .conftest import ENGLISH, MALAY, make, write


def test_each_token_is_as_likely_as_it_is_to_be() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = 4 + torch.randn(300, 8, generator=random)
    old, begin = (0.2 * torch.randn(n, 8, generator=random) for n in (30, 12))
    shares = torch.linspace(0.001, 0.1, 12)
    along = direction(hidden, hidden[:0])
    rows = scaled_rows(hidden, (hidden @ old.T).logsumexp(1), begin, shares, along)
    logits = hidden.double() @ torch.cat([rows, old]).double().T
    torch.testing.assert_close(logits.softmax(1).mean(0)[:12].float(), shares, rtol=0.02, atol=0)
    assert torch.cosine_similarity(rows - begin, along[None]).abs().min() > 0.999  # in that direction alone


def test_replay_text_lies_at_zero_in_the_direction_of_rows() -> None:
    random = torch.Generator().manual_seed(0)
    shared, other = torch.randn(2, 16, generator=random) * 3
    hidden, replay = (shared + other * own + torch.randn(400, 16, generator=random) for own in (1, 0))
    along = direction(hidden, replay)
    assert (hidden @ along).mean().item() == pytest.approx(1, abs=1e-4)
    assert (replay @ along).mean().item() == pytest.approx(0, abs=1e-4)
    assert (replay @ direction(hidden, hidden[:0])).mean() > 0.3


@pytest.mark.parametrize("tied", [True, False])
def test_text_is_likelier_and_nothing_else_is_changed(tied: bool, tmp_path: Path) -> None:
    source, text = make(tmp_path / "base", 0, tied=tied), write(tmp_path / "ms.jsonl", MALAY[:180])
    bits, models = {}, {}
    for init in (None, "calibrated"):
        out = tmp_path / str(init)
        result = extend(source, [text], out, add=40, init=init)
        models[init] = load(out, torch.float32)
        bits[init] = score_text(models[init], Tokenizer.open(out), MALAY[180:])["bits_per_byte"]
    assert bits["calibrated"] < bits[None]
    assert result.init == ({"embedding": "calibrated"} if tied else {"embedding": "mean-norm", "head": "calibrated"})
    before = load(source, torch.float32)
    first = before.config.vocab
    for name, tensor in models["calibrated"].named_parameters():
        torch.testing.assert_close(tensor[:first], before.get_parameter(name)[:first], rtol=0, atol=0)
    if not tied:
        assert torch.equal(models["calibrated"].embed.weight, models[None].embed.weight)
    again = extend(source, [text], tmp_path / "again", add=40, init="calibrated")
    assert again.sha256 == result.sha256


def test_rows_stay_means_where_replay_text_became_harder(tmp_path: Path) -> None:
    source, text = make(tmp_path / "base", 0), write(tmp_path / "ms.jsonl", MALAY)
    replay = write(tmp_path / "en.jsonl", ENGLISH)  # random weights do not tell the languages apart
    embeds = {}
    for name, options in {"means": {}, "calibrated": {"init": "calibrated"}}.items():
        result = extend(source, [text], tmp_path / name, add=40, replay=[replay], **options)
        embeds[name] = load(tmp_path / name, torch.float32).embed.weight
    assert torch.equal(embeds["means"], embeds["calibrated"])
    assert any("stay means" in note for note in result.notes)


def test_text_without_new_tokens_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "base", 0))
    base = ExtendableTokenizer.open(checkpoint.root)
    gained = base.learn(base.count_words(MALAY), 20)
    rows = torch.zeros(20, 32)
    with pytest.raises(DataError, match="nothing to calibrate"):
        calibrate(checkpoint, base, gained, ["0 1 2", "3 4 5"], rows, rows, tied=True)


def test_rows_stay_where_other_documents_became_harder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.language.rows.calibrate.PLACES", 250)
    source, text = make(tmp_path / "base", 0), write(tmp_path / "ms.jsonl", MALAY)
    extend(source, [text], tmp_path / "means", add=40)
    base = ExtendableTokenizer.open(source)
    gained = base.read_extension(tmp_path / "means")
    rows = load(tmp_path / "means", torch.float32).embed.weight.detach()[gained.first :]
    written, other, figures = " ".join(MALAY[:90]), " ".join(MALAY[90:]), " ".join(map(str, range(400)))
    first = next(seed for seed in range(9) if Random(seed).sample(range(2), 2) == [0, 1])

    def moved(*texts: str) -> bool:
        return calibrate(open_checkpoint(source), base, gained, texts, rows, rows, tied=True, seed=first) is not rows

    assert moved(written)
    assert moved(written, other)
    assert not moved(written, figures)


@pytest.mark.parametrize("tied", [True, False])
def test_one_bar_shows_all_that_is_read(tied: bool, tmp_path: Path) -> None:
    source, text = make(tmp_path / "base", 0, tied=tied), write(tmp_path / "ms.jsonl", MALAY)
    shown: list[tuple[float, float | None]] = []

    def progress(done: float, total: float | None, label: str) -> None:
        if label == "reading text in new tokens":
            shown.append((done, total))

    replay = write(tmp_path / "en.jsonl", ENGLISH[:100])
    extend(source, [text], tmp_path / "out", add=40, init="calibrated", replay=[replay], progress=progress)
    (total,) = {total for _, total in shown}
    assert [done for done, _ in shown] == list(range(len(shown))) and total == len(shown)
