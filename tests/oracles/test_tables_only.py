"""Architectures that lapis does not run: counted, compared, merged and grafted by the names of their tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError
from lapis.model.load import load
from lapis.model.size import measure_headers
from lapis.weights.diff.diff import diff
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 48}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
           "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
# model_type -> class of transformers, options of its config
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**SIZES, **EXPERTS, **LATENT}),
    "kimi_k2": ("DeepseekV3ForCausalLM", {**SIZES, **EXPERTS, **LATENT}),  # DeepSeek's, under a name of its own
    "glm4_moe": ("Glm4MoeForCausalLM", {**SIZES, **EXPERTS, "head_dim": 16}),
    "minimax": ("MiniMaxForCausalLM", {**SIZES, "num_local_experts": 4, "head_dim": 16, "block_size": 8}),
    "llama4_text": ("Llama4ForCausalLM", {**SIZES, "num_local_experts": 4, "head_dim": 16,
                                          "intermediate_size_mlp": 48}),
    "mamba2": ("Mamba2ForCausalLM", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4,
                                     "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "jamba": ("JambaForCausalLM", {**SIZES, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
                                   "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4,
                                   "use_mamba_kernels": False}),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path, Path]:
    """model_type, the model of transformers, its folder, and the folder of a fine-tune of it."""
    kind, options = KINDS[request.param]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    theirs, root = model_class(model_class.config_class(**options)), tmp_path_factory.mktemp("model")
    for role in ("base", "chat"):
        theirs.save_pretrained(root / role)
        fields = json.loads((root / role / "config.json").read_text())
        (root / role / "config.json").write_text(json.dumps({**fields, "model_type": request.param}))
    tensors = load_file(root / "chat" / "model.safetensors")
    moved = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(moved, root / "chat" / "model.safetensors", {"format": "pt"})
    return request.param, theirs, root / "base", root / "chat"


def test_it_is_counted_and_refused_by_name(pair: tuple[str, Any, Path, Path]) -> None:
    kind, theirs, base, _ = pair
    checkpoint = open_checkpoint(base)
    counted = measure_headers(checkpoint.index, checkpoint.part)
    held = {tensor.data_ptr(): tensor.numel() for tensor in theirs.state_dict().values()}  # what is tied counts once
    assert counted["parameters"]["total"] == sum(held.values())
    assert [row["layer"] for row in counted["layers"]] == list(range(3))
    assert counted["parameters"]["embedding"] == 61 * 32
    with pytest.raises(CheckpointError, match=f"model_type is {kind}; lapis builds"):
        load(base)


def test_it_is_compared_merged_and_grafted(pair: tuple[str, Any, Path, Path], tmp_path: Path) -> None:
    _, theirs, base, chat = pair
    a, b = (load_file(place / "model.safetensors") for place in (base, chat))
    rows = diff(base, chat).tensors
    assert {row["name"] for row in rows} == set(a)
    assert {row["layer"] for row in rows} == {None, 0, 1, 2}
    graft(base=base, chat=chat, onto=base, out=tmp_path / "grafted", norms="add")
    sources = [{"model": str(place), "parameters": {"weight": 0.5}} for place in (base, chat)]
    merge({"merge_method": "linear", "models": sources, "dtype": "float32"}, tmp_path / "merged")
    grafted, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("grafted", "merged"))
    outside = {row["name"] for row in rows if row["component"] in ("embed", "head")}
    assert outside
    for name in a:
        torch.testing.assert_close(grafted[name], (a if name in outside else b)[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2, atol=1e-6, rtol=0)
    _, report = type(theirs).from_pretrained(tmp_path / "merged", config=theirs.config, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
