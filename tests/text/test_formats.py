"""The formats that people have: recognised by their fields; what changes the meaning is honoured or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import DataError
from lapis.evaluation.chats import encode_record
from lapis.text.chat.chat import encode_chat, render
from lapis.text.corpus.corpus import chats, describe_file, documents, kind_of
from lapis.text.corpus.files import files
from lapis.text.corpus.pairs import pairs, pairs_of_verdicts
from lapis.text.corpus.preview import preview
from lapis.text.corpus.records import records
from lapis.text.rows.coverage import lines
from lapis.text.rows.data_sources import PackingSettings, open_data
from lapis.text.rows.packing import pack
from lapis.text.rows.pair_rows import Paired
from lapis.text.tokenizer.folder import CHATML
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

USER, REPLY = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}
SYSTEM = {"role": "system", "content": "Be short."}
TALK = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "the cat"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello the cat says how a dog runs. system user assistant tool " * 9], 300)


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def messages(folder: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    (chat,) = chats(write(folder, record))
    return chat.messages


@pytest.mark.parametrize(
    ("record", "expected", "description"),
    [
        ({"messages": [USER, REPLY]}, [USER, REPLY], "format: messages"),
        ({"conversations": TALK}, [USER, REPLY], "format: ShareGPT (conversations)"),
        ({"conversations": TALK, "system": "Be short."}, [SYSTEM, USER, REPLY],
         "format: ShareGPT (conversations, with system)"),
        ({"conversations": [{"from": "system", "value": "Be short."}, *TALK]}, [SYSTEM, USER, REPLY],
         "format: ShareGPT (conversations)"),
        ({"messages": [USER, REPLY], "system": ""}, [USER, REPLY], "format: messages"),
        ({"messages": [SYSTEM, USER, REPLY], "system": "Be short."}, [SYSTEM, USER, REPLY],
         "format: messages (with system)"),
        ({"instruction": "hello", "input": "", "output": "the cat"}, [USER, REPLY],
         "format: Alpaca (instruction, output)"),
        ({"instruction": "say", "input": "hello", "output": "the cat", "system": "Be short."},
         [SYSTEM, {**USER, "content": "say\nhello"}, REPLY],
         "format: Alpaca (instruction, input, output, with system)"),
        ({"instruction": "hello", "input": None, "output": "the cat", "history": [["how", "a dog"]]},
         [{**USER, "content": "how"}, {**REPLY, "content": "a dog"}, USER, REPLY],
         "format: Alpaca (instruction, history, output)"),
        ({"instruction": "say", "context": "hello", "response": "the cat", "category": "x"},
         [{**USER, "content": "say\nhello"}, REPLY], "format: Dolly (instruction, context, response)"),
        ({"prompt": "hello", "completion": "the cat"}, [USER, REPLY],
         "format: prompt and completion (prompt, completion)"),
        ({"prompt": [USER], "completion": [REPLY]}, [USER, REPLY],
         "format: prompt and completion (prompt, completion)"),
        ({"question": "hello", "answer": "the cat"}, [USER, REPLY], "format: question and answer (question, answer)"),
    ],
)  # fmt: skip
def test_every_chat_format_is_the_same_chat(
    record: dict[str, Any], expected: list[dict[str, Any]], description: str, tmp_path: Path
) -> None:
    assert messages(tmp_path, record) == expected
    path = tmp_path / "data.jsonl"
    assert kind_of(path) == "chats" and describe_file(path) == description
    assert (
        preview(path, 1)["format"] == description and preview(path, 1)["records"][0]["parts"][-1]["text"] == "the cat"
    )
    with pytest.raises(DataError, match="where a document"):
        list(documents(path))


def test_an_instruction_with_its_text_is_either(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "hello", "input": "", "output": "the cat", "text": "### hello: the cat"})
    assert kind_of(path, prefer="documents") == "documents" and kind_of(path, prefer="chats") == "chats"
    assert next(documents(path)).text == "### hello: the cat" and next(chats(path)).messages == [USER, REPLY]


def test_sharegpt_calls_and_tools(tmp_path: Path) -> None:
    talk = [TALK[0], {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "42"}, TALK[1]]  # fmt: skip
    (chat,) = chats(write(tmp_path, {"conversations": talk, "tools": '[{"name": "f"}]'}))
    assert chat.messages == [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                             {"role": "tool", "content": "42"}, REPLY]  # fmt: skip
    assert chat.tools == [{"type": "function", "function": {"name": "f"}}]
    (chat,) = chats(write(tmp_path, {"messages": [USER, REPLY], "tools": [CALL]}))
    assert chat.tools == [CALL]


BARE = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": [BARE]},
        {"role": "tool_call", "content": json.dumps(BARE)},
        {"from": "Function_Call", "value": json.dumps([BARE])},
    ],
)
def test_a_call_of_a_tool_is_the_same_in_all_spellings(call: dict[str, Any], tmp_path: Path) -> None:
    talk = [{"role": "User", "value": "hello"}, call, {"role": "tool_response", "content": "42"}, REPLY]
    (chat,) = chats(write(tmp_path, {"messages": talk, "tools": [json.dumps({"name": "f"})]}))
    assert chat.messages == [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                             {"role": "tool", "content": "42"}, REPLY]  # fmt: skip
    assert chat.tools == [{"type": "function", "function": {"name": "f"}}]


def test_calls_that_are_empty_are_none(tmp_path: Path) -> None:
    talk = [USER, {**REPLY, "tool_calls": [], "function_call": None}]
    assert messages(tmp_path, {"messages": talk}) == [USER, REPLY]


PRINTED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name + ' ' }}ARGUMENTS{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("given", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("{{ c.function.arguments | tojson }}", 'f {"x": 1}'),
        ("{{ c.function.arguments }}", 'f {"x": 1}'),
        ("{{ '' + c.function.arguments }}", 'f {"x": 1}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}", "f x=1"),
        ("{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
         'f {"x": 1}'),
    ],
)  # fmt: skip
def test_arguments_reach_the_template_as_it_reads_them(
    arguments: str, printed: str, given: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = Tokenizer(tokenizer._backend, tokenizer.named, {"default": PRINTED.replace("ARGUMENTS", arguments)})
    call = {"type": "function", "function": {"name": "f", "arguments": given}}
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "4"}, REPLY]
    path = write(tmp_path, {"messages": talk})
    ids = pack(path, made, length=128).arrays([0])[0][0]  # type: ignore[arg-type]
    (chat,) = chats(path)
    for text in (tokenizer.decode(ids), tokenizer.decode(encode_record(made, chat)[0])):
        assert f"<|im_start|>assistant\n{printed}<|im_end|>" in text


def test_arguments_that_are_no_object_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = PRINTED.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
    made = Tokenizer(tokenizer._backend, tokenizer.named, {"default": source})
    call = {"type": "function", "function": {"name": "f", "arguments": "x=1"}}
    path = write(tmp_path, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    with pytest.raises(DataError, match="line 1: arguments of a call are 'x=1'"):
        pack(path, made, length=64)


def test_what_is_scored_has_the_tools_of_the_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = "{% if tools %}{{ tools | tojson }}{% endif %}{% if loud %}LOUD{% endif %}" + CHATML
    made = Tokenizer(tokenizer._backend, tokenizer.named, {"default": source})
    record = {"messages": [USER, REPLY], "tools": [CALL], "chat_template_kwargs": {"loud": True}}
    (chat,) = chats(write(tmp_path, record))
    text = tokenizer.decode(encode_record(made, chat)[0])
    assert text.startswith('[{"type": "function"') and "LOUD" in text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "messages[1].weight is 0.5; a message is learned (1) or not"),
        ({"messages": [{**USER, "train": True}, REPLY]}, "messages[0].train asks to learn what is not the assistant's"),
        ({"messages": [USER, {**REPLY, "weight": 0, "train": True}]}, "weight and train contradict each other"),
        ({"messages": [USER, REPLY], "images": ["a.png"]}, "has images, which lapis does not read in chats"),
        ({"messages": [USER, REPLY], "weight": 0.3}, "weight is 0.3 for the whole record"),
        ({"messages": [SYSTEM, USER, REPLY], "system": "Be long."}, "system and the first message are two system"),
        ({"messages": [USER, REPLY], "tools": "{"}, "tools is text that is not JSON"),
        ({"messages": [USER, REPLY], "system": 3}, "system is a number; expected text"),
        ({"messages": [USER, REPLY], "chat_template_kwargs": [1]}, "chat_template_kwargs is a list; expected an"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]}, "content[0] is of type 'image'"),
        ({"conversations": [TALK[0], {"from": "tool_call", "value": "f(1)"}]}, "a tool_call, is text that is not JSON"),
        ({"messages": [USER, {**REPLY, "mask": 1}]}, "messages[1].mask may say what is learned"),
        ({"messages": [USER, {**REPLY, "tool_calls": "f(1)"}]}, "tool_calls is text that is not JSON"),
        ({"messages": [USER, {**REPLY, "tool_calls": [{"name": "f"}]}]}, "expected an object with name and arguments"),
        ({"messages": [USER, REPLY], "tools": [3]}, "tools holds a number; expected a list of objects"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] is a list; expected a question and"),
    ],
)  # fmt: skip
def test_what_changes_the_meaning_is_refused_by_name(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(chats(write(tmp_path, record)))
    assert message in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'data.jsonl'} line 1: ")


@pytest.mark.parametrize("silent", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_a_reply_of_no_weight_is_not_learned(silent: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = {"role": "assistant", "content": "a dog"}
    talk = [USER, {**bad, **silent}, USER, {**REPLY, "weight": 1}]
    chat = messages(tmp_path, {"messages": talk})
    ids, mask = encode_chat(tokenizer, chat)
    assert ids == encode_chat(tokenizer, [USER, bad, USER, REPLY])[0], "the template sees the same chat"
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "the cat<|im_end|>"
    marked = Tokenizer(tokenizer._backend, tokenizer.named, {"default": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )})  # fmt: skip
    ids, mask = encode_chat(marked, chat)
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "the cat<|im_end|>"


def test_padding_of_tables_is_not_data(tmp_path: Path) -> None:
    """Arrow gives every row the fields of all; what was not there must not reach the template as null."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def row(name: str, argument: str, value: Any) -> dict[str, Any]:
        schema = {"type": "object", "properties": {argument: {"type": "string"}}}
        call = {"type": "function", "function": {"name": name, "arguments": {argument: value}}}
        return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                             {"role": "tool", "content": "ok"}, REPLY],
                "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}]}  # fmt: skip

    rows = [row("weather", "city", "Kyiv"), row("add", "x", 1)]
    plain = list(chats(write(tmp_path, *rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    padded = pq.read_table(tmp_path / "data.parquet").to_pylist()
    assert padded != rows, "the table pads"
    for path in (tmp_path / "data.parquet", write(tmp_path, *padded, name="padded.jsonl")):
        for one, other in zip(plain, chats(path), strict=True):
            assert (one.messages, one.tools) == (other.messages, other.tools), path.name
    call_row = row("add", "x", None)
    assert next(chats(write(tmp_path, call_row))).messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}


WORDS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=9)
KEYS = st.text(st.sampled_from('ab"\\]}, é'), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=9,
)  # fmt: skip


@given(st.lists(VALUES, min_size=1, max_size=9), st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_an_array_is_read_item_by_item(
    tmp_path_factory: Any, items: list[Any], indent: int | None, escaped: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=escaped), encoding="utf-8")
    assert list(records(path)) == list(enumerate(items, 1))


def test_json_files_that_people_have(tmp_path: Path) -> None:
    many = [{"instruction": "hello", "output": f"the cat {i} " + 'é"]}\\' * (i % 700)} for i in range(3000)]
    path = tmp_path / "a.json"
    path.write_text("\ufeff " + json.dumps(many, ensure_ascii=False, indent=2), encoding="utf-8")
    assert [c.messages[-1]["content"] for c in chats(path)] == [row["output"] for row in many]
    (tmp_path / "lines.json").write_text(json.dumps(many[0]) + "\n" + json.dumps(many[1]) + "\n")
    assert len(list(chats(tmp_path / "lines.json"))) == 2
    (tmp_path / "settings.json").write_text('{\n "a": 1\n}')
    assert files(tmp_path) == [path], "of a folder, arrays are data and settings are not"
    for raw, message in (
        (path.read_bytes()[:2000], "the array ends too early, after item"),
        (b"[]", "is empty; give another file, or leave it out"),
        (b'[{"text": "a"}, {"text": }]', "item 2: not JSON at column"),
        (b'[{"text": "a\xff"}]', "item 1: not UTF-8 at byte 12"),
        (b'{\n "a": 1\n}', "is neither an array of records nor one object in each line"),
    ):
        (tmp_path / "bad.json").write_bytes(raw)
        with pytest.raises(DataError, match=r"bad\.json") as caught:
            list(records(tmp_path / "bad.json"))
        assert message in str(caught.value)


@pytest.mark.parametrize("trusted", [False, True])
def test_special_tokens_in_text_are_counted_and_may_be_trusted(trusted: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = train_tokenizer(["hello the cat says how a dog runs. user assistant " * 9], 290)
    base._backend.add_special_tokens(["<|aud_1|>", "<|aud_2|>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(base._backend, base.named, base.templates).save(folder)
    tokenizer, theirs = Tokenizer.open(folder), transformers.AutoTokenizer.from_pretrained(folder)
    talk = [USER, {"role": "assistant", "content": "<|aud_1|><|aud_2|>the <|aud_1|>"}]
    path = write(tmp_path, {"messages": talk}, {"messages": talk})
    source = {"path": str(path), "special": "trusted"} if trusted else str(path)
    rows = open_data(source, PackingSettings(tokenizer, "chats", 64))
    description = "\n".join(lines(rows))
    assert "special tokens spelled in the text: 6 (<|aud_1|> 4, <|aud_2|> 2)" in description
    assert ("they are tokens" in description) is trusted and (
        "special: trusted makes them tokens" in description
    ) is not trusted
    ids, mask = encode_chat(tokenizer, talk, trusted=trusted)
    if trusted:
        assert ids == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.id("<|aud_1|>")) == (2 if trusted else 0)
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(learned) == f"{talk[1]['content']}<|im_end|>"
    assert learned[-1] == tokenizer.id("<|im_end|>")
    with_pairs = write(tmp_path, {"prompt": "hello", "chosen": "<|aud_1|>", "rejected": "the dog"}, name="p.jsonl")
    paired = Paired.read({"path": with_pairs, "special": "trusted"} if trusted else with_pairs, tokenizer, 64)
    assert (tokenizer.id("<|aud_1|>") in paired.replies[0].ids) is trusted
    assert "special tokens spelled in the text: 1" in "\n".join(paired.notices)


def test_an_end_of_text_in_trusted_text_begins_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("hello the cat<|endoftext|>how a dog")
    (tmp_path / "a.txt").write_text("hello the cat")
    (tmp_path / "b.txt").write_text("how a dog")
    apart = pack([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, length=32)
    trusted = pack(tmp_path / "one.txt", tokenizer, length=32, special="trusted")
    plain = pack(tmp_path / "one.txt", tokenizer, length=32)
    rows = [0]
    for one, other in zip(trusted.arrays(rows), apart.arrays(rows), strict=True):  # type: ignore[arg-type]
        assert one.tolist() == other.tolist()
    assert trusted.counts["documents"] == 2 and plain.counts["documents"] == 1
    assert "special tokens spelled in the text: 1 (<|endoftext|> 1)" in "\n".join(lines(plain))
    folder = pack(tmp_path / "one.txt", tokenizer, tmp_path / "packed", 32, special="trusted")
    assert folder.digest == trusted.digest and folder.info["special"] == "trusted"
    with pytest.raises(DataError, match="was packed as plain text; pack the data again with --special trusted"):
        packed = pack(tmp_path / "one.txt", tokenizer, tmp_path / "plain", 32)
        open_data({"path": packed.source, "special": "trusted"}, PackingSettings(tokenizer, "documents", 32))


HEADERS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("ends", [(), ("<|user|>",)])
def test_a_header_that_ends_a_turn_is_learned(ends: tuple[str, ...], tmp_path: Path) -> None:
    base = train_tokenizer(["hello the cat says how a dog runs " * 9], 290)
    base._backend.add_special_tokens(["<|user|>", "<|assistant|>"])
    stop = [base.id(token) or 0 for token in ends]
    tokenizer = Tokenizer(base._backend, base.named, {"default": HEADERS}, stop)
    talk = [USER, REPLY, USER, REPLY]
    ids, mask = encode_chat(tokenizer, talk)
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert learned == ("the cat<|user|>the cat" if ends else "the catthe cat")
    rows = pack(write(tmp_path, {"messages": talk}), tokenizer, length=64)
    assert f"nothing closes a reply in {1 if ends else 2} of 2" in "\n".join(lines(rows))


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        ("{% for m in messages %}{{ m.role + ': ' }}{{ m.content }}{{ '\n' }}{% endfor %}", "user: hel\nlo\n"),
        (CHATML, "<|im_start|>user\nhel\nlo<|im_end|>\n"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}", "hel|lo|"),
    ],
)
def test_content_in_parts_is_text(template: str, printed: str, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    made = Tokenizer(tokenizer._backend, tokenizer.named, {"default": template})
    assert render(made, [{"role": "user", "content": parts}]) == printed
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    ids, mask = encode_chat(made, talk)
    assert "'type'" not in tokenizer.decode(ids) and "hel" in tokenizer.decode(
        [i for i, m in zip(ids, mask, strict=True) if m]
    )


def test_calls_without_a_place_in_the_template_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, REPLY]
    path = write(tmp_path, {"messages": talk, "tools": [CALL]})
    rows = pack(path, tokenizer, length=128)
    ids = rows.arrays([0])[0][0]  # type: ignore[arg-type]
    assert '<|im_start|>assistant\n{"name": "f", "arguments": {"x": 1}}<|im_end|>' in tokenizer.decode(ids)
    description = "\n".join(lines(rows))
    assert (
        "calls of tools are written as JSON text in 1 chat" in description
        and "the tools of 1 chat do not appear" in description
    )


ONE, TWO = {"from": "gpt", "value": "the cat"}, {"from": "gpt", "value": "the dog"}
DOG = {"role": "assistant", "content": "the dog"}


@pytest.mark.parametrize(
    ("record", "description"),
    [
        ({"conversations": TALK[:1], "chosen": ONE, "rejected": TWO},
         "format: LLaMA-Factory preferences (conversations, chosen, rejected)"),
        ({"instruction": "hello", "input": "", "chosen": "the cat", "rejected": "the dog"},
         "format: LLaMA-Factory preferences (instruction, chosen, rejected)"),
        ({"chosen": "\n\nHuman: hello\n\nAssistant: the cat", "rejected": "\n\nHuman: hello\n\nAssistant: the dog"},
         "format: HH transcripts (chosen, rejected)"),
        ({"prompt": "\n\nHuman: hello\n\nAssistant:", "chosen": "the cat", "rejected": "the dog"},
         "format: pairs (prompt, chosen, rejected)"),
        ({"question": "hello", "chosen": "the cat", "rejected": "the dog"},
         "format: pairs (question, chosen, rejected)"),
        ({"prompt": "hello", "chosen": [USER, REPLY], "rejected": [USER, DOG]},
         "format: pairs (prompt, chosen, rejected)"),
    ],
)  # fmt: skip
def test_every_preference_format_is_the_same_pair(record: dict[str, Any], description: str, tmp_path: Path) -> None:
    path = write(tmp_path, record)
    (pair,) = pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], REPLY, DOG)
    assert preview(path, 1)["format"] == description and preview(path, 1)["kind"] == "preferences"


