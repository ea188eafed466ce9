"""LoRA beside PEFT: adapters that lapis writes, as PEFT loads them, and the other way round; the same logits."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.adapter import write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, LoraLinear, of, off, token_rows, wrap
from lapis.model.transformer import Transformer
from lapis.weights.fuse import fuse

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=32)
LEARNED: dict[str, Any] = {"norm": "layer", "positions": "learned", "bias": "all", "tied": True}
SHAPES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", bias="qkv", tied=True),
    "gemma3": dataclasses.replace(LLAMA, family="gemma3_text", qk_norm=True, mlp="geglu_tanh", tied=True, window=3,
                                  window_layers=(0,), query_scalar=7.0),
    "gpt2": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="gpt2", norm_eps=1e-5,
                        mlp="gelu_tanh", **LEARNED),
    "bert": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="bert", norm_eps=1e-12,
                        norm_place="post", mlp="gelu", causal=False, head="classes", types=2, classes=4, pooler=True,
                        **LEARNED),
}  # fmt: skip
KINDS = {
    "lora": LoraConfig(rank=3),
    "rslora": LoraConfig(rank=3, rslora=True, alpha=5.0, targets=("attn.q", "attn.v", "layers.1.mlp")),
    "dora": LoraConfig(rank=3, dora=True, targets=("attn.q", "mlp")),
    "tokens": LoraConfig(rank=3, targets=("attn",), tokens=(4, 30, 7)),
}
IDS = torch.tensor([[3, 4, 5, 30, 7, 8], [9, 30, 11, 4, 13, 14]])


def shape_of(family: str) -> Any:
    kind = "SequenceClassification" if family == "bert" else "CausalLM"
    return getattr(transformers, f"AutoModelFor{kind}")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


@torch.no_grad()
def disturb(model: Transformer) -> None:
    """Numbers that training might have put there."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SHAPES)
def test_what_lapis_writes_is_the_same_in_peft(family: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Transformer(SHAPES[family]).eval()
    save(model, tmp_path / "base")
    with torch.no_grad():
        before = model(IDS)
    wrap(model, KINDS[kind], str(tmp_path / "base"))
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-6)
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    with torch.no_grad(), off(model):
        torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a key that is missing or left over is only warned of
        theirs = shape_of(family).from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert not torch.allclose(model(IDS), before, atol=1e-3)
    torch.testing.assert_close(model(IDS), logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(load(tmp_path / "adapter")(IDS), model(IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "patterns", "tokens"])
@pytest.mark.parametrize("family", SHAPES)
def test_what_peft_writes_is_the_same_here(family: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    save(Transformer(SHAPES[family]), tmp_path / "base")
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "attention.output.dense"]}.get(
        family, ["q_proj", "down_proj"]
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_dora=kind == "dora", use_rslora=kind == "patterns",
        task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM", init_lora_weights=False,
        rank_pattern={targets[0]: 2} if kind == "patterns" else {},
        alpha_pattern={targets[1]: 9} if kind == "patterns" else {},
        trainable_token_indices=[30, 4] if kind == "tokens" else None, fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(shape_of(family).from_pretrained(tmp_path / "base", dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "tokens_delta" in name or ("modules_to_save" in name and "weight" in name):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load(tmp_path / "adapter")
    torch.testing.assert_close(ours(IDS), logits(theirs), rtol=0, atol=1e-5)
    assert any(isinstance(module, LoraLinear) for module in ours.modules())
    assert bool(token_rows(ours)) == (kind == "tokens")
    write_adapter(ours, tmp_path / "again")  # what was read can be written
    again = load(tmp_path / "again")
    torch.testing.assert_close(again(IDS), ours(IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SHAPES)
def test_fuse_gives_the_weights_of_merge_and_unload(family: str, kind: str, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = dataclasses.replace(SHAPES[family], **({"head": "masked", "classes": 0, "pooler": False}
                                                  if family == "bert" else {}))  # fmt: skip
    stored = getattr(torch, dtype)
    save(Transformer(base).to(stored), tmp_path / "base")
    head: dict[str, Any] = {"head": "classes", "classes": 4} if family == "bert" else {}
    model = load(tmp_path / "base", dtype=torch.float32, **head)  # the classifier is one that the base lacks
    wrap(model, KINDS[kind], str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    result = fuse(tmp_path / "adapter", tmp_path / "fused")
    labels = {"num_labels": 4} if family == "bert" else {}
    theirs = shape_of(family).from_pretrained(tmp_path / "base", dtype=stored, **labels)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    ours = shape_of(family).from_pretrained(tmp_path / "fused", dtype=stored)
    assert type(ours) is type(theirs) and result.tensors["merged"] > 0
    # PEFT computes DoRA's lengths in the base's dtype, we in float32 whatever that is
    tolerance = torch.finfo(stored).eps * (4 if kind == "dora" and dtype == "bfloat16" else 1)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.config.tie_word_embeddings == base.tied
    here = load(tmp_path / "fused")
    assert here.config.tied == base.tied and not of(here)
    if dtype == "float32":
        torch.testing.assert_close(here(IDS), model(IDS), rtol=0, atol=1e-5)
