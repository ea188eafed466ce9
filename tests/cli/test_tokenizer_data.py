"""`lapis tokenizer train`, `data pack`, `data show`, `tokens`: what they write and print, and how they refuse."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lapis.cli.main import main
from lapis.text.rows.rows import Rows
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["Saya suka makan nasi lemak di Kuala Lumpur. ", "나는 밥을 좋아한다. ", "Я люблю читати книжки. "] * 8
CHAT = {"messages": [{"role": "user", "content": "Apa khabar?"}, {"role": "assistant", "content": "Khabar baik."}]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS))
    (tmp_path / "chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 6)
    (tmp_path / "tokenizer").mkdir()
    train_tokenizer(TEXTS, 320).save(tmp_path / "tokenizer")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    main([str(a) for a in arguments])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert ended.value.code == 1 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("lapis: ")
    return printed.err


def test_train_pack_show(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "new"
    result = json.loads(run(capsys, "tokenizer", "train", place / "text.jsonl", place / "chats.jsonl", "--vocab", 330,
                            "--out", out, "--json"))  # fmt: skip
    assert result["vocab"] == Tokenizer.open(out).vocab_size == 330 and result["out"] == str(out)
    for name in ("text", "chats"):
        packed = place / f"packed-{name}"
        result = json.loads(run(capsys, "data", "pack", place / f"{name}.jsonl", "--tokenizer", out, "--out", packed,
                                "--length", 64, "--json"))  # fmt: skip
        rows = Rows.open(packed)
        assert (result["rows"], result["digest"], result["counts"]) == (len(rows), rows.digest, rows.counts)
        shown = json.loads(run(capsys, "data", "show", packed, "--json"))
        assert shown["coverage"] == result["coverage"]
        said = [entry["text"] for entry in shown["shown"][0] if entry["loss"] and entry["segment"] == 1]
        if name == "chats":
            assert "".join(said) == "Khabar baik.<|im_end|>"
            assert run(capsys, "data", "show", packed, "--rows", 1).count("Khabar baik.") == 1
        else:
            assert "".join(said).startswith("Saya suka makan")
            assert "100.0% of tokens carry loss" in run(capsys, "data", "show", packed)
    direct = json.loads(
        run(capsys, "data", "show", place / "chats.jsonl", "--tokenizer", out, "--length", 64, "--json")
    )
    assert direct["coverage"] == shown["coverage"] and direct["shown"] == shown["shown"]


def test_a_field_of_another_name_and_several_workers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "two.jsonl").write_text("".join(json.dumps({"text": t, "content": t[::-1]}) + "\n" for t in TEXTS))
    pack = ("data", "pack", place / "two.jsonl", "--tokenizer", place / "tokenizer", "--length", 32, "--json")
    assert "line 1: text and content could both be the text" in refused(capsys, *pack, "--out", place / "a")
    outcome = []
    for field, workers in (("content", 1), ("content", 2), ("text", 1)):
        options = ("--out", place / f"{field}-{workers}", "--field", field, "--workers", workers)
        outcome.append(json.loads(run(capsys, *pack, *options)))
    assert outcome[0]["digest"] == outcome[1]["digest"] != outcome[2]["digest"]
    shown = json.loads(run(capsys, "data", "show", place / "two.jsonl", "--field", "content", "--length", 32,
                           "--tokenizer", place / "tokenizer", "--json"))  # fmt: skip
    assert shown["coverage"] == outcome[0]["coverage"] and set(shown["coverage"]) == {"supervised", "padding", "cut"}
    said = run(capsys, "data", "show", place / "content-1", "--rows", 0)
    assert "100.0% of tokens carry loss" in said and "0.0% of tokens were cut" in said


def test_data_show_colors_what_carries_loss(place: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lapis",
        "data",
        "show",
        "chats.jsonl",
        "--tokenizer",
        "tokenizer",
        "--length",
        "64",
    ]
    shown = subprocess.run(
        command, cwd=place, capture_output=True, text=True, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    ).stdout
    assert "\x1b[32m" in shown and "\x1b[90m" in shown and "\x1b[1;4;35m" in shown


def make_model(folder: Path, tokenizer: Path, tied: bool) -> Path:
    """A Llama folder whose embedding rows are orthogonal but for one, so that the way back is known."""
    rows = Tokenizer.open(tokenizer).rows + 8
    embed_VD = torch.eye(rows, 512)
    embed_VD[5] = embed_VD[6] * 0.5  # token 5 comes back as token 6
    tensors = {"model.embed_tokens.weight": embed_VD}
    if not tied:
        tensors["lm_head.weight"] = embed_VD.roll(1, 0).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": rows, "hidden_size": 512, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_tokens_shows_the_way_back(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.text.tokenizer.roundtrip._BLOCK", 512 * 50)  # several blocks of the vocabulary
    tokenizer = Tokenizer.open(place / "tokenizer")
    tied = make_model(place / "tied", place / "tokenizer", tied=True)
    text = "nasi " + tokenizer.token(5) + "<|im_end|>"
    result = json.loads(run(capsys, "tokens", tied, text, "--json"))
    assert [entry["id"] for entry in result["tokens"]] == tokenizer.encode(text)
    assert [entry["back"] for entry in result["tokens"]] == [6 if i == 5 else i for i in tokenizer.encode(text)]
    assert result["returned"] == len(result["tokens"]) - 1 and result["tied"]
    assert {entry["norm"] for entry in result["tokens"]} == {0.5, 1.0}
    untied = make_model(place / "untied", place / "tokenizer", tied=False)
    result = json.loads(run(capsys, "tokens", untied, "nasi", "--json"))
    assert result["returned"] == 0 and not result["tied"] and result["head"] == "lm_head.weight"
    assert "0 of" in run(capsys, "tokens", untied, "nasi")


def test_refusals_are_one_line_and_leave_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in place.iterdir())
    out = place / "out"
    (place / "empty.txt").touch()
    (place / "latin.txt").write_bytes(b"caf\xe9")
    tokenizer = ("--tokenizer", place / "tokenizer", "--out", out)
    assert "no such file" in refused(capsys, "data", "pack", place / "nothing.txt", *tokenizer)
    assert "is empty" in refused(capsys, "data", "pack", place / "empty.txt", *tokenizer)
    assert "line 1: not UTF-8 at byte 3" in refused(capsys, "data", "pack", place / "latin.txt", *tokenizer)
    assert "line 1: not UTF-8" in refused(
        capsys, "tokenizer", "train", place / "latin.txt", "--vocab", 300, "--out", out
    )
    assert "least is 259" in refused(capsys, "tokenizer", "train", place / "text.jsonl", "--vocab", 9, "--out", out)
    exists = ("--out", place / "tokenizer")
    assert "exists already" in refused(capsys, "tokenizer", "train", place / "text.jsonl", "--vocab", 300, *exists)
    assert "is the input" in refused(capsys, "data", "pack", place / "text.jsonl", "--tokenizer", exists[1], *exists)
    assert "no such file" in refused(capsys, "data", "show", place / "nothing.jsonl")
    assert "no such" in refused(capsys, "tokens", place / "nothing", "text")
    model = make_model(place / "model", place / "tokenizer", tied=True)
    assert "the text is empty" in refused(capsys, "tokens", model, "")
    (place / "empty.txt").unlink(), (place / "latin.txt").unlink()
    assert sorted(p.name for p in place.iterdir()) == sorted([*before, "model"])


def test_faults_60_and_63_a_full_disk_and_a_kill_leave_nothing(place: Path) -> None:
    command = [sys.executable, "-m", "lapis", "data", "pack", "text.jsonl", "--tokenizer", "tokenizer", "--out", "out"]
    before = sorted(p.name for p in place.iterdir())

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    full = subprocess.run(command, cwd=place, capture_output=True, text=True, preexec_fn=small_files)
    assert (
        full.returncode == 1
        and full.stdout == ""
        and "the disk is full" in full.stderr
        and full.stderr.count("\n") == 1
    )
    assert sorted(p.name for p in place.iterdir()) == before
    (place / "big.txt").write_text("Saya suka makan nasi lemak.\n" * 800_000)  # seconds of work
    killed = subprocess.Popen([*command[:5], "big.txt", *command[5:]], cwd=place)
    while not (place / ".out.lapis/.journal/plan.json").exists() and killed.poll() is None:  # what it does is written
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    (place / "big.txt").unlink()
    assert not (place / "out").exists()
    other = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert other.returncode == 1 and "big.txt" in other.stderr and other.stderr.count("\n") == 1
    shutil.rmtree(place / ".out.lapis")
    again = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert again.returncode == 0 and sorted(p.name for p in place.iterdir()) == sorted([*before, "out"])


def test_show_reads_a_file_without_a_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpaca = {"instruction": "Apa khabar?", "input": "", "output": "Khabar baik."}
    pair = {"prompt": "Apa khabar?", "chosen": "Khabar baik.", "rejected": "Apa?"}
    for name, kind, content, line in (
        ("alpaca.json", "chats", json.dumps([alpaca]), "format: Alpaca (instruction, output)"),
        ("pairs.jsonl", "preferences", json.dumps(pair), "format: pairs (prompt, chosen, rejected)"),
        ("labels.tsv", "labels", "label\ttext\nham\tKhabar baik.\n", "format: label and text"),
        ("plain.txt", "documents", "Khabar baik.", None),
    ):
        (place / name).write_text(content)
        shown = json.loads(run(capsys, "data", "show", place / name, "--json"))
        assert (shown["kind"], shown["format"]) == (kind, line)
        assert "Khabar baik." in [part["text"] for part in shown["records"][0]["parts"]]
        printed = run(capsys, "data", "show", place / name)
        assert "Khabar baik." in printed and (line or "plain text") in printed
    rows = json.loads(run(capsys, "data", "show", place / "alpaca.json", "--tokenizer", place / "tokenizer", "--json"))
    assert rows["format"] == ["format: Alpaca (instruction, output)"] and rows["counts"]["chats"] == 1


def test_tokens_of_a_folder_with_only_a_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(run(capsys, "tokens", place / "tokenizer", "Saya suka", "--json"))["tokens"]
    assert [entry["id"] for entry in shown] == Tokenizer.open(place / "tokenizer").encode("Saya suka")
    assert "".join(entry["text"] for entry in shown) == "Saya suka"
    assert "Saya" in run(capsys, "tokens", place / "tokenizer", "Saya suka")


def test_pack_counts_special_tokens_in_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "special.txt").write_text("Saya suka<|endoftext|>makan nasi")
    for special, documents in (("plain", 1), ("trusted", 2)):
        result = json.loads(run(capsys, "data", "pack", place / "special.txt", "--tokenizer", place / "tokenizer",
                                "--out", place / special, "--special", special, "--json"))  # fmt: skip
        assert list(result["special"].values()) == [{"<|endoftext|>": 1}]
        assert result["counts"]["documents"] == documents
