"""Import: what an export wrote comes back; real files of others are read as transformers and llama.cpp read them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lapis
from lapis.checkpoint.commit import verify
from lapis.formats.export import export_gguf
from lapis.formats.gguf.header import read_gguf
from lapis.formats.importing import import_gguf
from lapis.formats.vocabulary.probe import probe
from lapis.model.load import load
from lapis.text.tokenizer.tokenizer import Tokenizer

from .llama_cpp import LlamaCpp, need_llama_cpp
from .models import CASES, ENCODERS, EXPORTED_ONLY, make_folder, sentence_piece

TEXT = "Selamat pagi! The quick brown fox, 2024. Привіт, 你好。"


def real_files() -> Path:
    """GGUF files that others made; LAPIS_MODELS names the folder, as shared/tools/real_models.py fills it."""
    place = Path(os.environ.get("LAPIS_MODELS", "/nowhere"))
    if not (place / "gguf").is_dir():
        pytest.skip("LAPIS_MODELS names no folder of real models with GGUF files in gguf/")
    return place


@pytest.mark.parametrize("name", EXPORTED_ONLY)
def test_what_is_exported_only_is_named(name: str, tmp_path: Path) -> None:
    export_gguf(make_folder(tmp_path / "model", name), tmp_path / "x.gguf", type="f32")
    with pytest.raises(lapis.CheckpointError, match=r"lapis imports|exports and does not import"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "back")


@pytest.mark.parametrize("name", [name for name in CASES if name not in EXPORTED_ONLY])
def test_an_exported_model_comes_back(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", name)
    export_gguf(folder, tmp_path / "x.gguf", type="f32")
    result = import_gguf(tmp_path / "x.gguf", tmp_path / "back", dtype="f32")
    assert verify(tmp_path / "back") == [] and result.tokenizer.proved >= 250 and not result.notes[1:]
    first, again = Tokenizer.open(folder), Tokenizer.open(tmp_path / "back")
    assert again.rows == first.rows and again.chat_template == first.chat_template
    assert again.end_ids == first.end_ids or name in ENCODERS
    for special in (False, True):
        texts = [*probe()[:40], *first.special, "a<|im_start|>b"]
        assert again.encode_batch(texts, special) == first.encode_batch(texts, special)
    assert again.encode("a", add_special_tokens=True) == first.encode("a", add_special_tokens=True)
    ids = torch.tensor([first.encode(TEXT)[:44]])
    ours, theirs = load(folder, torch.float32), load(tmp_path / "back", torch.float32)
    head = "none" if name in ENCODERS else None
    with torch.no_grad():
        if head:
            ours = load(folder, torch.float32, head="none")
        assert torch.allclose(ours(ids), theirs(ids), atol=1e-5)


def test_transformers_loads_what_is_imported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_folder(tmp_path / "model", "llama", sentence_piece())
    export_gguf(folder, tmp_path / "x.gguf", type="q8_0")
    import_gguf(tmp_path / "x.gguf", tmp_path / "back")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = Tokenizer.open(tmp_path / "back").encode(TEXT, add_special_tokens=True)
    assert tokenizer(TEXT)["input_ids"] == ids
    ours = load(tmp_path / "back", torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids])).logits, ours(torch.tensor([ids])), atol=1e-4)


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2-it", "gemma3"])
def test_real_files_are_read_as_transformers_and_llama_cpp_do(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    need_llama_cpp()
    file = real_files() / "gguf" / f"{name}.gguf"
    result = import_gguf(file, tmp_path / "model", dtype="f32")
    assert result.tokenizer.proved == 300 and "were rounded to" in result.notes[0]
    tokenizer = Tokenizer.open(tmp_path / "model")
    with LlamaCpp(file) as llama:
        assert [llama.encode(text) for text in probe()] == tokenizer.encode_batch(probe())
    ids = torch.tensor([tokenizer.encode("The capital of Malaysia is Kuala Lumpur, and", add_special_tokens=True)])
    model = load(tmp_path / "model", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=2e-3)


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2-it", "gemma3"])
def test_real_models_are_exported_as_llama_cpp_reads_them(name: str, tmp_path: Path) -> None:
    need_llama_cpp()
    folder = real_files() / name
    export_gguf(folder, tmp_path / "x.gguf", type="f16" if name == "smollm2-it" else "bf16")
    model, tokenizer = lapis.load(folder, torch.float32)
    ids = tokenizer.encode("The capital of Malaysia is Kuala Lumpur, and the", add_special_tokens=True)
    with LlamaCpp(tmp_path / "x.gguf") as theirs, torch.no_grad():
        assert [theirs.encode(text) for text in probe()] == tokenizer.encode_batch(probe())
        ours_V = torch.log_softmax(model(torch.tensor([ids]))[0, -1], -1)
        theirs_V = torch.tensor(theirs.log_probabilities(ids, model.config.vocab))
        assert (ours_V - theirs_V).abs().max() < (2e-2 if name == "smollm2-it" else 0.15)  # bfloat16 has 8 bits
        cut = lapis.Sampling(max_tokens=32)
        text = lapis.generate(model, tokenizer, "The capital of Malaysia is Kuala Lumpur, and the", cut)
        assert tokenizer.decode(theirs.greedy(ids, 32), skip_special=True).strip().startswith(text.strip())


def test_a_window_and_a_shape_come_back(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "gemma3")
    export_gguf(folder, tmp_path / "x.gguf", type="bf16")
    result = import_gguf(tmp_path / "x.gguf", tmp_path / "back")
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "back"))
    for name in ("sliding_window", "layer_types", "head_dim", "hidden_size", "vocab_size", "num_key_value_heads"):
        assert after[name] == before[name]
    assert result.notes == [] and result.type == "BF16, F32"
    account = json.loads((tmp_path / "back" / "lapis-import.json").read_text())
    assert account["from"] == "x.gguf" and account["types"] == {"BF16": 50, "F32": 43}


def test_what_was_rounded_is_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "qwen2")
    export_gguf(folder, tmp_path / "x.gguf", type="q4_0")
    result = import_gguf(tmp_path / "x.gguf", tmp_path / "back")
    assert result.notes == [
        "these weights were rounded to Q8_0, Q4_0 when the file was made, and once more to bf16 here (--dtype f32 does "
        "not)"
    ]


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "gpt2")
    export_gguf(folder, tmp_path / "x.gguf", type="f16")
    with pytest.raises(lapis.OutputError, match="exists already"):
        import_gguf(tmp_path / "x.gguf", folder)
    import_gguf(tmp_path / "x.gguf", folder, overwrite=True)
    assert verify(folder) == []


def test_a_file_for_another_architecture_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "qwen2")
    export_gguf(folder, tmp_path / "x.gguf", type="f16")
    raw = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "y.gguf").write_bytes(raw.replace(b"qwen2", b"qwen9"))
    with pytest.raises(
        lapis.CheckpointError, match=r"general\.architecture is 'qwen9'; lapis imports arcee, bert, cohere2, gemma2"
    ):
        import_gguf(tmp_path / "y.gguf", tmp_path / "back")
    (tmp_path / "y.gguf").write_bytes(raw.replace(b"blk.1.attn_k.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(
        lapis.CheckpointError, match=r"attn_k.weight is missing; .*attn_z.weight is not a tensor of qwen2"
    ):
        import_gguf(tmp_path / "y.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_command_line_goes_there_and_back(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    exported = json.loads(run("export", folder, "--gguf", file, "--type", "q8_0", "--ollama", "--json")[1])
    assert exported["out"] == str(file) and exported["type"] == "q8_0" and exported["bytes"] == file.stat().st_size
    assert exported["seconds"] > 0 and exported["tokenizer"]["pre"] == "qwen35"
    assert exported["tokenizer"]["proved"] == 300
    assert f'PARAMETER stop "{"<|im_end|>"}"' in (tmp_path / "Modelfile").read_text()
    imported = json.loads(run("import", file, "--out", back, "--json")[1])
    assert imported["out"] == str(back) and imported["tokenizer"]["proved"] == 300
    assert "equal ids on 300 texts in many scripts" in run("import", file, "--out", tmp_path / "second")[1]
    for command in (["generate", file, "x"], ["inspect", file], ["tokens", file, "x"], ["eval", file, "--text", file],
                    ["diff", file, folder]):  # fmt: skip
        status, _, error = run(*command)
        assert status == 1 and error.count("lapis: ") == 1 and "Traceback" not in error
        assert f"{file}: is a GGUF file; make a model folder of it with: lapis import {file} --out DIR" in error
    (tmp_path / "only").mkdir()
    file.rename(tmp_path / "only" / "m.gguf")
    status, _, error = run("inspect", tmp_path / "only")
    assert status == 1 and "lapis import" in error and "Traceback" not in error
    assert read_gguf(tmp_path / "only" / "m.gguf").version == 3
