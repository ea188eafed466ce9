"""Small models of every family, for adapters beside PEFT, and how an adapter folder becomes a model there."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lapis.families.config import Delta, Experts, ModelConfig, Rope
from lapis.families.uneven import LayerInputs, Uneven
from lapis.model.transformer import Transformer
from tests.model import conftest as models

LLAMA = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=32)
LEARNED: dict[str, Any] = {"norm": "layer", "positions": "learned", "bias": "all", "tied": True}
SHAPES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", bias="qkv", tied=True),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, head_dim=8),
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
    "xlm_roberta": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="xlm-roberta",
                               norm_place="post", mlp="gelu", causal=False, head="classes", types=1, classes=4,
                               first_position=2, class_dense="tanh", **LEARNED),
    "distilbert": models.SHAPES["distilbert-classes"],
    "vit": models.SHAPES["vit"],
    **{name: models.SHAPES[name] for name in (
        "mistral", "ministral", "gemma2", "ministral3", "olmo3", "exaone4", "starcoder2", "glm4", "cohere2", "stablelm",
        "gpt_oss",
    )},
}  # fmt: skip
ENCODERS = ("bert", "roberta", "xlm_roberta", "modernbert", "distilbert")
CLASSIFIERS = (*ENCODERS, "vit")
# experts of their own on disk, which transformers stacks, and with them PEFT its adapters
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
STACKED = {"gpt_oss": models.SHAPES["gpt_oss"], "gemma4-experts": models.SHAPES["gemma4-experts"]}
IDS = torch.tensor([[3, 4, 5, 30, 7, 8], [9, 30, 11, 4, 13, 14]])
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def shape_of(family: str) -> Any:
    """The class of transformers that reads a family's folders."""
    kind = {"vit": "ImageClassification"}.get(family, "SequenceClassification" if family in ENCODERS else "CausalLM")
    return getattr(transformers, f"AutoModelFor{kind}")


def inputs(model: Transformer) -> torch.Tensor:
    return IDS if model.config.image is None else PIXELS


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    pictures = model.config.model_type == "vit"
    out: torch.Tensor = model.eval()(**({"pixel_values": PIXELS} if pictures else {"input_ids": IDS})).logits
    return out


@torch.no_grad()
def disturb(model: Transformer) -> None:
    """Numbers that training might have put there."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@torch.no_grad()
def disturb_theirs(theirs: Any) -> None:
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02 if "lora" in name else 0.2)


def as_peft(family: str, base: Path, adapter: Path, **options: Any) -> Any:
    """The adapter on its base, as PEFT loads it; a key that is missing or left over, of which it only warns, fails.

    Where it stacks adapters of experts itself it warns of its own pattern for the stacked matrices. options: of
    `from_pretrained` of the base.
    """
    with strictly(own_patterns=family in MIXTURES):
        theirs = shape_of(family).from_pretrained(base, **{"dtype": torch.float32, **options})
        return peft.PeftModel.from_pretrained(theirs, adapter)


@contextlib.contextmanager
def strictly(*, own_patterns: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if own_patterns:
            warnings.filterwarnings("ignore", r".*_pattern keys did not match")
        yield


def covered() -> set[str]:
    """The kinds of models that are held against PEFT, by model_type."""
    return {shape.family for shape in (SHAPES | MIXTURES | STACKED).values()}
