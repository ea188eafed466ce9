"""Small model folders with known weights, written with the safetensors library and not with lapis."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

LAYERS, DIM, FFN, WORDS = 2, 16, 24, 40
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
Tensors = dict[str, torch.Tensor]


def weights(seed: int, vocab: int = WORDS, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A Llama-shaped model of LAYERS blocks with random weights."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * 0.05).to(dtype)

    tensors = {"model.embed_tokens.weight": draw(vocab, DIM)}
    for i in range(LAYERS):
        for part, shape in {
            "input_layernorm": (DIM,),
            "mlp.down_proj": (DIM, FFN),
            "mlp.gate_proj": (FFN, DIM),
            "mlp.up_proj": (FFN, DIM),
            "post_attention_layernorm": (DIM,),
            "self_attn.k_proj": (DIM // 2, DIM),
            "self_attn.o_proj": (DIM, DIM),
            "self_attn.q_proj": (DIM, DIM),
            "self_attn.v_proj": (DIM // 2, DIM),
        }.items():
            tensors[f"model.layers.{i}.{part}.weight"] = draw(*shape)
    tensors["model.norm.weight"] = draw(DIM)
    if not tied:
        tensors["lm_head.weight"] = draw(vocab, DIM)
    return tensors


def near(tensors: Mapping[str, torch.Tensor], seed: int, size: float = 0.01) -> Tensors:
    """A fine-tune of `tensors`: the same with small random differences."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + size * torch.randn(tensor.shape, generator=random)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def words(extra: Sequence[str] = CHATML, count: int = 32) -> dict[str, int]:
    return {f"w{i}": i for i in range(count)} | {token: count + i for i, token in enumerate(extra)}


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    vocab: Mapping[str, int] | None = None,
    template: str | None = None,
    eos: str | None = None,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A Hugging Face folder. vocab: None leaves the tokenizer out; tokens that look like <...> are added ones."""
    folder.mkdir(parents=True)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": DIM, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "vocab_size": rows, "tie_word_embeddings": "lm_head.weight" not in tensors, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | dict(config or {})))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        placed = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(placed.values())):
            save_file({n: tensors[n] for n in names if placed[n] == file}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if vocab is not None:
        added = [
            {"id": i, "content": t, "special": True}
            | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
            for t, i in vocab.items()
            if t.startswith("<")
        ]
        plain = {token: i for token, i in vocab.items() if not token.startswith("<")}
        model = {"type": "WordLevel", "vocab": plain, "unk_token": "w0"}
        document = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(document))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if template:
            settings["chat_template"] = template
        if eos:
            settings["eos_token"] = eos
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def read_model(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def folders() -> SimpleNamespace:
    """The functions above, for tests that make their own models."""
    return SimpleNamespace(
        weights=weights, near=near, words=words, write=write_model, read=read_model, template=TEMPLATE
    )


@pytest.fixture
def trio(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """make(**options) -> folders of base, chat and onto: one vocabulary, and chat has a template."""

    def make(shards: int = 1, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> dict[str, Path]:
        base = weights(1, tied=tied, dtype=dtype)
        return {
            "base": write_model(tmp_path / "base", base, vocab=words(), eos="<|endoftext|>"),
            "chat": write_model(tmp_path / "chat", near(base, 2), vocab=words(), template=TEMPLATE, eos="<|im_end|>"),
            "onto": write_model(tmp_path / "onto", near(base, 3), vocab=words(), eos="<|endoftext|>", shards=shards),
        }

    return make
