"""Small models of every family, made here, and folders of them to damage."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.families.config import Delta, Experts, Image, ModelConfig, Rope
from lapis.families.uneven import LayerInputs, Uneven
from lapis.model.load import save
from lapis.model.transformer import Transformer

LLAMA = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=32)
SHAPES = {
    "llama": LLAMA,
    "llama-biases": dataclasses.replace(LLAMA, bias="all", tied=True, head_dim=6, rope=Rope(kind="linear", factor=2.0)),
    "mistral": dataclasses.replace(LLAMA, family="mistral", window=5),
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", bias="qkv", window=5, window_layers=(1,), tied=True),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, head_dim=8, head="classes", classes=3),
    "gemma3": dataclasses.replace(
        LLAMA, family="gemma3_text", mlp="geglu_tanh", qk_norm=True, head_dim=8, query_scalar=6.0, tied=True, window=5,
        window_layers=(0,), rope=Rope(theta=1e6), window_rope=Rope(theta=1e4),
    ),
    "gemma4": dataclasses.replace(
        LLAMA, family="gemma4_text", layers=4, mlp="geglu_tanh", qk_norm=True, head_dim=8, query_scalar=1.0, tied=True,
        window=5, window_layers=(0, 2), rope=Rope(kind="proportional", share=0.5), window_rope=Rope(theta=1e3),
        logit_cap=3.0, uneven=Uneven(12, 2, False, 2, True), layer_inputs=LayerInputs(6, 31),
    ),
    "gemma4-experts": dataclasses.replace(
        LLAMA, family="gemma4_text", layers=3, mlp="geglu_tanh", qk_norm=True, head_dim=8, query_scalar=1.0,
        window=5, window_layers=(0,), rope=Rope(kind="proportional", share=0.25), window_rope=Rope(),
        uneven=Uneven(16, 1, True), experts=Experts(4, 2, dense_dim=20, beside=True),
    ),
    "ministral": dataclasses.replace(LLAMA, family="ministral", window=5, window_layers=(1,)),
    "ministral3": dataclasses.replace(
        LLAMA, family="ministral3", rope=Rope(kind="yarn", factor=2.0, original_context=8, query_growth=0.1)
    ),
    "smollm3": dataclasses.replace(LLAMA, family="smollm3", tied=True, nope_layers=(1,), bias="all"),
    "olmo2": dataclasses.replace(LLAMA, family="olmo2", qk_norm=True, qk_norm_over="all"),
    "olmo3": dataclasses.replace(
        LLAMA, family="olmo3", qk_norm=True, qk_norm_over="all", window=5, window_layers=(0,), bias="attention",
        rope=Rope(kind="linear", factor=2.0), window_rope=Rope(),
    ),
    "granite": dataclasses.replace(
        LLAMA, family="granite", embed_scale=12.0, residual_scale=0.22, logit_divisor=8.0, query_scalar=64.0, tied=True
    ),
    "exaone4": dataclasses.replace(LLAMA, family="exaone4", qk_norm=True),
    "starcoder2": dataclasses.replace(LLAMA, family="starcoder2", norm="layer", mlp="gelu_tanh", bias="all", tied=True),
    "phi3": dataclasses.replace(LLAMA, family="phi3", window=5),
    "gemma2": dataclasses.replace(
        LLAMA, family="gemma2", mlp="geglu_tanh", head_dim=8, query_scalar=6.0, tied=True, window=5, window_layers=(0,),
        attention_cap=2.0, logit_cap=1.5,
    ),
    "glm4": dataclasses.replace(
        LLAMA, family="glm4", head_dim=8, bias="qkv", rope=Rope(share=0.5, neighbors=True)
    ),
    "cohere2": dataclasses.replace(
        LLAMA, family="cohere2", norm="layer", norm_bias=False, parallel="shared", tied=True, logit_divisor=4.0,
        window=5, rope=Rope(neighbors=True),
    ),
    "stablelm": dataclasses.replace(
        LLAMA, family="stablelm", dim=32, head_dim=8, norm="layer", bias="qkv", parallel="shared", rope=Rope(share=0.25)
    ),
    "neox": dataclasses.replace(
        LLAMA, family="gpt_neox", kv_heads=4, dim=32, head_dim=8, norm="layer", mlp="gelu", bias="all", parallel="own",
        rope=Rope(share=0.25),
    ),
    "arcee": dataclasses.replace(LLAMA, family="arcee", mlp="relu2", bias="attention", tied=True),
    "apertus": dataclasses.replace(LLAMA, family="apertus", mlp="xielu", qk_norm=True),
    "qwen3_moe": dataclasses.replace(LLAMA, family="qwen3_moe", qk_norm=True, experts=Experts(4, 2)),
    "qwen2_moe": dataclasses.replace(
        LLAMA, family="qwen2_moe", bias="qkv", experts=Experts(3, 1, False, 20), tied=True
    ),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", experts=Experts(3, 2), window=5),
    "olmoe": dataclasses.replace(
        LLAMA, family="olmoe", qk_norm=True, qk_norm_over="all", experts=Experts(5, 3, False)
    ),
    "gpt_oss": dataclasses.replace(
        LLAMA, family="gpt_oss", bias="all", experts=Experts(4, 2), window=5, window_layers=(0,),
        rope=Rope(kind="yarn", factor=4.0, original_context=8, truncate=False),
    ),
    "qwen3_5": dataclasses.replace(
        LLAMA, family="qwen3_5_text", layers=3, head_dim=8, qk_norm=True, rope=Rope(share=0.25),
        delta=Delta((0, 2), 1, 2, 4, 6, 3),
    ),
    "qwen3_5_moe": dataclasses.replace(
        LLAMA, family="qwen3_5_moe_text", layers=3, head_dim=8, qk_norm=True, rope=Rope(share=0.25),
        delta=Delta((0, 2), 1, 2, 4, 6, 3), experts=Experts(4, 2, True, 20),
    ),
    "qwen3_next": dataclasses.replace(
        LLAMA, family="qwen3_next", layers=3, head_dim=8, qk_norm=True, rope=Rope(share=0.25),
        delta=Delta((0, 2), 2, 4, 4, 6, 3), experts=Experts(4, 2, False, 20, 0.001, (1,), 28),
    ),
    "gpt2": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="gpt2", norm="layer", norm_eps=1e-5,
        mlp="gelu_tanh", positions="learned", bias="all", tied=True,
    ),
    "bert": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="bert", norm="layer", norm_eps=1e-12,
        norm_place="post", mlp="gelu", positions="learned", bias="all", tied=True, causal=False, head="masked", types=2,
    ),
    "bert-classes": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="bert", norm="layer", norm_eps=1e-12,
        norm_place="post", mlp="gelu", positions="learned", bias="all", tied=True, causal=False, head="classes",
        types=2, classes=4, pooler=True,
    ),
    "roberta": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="roberta", norm="layer", norm_place="post",
        mlp="gelu", positions="learned", bias="all", tied=True, causal=False, head="masked", types=1, first_position=2,
        class_dense="tanh", extra={"pad_token_id": 1},
    ),
    "xlm-roberta": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="xlm-roberta", norm="layer",
        norm_place="post", mlp="gelu", positions="learned", bias="all", causal=False, head="masked", types=1,
        first_position=2, class_dense="tanh", extra={"pad_token_id": 1},
    ),
    "distilbert": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="distilbert", norm="layer",
        norm_eps=1e-12, norm_place="post", mlp="gelu", positions="learned", bias="all", tied=True, causal=False,
        head="masked", class_dense="relu",
    ),
    "distilbert-classes": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=31, context=32, family="distilbert", norm="layer",
        norm_eps=1e-12, norm_place="post", mlp="gelu", positions="learned", bias="all", tied=True, causal=False,
        head="classes", classes=4, class_dense="relu",
    ),
    "modernbert": ModelConfig(
        dim=16, layers=3, heads=2, ffn_dim=24, vocab=31, context=32, family="modernbert", norm="layer",
        norm_place="embed", norm_bias=False, mlp="geglu", tied=True, causal=False, head="masked", class_dense="masked",
        window=3, window_layers=(1, 2), window_rope=Rope(),
    ),
    "vit": ModelConfig(
        dim=16, layers=2, heads=2, ffn_dim=24, vocab=0, context=17, family="vit", norm="layer", norm_eps=1e-12,
        mlp="gelu", positions="learned", bias="all", causal=False, head="classes", classes=4, image=Image(8, 2),
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> ModelConfig:
    """A small shape of each family."""
    return SHAPES[request.param]


@dataclasses.dataclass
class Folder:
    """A saved model, and the means to damage it."""

    path: Path
    model: Transformer

    def set(self, **fields: Any) -> None:
        """Fields of config.json; `...` takes one away."""
        path = self.path / "config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        save_file(
            {name: t.contiguous() for name, t in tensors.items()}, self.path / "model.safetensors", {"format": "pt"}
        )


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Folder]:
    def make(kind: str = "llama", **fields: Any) -> Folder:
        torch.manual_seed(0)
        model = Transformer(dataclasses.replace(SHAPES[kind], **fields)).eval()
        save(model, tmp_path / "model")
        return Folder(tmp_path / "model", model)

    return make


@pytest.fixture
def shapes() -> dict[str, ModelConfig]:
    return SHAPES
