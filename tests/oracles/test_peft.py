"""LoRA beside PEFT: adapters that lapis writes, as PEFT loads them, and the other way round; the same logits."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.errors import CheckpointError
from lapis.families.config import Delta, Experts, ModelConfig, Rope
from lapis.families.uneven import LayerInputs, Uneven
from lapis.model.adapter import write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, LoraLinear, of, off, token_rows, wrap
from lapis.model.transformer import Transformer
from lapis.weights.fuse.fuse import fuse
from tests.model import conftest as models

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=32)
LEARNED: dict[str, Any] = {"norm": "layer", "positions": "learned", "bias": "all", "tied": True}
SHAPES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", bias="qkv", tied=True),
    "gemma3": dataclasses.replace(LLAMA, family="gemma3_text", qk_norm=True, mlp="geglu_tanh", tied=True, window=3,
                                  window_layers=(0,), query_scalar=7.0),
    "gemma4": dataclasses.replace(
        LLAMA, family="gemma4_text", layers=4, qk_norm=True, mlp="geglu_tanh", tied=True, window=3,
        window_layers=(0, 2), query_scalar=1.0, rope=Rope(kind="proportional", share=0.5), window_rope=Rope(),
        uneven=Uneven(12, 2, False, 2, True), layer_inputs=LayerInputs(6, 31),
    ),
    "smollm3": dataclasses.replace(LLAMA, family="smollm3", nope_layers=(1,), tied=True),
    "olmo2": dataclasses.replace(LLAMA, family="olmo2", qk_norm=True, qk_norm_over="all"),
    "granite": dataclasses.replace(LLAMA, family="granite", embed_scale=3.0, residual_scale=0.5, logit_divisor=0.25),
    "phi3": dataclasses.replace(LLAMA, family="phi3"),
    "arcee": dataclasses.replace(LLAMA, family="arcee", mlp="relu2"),
    "apertus": dataclasses.replace(LLAMA, family="apertus", mlp="xielu", qk_norm=True),
    "neox": dataclasses.replace(LLAMA, family="gpt_neox", kv_heads=4, dim=32, head_dim=8, norm="layer", mlp="gelu",
                                bias="all", parallel="own", rope=Rope(share=0.25)),
    "qwen3_5": dataclasses.replace(LLAMA, family="qwen3_5_text", head_dim=8, qk_norm=True, rope=Rope(share=0.25),
                                   delta=Delta((0,), 1, 2, 4, 6, 3)),
    "gpt2": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="gpt2", norm_eps=1e-5,
                        mlp="gelu_tanh", **LEARNED),
    "bert": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="bert", norm_eps=1e-12,
                        norm_place="post", mlp="gelu", causal=False, head="classes", types=2, classes=4, pooler=True,
                        **LEARNED),
    "roberta": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="roberta",
                           norm_place="post", mlp="gelu", causal=False, head="classes", types=1, classes=4,
                           first_position=2, class_dense="tanh", **LEARNED),
    "modernbert": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="modernbert",
                              norm="layer", norm_place="embed", norm_bias=False, mlp="geglu", tied=True, causal=False,
                              head="classes", classes=4, class_dense="masked", window=3, window_layers=(1,)),
    **{name: models.SHAPES[name] for name in (
        "mistral", "gemma2", "ministral3", "olmo3", "exaone4", "starcoder2", "glm4", "cohere2", "stablelm",
    )},
}  # fmt: skip
ENCODERS = ("bert", "roberta", "modernbert")
# not qwen2_moe: PEFT 0.21 stacks adapters of experts for models that are like it, and not for it
MIXTURES = {
    "qwen3_moe": dataclasses.replace(LLAMA, family="qwen3_moe", qk_norm=True, experts=Experts(4, 2)),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", experts=Experts(4, 2)),
    "qwen3_next": dataclasses.replace(
        LLAMA,
        family="qwen3_next",
        head_dim=8,
        qk_norm=True,
        rope=Rope(share=0.25),
        delta=Delta((0,), 2, 4, 4, 6, 3),
        experts=Experts(4, 2, True, 20),
    ),
    "olmoe": dataclasses.replace(models.SHAPES["olmoe"], experts=Experts(4, 2, False)),
}
KINDS = {
    "lora": LoraConfig(rank=3),
    "rslora": LoraConfig(rank=3, rslora=True, alpha=5.0, targets=("attn.q", "attn.v", "layers.1.mlp")),
    "dora": LoraConfig(rank=3, dora=True, targets=("attn.q", "mlp")),
    "tokens": LoraConfig(rank=3, targets=("attn",), tokens=(4, 30, 7)),
}
IDS = torch.tensor([[3, 4, 5, 30, 7, 8], [9, 30, 11, 4, 13, 14]])


def shape_of(family: str) -> Any:
    kind = "SequenceClassification" if family in ENCODERS else "CausalLM"
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


@pytest.mark.parametrize("targets", [("experts",), ("mlp.experts.down", "attn")], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_experts_are_stacked_by_peft(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Transformer(MIXTURES[family]).eval()
    save(model, tmp_path / "base")
    wrap(model, LoraConfig(rank=3, targets=targets), str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", r".*_pattern keys did not match")  # of its own pattern for stacked matrices
        theirs = shape_of(family).from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(model(IDS), logits(theirs), rtol=0, atol=1e-5)
    fuse(tmp_path / "adapter", tmp_path / "fused")
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [("delta", "attn"), ("delta.qkv", "layers.1.attn")], ids=str)
def test_adapters_of_what_a_matrix_holds_in_groups_are_pefts(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Of q, k, v and gate of a delta net, which lie in one matrix by heads of keys: with one A, as PEFT sees it."""
    torch.manual_seed(4)
    model = Transformer(MIXTURES["qwen3_next"]).eval()
    save(model, tmp_path / "base")
    wrap(model, LoraConfig(rank=3, targets=targets), str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = shape_of("qwen3_next").from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(model(IDS), logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(load(tmp_path / "adapter")(IDS), model(IDS), rtol=0, atol=1e-6)
    fuse(tmp_path / "adapter", tmp_path / "fused")
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [("experts",), ("layers.1.mlp.experts",)], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_rslora_of_stacked_experts_is_scaled_twice(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """PEFT doubles rank and alpha where it stacks gate and up: 2 alpha / sqrt(2 rank), which is sqrt(2) too much."""
    torch.manual_seed(4)
    model = Transformer(MIXTURES[family]).eval()
    save(model, tmp_path / "base")
    wrap(model, LoraConfig(rank=3, alpha=5.0, rslora=True, targets=targets), str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shape_of(family).from_pretrained(
            tmp_path / "base", dtype=torch.float64, experts_implementation="eager"
        )
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False).double()
    stacked = [m for m in theirs.modules() if getattr(m, "parameter_name", "") == "gate_up_proj"]
    assert stacked
    for module in stacked:
        assert module.r["default"] == 6 and module.scaling["default"] == pytest.approx(2**0.5 * 5 / 3**0.5)
    ours = model.double()(IDS)
    assert (logits(theirs) - ours).abs().max() > 1e-3
    for module in stacked:
        module.scaling["default"] /= 2**0.5
    torch.testing.assert_close(ours, logits(theirs), rtol=0, atol=1e-6)  # routers stay in float32


@pytest.mark.parametrize("kind", ["lora", "dora", "patterns", "tokens"])
@pytest.mark.parametrize("family", SHAPES)
def test_what_peft_writes_is_the_same_here(family: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    save(Transformer(SHAPES[family]), tmp_path / "base")
    targets = {
        "gpt2": ["c_attn", "mlp.c_proj"],
        "phi3": ["qkv_proj", "gate_up_proj"],
        "bert": ["query", "attention.output.dense"],
        "roberta": ["query", "attention.output.dense"],
        "modernbert": ["Wqkv", "mlp.Wo"],
        "neox": ["query_key_value", "dense_4h_to_h"],
    }.get(family, ["q_proj", "down_proj"])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_dora=kind == "dora", use_rslora=kind == "patterns",
        task_type="SEQ_CLS" if family in ENCODERS else "CAUSAL_LM", init_lora_weights=False,
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
                                                  if family in ENCODERS else {}))  # fmt: skip
    stored = getattr(torch, dtype)
    save(Transformer(base).to(stored), tmp_path / "base")
    head: dict[str, Any] = {"head": "classes", "classes": 4} if family in ENCODERS else {}
    model = load(tmp_path / "base", dtype=torch.float32, **head)  # the classifier is one that the base lacks
    wrap(model, KINDS[kind], str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    result = fuse(tmp_path / "adapter", tmp_path / "fused")
    labels = {"num_labels": 4} if family in ENCODERS else {}
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


def saved(theirs: Any, base: Path, folder: Path) -> Path:
    """An adapter as PEFT saves it, naming its base."""
    theirs.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    return folder


@torch.no_grad()
def disturb_theirs(theirs: Any) -> None:
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02 if "lora" in name else 0.2)


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
