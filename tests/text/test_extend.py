"""Extended tokenizers: what is learned equals a recount and a new training, old ids stay, every text comes back."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lapis.errors import CheckpointError
from lapis.text.tokenizer.extend import ExtendableTokenizer, changed_share
from lapis.text.tokenizer.merges import learn_merges
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

ENGLISH = ["The old house stands by the river, and the children of the village play in its garden every day."] * 8
KOREAN = ["나는 오늘 학교에서 친구들과 함께 밥을 먹었습니다. 오늘 학교에서 배운 것을 친구들에게 말했습니다."] * 8
HINDI = ["हिन्दी भाषा में लिखी हुई किताबें पढ़ना अच्छा है और हम सब मिलकर सीखते हैं।"] * 8


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_level")
    train_tokenizer(ENGLISH, 330).save(folder)
    return folder


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Gemma has it: BPE over characters, whole sentences in a piece, bytes as a way out."""
    trained = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    plain = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    trained.train_from_iterator(
        ENGLISH + [text[:30] for text in HINDI],
        trainers.BpeTrainer(vocab_size=400, special_tokens=plain[:4], show_progress=False),
    )
    document = json.loads(trained.to_str())
    vocab = {token: i for i, token in enumerate(plain)}
    for token in document["model"]["vocab"]:
        vocab.setdefault(token, len(vocab))
    document["model"]["vocab"] = vocab
    backend = tokenizers.Tokenizer.from_str(json.dumps(document))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    folder = tmp_path_factory.mktemp("metaspace")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def extend(folder: Path, out: Path, texts: list[str], add: int, **options: Any) -> tuple[Tokenizer, Tokenizer]:
    """The old and the new tokenizer, the latter read back from its folder."""
    base = ExtendableTokenizer.open(folder)
    base.copy_files(out)
    base.write(out, base.learn(base.count_words(texts), add, **options))
    return Tokenizer.open(folder), Tokenizer.open(out)


WORDS = st.dictionaries(st.lists(st.integers(0, 4), min_size=1, max_size=7).map(tuple), st.integers(1, 9), max_size=12)


