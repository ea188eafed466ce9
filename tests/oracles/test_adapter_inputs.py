"""An adapter in the place of a model, beside PEFT's merge of it and beside the folder that `lapis fuse` writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lapis
from lapis.families.config import ModelConfig
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.weights.fuse.fuse import fuse
from lapis.weights.fuse.opening import open_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "ffn_dim": 24, "context": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": {**SMALL, "family": "qwen2", "bias": "qkv", "tied": True},
    "gpt2": {**SMALL, "family": "gpt2", "mlp": "gelu_tanh", "norm": "layer", "positions": "learned", "bias": "all",
             "tied": True},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules": {"modules_to_save": ["norm", "ln_f"]},
    "tokens": {"trainable_token_indices": [5, 9]},
    "pissa": {"init_lora_weights": "pissa"},
}


def make(place: Path, family: str, kind: str) -> torch.Tensor:
    """base, onto, adapter and merged (PEFT's) in a folder; the logits of the last on IDS."""
    torch.manual_seed(4)
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog"] * 9, 270)
    model = Transformer(ModelConfig(**FAMILIES[family], vocab=tokenizer.rows))
    save(model, place / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
    save(model, place / "onto")
    for name in ("base", "onto"):
        tokenizer.save(place / name)
    targets = ["c_attn", "mlp.c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    settings: dict[str, Any] = {"init_lora_weights": False} | KINDS[kind]
    if "modules_to_save" in settings:
        settings["modules_to_save"] = ["ln_f"] if family == "gpt2" else ["model.norm"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM",
                             fan_in_fan_out=family == "gpt2", **settings)  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    theirs.save_pretrained(place / "adapter")
    tokenizer.save(place / "adapter")
    merged = theirs.merge_and_unload()
    merged.save_pretrained(place / "merged")
    tokenizer.save(place / "merged")
    with torch.no_grad():
        logits: torch.Tensor = merged.eval()(input_ids=IDS).logits
    return logits


IDS = torch.tensor([[3, 4, 5, 9, 7, 8]])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_takes_an_adapter(family: str, kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    logits = make(tmp_path, family, kind)
    fuse("adapter", "fused")
    opened, whole = open_model("adapter"), load_file("fused/model.safetensors")
    assert set(opened.names) == set(whole)
    for name, tensor in whole.items():
        assert torch.equal(opened.read(name), tensor), name
        middle = opened.read_range(name, len(tensor.view(-1)) // 3, len(tensor.view(-1)) // 2)
        assert torch.equal(middle, tensor.view(-1)[len(tensor.view(-1)) // 3 : len(tensor.view(-1)) // 2])
    for source in ("adapter", "base+adapter", open_model("adapter")):
        torch.testing.assert_close(load(source)(IDS), logits, rtol=0, atol=2e-5)

    ours, theirs = lapis.diff("base", "adapter").to_json(), lapis.diff("base", "merged").to_json()
    expected = {line["name"].removeprefix("transformer."): line for line in theirs["tensors"]}
    assert len(ours["tensors"]) == len(expected)
    for line in ours["tensors"]:
        other = expected[line["name"].removeprefix("transformer.")]
        assert line["relative_norm"] == pytest.approx(other["relative_norm"], abs=1e-5), line["name"]

    for out, chat in (("g1", "adapter"), ("g2", "fused")):
        lapis.graft("base", chat, "onto", out, norms="add", embeddings="add", allow_unrelated=True)
    assert bytes_of(tmp_path / "g1") == bytes_of(tmp_path / "g2")
    for out, onto in (("o1", "base+adapter"), ("o2", "fused")):
        lapis.graft("base", "onto", onto, out, allow_unrelated=True)
    assert bytes_of(tmp_path / "o1") == bytes_of(tmp_path / "o2")
    assert json.loads(Path("o1/config.json").read_text()) == json.loads(Path("o2/config.json").read_text())
    for out, model in (("m1", "base+adapter"), ("m2", "fused")):
        inputs = [{"model": model, "parameters": {"weight": 0.4}}, {"model": "onto", "parameters": {"weight": 0.6}}]
        lapis.merge({"merge_method": "linear", "models": inputs, "dtype": "float32"}, out)
    one, two = (load_file(f"{name}/model.safetensors") for name in ("m1", "m2"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for out, chat in (("d1", "adapter"), ("d2", "fused")):
        lapis.delta_extract("base", chat, out, allow_unrelated=True)
        lapis.delta_apply(out, "onto", f"{out}-onto", norms="add", allow_unrelated=True)
    assert bytes_of(tmp_path / "d1-onto") == bytes_of(tmp_path / "d2-onto")


def test_an_adapter_is_exported_as_its_fused_model(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "llama", "lora")
    fuse("adapter", "fused")
    for name in ("fused", "adapter"):
        lapis.export_gguf(name, f"{name}.gguf", type="f32")
    one, two = (Path(f"{name}.gguf").read_bytes() for name in ("fused", "adapter"))
    assert len(one) - len(two) in range(-64, 65) and one[-1000:] == two[-1000:]  # the model's name stands in it


def test_a_graft_onto_an_adapter_that_was_killed_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "llama", "dora")
    lapis.graft("base", "onto", "adapter", "whole", allow_unrelated=True)
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lapis.graft("base", "onto", "adapter", "out", allow_unrelated=True, progress=stop)
    lapis.graft("base", "onto", "adapter", "out", allow_unrelated=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_an_adapter_that_does_not_fit_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "llama", "lora")
    config = json.loads(Path("base/config.json").read_text())
    tensors = load_file("base/model.safetensors")
    from safetensors.torch import save_file

    Path("other").mkdir()
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 16)
    save_file(tensors, "other/model.safetensors", metadata={"format": "pt"})
    Path("other/config.json").write_text(json.dumps(config))
    for call in (
        lambda: lapis.diff("base", "other+adapter"),
        lambda: lapis.graft("base", "other+adapter", "onto", "no"),
        lambda: lapis.diff("base", "nowhere+adapter"),
    ):  # type: Callable[[], Any]
        with pytest.raises(lapis.LapisError) as refusal:
            call()
        assert "\n" not in str(refusal.value) and "fuse:" not in str(refusal.value)
    Path("elsewhere").symlink_to("base")
    assert not any("belongs to" in note for note in open_model("base+adapter").notes)
    (note,) = (note for note in open_model("elsewhere+adapter").notes if "belongs to" in note)
    assert note.startswith("adapter says that it belongs to ") and note.endswith("; here it is put on elsewhere")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_low_rank_delta_is_an_adapter_that_peft_loads(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Of full rank, what it does is what the fine-tune did to the matrices; PEFT and lapis read it alike."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path, family, "lora")
    whole = load_file("onto/model.safetensors")
    base = load_file("base/model.safetensors")
    from safetensors.torch import save_file

    matrices = {n for n, t in whole.items() if t.dim() == 2 and (".layers." in n or ".h." in f".{n}")}
    chat = {n: t if n in matrices else base[n] for n, t in whole.items()}
    save_file(chat, "onto/model.safetensors", metadata={"format": "pt"})
    result = lapis.delta_extract("base", "onto", "delta", rank=16, peft=True)
    assert result.relative_error < 1e-3
    theirs = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, "delta").eval()
    expected = transformers.AutoModelForCausalLM.from_pretrained("onto", dtype=torch.float32).eval()
    with torch.no_grad():
        ours, exact = theirs(input_ids=IDS).logits, expected(input_ids=IDS).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)(input_ids=IDS).logits
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
    assert float((plain - exact).abs().max()) > 1e-3
    torch.testing.assert_close(load("delta")(IDS), exact, rtol=0, atol=1e-5)
    small = lapis.delta_extract("base", "onto", "small", rank=2, peft=True)
    assert small.relative_error > 0.1
    theirs = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, "small").merge_and_unload().state_dict()
    lapis.delta_apply("small", "base", "small-out")
    applied = transformers.AutoModelForCausalLM.from_pretrained("small-out", dtype=torch.float32).state_dict()
    for name in theirs:
        torch.testing.assert_close(applied[name], theirs[name], rtol=0, atol=1e-6)
