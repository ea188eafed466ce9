"""What a folder may hold, and what loading says of one that is damaged, before anything is allocated."""

import dataclasses
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError, ConfigError
from lapis.families.config import ModelConfig
from lapis.model.check import plan_load
from lapis.model.load import load, save
from lapis.model.transformer import Transformer

Folder = Any  # conftest.py has it
Make = Callable[..., Folder]
Q0 = "model.layers.0.self_attn.q_proj.weight"


def refusal(folder: Folder) -> str:
    """The one line that both counting and loading refuse with."""
    with pytest.raises(CheckpointError) as planned:
        plan_load(open_checkpoint(folder.path))
    with pytest.raises(CheckpointError) as loaded:
        load(folder.path)
    assert str(planned.value) == str(loaded.value)
    assert "\n" not in str(loaded.value) and str(folder.path) in str(loaded.value)
    return str(loaded.value).removeprefix(f"{folder.path}: ")


def test_what_is_saved_is_what_is_loaded(shape: ModelConfig, tmp_path: Path) -> None:
    model = Transformer(shape)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == shape and again.notes == []
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())


def test_saving_in_another_dtype_rounds_once(make_folder: Make, tmp_path: Path) -> None:
    model = make_folder("llama").model
    save(model, tmp_path / "half", torch.bfloat16)
    half = load(tmp_path / "half")
    assert half.embed.weight.dtype == torch.bfloat16
    assert torch.equal(half.embed.weight, model.embed.weight.bfloat16())
    assert torch.equal(load(tmp_path / "half", torch.float32).embed.weight, model.embed.weight.bfloat16().float())


def test_large_models_are_saved_in_shards(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_folder("gpt2").model
    monkeypatch.setattr(sys.modules["lapis.model.load"], "SHARD_BYTES", 4000)
    save(model, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    ids = torch.arange(8)[None]
    assert torch.equal(load(tmp_path / "sharded")(ids), model(ids))


def test_another_head_is_drawn_anew_only_when_asked(make_folder: Make) -> None:
    folder = make_folder("llama", tied=True)
    model = load(folder.path, head="scalar")
    assert model(torch.arange(6)[None]).shape == (1, 1)
    assert model.notes == ["a new head (scalar) was drawn at random: head.classes.weight"]
    assert load(folder.path, head="classes", classes=3)(torch.arange(6)[None]).shape == (1, 3)
    bert = make_folder("bert")
    assert load(bert.path, head="classes", classes=2).config.pooler
    with pytest.raises(ConfigError, match="classes is 0"):
        load(bert.path, head="classes")


def test_a_shape_that_no_family_has_is_not_saved(tmp_path: Path) -> None:
    shape = ModelConfig(dim=8, layers=1, heads=1, ffn_dim=8, vocab=5, context=4, positions="none", mlp="relu2")
    assert Transformer(shape)(torch.arange(4)[None]).shape == (1, 4, 5)
    with pytest.raises(ConfigError, match=r"^positions='none' has no place in a llama folder; it can be rotary$"):
        save(Transformer(shape), tmp_path)
    with pytest.raises(ConfigError, match='family is "lama"; known: llama'):
        save(Transformer(ModelConfig(dim=8, layers=1, heads=1, ffn_dim=8, vocab=5, context=4, family="lama")), tmp_path)


def test_fault_17_quantized_weights_are_refused(make_folder: Make) -> None:
    folder = make_folder()
    folder.put({**folder.tensors, Q0: torch.zeros(16, 16, dtype=torch.int8)})
    assert refusal(folder) == f"{Q0} is I8: such weights cannot be run here; convert them to bfloat16"


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}, "fp4"])
def test_a_quantization_that_is_not_known_is_refused(make_folder: Make, value: Any) -> None:
    folder = make_folder()
    folder.set(quantization_config=value)
    assert "quantization_config is" in refusal(folder) and "give the unquantized model" in refusal(folder)
    assert plan_load(open_checkpoint(folder.path), to_run=False).config.layers


