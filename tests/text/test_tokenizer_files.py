"""Tokenizer folders as they lie about: older files, settings on top of tokenizer.json, templates in several places.

What transformers makes of each is the measure.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from lapis.cli.main import main
from lapis.errors import CheckpointError
from lapis.text.tokenizer.folder import copy_templates, read_templates
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.text.tokenizer.vocabulary import read_vocabulary

TEXTS = [
    "hello World, Café STRASSE Straße",
    "هذه جملة إسلام أهلا",
    " two  spaces\nand 北京 lines",
    "",
    "I'll don't 123 x\u0301",
]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéأإا"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS), "Straße", "strasse",
         "هذه", "جملة", "إسلام", "اسلام", "أهلا", "اهلا", "Caf", "caf", "北", "京", "北京", ",", "1"]  # fmt: skip
BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def bert_folder(folder: Path, lower: bool, strip: bool | None, config: dict[str, Any]) -> Path:
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**BERT, **config}))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def same_ids(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.open(folder)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("stored", [(False, None), (True, None), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False},
        {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True},
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": False},
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "tokenize_chinese_chars": False},
        {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True},
        {"do_lower_case": False},
        {},
    ],
)
def test_settings_on_top_count_as_in_transformers(
    stored: tuple[bool, bool | None], config: dict[str, Any], tmp_path: Path
) -> None:
    folder = bert_folder(tmp_path, *stored, config)
    same_ids(folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    Tokenizer.open(folder).save(saved)
    for text in TEXTS:  # what is saved does the same without config.json beside it
        assert Tokenizer.open(saved).encode(text) == Tokenizer.open(folder).encode(text)


def test_a_vocabulary_in_a_text_file_is_read(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path, False, None, {"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    (folder / "tokenizer.json").unlink()
    same_ids(folder)


def byte_level_folder(folder: Path, config: dict[str, Any], model_type: str, space: bool = False) -> Path:
    made = train_tokenizer([" ".join(TEXTS) * 9], 330)
    made._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    made.save(folder)
    path = folder / "tokenizer_config.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k != "added_tokens_decoder"}
    path.write_text(json.dumps({**old, **config}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("space", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"add_prefix_space": True}, {"add_prefix_space": False},
               {"add_bos_token": True, "bos_token": "<|im_start|>"}]
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "model_type"),
    [("GPT2Tokenizer", "gpt2"), ("GPT2TokenizerFast", "llama"), ("PreTrainedTokenizerFast", "llama")],
)  # fmt: skip
def test_a_space_before_a_text(name: str, model_type: str, config: dict[str, Any], space: bool, tmp_path: Path) -> None:
    same_ids(byte_level_folder(tmp_path, {"tokenizer_class": name, **config}, model_type, space))


@pytest.mark.parametrize("setting", [None, False, True])
@pytest.mark.parametrize("scheme", ["first", "never"])
def test_a_space_before_a_piece(setting: bool | None, scheme: str, tmp_path: Path) -> None:
    letters = sorted({c for text in TEXTS for c in text if not c.isspace()})
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *letters, "▁h"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "h")], unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    more = {} if setting is None else {"add_prefix_space": setting, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if setting is None and scheme == "never":
        return  # the class then puts a space, which nothing in the folder asks for
    same_ids(tmp_path)


def test_a_setting_that_cannot_be_applied_names_both_files(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, {"tokenizer_class": "BertTokenizer", "do_lower_case": True}, "bert")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json says do_lower_case true, but the normalizer in "
                                              r"tokenizer.json is none"):  # fmt: skip
        Tokenizer.open(folder)
    config = {"tokenizer_class": "AlbertTokenizer", "do_lower_case": True}
    folder = byte_level_folder(tmp_path, config, "unknown")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json says do_lower_case true, which AlbertTokenizer"):
        Tokenizer.open(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "X", "do_lower_case": "yes"}))
    with pytest.raises(CheckpointError, match="do_lower_case is 'yes'; expected true or false"):
        Tokenizer.open(folder)


@pytest.mark.parametrize(
    "config", [{"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
               {"tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}]
)  # fmt: skip
def test_vocabulary_and_merges_without_tokenizer_json(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = byte_level_folder(tmp_path / "m" if (tmp_path / "m").mkdir() is None else tmp_path, config, "llama")
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    same_ids(folder)
    main(["tokens", str(folder), "hello World", "--json"])
    shown = json.loads(capsys.readouterr().out)["tokens"]
    assert [entry["id"] for entry in shown] == Tokenizer.open(folder).encode("hello World")
    copy = tmp_path / "copy"
    copy.mkdir()
    Tokenizer.open(folder).save(copy)
    assert Tokenizer.open(copy).digest() == Tokenizer.open(folder).digest()
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None and vocabulary.ids["hello" if "hello" in vocabulary.ids else "h"] is not None
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(CheckpointError, match=r"merges.txt line 2: is 'a b c'; expected two tokens"):
        Tokenizer.open(folder)


def test_files_that_do_not_say_how_text_is_split(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match=r"do not say how text is split.*give tokenizer_class GPT2Tokenizer"):
        Tokenizer.open(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.json, and no other file of a tokenizer"):
        Tokenizer.open(tmp_path)


STYLES = ("file", "config", "named", "folder")


def speak(folder: Path, text: str, style: str) -> None:
    """Gives a folder a chat template in one of the places that hubs have had."""
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    if style == "file":
        (folder / "chat_template.jinja").write_text(text)
    elif style == "folder":
        (folder / "chat_template.jinja").write_text(text)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text + "!")
    elif style == "config":
        config["chat_template"] = text
    else:
        config["chat_template"] = [{"name": n, "template": text + e} for n, e in (("default", ""), ("tool_use", "!"))]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("own", STYLES)
@pytest.mark.parametrize("other", STYLES)
def test_one_template_holds_wherever_it_stands(own: str, other: str, tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    base.mkdir()
    train_tokenizer(["hello the cat " * 9], 280).save(base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    empty = tmp_path / "empty"
    shutil.copytree(base, empty)
    speak(adapter, "adapter's", own)
    speak(base, "base's", other)
    assert read_templates(adapter, base)["default"] == "adapter's" and read_templates(base)["default"] == "base's"
    assert read_templates(empty, base) == read_templates(base)
    assert not copy_templates(empty, base) and read_templates(base)["default"] == "base's"
    assert copy_templates(adapter, base) and read_templates(base) == read_templates(adapter)
    theirs = AutoTokenizer.from_pretrained(base).chat_template
    assert (theirs if isinstance(theirs, str) else theirs["default"]) == "adapter's"
    assert Tokenizer.open(base).templates == read_templates(adapter)


REAL = Path(os.environ.get("LAPIS_MODELS", "/nowhere"))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["smollm2-it", "gemma3"])
def test_real_folders_give_the_ids_of_transformers(name: str) -> None:
    folder = REAL / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder} is not at hand")
    same_ids(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.open(folder)
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None and dict(vocabulary.ids) == theirs.get_vocab()
    assert {ours.token(i): i for i in range(ours.rows)} == theirs.get_vocab()
