"""What files hold reaches the terminal as text: no control character, no markup, on every route of the command line."""

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lapis.cli.main import main
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.training.loop.progress import Bar, LogLines

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m[/red][/INST][bold]x[/bold]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    words = train_tokenizer(["Saya suka makan nasi lemak. user assistant"] * 5, 300)
    save(
        Transformer(ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, vocab=words.rows, context=32)),
        folder,
    )
    words.save(folder)
    return folder


def evil_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {EVIL: 1, "model_type": EVIL}))


def evil_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[EVIL] = tensors["model.norm.weight"].clone()
    save_file(tensors, path)


def evil_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ raise_exception(" + repr(EVIL) + ") }}"})
    )


def evil_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": EVIL}))


def evil_text(folder: Path) -> None:
    (folder / "text.jsonl").write_text(json.dumps({"text": EVIL + " nasi"}) + "\n" + json.dumps({EVIL: 1}) + "\n")
    (folder / "chats.jsonl").write_text(json.dumps({"messages": [{"role": EVIL, "content": "a"}]}) + "\n")
    (folder / "recipe.yaml").write_text(json.dumps({"merge_method": EVIL}))
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "log.jsonl").write_text(json.dumps({"step": EVIL}) + "\n")


COMMANDS = [
    ["inspect", "{model}"], ["inspect", "{model}", "--json"], ["generate", "{model}", EVIL, "--max-tokens", "2"],
    ["tokens", "{model}", EVIL + "nasi"], ["tokens", "{model}", EVIL, "--json"], ["lens", "{model}", "nasi " + EVIL],
    ["lens", "{model}", "nasi", "--track", EVIL], ["diff", "{good}", "{model}"],
    ["diff", "{model}", "{good}", "--rows"],
    ["graft", "--base", "{good}", "--chat", "{model}", "--onto", "{good}", "--out", "{out}", "--dry-run"],
    ["merge", "{model}/recipe.yaml", "--out", "{out}"], ["merge", EVIL, "--out", "{out}"],
    ["data", "show", "{model}/text.jsonl"], ["data", "show", "{model}/text.jsonl", "--tokenizer", "{good}"],
    ["data", "show", "{model}/chats.jsonl"], ["eval", "{model}", "--text", "{model}/text.jsonl"],
    ["data", "pack", "{model}/text.jsonl", "--tokenizer", "{model}", "--out", "{out}"],
    ["report", "{model}/report", "--out", "{out}.html"], ["inspect", EVIL], [EVIL], ["generate", "{model}", "a", EVIL],
    ["train", "{model}/recipe.yaml"],
    ["plan", "--base", "{good}", "--chat", "{model}", "--goal", EVIL, "--out", "{out}"],
    ["eval", "{good}", "--choices", "{model}/text.jsonl"], ["generate", "{good}", "a", "--temperature", EVIL],
]  # fmt: skip


@pytest.mark.parametrize("change", [evil_config, evil_tensor, evil_template, evil_token, evil_text])
def test_no_control_character_and_no_markup(model: Path, tmp_path: Path, capsys, change) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    evil_text(folder)
    change(folder)
    for command in COMMANDS:
        places = {"{model}": folder, "{good}": model, "{out}": tmp_path / "out"}
        parts = command
        for name, place in places.items():
            parts = [part.replace(name, str(place)) for part in parts]
        try:
            main(parts)
        except SystemExit as stop:
            assert stop.code in (0, 1, 2, None), command
        captured = capsys.readouterr()
        shown = captured.out + captured.err
        assert "Traceback" not in shown
        wrong = sorted({character for character in shown if character not in "\n\t" and (
            ord(character) < 32 or 0x7F <= ord(character) < 0xA0)})  # fmt: skip
        assert not wrong, (command, wrong, shown[:300])


def test_progress_and_warnings(capsys) -> None:
    for watch in (LogLines(EVIL, 0), Bar(EVIL)):
        watch.note(EVIL)
        watch.stage(EVIL)
        watch.close()
    with pytest.raises(SystemExit):
        main(["inspect", "there-is-none"])
    logging.getLogger("lapis").warning("%s was found", EVIL)
    shown = capsys.readouterr().err
    assert "owned" in shown and "\x1b]0" not in shown and "\x9b" not in shown and "\x07" not in shown
    assert "[/INST]" in shown
