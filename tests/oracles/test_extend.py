"""Extended models beside transformers: the same ids on text of six languages, and rows where they belong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lapis.checkpoint import open_checkpoint
from lapis.errors import ConfigError, DataError
from lapis.families.config import ModelConfig, Rope
from lapis.language.extend import extend
from lapis.language.rows.distill import choose_snippets, distill, snippets_of
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.extend import ExtendableTokenizer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.weights.rows import first_rows, token_tables

transformers.logging.set_verbosity_error()
REAL = Path(os.environ.get("LAPIS_MODELS", "/nowhere"))
ENGLISH = "The old house stands by the river, and the children of the village play in its garden every day. "
MALAY = "Rumah lama itu terletak di tepi sungai, dan kanak-kanak kampung bermain di dalam tamannya setiap hari. "


def make(folder: Path, *, tied: bool, padding: int = 0, family: str = "llama") -> Path:
    """A small model that knows some English, with rows of padding behind its tokenizer's."""
    tokenizer = train_tokenizer([ENGLISH * 20], 300)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"rope": Rope(theta=1e4)}
    config = ModelConfig(
        family=family, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48,
        vocab=tokenizer.rows + padding, context=128, tied=tied, **shape,
    )  # fmt: skip
    model = Transformer(config)
    folder.mkdir()
    save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def malay(tmp_path: Path) -> Path:
    path = tmp_path / "ms.txt"
    path.write_text("\n".join([MALAY] * 30))
    return path


@pytest.mark.parametrize(("tied", "padding"), [(True, 0), (False, 0), (False, 7), (True, 100)])
def test_rows_are_those_of_the_rule(tied: bool, padding: int, tmp_path: Path, malay: Path) -> None:
    source = make(tmp_path / "base", tied=tied, padding=padding)
    out = tmp_path / "out"
    result = extend(source, [malay], out, add=40)
    before, after = load(source, torch.float32), load(out, torch.float32)
    base = ExtendableTokenizer.open(source)
    gained = base.learn(base.count_words([malay.read_text()]), 40)
    first = base.size
    assert after.config.vocab == max(before.config.vocab, first + 40) == result.rows["after"]
    embed, grown = before.embed.weight.detach(), after.embed.weight.detach()
    torch.testing.assert_close(grown[:first], embed[:first], rtol=0, atol=0)
    means = torch.stack([embed[list(ids)].mean(0) for ids in gained.old_tokens])
    if tied:
        assert result.init == {"embedding": "mean"}
        torch.testing.assert_close(grown[first : first + 40], means)
    else:
        assert result.init == {"embedding": "mean-norm", "head": "mean"}
        typical = embed.norm(dim=1).median()
        expected = means / means.norm(dim=1, keepdim=True) * typical
        torch.testing.assert_close(grown[first : first + 40], expected, rtol=1e-5, atol=1e-7)
        old_head, head = (m.head.weight.detach() for m in (before, after))
        torch.testing.assert_close(
            head[first : first + 40], torch.stack([old_head[list(ids)].mean(0) for ids in gained.old_tokens])
        )
    if padding > 40:  # rows of padding beyond what was taken are as they were
        torch.testing.assert_close(grown[first + 40 :], embed[first + 40 :], rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_it_and_computes_the_same(tied: bool, tmp_path: Path, malay: Path) -> None:
    out = tmp_path / "out"
    extend(make(tmp_path / "base", tied=tied), [malay], out, add=40)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(out)
    ours, tokenizer = load(out, torch.float32), Tokenizer.open(out)
    ids = tokenizer.encode(MALAY)
    assert ids == words(MALAY)["input_ids"]
    assert max(ids) >= 300
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(ours(torch.tensor([ids])), logits, rtol=1e-4, atol=1e-4)
    assert theirs.config.vocab_size == len(words) == 340


def test_text_of_old_tokens_is_scored_as_before(tmp_path: Path, malay: Path) -> None:
    source, out = make(tmp_path / "base", tied=False), tmp_path / "out"
    extend(source, [malay], out, add=40)
    ids = torch.tensor([Tokenizer.open(source).encode(ENGLISH)])
    before, after = load(source, torch.float32)(ids), load(out, torch.float32)(ids)
    torch.testing.assert_close(after[..., :300], before)


def test_a_head_that_config_ties_and_weights_do_not(tmp_path: Path, malay: Path) -> None:
    source, out = make(tmp_path / "base", tied=False), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    result = extend(source, [malay], out, add=40)
    assert any("not tied" in note for note in result.notes)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_distilled_rows_bring_hidden_states_nearer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "base", tied=True))
    base = ExtendableTokenizer.open(checkpoint.root)
    texts = [MALAY * 3] * 40
    gained = base.learn(base.count_words(texts), 30)
    tables = token_tables(checkpoint)
    rows = first_rows(checkpoint, tables, gained.old_tokens, "mean")[tables.embed]
    trained = distill(checkpoint, base, gained, texts, rows, snippets=400, rate=3e-3)
    model = load(checkpoint, torch.float32)
    embed, snippets_found = model.embed.weight.detach(), list(snippets_of(base, gained, texts[:1], [0]))
    distance = []
    for each in (rows, trained):
        model.embed.weight = torch.nn.Parameter(torch.cat((embed, each)))
        with torch.no_grad():
            distance.append(
                sum(
                    float((model.hidden(torch.tensor([s.old]))[0, s.old_ends]
                           - model.hidden(torch.tensor([s.new]))[0, s.new_ends]).square().sum())
                    for s in snippets_found
                )
            )  # fmt: skip
    assert distance[1] < 0.8 * distance[0]


