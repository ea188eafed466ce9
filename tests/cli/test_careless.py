"""What a careless user types: an empty name, a folder for a file, a file for a folder, another encoding, a wrong field.

Each answer is one line with a remedy, and nothing is written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> Callable[..., str]:
    """refused(*arguments, status) -> the line that a command ends with, run beside a model and inputs of every kind."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 280)
    save(Transformer(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=tokenizer.rows, context=64)), "base")
    tokenizer.save(Path("base"))
    Path("void").mkdir()
    Path("empty").touch()
    Path("text.txt").write_text("the cat sat on the mat\n" * 9)
    Path("latin.yaml").write_bytes(b"model: caf\xe9\n")

    def call(*arguments: str, status: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        ended, out, err = run(*arguments)
        assert (ended, out, err.count("\n")) == (status, "", 1), (ended, out, err)
        assert sorted(tmp_path.rglob("*")) == before
        return str(err)

    return call


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("generate @ hello", "MODEL"), ("inspect @", "MODEL"), ("eval base --text @", "--text"),
        ("tokenizer extend base @ --add 2 --out o", "FILES"),
        ("tokenizer extend base text.txt --add 2 --out @", "--out"),
        ("delta extract --base base --chat @ --out o", "--chat"), ("graft --base base --chat base --onto base --out @",
        "--out"), ("adapt --base base --text @ --out o", "--text"), ("diff base base @", "OTHERS"),
        ("push @ me/x", "FOLDER"), ("lens base hello --html @", "--html"), ("train @", "CONFIG"),
    ],
)  # fmt: skip
def test_an_empty_name_is_not_the_current_folder(refused: Any, command: str, name: str) -> None:
    line = refused(*(word.replace("@", "") for word in command.split()), status=2)
    assert line.startswith(f"lapis: {name} is empty; give a value"), line


def test_text_may_be_empty(refused: Any, run: Any) -> None:
    status, _, err = run("generate", "base", "hello", "--system", "", "--max-tokens", "1")
    assert status == 0, err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train void", "void: is a folder; give a YAML file"),
        ("train none.yaml", "none.yaml: there is no such file; give a YAML file"),
        ("train latin.yaml", "latin.yaml: not UTF-8 at byte 10; give a YAML file, in UTF-8"),
        ("adapt void", "void: is a folder; give a YAML file"),
        ("lens base hello --tuned void", "void: holds no tuned_lens.json; make a tuned lens with --tune FILES"),
        ("lens base hello --tuned text.txt", "text.txt: is a file; make a tuned lens with --tune FILES"),
        ("eval base --choices void", "void: the folder holds no .jsonl, .json, .parquet (or .gz"),
        ("inspect base --html void", "void: is a folder; give the name of a file to --html\n"),
        ("inspect base --html void --overwrite", "void: is a folder; give the name of a file to --html\n"),
        ("push text.txt me/x --dry-run", "push: text.txt is a file; give the folder that holds it\n"),
        ("import text.txt/x.gguf --out o", "x.gguf: is missing; give a .gguf file"),
        ("generate void hello", "void: config.json is missing; give the folder of a model"),
        ("generate none hello", "none: there is no such folder; give a folder"),
        ("generate empty hello", "empty: is a file; give the folder that holds it"),
        ("eval base --text empty", "empty: its name has no ending; give .txt"),
        ("eval base --text none.jsonl", "none.jsonl: there is no such file; give files, folders or globs"),
        ("eval base --text latin.yaml", 'latin.yaml: files that end in ".yaml" are not read; give .txt'),
        ("tokenizer extend base text.txt --add 2 --out empty/o", "/empty is a file and not a folder; give another"),
        ("adapt --base base --text text.txt --vocab 0 --out empty", "/empty: is a file; give another --out"),
        ("adapt --base base --text text.txt --vocab 0 --out empty/o",
         "/empty is a file and not a folder; give another"),
        ("adapt --base base --chat none --text text.txt --vocab 0 --out o",
         "lapis: adapt: chat: none: there is no such folder; give a folder\n"),
    ],
)  # fmt: skip
def test_one_kind_of_place_for_another(refused: Any, command: str, says: str) -> None:
    assert says in refused(*command.split())


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "[]", "holds [], not an object; fetch the file again"),
        ("config.json", "null", "holds None, not an object; fetch the file again"),
        ("tokenizer.json", "", "; fetch the file again"),
        ("tokenizer_config.json", "[1]", "holds [1], not an object; fetch the file again"),
        ("generation_config.json", "[]", "holds [], not an object; fetch the file again"),
    ],
)
def test_a_file_that_holds_something_else(refused: Any, file: str, content: str, says: str) -> None:
    Path("base", file).write_text(content)
    line = refused("generate", "base", "hello")
    assert line.endswith(f"{says}\n") and f"base/{file}: " in line


def test_a_type_of_model_that_is_no_text(refused: Any) -> None:
    path = Path("base/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": ["llama"]}))
    Path("run.yaml").write_text("objective: causal\nmodel: base\ndata: text.txt\nsteps: 1\nout: o\n")
    assert "model_type is ['llama']; lapis builds llama, " in refused("train", "run.yaml")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("export base --gguf @", "--gguf"), ("diff base base --html @", "--html"), ("inspect base --html @", "--html"),
        ("fertility base text.txt --html @", "--html"), ("lens base hello --html @", "--html"),
        ("lens base hello --tuned @ --tune text.txt", "--tuned"),
        ("tokenizer train text.txt --vocab 300 --out @", "--out"),
        ("train run.yaml objective=causal model=base data=run.yaml steps=1 out=@", "out=FOLDER"),
    ],
)  # fmt: skip
def test_an_output_that_exists_is_kept_and_its_option_named(refused: Any, command: str, option: str) -> None:
    Path("run.yaml").write_text("{}\n")
    line = refused(*command.replace("@", "text.txt").split())
    assert line.endswith(f"text.txt: exists already; give another {option}, or --overwrite\n"), line
    assert Path("text.txt").read_text().startswith("the cat")
    line = refused(*command.replace("@", "text.txt/o").split())
    assert line.endswith(f"/text.txt is a file and not a folder; give another {option}\n"), line


def test_weights_that_are_not_there(refused: Any) -> None:
    Path("base/model.safetensors").unlink()
    assert refused("inspect", "base").endswith("; fetch the weights, too\n")


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("smollm3", {"no_rope_layers": ["1", "0"]}, "no_rope_layers is ['1', '0']; expected a list of 2 numbers"),
    ("smollm3", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']; expected a list of 2 names"),
    ("smollm3", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope type is ['yarn']; lapis reads default"),
    (
        "granite",
        {"rope_parameters": {"full_attention": [1]}},
        "rope_parameters is {'full_attention': [1]}; this",
    ),
    ("granite", {"logits_scaling": float("nan")}, "logits_scaling is nan; expected a number above 0"),
    ("olmo3", {"rope_parameters": {"full_attention": [1]}}, "full_attention is [1]; expected an object"),
    ("granite", {"attention_multiplier": 1e-300}, "attention_multiplier is 1e-300; expected a number above 0"),
    ("olmo3", {"layer_types": [["full_attention"], {}]}, "layer_types is [['full_attention'], {}]; expected a list"),
]


@pytest.mark.parametrize(("kind", "fields", "says"), FIELDS)
def test_a_wrong_field_of_config_json(refused: Any, kind: str, fields: dict[str, Any], says: str) -> None:
    path = Path("base/config.json")
    config = {**json.loads(path.read_text()), "model_type": kind, "rope_scaling": None, **fields}
    path.write_text(json.dumps(config))
    assert says in refused("inspect", "base")
