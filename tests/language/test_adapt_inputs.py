"""What `lapis adapt` is given that cannot be, as it is typed: one line that names it and says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Rust
from tokenizers import models, pre_tokenizers, trainers

from lapis.language.adapt import adapt

from .conftest import ENGLISH, MALAY, make, write

Run = Callable[..., tuple[int, str, str]]
Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def typed(plan: Plan, run: Run, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """typed(**changes) -> exit status and standard error of the command with a plan in a file."""

    def call(*arguments: str, **changes: Any) -> tuple[int, str]:
        file = tmp_path / "plan.yaml"
        file.write_text(json.dumps(plan(**changes)))
        status, _, err = run("adapt", file, *arguments)
        return status, err

    return call


def refused(answer: tuple[int, str]) -> str:
    """The one line of a refusal."""
    status, err = answer
    assert status == 1 and "Traceback" not in err, err
    last = err.splitlines()[-1]
    assert last.startswith("lapis: ") and len(last) < 400
    return last


def test_text_that_is_not_there_or_of_no_such_language(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the folder holds no .txt" in refused(typed(text=[str(empty)]))
    (tmp_path / "none.jsonl").write_text("")
    for language in ("ms", ""):
        alone = {"text": [str(tmp_path / "none.jsonl")], "replay": [], "chat": None, "tokens_per_second": None}
        assert "none.jsonl: is empty" in refused(typed(**alone, language=language))
        assert not (tmp_path / "out").exists()
    one = str(write(tmp_path / "one.jsonl", MALAY[:1]))
    assert "one.jsonl: holds 1 text; give at least 2" in refused(typed(text=[one], out=str(tmp_path / "short")))
    english = str(write(tmp_path / "other.jsonl", ENGLISH[300:400]))
    line = refused(typed(text=[english]))
    assert "0% of the documents of the text look like ms" in line and "language" in line
    assert not (tmp_path / "out").exists()


def test_text_that_is_mostly_another_language_is_told(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    mixed = str(write(tmp_path / "mixed.jsonl", [*ENGLISH[300:460], *MALAY[:60]]))
    status, err = typed(text=[mixed], chat=None, card=False, vocab=0, tokens=128)
    assert status == 0 and "text: 27% of the documents look like ms; the rest is another language" in err


def test_languages_of_text_are_told_where_nobody_names_one(
    typed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    english, malay = ENGLISH[300:460], MALAY[:60]
    korean = str(
        write(tmp_path / "ko.jsonl", [f"나는 오늘 학교에서 친구들과 함께 밥을 {n} 번 먹었습니다." for n in range(30)])
    )
    shares = "text: looks like en (73%), id or ms (27%); all of it is learned, so leave out other languages"
    mixed = str(write(tmp_path / "mixed.jsonl", [*english, *malay]))
    alone = str(write(tmp_path / "alone.jsonl", english))
    book = tmp_path / "book.txt"  # one document, which is looked at in pieces
    book.write_text("\n".join([*english * 8, *malay * 8]))
    for number, (text, changes, told) in enumerate(
        (
            (mixed, {"replay": [korean]}, shares),
            (mixed, {"replay": []}, shares),
            (str(book), {"replay": [korean]}, shares),
            (mixed, {}, "text: looks like en (73%), id or ms (27%), and the replay text like en; give text"),
            (alone, {}, "text: looks like en (100%), and the replay text like en; give text of the language to learn"),
        )
    ):
        status, err = typed("--dry-run", f"out={tmp_path / str(number)}", text=[text], language="", **changes)
        assert status == 0 and told in err and len(err.splitlines()) == 1, err
    several = [
        *english[:50],
        *malay[:40],
        *["나는 오늘 밥을 먹었습니다."] * 10,
        *["Столиця України — Київ, він стоїть."] * 4,
    ]
    text = [str(write(tmp_path / "several.jsonl", [*several, *["Ο σκύλος είναι εδώ και τρώει."] * 3]))]
    status, err = typed("--dry-run", f"out={tmp_path / 'several'}", text=text, language="", replay=[])
    assert status == 0 and "looks like en (47%), id or ms (37%), ko (9%), others (7%); all of it" in err, err


def test_text_of_one_language_is_not_remarked_on(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Nor is text of a language that is not known, where all of it looks alike."""
    khmer = str(write(tmp_path / "km.jsonl", [f"ភាសាខ្មែរ គឺជាភាសាផ្លូវការ {n}" for n in range(30)]))
    for changes in ({}, {"text": [khmer]}):
        status, err = typed("--dry-run", language="", **changes)
        assert (status, err) == (0, "")