def recount(words: dict[tuple[int, ...], int], add: int, least: int) -> list[tuple[int, int, int]]:
    """The definition: count all pairs anew, merge the most frequent one, again and again."""
    spelling = {i: "abcde"[i] for i in range(5)}
    merges: list[tuple[int, int, int]] = []
    while len(spelling) - 5 < add:
        counts: Counter[tuple[int, int]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < least:
            break
        token = spelling[best[0]] + spelling[best[1]]
        merged = next((i for i, known in spelling.items() if known == token), len(spelling))
        spelling[merged] = token
        merges.append((*best, merged))
        fresh: Counter[tuple[int, ...]] = Counter()
        for word, times in words.items():
            fresh[in_order(word, merges)] += times
        words = fresh
    return merges


def in_order(word: tuple[int, ...], merges: list[tuple[int, int, int]]) -> tuple[int, ...]:
    """A word under merges, the earliest that applies first and from the left, as every encoder does it."""
    ranks = {(left, right): (rank, merged) for rank, (left, right, merged) in enumerate(merges)}
    parts = list(word)
    while result := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        (_, merged), place = min(result)
        parts[place : place + 2] = [merged]
    return tuple(parts)


@settings(max_examples=150, deadline=None)
@given(WORDS, st.integers(1, 3))
def test_merges_are_those_of_a_recount(words: dict[tuple[int, ...], int], least: int) -> None:
    learned = learn_merges(words, {i: "abcde"[i] for i in range(5)}, {}, 5, 8, least=least)
    assert learned.merges == recount(words, 8, least)
    assert learned.enough == (len(learned.counts) == 8)


def test_from_bytes_alone_it_is_a_new_training(tmp_path: Path) -> None:
    texts = [text.replace(",", "").replace(".", "") for text in ENGLISH + KOREAN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"initial_alphabet": alphabet, "show_progress": False, "min_frequency": 2}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=256, **options))
    backend.save(str(tmp_path / "tokenizer.json"))
    base = ExtendableTokenizer.open(tmp_path)
    gained = base.learn(base.count_words(texts), 80, least=2)
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=256 + 80, **options))
    assert [list(pair) for pair in gained.merges] == json.loads(backend.to_str())["model"]["merges"]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_old_ids_stay_and_text_gets_shorter(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    old, new = extend(request.getfixturevalue(kind), tmp_path, KOREAN, 40)
    assert new.vocab_size == old.vocab_size + 40
    assert new.rows == old.rows + 40
    for i in range(old.rows):
        assert new.token(i) == old.token(i)
    assert new.special == old.special
    before, after = old.encode(KOREAN[0]), new.encode(KOREAN[0])
    assert len(after) < 0.6 * len(before)
    assert new.decode(after) == KOREAN[0]
    assert new.encode(ENGLISH[0]) == old.encode(ENGLISH[0])
    assert new.decode(new.encode("<eos> <|im_end|>")) == "<eos> <|im_end|>"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_every_text_comes_back_after_extending(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old, new = extend(request.getfixturevalue(kind), tmp_path_factory.mktemp("out"), KOREAN + HINDI, 90)
    pieces = st.sampled_from([*KOREAN[0].split(), *HINDI[0].split(), *ENGLISH[0].split(), " ", "\n", "한", "ि", "0"])
    texts = st.one_of(st.text(max_size=80), st.lists(pieces, max_size=12).map("".join), st.lists(pieces).map(" ".join))

    @settings(max_examples=150, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        ids = new.encode(text)
        assert new.decode(ids) == text == old.decode(old.encode(text))
        assert len(ids) <= len(old.encode(text))

    check()


def test_added_tokens_outside_the_vocabulary_keep_ids(byte_level: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    ExtendableTokenizer.open(byte_level).copy_files(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|tool|>", "<|think|>"])
    backend.save(str(folder / "tokenizer.json"))
    out = tmp_path / "out"
    out.mkdir()
    old, new = extend(folder, out, KOREAN, 20)
    assert new.special == old.special
    assert new.special["<|think|>"] == old.rows - 1
    assert new.encode("<|tool|>x", special=True) == old.encode("<|tool|>x", special=True)
    assert new.rows == old.rows + 20


def test_only_target_leaves_replay_text_as_it_was(byte_level: Path) -> None:
    base = ExtendableTokenizer.open(byte_level)
    replay = ["The rivers stand, and the houses of villages are old.", "A word or two: 학교 and pratique."]
    target = ["Ils sont dans les villages anciens, et le pratique. Standen, riverain, anciens, housesse."] * 9
    counts = base.count_words(target + KOREAN)
    free = base.extended(base.learn(counts, 60))
    held = base.extended(base.learn(counts, 60, replay=base.count_words(replay)))
    assert changed_share(base.backend, free, replay) > 0.05
    assert changed_share(base.backend, held, replay) == 0
    assert len(held.encode(target[0]).ids) < len(base.backend.encode(target[0]).ids)


def test_the_first_of_the_new_tokens_are_a_smaller_extension(metaspace: Path) -> None:
    base = ExtendableTokenizer.open(metaspace)
    counts = base.count_words(KOREAN)
    whole = base.learn(counts, 50)
    for size in (0, 5, 20, 40, 50):
        part, alone = whole.cut(size), base.learn(counts, size)
        assert part.tokens[:5] == whole.tokens[: min(5, size)]
        assert base.extended(part).get_vocab_size() == base.backend.get_vocab_size() + size
        if size > len(counts.characters):
            assert (part.tokens, part.merges) == (alone.tokens, alone.merges)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_what_another_text_saves_is_what_encoding_it_saves(kind: str, request: pytest.FixtureRequest) -> None:
    base = ExtendableTokenizer.open(request.getfixturevalue(kind))
    gained = base.learn(base.count_words(KOREAN + HINDI), 80)
    other = ["학교에서 나는 밥을 배운 오늘, हम किताबें सीखते हैं 친구들", "말했습니다 말 말을 12 학교"]
    counts = base.count_words(other)
    saved = base.tokens_saved(counts, gained)
    assert len(saved) == len(gained.tokens) + 1
    for size in (0, 1, 7, 30, 55, 80):
        encoded = base.extended(gained.cut(size)).encode_batch(other, add_special_tokens=False)
        assert sum(map(len, encoded)) == counts.tokens - saved[size]


def test_marks_stay_with_their_letters(byte_level: Path, metaspace: Path) -> None:
    base = ExtendableTokenizer.open(metaspace)
    counts = base.count_words(HINDI)
    assert counts.marks > 100 and counts.cut_marks == 0
    learned = base.learn(counts, 60).tokens
    assert sum("ि" in token and len(token) > 1 for token in learned) >= 3
    assert not any(token.removeprefix("▁")[:1] in "िीेैाु" and len(token) > 2 for token in learned)
    cut = ExtendableTokenizer.open(byte_level).count_words(HINDI)
    assert (cut.marks, cut.cut_marks) == (counts.marks, counts.marks)  # GPT-2's splitting, which must stay


@pytest.mark.parametrize(
    "text",
    [
        *HINDI[:1], "ภาษาไทยไม่มีการเว้นวรรคระหว่างคำ ที่นี่ที่นั่น", "الْعَرَبِيَّةُ لُغَةٌ جَمِيلَةٌ",
        "பிள்ளைகள் பள்ளியில் தமிழ்க் கதைகளைக் கேட்கிறார்கள்",
    ],
)  # fmt: skip
def test_a_trained_tokenizer_keeps_marks_with_letters(text: str) -> None:
    trained = train_tokenizer([text] * 20, 420)
    assert len(trained.encode(text)) <= len(text.split()) + 2
    assert trained.decode(trained.encode(text)) == text


def test_without_marks_the_splitting_is_gpt2s_own() -> None:
    trained = train_tokenizer(ENGLISH + KOREAN, 340)
    assert json.loads(trained._backend.to_str())["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "longest entry that fits"),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), "estimated together"),
        (models.WordLevel({"<unk>": 0}, unk_token="<unk>"), "whole words"),
        (models.BPE({"a": 0}, []), "cannot spell every text"),
        (models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>", byte_fallback=True), "end_of_word_suffix"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(model: Any, reason: str, tmp_path: Path) -> None:
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=reason):
        ExtendableTokenizer.open(tmp_path)
