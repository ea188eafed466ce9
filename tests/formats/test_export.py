"""Export against llama.cpp itself: ids, logits, greedy tokens and embeddings of every family; and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers

import lapis
from lapis.evaluation.text import score_text
from lapis.families import family_of
from lapis.formats.export import export_gguf
from lapis.formats.gguf.header import read_gguf
from lapis.formats.gguf.keys import layout_of
from lapis.formats.gguf.library import dequantized
from lapis.formats.vocabulary.patterns import SPLITTINGS
from lapis.formats.vocabulary.probe import LINES, probe
from lapis.text.tokenizer.tokenizer import Tokenizer

from .llama_cpp import LlamaCpp, need_llama_cpp
from .models import CASES, ENCODERS, byte_level, cut_by, make_folder, sentence_piece, unigram, word_piece

TEXT = "Selamat pagi! The quick brown fox, 2024. Привіт, 你好。"
TOLERANCE = {"f32": 2e-3, "f16": 2e-2}  # llama.cpp's GELU is a table in float16, also for float32 weights
LLAMA_TOKENS = {
    "llama-bpe": lambda: cut_by(lambda: _steps("llama-bpe"), whole_words=True),
    "qwen2": lambda: cut_by(lambda: _steps("qwen2")),
    "smollm": lambda: cut_by(
        lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: cut_by(lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "gpt-4o": lambda: cut_by(lambda: _steps("gpt-4o")),
    "tekken": lambda: cut_by(lambda: _steps("tekken"), whole_words=True),
    "falcon": lambda: cut_by(lambda: _steps("falcon")),
    "default": lambda: cut_by(lambda: _steps("default")),
    "smaug-bpe": lambda: cut_by(lambda: _steps("smaug-bpe")),
    "qwen35": byte_level,
    "llama with a space before": lambda: sentence_piece(True),
    "llama without": lambda: sentence_piece(False),
    "t5 of XLM-RoBERTa": unigram,
    "t5 of T5": lambda: unigram("t5"),
}


def _steps(name: str) -> list[Any]:
    cuts: list[Any] = [pre_tokenizers.Split(Regex(step), "isolated") for step in SPLITTINGS[name].steps]
    return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ENCODERS])
@pytest.mark.parametrize("type_", ["f32", "f16"])
def test_llama_cpp_computes_the_same(name: str, type_: Any, tmp_path: Path) -> None:
    need_llama_cpp()
    folder = make_folder(tmp_path / "model", name)
    export_gguf(folder, tmp_path / "x.gguf", type=type_)
    model, tokenizer = lapis.load(folder, torch.float32)
    ids = tokenizer.encode(TEXT)[:44]
    with LlamaCpp(tmp_path / "x.gguf") as theirs, torch.no_grad():
        ours_V = torch.log_softmax(model(torch.tensor([ids]))[0, -1], -1)
        theirs_V = torch.tensor(theirs.log_probabilities(ids, model.config.vocab))
        assert (ours_V - theirs_V).abs().max() < TOLERANCE[type_]
        _check_greedy(model, tokenizer, ids, theirs.greedy(ids, 32), 2 * TOLERANCE[type_])


def _check_greedy(model: Any, tokenizer: Tokenizer, ids: list[int], reply: list[int], near: float) -> None:
    """Each token is our likeliest that ends no reply, up to the first place where two are as likely."""
    assert len(reply) == 32
    logits_TV = model(torch.tensor([[*ids, *reply]]))[0, len(ids) - 1 : -1]
    logits_TV[:, list(tokenizer.end_ids)] = -torch.inf
    for place, token in enumerate(reply):
        if token != int(logits_TV[place].argmax()):
            assert logits_TV[place].max() - logits_TV[place, token] < near
            return


def test_heads_that_share_keys_are_refused_for_olmoe() -> None:
    experts = {"count": 2, "active": 1, "normalized": False}
    config = lapis.ModelConfig.of({"family": "olmoe", "dim": 8, "layers": 1, "heads": 4, "kv_heads": 2, "ffn_dim": 8,
                                   "vocab": 9, "context": 9, "experts": experts})  # fmt: skip
    with pytest.raises(lapis.ConfigError, match="one for each of the 4 heads"):
        layout_of(config, family_of(config))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_neox", "qwen3_5_moe", "qwen3_next"])
def test_what_is_stacked_or_reordered_is_read_back(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    folder = make_folder(tmp_path / "model", name)
    bits = export_gguf(folder, tmp_path / "x.gguf", type="f32", text=tmp_path / "text.txt").bits_per_byte
    assert bits is not None and bits["before"] == pytest.approx(bits["after"], abs=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    need_llama_cpp()
    folder = make_folder(tmp_path / "model", name)
    result = export_gguf(folder, tmp_path / "x.gguf", type="f32")
    assert any("left out" in note for note in result.notes) == (name not in ("distilbert", "modernbert"))
    tokenizer = Tokenizer.open(folder)
    transformers = pytest.importorskip("transformers")
    ids = tokenizer.encode(TEXT)
    with LlamaCpp(tmp_path / "x.gguf", embedding=True) as theirs, torch.no_grad():
        states_TD = transformers.AutoModel.from_pretrained(folder)(torch.tensor([ids])).last_hidden_state[0]
        ours_D = torch.nn.functional.normalize(states_TD.mean(0), dim=0)
        assert (ours_D - torch.tensor(theirs.embed(ids))).abs().max() < 1e-3
        assert theirs.encode("a", around=True) == tokenizer.encode("a", add_special_tokens=True)


@pytest.mark.parametrize("kind", LLAMA_TOKENS)
def test_ids_are_those_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    need_llama_cpp()
    folder = make_folder(tmp_path / "model", "llama", LLAMA_TOKENS[kind]())
    result = export_gguf(folder, tmp_path / "x.gguf", type="f32")
    assert result.tokenizer.pre == kind.split(" ")[0] and result.tokenizer.proved == 300
    tokenizer = Tokenizer.open(folder)
    with LlamaCpp(tmp_path / "x.gguf") as theirs:
        wrong = [text for text in probe() if theirs.encode(text) != tokenizer.encode(text)]
        assert not wrong
        special = "".join(f"a{token} b" for token in tokenizer.special)
        assert theirs.encode(special, special=True) == tokenizer.encode(special, special=True)
        assert theirs.encode(special) == tokenizer.encode(special)
        assert theirs.encode("a", around=True) == tokenizer.encode("a", add_special_tokens=True)


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_pieces_are_those_of_llama_cpp(lowercase: bool, tmp_path: Path) -> None:
    need_llama_cpp()
    folder = make_folder(tmp_path / "model", "bert", word_piece(lowercase))
    result = export_gguf(folder, tmp_path / "x.gguf", type="f32")
    tokenizer = Tokenizer.open(folder)
    with LlamaCpp(tmp_path / "x.gguf", embedding=True) as theirs:
        wrong = [text for text in probe() if theirs.encode(text) != tokenizer.encode(text)]
    assert len(wrong) <= 300 - result.tokenizer.proved
    assert (result.tokenizer.proved == 300) == (not lowercase)


def test_an_extended_tokenizer_is_exported(tmp_path: Path) -> None:
    need_llama_cpp()
    from lapis.text.tokenizer.extend import ExtendableTokenizer

    byte_level().save(_made(tmp_path / "base"))
    base = ExtendableTokenizer.open(tmp_path / "base")
    counts = base.count_words(["kerana mereka menyeberangi sungai itu " * 50])
    base.write(_made(tmp_path / "more"), base.learn(counts, 20))
    extended = Tokenizer.open(tmp_path / "more")
    assert extended.rows > Tokenizer.open(tmp_path / "base").rows
    folder = make_folder(tmp_path / "model", "llama", extended)
    export_gguf(folder, tmp_path / "x.gguf", type="f32")
    with LlamaCpp(tmp_path / "x.gguf") as theirs:
        for text in ("kerana mereka menyeberangi", *LINES):
            assert theirs.encode(text) == extended.encode(text)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("type_", ["bf16", "q8_0", "q5_1", "q4_0"])
def test_rounded_weights_are_near(type_: Any, tmp_path: Path) -> None:
    need_llama_cpp()
    folder = make_folder(tmp_path / "model", "qwen3")
    result = export_gguf(folder, tmp_path / "x.gguf", type=type_)
    assert result.types[type_.upper()] >= 20 and result.bytes == (tmp_path / "x.gguf").stat().st_size
    model, tokenizer = lapis.load(folder, torch.float32)
    ids = tokenizer.encode(TEXT)[:44]
    with LlamaCpp(tmp_path / "x.gguf") as theirs, torch.no_grad():
        ours_V = torch.log_softmax(model(torch.tensor([ids]))[0, -1], -1)
        theirs_V = torch.tensor(theirs.log_probabilities(ids, model.config.vocab))
    share = (ours_V - theirs_V).norm() / (ours_V - ours_V.mean()).norm()
    assert share < {"bf16": 0.02, "q8_0": 0.03, "q5_1": 0.2, "q4_0": 0.4}[type_]


def test_what_is_written_beside_the_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama-rope-llama3")
    result = export_gguf(folder, tmp_path / "x.gguf", type="f16")
    file = read_gguf(tmp_path / "x.gguf")
    tokenizer, fields = Tokenizer.open(folder), file.fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == tokenizer.rows + 3 and tokens[-1] == f"[PAD{tokenizer.rows + 2}]" and types[-1] == 5
    assert [types[i] for i in tokenizer.special.values()] == [3] * len(tokenizer.special)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")] == list(tokenizer.end_ids)
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == 1
    assert file.tensors["rope_freqs.weight"].shape == (8,)
    assert result.types == {"F16": 23, "F32": 8}
    tied = make_folder(tmp_path / "tied", "qwen2-tied")
    export_gguf(tied, tmp_path / "tied.gguf", type="f16")
    assert "output.weight" not in read_gguf(tmp_path / "tied.gguf").tensors


def test_ternary_weights_are_exact(tmp_path: Path) -> None:
    need_llama_cpp()
    from .models import ternary_folder

    folder = ternary_folder(tmp_path / "model")
    result = export_gguf(folder, tmp_path / "x.gguf", type="tq2_0")
    assert result.types["TQ2_0"] == 14
    model, tokenizer = lapis.load(folder, torch.float32)
    ids = tokenizer.encode(TEXT)[:44]
    with LlamaCpp(tmp_path / "x.gguf") as theirs, torch.no_grad():
        ours_V = torch.log_softmax(model(torch.tensor([ids]))[0, -1], -1)
        theirs_V = torch.tensor(theirs.log_probabilities(ids, model.config.vocab))
    # activations are rounded to eight bits by llama.cpp; the weights are what they were
    assert (ours_V - theirs_V).norm() / (ours_V - ours_V.mean()).norm() < 0.1
    tensor = read_gguf(tmp_path / "x.gguf").tensors["blk.1.ffn_up.weight"]
    raw = read_gguf(tmp_path / "x.gguf").read(tensor, 0, 256)
    weights = dict(model.named_parameters())["blocks.1.mlp.up.weight"]
    assert torch.equal(torch.from_numpy(dequantized(raw, "TQ2_0")), weights)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("vit", {}, "vit has no GGUF file here; known: llama"),
    "activation": ("llama", {"hidden_act": "gelu"}, "llama.cpp computes llama with swiglu only"),
    "rope": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "kind dynamic"),
    "window": ("gemma3", {"layer_types": ["full_attention"] * 7}, "5 layers of 6"),
    "modern windows": ("modernbert", {"layer_types": ["sliding_attention"] * 4 + ["full_attention"]}, "each so many"),
    "modern gates": ("modernbert", {"hidden_activation": "silu", "classifier_activation": "silu"}, "with geglu only"),
    "nope": ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 1]}, "each 4th layer of smollm3 without"),
    "moe weights": ("qwen3_moe", {"norm_topk_prob": False}, "weights of experts that sum to 1"),
    "uncapped": ("gemma2", {"final_logit_softcapping": None}, "logit_cap is 0"),
    "scale": ("gemma3", {"query_pre_attn_scalar": 24}, "query_scalar is 24.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    name, changes, message = REFUSED[case]
    if name == "vit":
        transformers = pytest.importorskip("transformers")
        shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80}
        model = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=24, patch_size=8))
        model.save_pretrained(tmp_path / "model")
    else:
        make_folder(tmp_path / "model", name)
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        if "rope_scaling" in changes:
            config.pop("rope_parameters", None)
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(lapis.ConfigError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", type="f16")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".x*"))


def _with(change: Any) -> Tokenizer:
    tokenizer = byte_level()
    change(tokenizer._backend)
    return Tokenizer(tokenizer._backend, tokenizer.named, tokenizer.templates)


def _lowered(backend: Any) -> None:
    backend.normalizer = normalizers.Lowercase()


def _spaced(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _by_spaces(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _stripping(backend: Any) -> None:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken("<here>", lstrip=True)])


@pytest.mark.parametrize(
    "change, message",
    [
        (_lowered, "its normalizer"),
        (_spaced, "as no splitting does"),
        (_by_spaces, "as no splitting does"),
        (_stripping, "<here>.* would be"),
    ],
)
def test_a_tokenizer_that_a_file_cannot_say_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama", _with(change))
    with pytest.raises(lapis.CheckpointError, match=message):
        export_gguf(folder, tmp_path / "x.gguf", type="f16")
    assert not list(tmp_path.glob("*.gguf"))


def test_composed_text_only_is_noted(tmp_path: Path) -> None:
    def composing(backend: Any) -> None:
        backend.normalizer = normalizers.NFC()

    folder = make_folder(tmp_path / "model", "llama", _with(composing))
    assert any("composed form" in note for note in export_gguf(folder, tmp_path / "x.gguf", type="f16").notes)


def test_numbers_beyond_a_type_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for value, message in ((70_000.0, "take --type bf16"), (float("nan"), "holds NaN or Inf")):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(lapis.LapisError, match=message):
            export_gguf(folder, tmp_path / "x.gguf", type="f16")
        assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".x*"))


def test_a_type_that_no_matrix_can_have_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    with pytest.raises(lapis.ConfigError, match="no matrix can be tq2_0, whose blocks hold 256"):
        export_gguf(folder, tmp_path / "x.gguf", type="tq2_0")


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(lapis.OutputError, match="exists already"):
        export_gguf(folder, tmp_path / "x.gguf", type="f16", ollama=True)
    export_gguf(folder, tmp_path / "x.gguf", type="f16")
    with pytest.raises(lapis.OutputError, match="exists already"):
        export_gguf(folder, tmp_path / "x.gguf", type="f16")
    assert (tmp_path / "Modelfile").read_text() == "mine"
    export_gguf(folder, tmp_path / "x.gguf", type="f16", ollama=True, overwrite=True)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./x.gguf\n")


def test_a_text_says_what_rounding_costs(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    results = {
        type_: export_gguf(folder, tmp_path / f"{type_}.gguf", type=type_, text=tmp_path / "text.txt").bits_per_byte
        for type_ in ("f32", "q4_0")
    }
    assert results["f32"]["before"] == pytest.approx(results["f32"]["after"], abs=1e-6)
    assert results["q4_0"]["before"] == results["f32"]["before"]
    assert abs(results["q4_0"]["after"] - results["q4_0"]["before"]) > 1e-3
    model, tokenizer = lapis.load(folder, torch.float32)
    expected = score_text(model, tokenizer, ["\n".join(LINES)])["bits_per_byte"]
    assert results["f32"]["before"] == pytest.approx(expected, abs=1e-6)


def test_folders_that_cannot_be_exported_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(lapis.CheckpointError, match=r"there is no tokenizer\.json"):
        export_gguf(folder, tmp_path / "x.gguf", type="f16")
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    (_made(tmp_path / "adapter") / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(lapis.CheckpointError, match="adapter"):
        export_gguf(tmp_path / "adapter", tmp_path / "x.gguf", type="f16")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_disk_that_fills_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    export_gguf(folder, tmp_path / "whole.gguf", type="f32")
    for command in (["export", folder, "--gguf", tmp_path / "x.gguf", "--type", "f32"],
                    ["import", tmp_path / "whole.gguf", "--out", tmp_path / "back"]):  # fmt: skip
        limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        run = f"{limited} from lapis.cli.main import main; main(sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", run, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("lapis: ") == 1 and "full" in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole.gguf"]


def test_the_library_is_named_where_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(lapis.MissingExtra, match=r"gguf.*pip install 'lapis\[gguf\]'"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf")