def test_replay_that_is_the_targets(typed: Callable[..., tuple[int, str]], plan: Plan, tmp_path: Path) -> None:
    assert "100% of the replay documents stand in the target's text" in refused(typed(replay=plan()["text"]))
    some = str(write(tmp_path / "some.jsonl", [*ENGLISH[:40], *MALAY[:20]]))
    assert "33% of the replay documents" in refused(typed(replay=[some]))
    assert not (tmp_path / "out").exists()


def test_a_chat_model_that_is_the_base_is_refused(typed: Callable[..., tuple[int, str]], plan: Plan) -> None:
    base = plan()["base"]
    line = refused(typed(chat=base, base=f"{base}/../{Path(base).name}"))
    assert f"adapt: chat is {base}, which is the base itself, so that chat - base is nothing; leave chat out" in line


def test_a_setting_of_trainings_that_is_none_is_refused(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Before anything is measured, whether it stands in the file or is typed, and by a dry run, too."""
    for arguments in (("train.warmpu=3",), ("train.warmpu=3", "--dry-run")):
        assert 'adapt: train: unknown key "warmpu"; did you mean "warmup"' in refused(typed(*arguments))
    assert "train: log_every is 0; it must be above 0" in refused(typed("train.log_every=0"))
    assert not (tmp_path / "out").exists()


def test_replay_in_the_target_language_is_told(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    others = [text.replace("bermain dengan", "duduk bersama") for text in MALAY]
    for number, (language, told) in enumerate(
        (
            ("ms", "replay: looks to be in the language of the text; give text of what the model knew before"),
            ("", "text: looks like id or ms (100%), and the replay text like id or ms; give text of the language to"),
        )
    ):
        replay = [str(write(tmp_path / "others.jsonl", others))]
        status, err = typed("--dry-run", f"out={tmp_path / str(number)}", replay=replay, language=language)
        assert status == 0 and told in err, err
    status, err = typed("--dry-run")
    assert status == 0 and "replay" not in err


def test_a_language_that_is_not_known_is_told(typed: Callable[..., tuple[int, str]]) -> None:
    status, err = typed("--dry-run", language="malay")
    assert status == 0 and "language: whether the text is 'malay' was not looked at; known are ko, " in err


def test_more_tokens_than_the_text_carries(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert "vocab is -5; give auto, 0 for no new tokens, or their number" in refused(typed("--vocab", "-5"))
    line = refused(typed(vocab=50_000))
    assert "vocab is 50,000, and the text carries" in line and "give vocab: " in line
    carried = int(line.split("give vocab: ")[1].split(",")[0])
    assert (tmp_path / "out" / "measure").is_dir() and not (tmp_path / "out" / "tokenizer").exists()
    status, err = typed(vocab=carried, tokens=128, chat=None, card=False)  # what it names can be had, and it goes on
    assert status == 0, err


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_a_tokenizer_that_cannot_be_extended(
    typed: Callable[..., tuple[int, str]], plan: Plan, tmp_path: Path, kind: str
) -> None:
    base, end = Path(plan()["base"]), "[UNK]" if kind == "WordPiece" else "<unk>"
    if kind == "WordPiece":
        tokenizer, trainer = Rust(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]"]
        )  # fmt: skip
    else:
        tokenizer, trainer = Rust(models.Unigram()), trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"]
        )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(ENGLISH, trainer)
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    )
    line = refused(typed(vocab=40, chat=None, card=False))
    assert kind in line and not (tmp_path / "out").exists()
    status, err = typed(vocab="auto", chat=None, card=False, tokens=128)  # adapted as it is, with the reason
    assert status == 0 and "do not extend: " in err and kind in err, err
    assert not (tmp_path / "out" / "tokenizer").exists() and (tmp_path / "out" / "adapted").is_dir()


def test_a_tokenizer_without_an_end_token(typed: Callable[..., tuple[int, str]], plan: Plan, tmp_path: Path) -> None:
    file = Path(plan()["base"]) / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))
    assert "names no eos_token" in refused(typed()) and not (tmp_path / "out").exists()


def test_a_head_that_is_tied_and_is_not(typed: Callable[..., tuple[int, str]], plan: Plan, tmp_path: Path) -> None:
    """Both tables are kept and grown, that is told, and other programs load both."""
    weights = Path(plan()["base"]) / "model.safetensors"
    tensors = load_file(weights)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, weights, {"format": "pt"})
    status, err = typed(chat=None, card=False, tokens=256)
    assert status == 0, err
    assert err.count("config.json ties the head to the embedding, but lm_head.weight differs") == 1
    start = load_file(tmp_path / "out" / "start" / "model.safetensors")
    assert start["lm_head.weight"][:300].equal(head) and start["lm_head.weight"].shape == (340, 32)
    for step in ("start", "embedded", "adapted"):
        assert not json.loads((tmp_path / "out" / step / "config.json").read_text())["tie_word_embeddings"], step


def test_a_chat_model_of_another_base(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    stranger = make(tmp_path / "stranger", 9)
    line = refused(typed(chat=str(stranger)))
    assert "chat is no fine-tune of base: the cosine of their weights" in line
    assert "give the chat version of base" in line and "--allow" not in line and not (tmp_path / "out").exists()


def test_a_chat_or_a_question_that_cannot_be_measured_on(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """They are read at the end; that they cannot be is told at the beginning."""
    chats = tmp_path / "bad.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "assistant", "content": "Ya."}]}) + "\n")
    assert "bad.jsonl line 1: the chat has no reply" in refused(typed(chats=[str(chats)]))
    chats.write_text(json.dumps({"question": "Apa?", "choices": ["a"], "answer": 0}) + "\n")
    assert "bad.jsonl line 1" in refused(typed(choices=[str(chats)]))
    assert not (tmp_path / "out").exists()


def test_a_step_that_was_edited_by_hand(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    brief = {"vocab": 0, "chat": None, "card": False, "tokens": 128}
    assert typed(**brief)[0] == 0
    weights = tmp_path / "out" / "adapted" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    edited = weights.read_bytes()
    line = refused(typed(**brief))
    assert "adapted: model.safetensors was changed" in line and "remove the folder to have it made again" in line
    assert weights.read_bytes() == edited
    shutil.rmtree(tmp_path / "out" / "adapted")
    assert typed(**brief)[0] == 0 and weights.read_bytes() == raw


def test_settings_that_change_nothing_are_told(plan: Plan) -> None:
    told = {
        "minutes": ({"minutes": 3, "tokens": 2000, "tokens_per_second": 100.0},
                    "tokens: 2,000 is not used, since minutes is 3; minutes=null goes by tokens"),
        "replay": ({"replay": [], "cost": 0.01, "replay_share": 0.5},
                   "replay_share, cost: not used, since there is no replay text"),
        "rows": ({"vocab": 0, "rows_lr": 0.5}, "embedded, rows_lr: not used, since no tokens are added"),
        "watch": ({"cost": 0.2, "train": {"eval_every": 0}},
                  "cost: ends no training, since train: eval_every is 0; it is held against the card alone"),
        "step": ({"tokens": 100}, "training: 100 tokens in all, and a step reads 128; each training takes one step all "
                 "the same, so give more tokens, or a smaller batch or context"),
    }  # fmt: skip
    for changes, line in told.values():
        remarks: list[str] = []
        adapt(plan(**changes), dry_run=True, note=remarks.append)
        assert line in remarks, remarks
    remarks = []
    adapt(plan(replay=[], scale="plan", cost=0.01), dry_run=True, note=remarks.append)  # a plan of scales reads cost
    adapt(plan(), dry_run=True, note=remarks.append)
    assert not any("not used" in remark or "step" in remark for remark in remarks)


def test_chats_beside_no_replay_text_are_refused(typed: Callable[..., tuple[int, str]], plan: Plan) -> None:
    for key in ("replay_chats", "replay_choices"):
        line = refused(typed(replay=[], **{key: plan()["chats"]}))
        assert f"adapt: {key} is measured beside replay text, and there is none; give replay, or leave it out" in line


def test_an_output_among_the_text_is_refused(typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """The next run would read what this one held out."""
    text = tmp_path / "ms"
    text.mkdir()
    write(text / "a.jsonl", MALAY)
    line = refused(typed(text=[str(text)], out=str(text / "runs" / "out")))
    assert f"lies in {text}, which is read as text; give another --out" in line and not (text / "runs").exists()
    (tmp_path / "out" / "measure").mkdir(parents=True)
    (tmp_path / "out" / "plan.yaml").write_text("{}")
    write(tmp_path / "out" / "measure" / "text.jsonl", MALAY)
    assert f"out lies in {tmp_path}/**/text.jsonl" in refused(typed(text=[f"{tmp_path}/**/text.jsonl"]))


def test_a_plan_is_the_same_wherever_it_is_read(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in it are whole, so that one that is spelled in another way repeats no step."""
    whole = plan(vocab=0, chat=None, chats=[], card=False, text=[str(tmp_path / "m*.jsonl")])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("a file of that name is not meant")
    spelled = {"base": "out/../base", "text": ["m*.jsonl"], "out": "./out"}
    (tmp_path / "out").mkdir()
    adapt({**whole, **spelled, "replay": ["self"]}, dry_run=True)
    written = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    assert written == {**written, **{key: whole[key] for key in spelled}, "replay": ["self"]}
    adapt({**whole, **spelled})
    before = (tmp_path / "out" / "adapted" / "training.json").stat().st_mtime_ns
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapt(tmp_path / "out" / "plan.yaml")
    adapt(whole)
    assert (tmp_path / "out" / "adapted" / "training.json").stat().st_mtime_ns == before
