"""LoRA beside PEFT: adapters that lapis writes, as PEFT loads them, and the other way round; the same logits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lapis.errors import CheckpointError
from lapis.families import FAMILIES
from lapis.model.adapter import write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, LoraLinear, of, off, stacked_adapters, token_rows, wrap
from lapis.model.transformer import Transformer
from lapis.weights.fuse.fuse import fuse
from tests.oracles.adapted import (
    CLASSIFIERS,
    ENCODERS,
    IDS,
    LLAMA,
    SHAPES,
    as_peft,
    covered,
    disturb,
    disturb_theirs,
    inputs,
    logits,
    shape_of,
)

KINDS = {
    "lora": LoraConfig(rank=3),
    "rslora": LoraConfig(rank=3, rslora=True, alpha=5.0, targets=("attn.q", "attn.v", "layers.1.mlp")),
    "dora": LoraConfig(rank=3, dora=True, targets=("attn.q", "mlp")),
    "tokens": LoraConfig(rank=3, targets=("attn",), tokens=(4, 30, 7)),
}
CASES = [(family, kind) for family in SHAPES for kind in KINDS
         if (family, kind) not in (("vit", "tokens"), ("gpt_oss", "dora"))]  # fmt: skip


def test_every_family_is_held_against_peft() -> None:
    """But mixtures whose experts PEFT does not find (test_peft_experts.py)."""
    kinds = {kind for family in FAMILIES for kind in family.model_types}
    assert kinds - covered() == {"qwen2_moe", "qwen3_5_moe_text"}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_lapis_writes_is_the_same_in_peft(family: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Transformer(SHAPES[family]).eval()
    ids = inputs(model)
    save(model, tmp_path / "base")
    with torch.no_grad():
        before = model(ids)
    wrap(model, KINDS[kind], str(tmp_path / "base"))
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-6)
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    with torch.no_grad(), off(model):
        torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
    theirs = as_peft(family, tmp_path / "base", tmp_path / "adapter")
    assert not torch.allclose(model(ids), before, atol=1e-3)
    torch.testing.assert_close(model(ids), logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(load(tmp_path / "adapter")(ids), model(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "patterns", "tokens"])
@pytest.mark.parametrize("family", SHAPES)
def test_what_peft_writes_is_the_same_here(family: str, kind: str, tmp_path: Path) -> None:
    if (family, kind) == ("vit", "tokens"):
        pytest.skip("pictures have no tokens")
    torch.manual_seed(2)
    save(Transformer(SHAPES[family]), tmp_path / "base")
    targets = {
        "gpt2": ["c_attn", "mlp.c_proj"],
        "phi3": ["qkv_proj", "gate_up_proj"],
        "bert": ["query", "attention.output.dense"],
        "roberta": ["query", "attention.output.dense"],
        "xlm_roberta": ["query", "attention.output.dense"],
        "distilbert": ["q_lin", "ffn.lin2"],
        "vit": ["q_proj", "fc2"],
        "gpt_oss": ["q_proj", "o_proj"],
        "modernbert": ["Wqkv", "mlp.Wo"],
        "neox": ["query_key_value", "dense_4h_to_h"],
    }.get(family, ["q_proj", "down_proj"])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_dora=kind == "dora", use_rslora=kind == "patterns",
        task_type="SEQ_CLS" if family in ENCODERS else None if family == "vit" else "CAUSAL_LM",
        init_lora_weights=False, modules_to_save=["classifier"] if family == "vit" else None,
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
    torch.testing.assert_close(ours(inputs(ours)), logits(theirs), rtol=0, atol=1e-5)
    assert any(isinstance(module, LoraLinear) for module in ours.modules())
    assert bool(token_rows(ours)) == (kind == "tokens")
    write_adapter(ours, tmp_path / "again")  # what was read can be written
    again = load(tmp_path / "again")
    torch.testing.assert_close(again(inputs(again)), ours(inputs(ours)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_fuse_gives_the_weights_of_merge_and_unload(family: str, kind: str, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    without = {"head": "none" if family == "vit" else "masked", "classes": 0, "pooler": False}
    base = dataclasses.replace(SHAPES[family], **(without if family in CLASSIFIERS else {}))
    stored = getattr(torch, dtype)
    save(Transformer(base).to(stored), tmp_path / "base")
    head: dict[str, Any] = {"head": "classes", "classes": 4} if family in CLASSIFIERS else {}
    model = load(tmp_path / "base", dtype=torch.float32, **head)  # the classifier is one that the base lacks
    wrap(model, KINDS[kind], str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    result = fuse(tmp_path / "adapter", tmp_path / "fused")
    labels = {"num_labels": 4} if family in CLASSIFIERS else {}
    theirs = shape_of(family).from_pretrained(tmp_path / "base", dtype=stored, **labels)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    ours = shape_of(family).from_pretrained(tmp_path / "fused", dtype=stored)
    assert type(ours) is type(theirs) and result.tensors["merged"] > 0
    # PEFT computes DoRA's lengths in the base's dtype, and rounds to it what it adds to experts that lie in one tensor
    tolerance = torch.finfo(stored).eps * (4 if kind == "dora" and dtype == "bfloat16" else 1)
    added = {name: float(layer.delta().abs().max()) for name, layer in stacked_adapters(model).items()}
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        atol = max(added.values(), default=0.0) * torch.finfo(stored).eps / 2 if ".experts." in name else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=max(atol, 1e-7), msg=lambda m, n=name: f"{n}: {m}")
    assert getattr(ours.config, "tie_word_embeddings", False) == base.tied
    here = load(tmp_path / "fused")
    assert here.config.tied == base.tied and not of(here)
    if dtype == "float32":
        torch.testing.assert_close(here(inputs(here)), model(inputs(here)), rtol=0, atol=1e-5)


def saved(theirs: Any, base: Path, folder: Path) -> Path:
    """An adapter as PEFT saves it, naming its base."""
    theirs.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    return folder


def fused_logits(adapter: Path, out: Path) -> torch.Tensor:
    fuse(adapter, out)
    return logits(shape_of("llama").from_pretrained(out, dtype=torch.float32))


@pytest.mark.parametrize("patterns", [
    {r"layers\.[01]\.self_attn\.q_proj": 64}, {r"layers\.(0|2)\.self_attn\.v_proj": 64}, {r"layers.1.*q_proj": 64},
    {r"^model\.layers\.0\.self_attn\.q_proj": 64}, {r"^q_proj": 64}, {"q_proj": 64}, {"proj": 64},
    {r".*\.(q|v)_proj": 64}, {".*v_proj": 7, "q_proj$": 3, "self_attn.v_proj": 5},
    {r"\w+_proj": 2, r"layers\.1\..*": 9},
], ids=str)  # fmt: skip
def test_patterns_of_alpha_and_rank_are_read_as_peft_does(patterns: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(3)
    save(Transformer(dataclasses.replace(LLAMA, layers=3)), tmp_path / "base")
    ranks = {key: 2 + value % 3 for key, value in patterns.items()}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alpha_pattern=patterns,
                             rank_pattern=ranks, init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(shape_of("llama").from_pretrained(tmp_path / "base", dtype=torch.float32), config)
    adapter = saved(theirs, tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(load(adapter)(IDS), logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(fused_logits(adapter, tmp_path / "fused"), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal", "eva", "mica", True])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_that_begin_by_changing_the_base(start: str | bool, dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(4)
    save(Transformer(LLAMA), tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=start,
                             use_dora=dora and start != "mica", use_rslora=start == "olora")  # fmt: skip
    theirs = peft.get_peft_model(shape_of("llama").from_pretrained(tmp_path / "base", dtype=torch.float32), config)
    disturb_theirs(theirs)
    adapter = saved(theirs, tmp_path / "base", tmp_path / "adapter")
    again = shape_of("llama").from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(again, adapter))
    torch.testing.assert_close(expected, logits(theirs), rtol=0, atol=1e-5)
    ours = load(adapter)
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(fused_logits(adapter, tmp_path / "fused"), expected, rtol=0, atol=1e-5)
    with torch.no_grad(), off(ours):  # the base is what it was
        torch.testing.assert_close(ours(IDS), load(tmp_path / "base")(IDS), rtol=0, atol=0)
    write_adapter(ours, tmp_path / "again")  # an adapter that leaves the base alone, which PEFT reads
    again = shape_of("llama").from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "again")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)


PARTS = {  # what PEFT is asked to train, and whether embedding and head are one afterwards
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, False),
    "head": ({"modules_to_save": ["lm_head"]}, False),
    "tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "rows": ({"trainable_token_indices": {"embed_tokens": [1, 2, 30]}}, True),
    "head lora": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "embedding lora": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "norm": ({"modules_to_save": ["norm"]}, True),
}


@pytest.mark.parametrize("rows", [31, 34])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_embedding_and_head_are_fused_as_peft_runs_them(part: str, tied: bool, rows: int, tmp_path: Path) -> None:
    """Also where rows were added in memory, so that the base on disk has fewer."""
    torch.manual_seed(5)
    shape = dataclasses.replace(LLAMA, tied=tied)
    save(Transformer(shape), tmp_path / "base")
    options, stays_tied = PARTS[part]
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
                                "init_lora_weights": False, **options})  # fmt: skip
    base = shape_of("llama").from_pretrained(tmp_path / "base", dtype=torch.float32)
    if rows != 31:
        base.resize_token_embeddings(rows)
    theirs = peft.get_peft_model(base, config)
    disturb_theirs(theirs)
    adapter = saved(theirs, tmp_path / "base", tmp_path / "adapter")
    expected = logits(theirs)
    if rows != 31 and not tied and "lora" in part:  # PEFT does not save the other matrix with its new rows
        with pytest.raises(CheckpointError, match=r"has 34 rows.*give --base"):
            fuse(adapter, tmp_path / "fused")
        return
    torch.testing.assert_close(fused_logits(adapter, tmp_path / "fused"), expected, rtol=0, atol=1e-5)
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert written["tie_word_embeddings"] is (tied and stays_tied) and written["vocab_size"] == rows
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), expected, rtol=0, atol=1e-5)
    try:
        ours = load(adapter)
    except CheckpointError as error:
        assert str(error).endswith("make it a model with: lapis fuse")
        assert rows != 31 or not stays_tied
    else:
        torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-5)


def test_equal_copies_of_a_tied_embedding_stay_one(tmp_path: Path) -> None:
    torch.manual_seed(6)
    save(Transformer(dataclasses.replace(LLAMA, tied=True)), tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    theirs = peft.get_peft_model(shape_of("llama").from_pretrained(tmp_path / "base", dtype=torch.float32), config)
    adapter = saved(theirs, tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(load(adapter)(IDS), logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(fused_logits(adapter, tmp_path / "fused"), logits(theirs), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_embedding_trained_in_full_is_tied_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = Transformer(dataclasses.replace(LLAMA, tied=True))
    save(model, tmp_path / "base")
    disturb(wrap(model, LoraConfig(rank=3, whole=("embed",)), str(tmp_path / "base")))
    write_adapter(model, tmp_path / "adapter")
    theirs = shape_of("llama").from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), model(IDS), rtol=0, atol=1e-5)
    torch.testing.assert_close(load(tmp_path / "adapter")(IDS), model(IDS), rtol=0, atol=1e-6)
    torch.testing.assert_close(fused_logits(tmp_path / "adapter", tmp_path / "fused"), model(IDS), rtol=0, atol=1e-5)
