"""The tour about a model that exists: on a tiny one and text made here, and marked, on a public one and real text."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.checkpoint.commit import verify
from lapis.evaluation.chats import score_chats
from lapis.evaluation.text import score_text
from lapis.families.config import ModelConfig
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.tour import measure
from lapis.tour.material import Material, write_world
from lapis.tour.page import page
from lapis.tour.real.story import RealSize
from lapis.tour.world import World

REAL = Path(os.environ.get("LAPIS_MODELS", "/nowhere"))
TOKENS = 3000
Run = Callable[..., tuple[int, str, str]]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lapis", "tour", "--real", *map(str, arguments)]


def lapis(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env={**ONE_THREAD, **environment}
    )


def text_of(page: str) -> str:
    """A page, without the marks inside which no line breaks."""
    return re.sub(r'<span class="whole">([\w-]+)</span>', r"\1", Path(page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/: text and chats without questions; model/: a small model that has read some of it, in bfloat16."""
    place = tmp_path_factory.mktemp("real")
    write_world(World(0, 20), place / "data", "ms", 60_000, 300)
    shutil.rmtree(place / "data" / "questions")
    tokenizer = train_tokenizer(sorted((place / "data" / "corpus").glob("*/train.jsonl")), 600)
    torch.manual_seed(0)
    shape = ModelConfig(
        dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, vocab=tokenizer.rows, context=256, tied=True
    )
    (place / "model").mkdir()
    save(Transformer(shape), place / "model", torch.bfloat16)
    tokenizer.save(place / "model")
    return place


