"""The whole tour as a user types it, short: every model loads elsewhere, every number is there, a stop is harmless."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lapis.checkpoint.commit import verify
from lapis.errors import DataError
from lapis.model.load import load
from lapis.text.tokenizer.tokenizer import TURN_END, TURN_START, Tokenizer
from lapis.tour import measure
from lapis.tour.material import Material, write_world
from lapis.tour.recipe import Lessons
from lapis.tour.setup.folder import claim
from lapis.tour.setup.size import CONTEXT
from lapis.tour.world import World
from lapis.training.certificate.certificate import CERTIFICATE
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.setup.select import select_parts

MINUTES = "0.1"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
MODELS = ["base", "chat", "adapted", "tuned", "yardstick", "grafted"]


def lapis(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lapis", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tour that was killed on its way and run again."""
    out = tmp_path_factory.mktemp("tour") / "run"
    command = [sys.executable, "-m", "lapis", "tour", "--minutes", MINUTES, "--out", str(out), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    while not (out / "chat").exists() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = (out / "base" / "model.safetensors").stat().st_mtime_ns
    (out / ".sweep-left").mkdir()  # as of a tour that was killed while it tried scales
    for note in (".seconds", ".machine"):  # and while it wrote its notes
        (out / note).write_bytes(b"")
    done = lapis("tour", "--minutes", MINUTES, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == before, "base was trained again"
    assert not (out / ".sweep-left").exists()
    return out, json.loads(done.stdout)


def test_one_seed_gives_the_same_bytes_stopped_or_not(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, result = finished
    done = lapis("tour", "--minutes", MINUTES, "--out", tmp_path / "again", "--json")
    again = json.loads(done.stdout)
    for name in result["models"]:
        ours, theirs = (Path(models[name]) / "model.safetensors" for models in (result["models"], again["models"]))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert again["tokens"] == result["tokens"] and again["scores"] == result["scores"]


@pytest.mark.parametrize("part", ["a world of its own", "base:", "chat:"])
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, part: str) -> None:
    command = [sys.executable, "-m", "lapis", "tour", "--minutes", MINUTES, "--out", str(tmp_path / "run")]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ONE_THREAD)
        while part not in log.read_text() and running.poll() is None:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate()
    lines = log.read_text().splitlines()
    assert "how fast this machine is" in lines[0]
    assert "million tokens to learn: about " in lines[1] and "1 thread" in lines[1]
    assert running.returncode in (1, 130) and said == ""
    assert "ame command again" in " ".join(lines[-2:]) and "Traceback" not in log.read_text()


def test_the_findings_are_all_there(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    assert sorted(result["models"]) == sorted(MODELS)
    for part in result["scores"].values():
        assert set(part) == {"en", "ms"}
        for scores in part.values():
            assert 0 < scores["bits_per_byte"] < 8 and scores["response_nll"] > 0
            assert 0 <= scores["stop_rate"] <= 1 and 0 <= scores["answers"] <= 1
    assert set(result["gap_closed"]) == {"en", "ms"}
    assert result["scale"] in {row["scale"] for row in result["sweep"]}
    assert result["seconds"] > 0


def test_what_is_checked_after_a_long_lesson_holds(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Trained rows over a frozen embedding, text beside chats: what a tour of 50 steps and more certifies."""
    out, result = finished
    model, tokenizer = load(result["models"]["base"]), Tokenizer.open(result["models"]["base"])
    select_parts(model, freeze=["embed"], tokens=[TURN_START, TURN_END], tokenizer=tokenizer)
    text = Causal(tokenizer=tokenizer, data=[out / "data" / "beside.jsonl"], context=CONTEXT)
    chats = next((out / "world" / "instruct").rglob("*.jsonl"))
    lessons = Lessons(tokenizer=tokenizer, data=[chats], context=CONTEXT, text=text, rows_of_text=1)
    config = TrainConfig(steps=2, batch=4, precision="float32", compile="off", threads=1, certify="on", sample_every=0)
    train(model, lessons, config, tmp_path / "out", watch=Silent())
    computed = {check["name"]: check for check in json.loads((tmp_path / "out" / CERTIFICATE).read_text())["checks"]}
    assert computed["saved and restored"]["difference"] == 0.0
    assert computed["accumulated or not"]["why_not"] == "the loss of a batch is more than the sum over its rows"


def test_every_model_is_whole_and_loads_in_transformers(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    for folder in result["models"].values():
        assert verify(Path(folder)) == []
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("This is a story about Mira.", return_tensors="pt").input_ids
        with torch.no_grad():
            assert (theirs(ids).logits - load(folder)(ids)).abs().max() <= 1e-5


def test_the_graft_is_the_arithmetic_it_says(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    base, chat, adapted, grafted = (
        load(result["models"][name]).state_dict() for name in ("base", "chat", "adapted", "grafted")
    )
    for name, weight in grafted.items():
        if "norm" in name:
            assert torch.equal(weight, adapted[name]), name
        elif "embed" not in name:
            expected = adapted[name].double() + result["scale"] * (chat[name].double() - base[name].double())
            assert (weight - expected).abs().max() <= 1e-6, name


def test_the_report_is_one_file_that_asks_for_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    html = Path(result["report"]).read_text(encoding="utf-8")
    assert "grafted" in html and "<script src" not in html and '<link rel="stylesheet"' not in html


def test_a_finished_tour_is_shown_again_another_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    again = lapis("tour", "--minutes", MINUTES, "--out", out)
    assert again.returncode == 0 and "lapis chat" in again.stdout
    other = lapis("tour", "--minutes", 1, "--out", out)
    assert other.returncode == 1 and "holds another tour (minutes was 0.1)" in other.stderr
    assert other.stderr.count("\n") == 1


def test_a_note_that_was_cut_is_no_traceback(tmp_path: Path) -> None:
    """An empty .tour: a folder with nothing else is begun anew, another is refused."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".tour").touch()
    (out / "..tour.lapis-0123").touch()
    claim(out, {"minutes": 1})
    assert json.loads((out / ".tour").read_text()) == {"minutes": 1}
    (out / "base").mkdir()
    (out / ".tour").write_text("{")
    done = lapis("tour", "--minutes", MINUTES, "--out", out)
    assert done.returncode == 1 and done.stderr == (
        f"lapis: {out}: exists already and its .tour cannot be read; give another --out\n"
    )


def test_two_tours_do_not_share_a_folder(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = lapis("tour", "--minutes", MINUTES, "--out", tmp_path)
    finally:
        os.close(handle)
    assert done.returncode == 1 and "another tour is at work in it" in done.stderr
    assert os.listdir(tmp_path) == [".tour"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere"], "there is no such folder"),
        (["--language", "xx"], "xx"),
        (["--language", "en"], "from English to another language"),
        (["--minutes", "0"], "minutes"),
        (["--minutes", "0.01"], "give 0.1 to 10000"),
    ],
)
def test_what_cannot_be_a_tour_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = lapis("tour", "--out", tmp_path / "run", *arguments)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []


def test_material_is_mixed_by_share_and_halved_without_overlap(tmp_path: Path) -> None:
    write_world(World(0, 20), tmp_path / "world", "ko", 40_000, 200)
    material = Material(tmp_path / "world", "ko")
    material.mix({"en": 0.25, "ko": 0.75}, tmp_path / "mixed.jsonl", 100_000, seed=0)
    texts = [json.loads(line)["text"] for line in (tmp_path / "mixed.jsonl").read_text().splitlines()]
    hangul = sum(len(text) for text in texts if any("가" <= letter <= "힣" for letter in text))
    assert abs(hangul / sum(map(len, texts)) - 0.75) < 0.01
    first, second = measure.held_out_halves(material)
    for language in material.languages:
        assert not {id(chat) for chat in first.chats[language]} & {id(chat) for chat in second.chats[language]}
        assert first.prompts[language] and second.prompts[language]
        assert not {id(prompt) for prompt in first.prompts[language]} & {
            id(prompt) for prompt in second.prompts[language]
        }
    assert {prompt.split for prompt in first.prompts["ko"][:4]} == {"held_out", "local"}, "a few are of all splits"
    for language in material.languages:
        texts = [set(half.texts[language]) for half in (first, second)]
        assert not texts[0] & texts[1]
    (tmp_path / "world" / "instruct" / "en.jsonl").unlink()
    with pytest.raises(DataError, match=r"en\.jsonl: there is no such file"):
        Material(tmp_path / "world", "ko")


def test_the_scale_within_the_budget_or_with_most_right_answers() -> None:
    rows = [
        {"scale": s, "gap_closed": g, "bits": c} for s, g, c in ((0.5, 0.4, 0.01), (1.0, 0.5, 0.04), (1.5, 0.7, 0.2))
    ]
    assert measure.choose(rows) == 1.0
    assert measure.choose([{"scale": 2.0, "gap_closed": 0.1, "bits": 0.3}]) == 2.0
    marks = ((0.1, 0), (0.3, 0), (0.2, 0.2))
    right = [row | {"answers_en": a, "answers_ms": b} for row, (a, b) in zip(rows, marks, strict=True)]
    assert measure.choose(right) == 1.5
    assert measure.choose([row | {"answers_en": 0, "answers_ms": 0} for row in rows]) == 1.0
