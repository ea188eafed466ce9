"""The language model of a multimodal folder, beside transformers: it runs, is saved alone, and meets its kin."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError
from lapis.model.adapter import attach, write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, wrap
from lapis.weights.graft.graft import graft

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 96,
}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
          "image_size": 16, "patch_size": 4}  # fmt: skip
ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.1}  # fmt: skip
# kind -> class of transformers, model_type of the text and its options, model_type of the tower that sees
KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration", "gemma3_text", {"sliding_window": 5, "query_pre_attn_scalar": 16},
        "siglip_vision_model",
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration", "gemma4_text", {"sliding_window": 5, "global_head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 97}, "gemma4_vision",
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", "mistral", {"sliding_window": None}, "pixtral"),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration", "qwen3_5_text", {"linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 16, "num_hidden_layers": 4}, "qwen3_5_vision",
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", {"linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "qwen3_5_moe_vision",
    ),
    "mistral3-growing": ("Mistral3ForConditionalGeneration", "ministral3", {"rope_parameters": ROPE}, "pixtral"),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small multimodal model of transformers, and its folder."""
    kind, text_type, options, vision_type = KINDS[request.param]
    model_class = getattr(transformers, kind)
    ids = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    config = model_class.config_class(
        text_config={"model_type": text_type, **TEXT, **options}, vision_config={"model_type": vision_type, **VISION},
        **(ids if request.param == "gemma3" else {"image_token_index": 90}), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, folder = model_class(config).eval(), tmp_path_factory.mktemp("whole")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(folder)
    return theirs, folder


IDS = torch.randint(0, 90, (2, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_its_text_runs_and_is_saved_alone(whole: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = whole
    ours = load(folder)
    assert (theirs(IDS).logits - ours(IDS)).abs().max() <= 1e-5
    assert any("text alone is run here" in note and "of vis" in note for note in ours.notes)
    save(ours, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again(IDS).logits - ours(IDS)).abs().max() <= 1e-5
    assert load(tmp_path).config == ours.config and load(tmp_path).notes == []


@torch.no_grad()
def test_older_names_of_the_same_folder_are_read(whole: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = whole
    tensors = load_file(folder / "model.safetensors")
    older = {
        name.replace("model.language_model.", "language_model.model.") if "language_model" in name
        else name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert (theirs(IDS).logits - load(tmp_path)(IDS)).abs().max() <= 1e-5


@torch.no_grad()
def test_text_that_learned_is_grafted_onto_the_whole(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    for name, change in (("base", 0.0), ("chat", 0.01)):
        text = load(folder)
        for part, parameter in text.named_parameters():
            if part not in ("embed.weight", "head.weight"):
                parameter.add_(change)
        save(text, tmp_path / name)
    graft(base=tmp_path / "base", chat=tmp_path / "chat", onto=folder, out=tmp_path / "out", norms="add")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        learned = 0.01 if "language_model" in name and "embed_tokens.weight" not in name else 0.0
        assert torch.allclose(after[name], tensor + learned, atol=1e-6), name
    expected, got = load(tmp_path / "chat")(IDS), load(tmp_path / "out")(IDS)
    torch.testing.assert_close(expected, got, atol=1e-5, rtol=0)


@torch.no_grad()
def test_stacked_experts_are_read_as_the_hub_holds_them(tmp_path: Path) -> None:
    """Published folders of Qwen3.5's mixtures have one tensor for all experts of a layer; transformers writes many."""
    options = {**TEXT, **KINDS["qwen3_5_moe"][2], "num_experts": 3}
    config = transformers.Qwen3_5MoeForCausalLM.config_class(**options)
    torch.manual_seed(0)
    theirs = transformers.Qwen3_5MoeForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    state = theirs.state_dict()
    stacked |= {name: tensor for name, tensor in state.items() if ".experts." in name}
    (tmp_path / "hub").mkdir()
    save_file({n: t.contiguous() for n, t in stacked.items()}, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hub" / "config.json").write_text((tmp_path / "own" / "config.json").read_text())
    assert len(stacked) < len(tensors)
    ours = load(tmp_path / "hub")
    assert torch.equal(ours(IDS), load(tmp_path / "own")(IDS))
    assert (theirs(IDS).logits - ours(IDS)).abs().max() <= 1e-5
    graft(base=tmp_path / "hub", chat=tmp_path / "hub", onto=tmp_path / "hub", out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stacked.keys()
    damaged = {name: tensor for name, tensor in stacked.items() if not name.endswith("layers.1.mlp.experts.down_proj")}
    save_file(damaged, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.down_proj\.weight is missing"):
        load(tmp_path / "hub")


def test_its_adapter_is_pefts(whole: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = whole
    down = "mlp.down" if load(folder).config.experts is None else "mlp.shared.down"
    ours = wrap(load(folder), LoraConfig(rank=2, targets=("attn.q", down)), base=str(folder))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        write_adapter(ours, tmp_path)
        adapted = peft.PeftModel.from_pretrained(type(theirs).from_pretrained(folder), tmp_path)
        assert (adapted(IDS).logits - ours(IDS)).abs().max() <= 1e-5
        assert (ours(IDS) - theirs(IDS).logits).abs().max() > 1e-3
        checkpoint = open_checkpoint(tmp_path, adapters=True)
        assert checkpoint.adapter is not None
        again = attach(load(folder), checkpoint.adapter)
        assert torch.equal(again(IDS), ours(IDS))


def test_a_whole_that_does_more_with_text_is_refused(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    fields = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "paligemma"}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model_type is paligemma; lapis builds .*gemma3_text"):
        load(tmp_path)
