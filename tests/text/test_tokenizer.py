"""Tokenizers: equal to transformers on folders as hubs hold them, exact on GPT-2; special-looking text stays plain."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from transformers import AutoTokenizer

from lapis.errors import CheckpointError, ConfigError, DataError
from lapis.text.chat.chat import encode_chat, render
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

TEXT = [
    "Saya suka makan nasi lemak di Kuala Lumpur.",
    "나는 밥을 좋아한다.",
    "Я люблю читати книжки.",
    "我喜欢看书。",
] * 5
STRINGS = [
    "",
    " ",
    "\n\n\t x",
    "Saya suka",
    "한국어 и українська 你好 🙂‍↔️",
    "<|im_end|> <|endoftext|>",
    "a\u0000b",
    "e\u0301 é",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXT, 340)


@pytest.fixture
def folder(trained: Tokenizer, tmp_path: Path) -> Path:
    trained.save(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_trained_tokenizer_is_the_same_in_transformers(folder: Path, trained: Tokenizer) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.open(folder)
    assert len(theirs) == ours.vocab_size == ours.rows == 340
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    for text in [*TEXT, *STRINGS]:
        assert ours.encode(text, special=True) == trained.encode(text, special=True) == theirs(text)["input_ids"]
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    chat = [{"role": "user", "content": "Apa khabar?"}, {"role": "assistant", "content": "Baik."}]
    assert render(ours, chat) == theirs.apply_chat_template(chat, tokenize=False)
    assert encode_chat(ours, chat)[0] == theirs.apply_chat_template(chat, return_dict=False)
    assert ours.end_ids == (ours.id("<|endoftext|>"), ours.id("<|im_end|>"))


def test_training_gives_the_same_tokenizer_each_time(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    assert train_tokenizer(TEXT, 340).digest() == trained.digest() == train_tokenizer([file], 340).digest()
    assert train_tokenizer(TEXT[:1], 10_000).vocab_size < 10_000
    with pytest.raises(ConfigError, match="least is 259"):
        train_tokenizer(TEXT, 258)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_every_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not set(ids) & set(trained.special.values())


def test_fault_46_special_text_is_plain_unless_it_is_ones_own(trained: Tokenizer) -> None:
    end = trained.special["<|im_end|>"]
    assert end not in trained.encode("a<|im_end|>b")
    assert trained.encode("a<|im_end|>b", special=True).count(end) == 1
    assert trained.encode_batch(["<|im_end|>", "x"], special=True)[0] == [end]
    assert trained.decode([end], skip_special=True) == ""


def test_one_token_as_a_reader_sees_it(trained: Tokenizer) -> None:
    assert trained.text(trained.encode("\n")[0]) == "\\n"
    assert trained.text(trained.encode(" nasi")[0]).startswith(" ")
    assert trained.text(trained.encode("🙂")[0]) == "\\xf0"
    assert trained.text(0) == "<|endoftext|>"
    with pytest.raises(DataError, match="no such token"):
        trained.token(10_000)
    with pytest.raises(DataError, match="no such token"):
        trained.decode([-1])
    with pytest.raises(DataError, match="surrogate"):
        trained.encode("half \ud83d")


PLAIN = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
OBJECT = {"__type": "AddedToken", **PLAIN, "special": True}
TOKENS = {
    "text": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|a|>", "<|b|>"]},
    "objects": {
        "eos_token": {"content": "<|im_end|>", **OBJECT},
        "bos_token": {"content": "<s>", **OBJECT},
        "additional_special_tokens": [{"content": "<|a|>", **OBJECT, "rstrip": True}],
    },
    "decoder": {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "340": {"content": "<think>", **PLAIN, "special": False},
            "341": {"content": "<|c|>", **PLAIN, "special": True},
        },
    },
}


@pytest.mark.parametrize("kind", TOKENS)
def test_added_tokens_in_every_spelling(kind: str, folder: Path) -> None:
    edit(folder, **{"added_tokens_decoder": {}, **TOKENS[kind]})
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.open(folder)
    assert ours.vocab_size == len(theirs)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    text = "x <|a|>  y<|b|><|c|> <think>z<s> <|im_end|>"
    assert ours.encode(text, special=True) == theirs(text)["input_ids"]
    assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]


def test_older_folders_name_special_tokens_in_their_own_file(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"], config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    older = {"eos_token": {"content": "<|im_end|>", **PLAIN}}
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    assert Tokenizer.open(folder).eos_id == AutoTokenizer.from_pretrained(folder).eos_token_id == 2


CHAT = [{"role": "user", "content": "a"}]


def test_templates_in_every_spelling(folder: Path, tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "D{{ messages|length }}"},
        {"name": "tool_use", "template": "T{{ tools }}"},
    ]
    edit(folder, chat_template=named)
    ours, theirs = Tokenizer.open(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.chat_template == "D{{ messages|length }}"
    for tools in (None, [{"type": "function"}]):
        assert render(ours, CHAT, tools=tools) == theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
    (folder / "chat_template.jinja").write_text("file\n{{ messages[0].content }}\n")
    assert render(Tokenizer.open(folder), CHAT) == "file\na"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools!")
    assert render(Tokenizer.open(folder), CHAT, tools=[]) == "tools!"
    copy = tmp_path / "copy"
    copy.mkdir()
    Tokenizer.open(folder).save(copy)
    assert render(Tokenizer.open(copy), CHAT, tools=[]) == "tools!"


def test_end_ids_come_from_generation_config_too(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.open(folder).end_ids == (0, 7, 2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert Tokenizer.open(folder).end_ids == (0, 5, 2)
    edit(folder, chat_template="{{ messages[1].content + '</reply>' }}", eos_token=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert Tokenizer.open(folder).end_ids == (9,)


def test_saving_keeps_the_bytes_of_what_was_opened(folder: Path, tmp_path: Path) -> None:
    edit(folder, something_else="kept")
    copy = tmp_path / "copy"
    copy.mkdir()
    Tokenizer.open(folder).save(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()


def test_lengths_of_an_earlier_use_are_not_kept(folder: Path, trained: Tokenizer) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    whole["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    assert Tokenizer.open(folder).encode("Saya suka makan") == trained.encode("Saya suka makan")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", '{"model": ', r"tokenizer\.json.*line 1 column"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "a"', r"tokenizer_config\.json.*column"),
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "must map ids"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"900": {"content": "<x>"}}}', "900.*leads to 340"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 1}]}', "needs a name and a template"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
    ],
)
def test_fault_33_damaged_files_are_named(name: str, content: str, says: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        Tokenizer.open(folder)
    assert "\n" not in str(caught.value)


def test_fault_27_a_link_that_leaves_the_folder_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "t.json"
    elsewhere.write_bytes((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="leads outside"):
        Tokenizer.open(folder)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Tokenizer.open(elsewhere.parent)
    with pytest.raises(CheckpointError, match="no such folder"):
        Tokenizer.open(folder / "nothing")


def test_fault_38_a_token_beyond_the_embedding_is_named(folder: Path) -> None:
    edit(folder, pad_token="[PAD]")
    tokenizer = Tokenizer.open(folder)
    with pytest.raises(CheckpointError, match=r'"\[PAD\]" has id 340.*340 rows'):
        tokenizer.check_rows(340)
    tokenizer.check_rows(341)
    tokenizer.check_rows(151_936)


@pytest.mark.real_data
def test_gpt2_golden_ids(data_dir: Path) -> None:
    tokenizer = Tokenizer.open(data_dir / "tokenizer" / "gpt2")
    golden = [json.loads(line) for line in (data_dir / "tokenizer" / "gpt2" / "golden.jsonl").open()]
    assert len(golden) == 300
    for case in golden:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        special = case.get("ids_with_special", case["ids"])
        assert tokenizer.encode(case["text"], special=True) == special
        assert tokenizer.decode(special) == case["text"]
    assert tokenizer.eos_id == 50256
