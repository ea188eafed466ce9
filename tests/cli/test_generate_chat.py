"""lapis generate and lapis chat: what they print, what they refuse, and a conversation in a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lapis.cli.main import main
from lapis.errors import DataError, TemplateError
from lapis.families.config import ModelConfig
from lapis.generation.conversation import Conversation
from lapis.generation.generate import generate
from lapis.generation.options import Sampling
from lapis.generation.text import for_terminal
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

TEXT = "the cat sat on the mat and the dog ate the fish while a bird sang in the old tree. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights whose replies do not end by themselves: a long context, an end token of logit 0."""
    place = tmp_path_factory.mktemp("cli") / "parrot"
    tokenizer = train_tokenizer([TEXT * 4], 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, layers=2, heads=2, ffn_dim=48, vocab=300, context=100_000))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.head.weight.mul_(10)  # other tokens lie some tens above and below
        model.head.weight[list(tokenizer.end_ids)] = 0
    save(model, place)
    tokenizer.save(place)
    return place


def run(*arguments: object) -> int:
    """Exit status of a command run in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# -- lapis generate


def test_generate_prints_the_text_and_nothing_else(folder, capsys):
    assert run("generate", folder, "the cat", "--max-tokens", 12) == 0
    expected = generate(load(folder), Tokenizer.open(folder), "the cat", Sampling(max_tokens=12))
    assert capsys.readouterr().out == expected + "\n"


def test_an_empty_reply_says_why(folder, capsys):
    first = generate(load(folder), Tokenizer.open(folder), "the cat", Sampling(max_tokens=1))
    assert run("generate", folder, "the cat", "--stop", first) == 0
    captured = capsys.readouterr()
    assert captured.out == "\n" and "the reply is empty: ended at a stop text after 1 new token" in captured.err
    assert "--chat asks it in its chat template" in captured.err  # the folder has one


def test_generate_json_is_one_object(folder, capsys):
    status = run("generate", folder, "the cat", "--json", "--temperature", 1, "--seed", 4, "--max-tokens", 9)
    result = json.loads(capsys.readouterr().out)
    assert status == 0 and result["tokens"] == len(result["ids"]) == 9 and result["stop_reason"] == "length"
    sampling = Sampling(max_tokens=9, temperature=1, seed=4)
    assert result["text"] == generate(load(folder), Tokenizer.open(folder), "the cat", sampling)


def test_generate_reads_standard_input_and_uses_the_template(folder, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    assert run("generate", folder, "-", "--chat", "--system", "be kind", "--max-tokens", 5) == 0
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat"}]
    expected = generate(load(folder), Tokenizer.open(folder), messages, Sampling(max_tokens=5))
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["the", "--top-p", "2"], 1, "top_p is 2.0; expected above 0"),
        (["the", "--system", "x"], 1, "--system is for --chat"),
        (["the", "--device", "tpu"], 1, 'device is "tpu"'),
        (["the", "--temperatur", "1"], 2, "--temperature"),
    ],
)
def test_generate_refuses_in_one_line(folder, capsys, arguments, status, message):
    assert run("generate", folder, *arguments) == status
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and "Traceback" not in error


def test_fault_95_prompt_beyond_the_context(tmp_path, folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    assert run("generate", tmp_path, "the cat " * 20) == 1
    assert "tokens and the model's context is 8" in capsys.readouterr().err


# -- a conversation


@pytest.fixture(scope="module")
def opened(folder):
    return load(folder), Tokenizer.open(folder)


def test_conversation_keeps_history_and_replies_like_generate(opened):
    conversation = Conversation(*opened, Sampling(max_tokens=6), "be kind")  # type: ignore[call-arg]
    for turn in ("the cat", "a bird"):
        expected = generate(  # type: ignore[call-arg]
            *opened, [*conversation.messages, {"role": "user", "content": turn}], Sampling(max_tokens=6)
        )
        assert "".join(conversation.send(turn)) == expected
    assert [turn["role"] for turn in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert "".join(conversation.retry()) == conversation.turns[-1]["content"] and len(conversation.turns) == 4
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be kind"}]
    with pytest.raises(DataError, match="nothing to answer"):
        list(conversation.retry())


def test_retry_draws_anew_and_a_seed_repeats_it(opened):
    def talk(seed):
        conversation = Conversation(*opened, Sampling(max_tokens=12, temperature=1.0, seed=seed))  # type: ignore[call-arg]
        return "".join(conversation.send("the cat")), "".join(conversation.retry())

    first, again = talk(1)
    assert first != again and talk(1) == (first, again)


def test_reply_that_is_left_keeps_what_was_said(opened):
    conversation = Conversation(*opened, Sampling(max_tokens=50))  # type: ignore[call-arg]
    pieces = conversation.send("the cat")
    words = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": words}
    assert conversation.last_reply.stop_reason == "stopped"
    assert "".join(conversation.send("a bird"))


def test_turn_that_does_not_fit_is_taken_back(opened):
    model, tokenizer = opened
    conversation = Conversation(model, tokenizer, Sampling(max_tokens=4))
    with pytest.raises(DataError, match="or reset the conversation"):
        list(conversation.send("the cat " * 60_000))
    assert conversation.turns == []


def test_chat_needs_a_template(opened):
    model, tokenizer = opened
    bare = Tokenizer(tokenizer._backend, tokenizer.named, {})
    with pytest.raises(TemplateError, match="chat template"):
        Conversation(model, bare, Sampling())


def test_model_cannot_steer_the_terminal():
    assert for_terminal("a\x1b]0;title\x07b\x9b2J\r\n\tc") == "a␛]0;title␇b\ufffd2J␍\n\tc"


# -- lapis chat


def chat(folder: Path, typed: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lapis", "chat", str(folder), "--max-tokens", "8", "--temperature", "0", *options]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, check=False)


def test_chat_from_a_pipe(folder, tmp_path):
    saved = tmp_path / "chat.jsonl"
    turns = (
        f"the cat\n/retry\n/systm\n/system be kind\n//slash\\\nand more\n/save {saved}\n/save {saved}\n/reset\n/retry\n"
    )
    done = chat(folder, turns + "/help\n/quit\nnever read\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    model, tokenizer = load(folder), Tokenizer.open(folder)
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] != "assistant"] == ["be kind", "the cat", "/slash\nand more"]
    expected = generate(model, tokenizer, [{"role": "user", "content": "the cat"}], Sampling(max_tokens=8))
    assert messages[2]["content"] == expected and done.stdout.startswith(f"{expected}\n{expected}\n")
    for message in ('did you mean "/system"?', "exists already", "nothing to answer yet", "/save FILE"):
        assert message in done.stderr


def test_chat_against_another(folder):
    done = chat(folder, "the cat\n", "--against", str(folder))
    assert done.returncode == 0 and done.stdout == done.stdout[: len(done.stdout) // 2] * 2
    assert done.stderr.splitlines()[-2:] == ["parrot", str(folder)]


def test_ctrl_c_stops_the_reply_and_not_the_chat(folder, tmp_path):
    saved = tmp_path / "chat.jsonl"
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "lapis", "chat", str(folder), "--max-tokens", "90000"]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, start_new_session=True, cwd=tmp_path,
                               env={**os.environ, "TERM": "xterm", "COLUMNS": "200"})  # fmt: skip
    os.close(side)
    seen, place = "", 0

    def until(sign: str, interrupt: bool = False) -> None:
        """Reads the terminal until `sign` comes after the sign before; with Ctrl-C every two seconds, if asked.

        A signal that comes between a prompt's print and its read is only seen at the next one.
        """
        nonlocal seen, place
        end, due = time.monotonic() + 90, time.monotonic()
        while sign not in seen[place:]:
            if interrupt and time.monotonic() >= due:
                os.killpg(process.pid, signal.SIGINT)
                due += 2
            assert time.monotonic() < end and process.poll() is None, f"waited for {sign!r} in {seen[-500:]!r}"
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
        place = seen.index(sign, place) + len(sign)

    try:
        until("> ")
        os.write(terminal, b"the cat\n")
        until("the cat\r\n")
        until("a")  # words come, and would go on coming
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C goes to all of the terminal's processes
        until("stopped")
        until("> ")
        until("/quit leaves", interrupt=True)  # at the prompt it throws the line away
        os.write(terminal, f"/save {saved.name}\n".encode())
        until("saved")
        os.write(terminal, b"/quit\n")
        process.wait(30)
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 0 and "Traceback" not in seen
    assert [m["role"] for m in json.loads(saved.read_text())["messages"]] == ["user", "assistant"]