@pytest.fixture(scope="module")
def finished(place: Path) -> dict[str, Any]:
    """A tour that was killed on its way and run again."""
    arguments = ["--model", place / "model", "--data", place / "data", "--tokens", TOKENS, "--out", place / "run"]
    first = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    while not (place / "run" / "chat").exists() and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = (place / "run" / "chat" / "model.safetensors").stat().st_mtime_ns
    done = lapis(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert (place / "run" / "chat" / "model.safetensors").stat().st_mtime_ns == before, "chat was trained again"
    assert f"{TOKENS:,} tokens to learn by a model of " in done.stderr
    findings: dict[str, Any] = json.loads(done.stdout)
    return findings


def test_the_keys_are_the_tours_and_there_are_no_answers(place: Path, finished: dict[str, Any]) -> None:
    assert sorted(finished["models"]) == ["adapted", "base", "chat", "grafted", "tuned"]
    assert finished["models"]["base"] == str(place / "model")
    for part in finished["scores"].values():
        for scores in (part["en"], part["ms"]):
            assert scores["answers"] is None
            assert 0 < scores["bits_per_byte"] < 10 and scores["response_nll"] > 0 and 0 <= scores["stop_rate"] <= 1
    assert set(finished["gap_closed"]) == {"en", "ms"} and finished["seconds"] > 0
    assert finished["scale"] in {row["scale"] for row in finished["sweep"]}
    assert sum(finished["tokens"].values()) == pytest.approx(TOKENS, rel=0.3)
    assert sorted(finished["tokens"]) == ["adapted", "chat", "tuned"], "base was trained by somebody else"


def test_the_scores_are_those_of_the_evaluations(place: Path, finished: dict[str, Any]) -> None:
    """Base in float32, on the half that reports, by the functions behind `lapis eval`."""
    size = RealSize.of(TOKENS, chat_is_given=False)
    _, reporting = measure.held_out_halves(Material(place / "data", "ms"), size.held_out, size.fewest)
    for name in ("base", "grafted"):
        model, tokenizer = load(finished["models"][name], torch.float32), Tokenizer.open(finished["models"][name])
        for code in ("en", "ms"):
            scores = finished["scores"][name][code]
            bits = score_text(model, tokenizer, reporting.texts[code])["bits_per_byte"]
            nll = score_chats(model, tokenizer, reporting.chats[code], replies=[])["response_nll"]
            assert scores["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
            assert scores["response_nll"] == pytest.approx(nll, rel=1e-5)


def test_only_the_rows_of_the_template_move(finished: dict[str, Any]) -> None:
    base, chat, adapted, tuned = (
        load(finished["models"][name], torch.float32).state_dict() for name in ("base", "chat", "adapted", "tuned")
    )
    tokenizer = Tokenizer.open(finished["models"]["base"])
    template = sorted(tokenizer.special[token] for token in ("<|im_start|>", "<|im_end|>"))
    changed = (chat["embed.weight"] != base["embed.weight"]).any(1)
    assert changed.nonzero().flatten().tolist() == template
    assert torch.equal(adapted["embed.weight"], base["embed.weight"])
    assert [row["id"] for row in sorted(finished["difference"]["rows"], key=lambda row: row["id"])] == template
    assert not torch.equal(tuned["blocks.0.mlp.up.weight"], adapted["blocks.0.mlp.up.weight"])


def test_the_graft_is_the_arithmetic_it_says(finished: dict[str, Any]) -> None:
    base, chat, adapted, grafted = (
        load(finished["models"][name], torch.float32).state_dict() for name in ("base", "chat", "adapted", "grafted")
    )
    for name, weight in grafted.items():
        if "norm" not in name and "embed" not in name:
            expected = adapted[name].double() + finished["scale"] * (chat[name].double() - base[name].double())
            assert (weight - expected).abs().max() <= 1e-6, name
    assert verify(Path(finished["models"]["grafted"])) == []


def test_the_page_names_the_model_and_how_it_was_made(place: Path, finished: dict[str, Any]) -> None:
    html = text_of(finished["report"])
    assert f"lapis tour --real --model {place / 'model'} --tokens {TOKENS}" in html
    assert "Of held-out chats and text" in html and "More is learned with a larger --tokens" in html
    assert "as it came" in html and "tuned on English chats" in html and "<script src" not in html
    assert "left as it is" in page({**finished, "difference": {**finished["difference"], "rows": []}})


def test_a_chat_version_is_taken_as_it_is(place: Path, finished: dict[str, Any], tmp_path: Path) -> None:
    chat = finished["models"]["chat"]
    done = lapis(
        "--model", place / "model", "--chat", chat, "--tokens", TOKENS, "--out", tmp_path / "run", "--json",
        LAPIS_DATA=str(place / "data"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert findings["models"]["chat"] == chat and sorted(findings["tokens"]) == ["adapted", "tuned"]
    assert findings["scores"]["chat"] == finished["scores"]["chat"]
    assert f"--chat {chat} --tokens" in text_of(findings["report"])
    again = lapis("--model", place / "model", "--data", place / "data", "--tokens", TOKENS, "--out", tmp_path / "run")
    assert again.returncode == 1 and "holds another tour (chat was " in again.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "{data}"], "--real needs a model; give --model, a folder or a hub id such as "),
        (["--model", "{model}"], "--real needs real text; give --data"),
        (["--model", "{data}", "--data", "{data}"], "config.json"),
        (["--model", "{model}", "--data", "nowhere"], "there is no such folder"),
        (["--model", "{model}", "--data", "{data}", "--language", "ko"], "has no corpus/ko"),
        (["--model", "{model}", "--data", "{data}", "--tokens", "10"], "tokens is 10; give at least 1,536"),
        (["--model", "{model}", "--data", "{data}", "--minutes", "3"], "--minutes sizes the story that is built here"),
        (["--model", "{mute}", "--data", "{data}"], "has no chat template, in which chats are written; give --chat"),
        (["--model", "{short}", "--data", "{data}"], "reads 128 tokens; a tour needs a model that reads 256"),
        (["--model", "{model}", "--chat", "{wide}", "--data", "{data}"], "64"),
    ],
)
def test_what_cannot_be_a_tour_is_one_line(
    place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    for name in ("mute", "short", "wide"):
        shutil.copytree(place / "model", tmp_path / name)
    config = json.loads((place / "model" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    settings = json.loads((tmp_path / "mute" / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "mute" / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = ModelConfig(
        dim=96, layers=2, heads=4, kv_heads=2, ffn_dim=128, vocab=config["vocab_size"], context=256, tied=True
    )
    save(Transformer(shape), tmp_path / "wide")
    places = {"model": place / "model", "data": place / "data"}
    places |= {name: tmp_path / name for name in ("mute", "short", "wide")}
    monkeypatch.delenv("LAPIS_DATA", raising=False)
    status, out, errors = run(
        "tour", "--real", "--out", tmp_path / "run", *(text.format_map(places) for text in arguments)
    )
    assert (status, out) == (1, "") and says in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()


def test_options_of_the_public_model_need_real(tmp_path: Path, run: Run) -> None:
    status, _, errors = run("tour", "--tokens", 5, "--out", tmp_path / "run")
    assert (status, errors) == (1, "lapis: tour: --tokens belongs to a tour about a model: --real\n")


@pytest.mark.real_model
@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="LAPIS_MODELS names no folder of real models")
def test_a_very_short_tour_of_a_public_model(data_dir: Path, tmp_path: Path) -> None:
    done = lapis(
        "--model", REAL / "smollm2-it", "--data", data_dir, "--tokens", 1536, "--out", tmp_path / "run", "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert "tokens to learn by a model of 134,515,008 parameters" in done.stderr
    scores = findings["scores"]
    assert all(0.5 < part[code]["bits_per_byte"] < 4 for part in scores.values() for code in ("en", "ms"))
    assert scores["chat"]["en"]["response_nll"] < scores["base"]["en"]["response_nll"]
    assert scores["adapted"]["ms"]["bits_per_byte"] < scores["base"]["ms"]["bits_per_byte"]
