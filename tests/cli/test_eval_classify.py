"""`lapis eval` and `lapis classify` as a user has them: what is printed, in which precision, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.commit import commit
from lapis.cli.main import main
from lapis.errors import ConfigError
from lapis.evaluation.text import score_text
from lapis.families.config import ModelConfig
from lapis.generation import ready
from lapis.generation.kernels import build
from lapis.model.load import load, save
from lapis.model.transformer import Transformer, put_head
from lapis.report.evaluations import KINDS
from lapis.text.tokenizer.tokenizer import train_tokenizer

TEXTS = ["The cat sleeps under the tree.", "Anak itu makan nasi di rumah.", "A dog runs."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A language model in bfloat16, a classifier of texts, and files."""
    root = tmp_path_factory.mktemp("eval")
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    torch.manual_seed(0)
    config = ModelConfig(dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=96, vocab=tokenizer.rows, context=64, tied=True)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.embed.weight.mul_(20)
    for name in ("lm", "classes"):
        if name == "classes":
            put_head(model, "classes", ["ham", "spam", "other"])
        with commit(root / name) as staging:
            save(model, staging.path, torch.bfloat16 if name == "lm" else torch.float32)
            tokenizer.save(staging.path)
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (root / "lines.txt").write_text("\n".join([*TEXTS, "", "cat " * 200]), encoding="utf-8")
    return SimpleNamespace(lm=root / "lm", classes=root / "classes", text=root / "text.jsonl", lines=root / "lines.txt",
                           tokenizer=tokenizer)  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def bits(folders: SimpleNamespace, dtype: torch.dtype) -> float:
    """Bits per byte computed with weights of a dtype."""
    return float(score_text(load(folders.lm, dtype), folders.tokenizer, TEXTS)["bits_per_byte"])


def test_the_precision_of_the_flag_is_what_is_computed(
    folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, narrow = bits(folders, torch.float32), bits(folders, torch.bfloat16)
    assert wide != narrow  # else this test could not fail
    for flag, expected, name in (("float32", wide, "float32"), ("bf16", narrow, "bfloat16")):
        status, out, _ = run(capsys, "eval", folders.lm, "--text", folders.text, "--precision", flag, "--json")
        result = json.loads(out)
        assert status == 0 and result["precision"] == name
        assert result["text"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_python_refuses_a_precision_that_is_not_computed(folders: SimpleNamespace) -> None:
    model = load(folders.lm)
    assert model.embed.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="precision is float32 and the model's weights are bfloat16; load the model"):
        score_text(model, folders.tokenizer, TEXTS, precision="float32")


@pytest.mark.parametrize("able", [True, False])
def test_the_default_precision_is_the_faster_one(
    able: bool, folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ready, "has_bfloat16", lambda: able)
    dtype, note = ready.choose_dtype(open_checkpoint(folders.lm), None, torch.device("cpu"))
    assert (dtype, bool(note)) == ((None, False) if able else (torch.float32, True))
    _, out, _ = run(capsys, "eval", folders.lm, "--text", folders.text, "--json")
    result = json.loads(out)
    assert result["precision"] == ("bfloat16" if able else "float32")
    assert sum("no bfloat16 instructions" in line for line in result["notes"]) == (0 if able else 1)
    model, _ = ready.open_ready(folders.lm)
    assert model.embed.weight.dtype == (torch.bfloat16 if able else torch.float32)
    assert sum("no bfloat16 instructions" in line for line in model.notes) == (0 if able else 1)
    status, _, error = run(capsys, "lens", folders.lm, "The cat", "--against", folders.lm, "--json")
    assert status == 0 and error.count("no bfloat16 instructions") == (0 if able else 1)


def test_the_flags_of_the_processor_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, able in (({"avx2"}, False), ({"avx2", "avx512_bf16"}, True), ({"asimd", "bf16"}, True)):
        monkeypatch.setattr(build, "processor_flags", lambda flags=flags: flags)
        build.has_bfloat16.cache_clear()
        assert build.has_bfloat16() is able
    monkeypatch.undo()
    build.has_bfloat16.cache_clear()


def test_scores_are_shown_with_labels_and_units(folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "eval", folders.lm, "--text", folders.text, "--text", folders.text)
    assert status == 0 and "bits per byte" in out and "nats per token" in out


def test_nothing_to_score_on_is_refused_by_name(folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, "eval", folders.lm)
    assert status == 1 and all(f"--{kind}" in error for kind in KINDS)
    assert run(capsys, "eval", folders.lm, "--text", folders.text, "--limit", 0)[0] != 0


def test_a_text_has_its_class_with_probabilities(folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "classify", folders.classes, TEXTS[0], "--json")
    result = json.loads(out)
    ids = torch.tensor([folders.tokenizer.encode(TEXTS[0], add_special_tokens=True)])
    with torch.inference_mode():
        expected = load(folders.classes)(ids)[0].double().softmax(-1).tolist()
    assert status == 0 and sum(result["probabilities"].values()) == pytest.approx(1.0)
    assert result["probabilities"] == pytest.approx(
        dict(zip(["ham", "spam", "other"], expected, strict=True)), abs=1e-5
    )
    assert result["label"] == max(result["probabilities"], key=result["probabilities"].get)
    assert list(result["probabilities"].values()) == sorted(result["probabilities"].values(), reverse=True)
    status, out, _ = run(capsys, "classify", folders.classes, TEXTS[0])
    assert status == 0 and result["label"] in out and "probability" in out


def test_each_line_of_a_file_is_classified(folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    _, one, _ = run(capsys, "classify", folders.classes, TEXTS[1], "--json")
    status, out, _ = run(capsys, "classify", folders.classes, "--file", folders.lines, "--json")
    result = json.loads(out)
    assert status == 0 and [row["input"] for row in result["results"]][:3] == TEXTS and len(result["results"]) == 4
    assert result["results"][1]["probabilities"] == pytest.approx(json.loads(one)["probabilities"], abs=1e-5)
    assert result["results"][3]["cut"] and "1 of 4 texts is longer" in result["notes"][-1]
    status, out, _ = run(capsys, "classify", folders.classes, "--file", folders.text, "--json")
    assert [row["label"] for row in json.loads(out)["results"]] == [row["label"] for row in result["results"][:3]]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("classify", "lm", "text"), "train a classifier"),
        (("classify", "classes"), "give a text, or --file"),
        (("classify", "classes", "text", "--file", "lines"), "give a text, or --file"),
        (("classify", "classes", "--file", "absent.txt"), "absent.txt"),
    ],
)
def test_what_cannot_be_classified_is_one_line(
    arguments: tuple[str, ...], words: str, folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(capsys, *(getattr(folders, word, word) if word != "text" else word for word in arguments))
    assert status == 1 and words in error and error.count("\n") == 1


def test_a_file_of_no_line_is_refused(
    folders: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    status, _, error = run(capsys, "classify", folders.classes, "--file", tmp_path / "empty.txt")
    assert status == 1 and "no line of text" in error