def test_distilling_trains_new_rows_alone(tmp_path: Path, malay: Path) -> None:
    source, out = make(tmp_path / "base", tied=True), tmp_path / "out"
    result = extend(source, [malay], out, add=30, init="distilled")
    assert result.init == {"embedding": "distilled"}
    before, after = load(source, torch.float32), dict(load(out, torch.float32).named_parameters())
    for name, tensor in before.named_parameters():
        torch.testing.assert_close(after[name][: len(tensor)], tensor, rtol=0, atol=0)
    extend(source, [malay], tmp_path / "mean", add=30)
    assert not torch.equal(after["embed.weight"], load(tmp_path / "mean", torch.float32).embed.weight)


def test_stretches_end_at_the_same_bytes(tmp_path: Path, malay: Path) -> None:
    base = ExtendableTokenizer.open(make(tmp_path / "base", tied=True))
    text = (MALAY + ENGLISH + "ünïcødé 한국어 ") * 5
    gained = base.learn(base.count_words([MALAY] * 30), 30)
    new = base.extended(gained)
    snippets_found = list(snippets_of(base, gained, [text], [0]))
    assert len(snippets_found) > 5
    for each in snippets_found:
        assert 1 < len(each.new) < len(each.old) <= 60
        for old_end, new_end in zip(each.old_ends, each.new_ends, strict=True):
            one = base.backend.decode(each.old[1 : old_end + 1], skip_special_tokens=False)
            assert one == new.decode(each.new[1 : new_end + 1], skip_special_tokens=False)
    assert choose_snippets(iter(snippets_found), gained, 1, 0) != []
    assert len(choose_snippets(iter(snippets_found), gained, 1, 0)) < len(snippets_found)


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, malay: Path) -> None:
    source, out = make(tmp_path / "base", tied=True), tmp_path / "out"
    for options, error, text in (
        ({"add": 5000}, DataError, "the text carries"),
        ({"add": 5, "least": 9999}, DataError, "carries 0 new tokens that occur 9999 times or more; give more"),
        ({"add": 5, "init": "mean-norm"}, ConfigError, "head is tied"),
        ({"add": 5, "only_target": True}, ConfigError, "--replay"),
        ({"add": 0}, ConfigError, "1 or more"),
    ):
        with pytest.raises(error, match=text):
            extend(source, [malay], out, **options)
        assert not out.exists()


@pytest.mark.real_model
@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="LAPIS_MODELS names no folder of real models")
@pytest.mark.parametrize("name", ["smollm2-it", "gemma3"])
def test_the_same_ids_on_2000_strings_of_six_languages(name: str, tmp_path: Path, data_dir: Path) -> None:
    base = ExtendableTokenizer.open(REAL / name)
    texts: dict[str, list[str]] = {}
    for language in ("en", "id", "ko", "ms", "uk", "zh"):
        lines = (data_dir / "corpus" / language / "train.jsonl").read_text(encoding="utf-8").splitlines()
        texts[language] = [json.loads(line)["text"] for line in lines]
    gained = base.learn(base.count_words(t[:20_000] for t in [*texts["ko"][:80], *texts["uk"][:60]]), 1500)
    base.copy_files(tmp_path)
    base.write(tmp_path, gained)
    strings = [
        text[start : start + 60 + 7 * (i % 40)]
        for listed in texts.values()
        for i, text in enumerate((listed * 10)[:334])
        for start in [(i * 137) % max(1, len(text) - 100)]
    ]
    ours, theirs = Tokenizer.open(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(strings) > 2000
    encoded = ours.encode_batch(strings)
    expected = theirs(strings, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert encoded == expected
    assert sum(i >= base.size for ids in encoded for i in ids) > 3000
    for text, ids in zip(strings, encoded, strict=True):
        assert ours.decode(ids) == text