def test_system_and_tools_of_a_pair_are_kept(tmp_path: Path) -> None:
    record = {"system": "Be short.", "question": "hello", "chosen": "the cat", "rejected": "the dog", "tools": [CALL]}
    (pair,) = pairs(write(tmp_path, record))
    assert pair.prompt == [SYSTEM, USER] and pair.tools == [CALL]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"prompt": "hello", "completion": "the cat", "label": True},
         {"prompt": "how", "completion": "the dog", "label": False}),
        ({"prompt": [USER], "completion": [REPLY], "label": True},
         {"prompt": [{**USER, "content": "how"}], "completion": [DOG], "label": False}),
        ({"messages": [USER, REPLY], "kto_tag": True},
         {"messages": [{**USER, "content": "how"}, DOG], "kto_tag": False}),
        ({"instruction": "hello", "input": "", "output": "the cat", "kto_tag": True},
         {"instruction": "how", "input": "", "output": "the dog", "kto_tag": False}),
    ],
)  # fmt: skip
def test_replies_with_a_verdict_each(
    good: dict[str, Any], bad: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path, bad, good, bad)
    made, desirable, undesirable = pairs_of_verdicts(path)
    assert (desirable, undesirable, len(made)) == (1, 2, 2)
    first = made[0]
    assert (first.prompt, first.chosen, first.rejected_prompt, first.rejected) == (
        [USER], REPLY, [{**USER, "content": "how"}], DOG)  # fmt: skip
    data = Paired.read(path, tokenizer, 64, verdicts=True)
    assert [tokenizer.decode(r.ids[r.first : r.last].tolist()) for r in data.replies[:2]] == [
        "the cat<|im_end|>", "the dog<|im_end|>"]  # fmt: skip
    assert "how" in tokenizer.decode(data.replies[1].ids.tolist())
    assert "1 desirable and 2 undesirable replies; the desirable ones are read again" in data.notices
    with pytest.raises(DataError, match=r"holds one reply and a verdict .*, which KTO learns from"):
        Paired.read(path, tokenizer, 64)
    with pytest.raises(DataError, match="all 1 reply has one verdict; both are needed"):
        pairs_of_verdicts(write(tmp_path, good))