def test_fault_16_float8_weights_are_counted_and_not_run(make_folder: Make) -> None:
    folder = make_folder()
    tensors = {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for n, t in folder.tensors.items()}
    folder.put({**tensors, "model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)})
    assert " is F8_E4M3 and 15 more are quantized: such weights cannot be run here" in refusal(folder)
    plan = plan_load(open_checkpoint(folder.path), to_run=False)
    assert plan.dtype == "float8" and plan.config == folder.model.config
    assert plan.notes == ("1 tensor is the scale of quantized weights; not counted",)


def test_fault_18_dtypes_that_differ_are_read_as_most_are(make_folder: Make) -> None:
    folder = make_folder()
    tensors = {name: t.bfloat16() for name, t in folder.tensors.items()}
    folder.put({**tensors, "model.norm.weight": tensors["model.norm.weight"].float()})
    assert {p.dtype for p in load(folder.path).parameters()} == {torch.bfloat16}


def test_fault_23_missing_tensors_are_listed_and_never_drawn(make_folder: Make) -> None:
    folder = make_folder()
    folder.put({name: t for name, t in folder.tensors.items() if name not in (Q0, "lm_head.weight")})
    assert refusal(folder) == f"lm_head.weight is missing; {Q0} is missing"


def test_fault_24_shapes_that_differ_are_listed_together(make_folder: Make) -> None:
    folder = make_folder()
    tensors = folder.tensors
    folder.put({**tensors, Q0: torch.zeros(16, 8), "model.norm.weight": torch.zeros(8), "extra.weight": torch.zeros(2)})
    message = refusal(folder)
    assert "extra.weight is not a tensor of llama" in message
    assert f"{Q0} is 16x8 but 16x16 by config.json" in message and "model.norm.weight is 8 but 16" in message


def test_fault_24_a_long_list_is_cut_and_counted(make_folder: Make) -> None:
    folder = make_folder()
    folder.set(hidden_size=20, num_attention_heads=5, num_key_value_heads=5)
    assert refusal(folder).endswith("more") and " ... and " in refusal(folder)


def test_fault_30_a_tied_model_keeps_its_tie(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder(tied=True)
    assert "lm_head.weight" not in folder.tensors
    folder.put({**folder.tensors, "lm_head.weight": folder.tensors["model.embed_tokens.weight"].clone()})
    model = load(folder.path)
    assert model.config.tied and model.notes == []
    save(model, tmp_path / "again")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "again").names


def test_fault_31_a_tied_flag_with_another_head_keeps_both(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder(tied=True)
    head = torch.randn(31, 16)
    folder.put({**folder.tensors, "lm_head.weight": head})
    model = load(folder.path)
    assert not model.config.tied and torch.equal(model.head.weight, head)
    assert "lm_head.weight differs from model.embed_tokens.weight" in model.notes[0]
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").notes == []


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "max_position_embeddings", "hidden_act"]
)
def test_fault_34_a_missing_field_has_no_silent_default(make_folder: Make, field: str) -> None:
    folder = make_folder()
    folder.set(**{field: ...})
    assert refusal(folder) == f"config.json: {field} is missing; fetch the file again"


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "16"), ("hidden_size", -1), ("num_attention_heads", 1.5), ("rms_norm_eps", 0),
     ("tie_word_embeddings", "yes"), ("hidden_act", "tan"), ("architectures", ["LlamaForTokenClassification"]),
     ("rope_scaling", {"rope_type": "longrope", "factor": 2}), ("rope_scaling", {"rope_type": "yarn"}),
     ("num_key_value_heads", 3), ("head_dim", 5)],
)  # fmt: skip
def test_fault_34_a_field_of_another_kind_is_named(make_folder: Make, field: str, value: Any) -> None:
    folder = make_folder()
    folder.set(**{field: value, "rope_parameters": ...})
    word = {"rope_scaling": "factor" if value == {"rope_type": "yarn"} else "longrope",
            "num_key_value_heads": "kv_heads 3"}.get(field, field)  # fmt: skip
    assert word in refusal(folder)


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "head_dim", "num_attention_heads"]
)
def test_fault_35_a_size_of_a_billion_is_refused_at_once(make_folder: Make, field: str) -> None:
    folder = make_folder()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder.set(**{field: 10**9}, **({"num_key_value_heads": 10**9} if field == "num_attention_heads" else {}))
    assert "000000000" in refusal(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_fault_36_layers_differ_from_the_tensors(make_folder: Make) -> None:
    folder = make_folder()
    folder.set(num_hidden_layers=3)
    assert refusal(folder) == "config.json says 3 layers, the tensors have 2; fetch both again"


def test_fault_37_vocab_size_differs_from_the_rows(make_folder: Make) -> None:
    folder = make_folder(tied=True)
    folder.set(vocab_size=40)
    assert refusal(folder) == "model.embed_tokens.weight is 31x16 but 40x16 by config.json (vocab_size 40)"


def test_faults_40_and_41_code_and_unknown_fields_left_out(make_folder: Make) -> None:
    folder = make_folder()
    folder.set(auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True, _attn_implementation="evil", spam=1)
    assert load(folder.path).notes == [
        "config.json: auto_map, trust_remote_code is ignored; no file turns code on",
        "config.json: left out, not known here: _attn_implementation, spam",
    ]


def test_the_same_tensor_under_two_names_is_refused(make_folder: Make) -> None:
    folder = make_folder()
    folder.put({**folder.tensors, "norm.weight": torch.zeros(16)})
    assert refusal(folder) == "norm.weight and model.norm.weight are the same tensor twice"


def test_an_unknown_family_is_refused_by_name(make_folder: Make) -> None:
    folder = make_folder()
    folder.set(model_type="mamba")
    assert refusal(folder).startswith("config.json: model_type is mamba; lapis builds llama, qwen2, qwen3, mistral")


@pytest.mark.parametrize("on_disk", [torch.bfloat16, torch.float32])
def test_loading_holds_no_second_copy(tmp_path: Path, on_disk: torch.dtype) -> None:
    """Peak memory above the interpreter's is at most 1.15 times the weights, converted or not."""
    shape = ModelConfig(dim=512, layers=8, heads=8, ffn_dim=1792, vocab=60000, context=64)
    with torch.device("meta"):
        model = Transformer(shape)
    save(model, tmp_path, on_disk, state={n: torch.zeros(p.shape, dtype=on_disk) for n, p in model.named_parameters()})
    save(Transformer(dataclasses.replace(shape, layers=1, vocab=64)), tmp_path / "small", on_disk)
    script = f"""
import resource, torch
from lapis.model.load import load
load({str(tmp_path / "small")!r}, torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = sum(p.nbytes for p in load({str(tmp_path)!r}, torch.bfloat16).parameters()) / 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / weights)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.15


def test_keys_of_layers_that_borrow_are_left_out_aloud(make_folder: Callable[..., Folder]) -> None:
    """Published folders of Gemma 4 hold them, and no model reads them."""
    folder = make_folder("gemma4")
    ids = torch.arange(9)[None]
    before = load(folder.path)(ids)
    own = {name: tensor for name, tensor in folder.tensors.items() if ".layers.1.self_attn.k" in name}
    folder.put(folder.tensors | {name.replace(".layers.1.", ".layers.3."): tensor for name, tensor in own.items()})
    model = load(folder.path)
    assert len(own) == 2 and any("2 tensors are keys and values of layers that read" in note for note in model.notes)
    assert torch.equal(model(ids), before)
