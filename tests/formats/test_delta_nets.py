"""Delta nets in GGUF files: what llama.cpp lacks is refused; experts that a folder stacks are taken one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lapis
from lapis.families import family_of
from lapis.formats.export import export_gguf
from lapis.formats.gguf.keys import layout_of, write_keys

from .models import make_folder


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value_dim": 4}, "heads of values are 4 wide and those of keys 8"),
        ({"layers": [0, 3]}, "attention in one layer of 2, in order"),
    ],
)
def test_delta_nets_that_llama_cpp_lacks_are_refused(change: dict[str, Any], message: str) -> None:
    delta = {"layers": [0, 2], "heads": 1, "value_heads": 2, "head_dim": 8, "value_dim": 8, **change}
    config = lapis.ModelConfig.of({"family": "qwen3_5_text", "dim": 8, "layers": 4, "heads": 1, "ffn_dim": 8,
                                   "vocab": 9, "context": 9, "qk_norm": True, "delta": delta})  # fmt: skip
    with pytest.raises(lapis.ConfigError, match=message):
        write_keys(config, layout_of(config, family_of(config)), [])


def test_experts_that_a_folder_stacks_are_exported(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "qwen3_5_moe")
    export_gguf(folder, tmp_path / "each.gguf", type="f32")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        stem = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            [tensors.pop(f"{stem}{expert}.{kind}_proj.weight") for expert in range(4)]
            for kind in ("gate", "up", "down")
        )
        tensors[stem + "gate_up_proj"] = torch.cat((torch.stack(gate), torch.stack(up)), 1)
        tensors[stem + "down_proj"] = torch.stack(down)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export_gguf(folder, tmp_path / "stacked.gguf", type="f32")
    assert (tmp_path / "stacked.gguf").read_bytes() == (tmp_path / "each.gguf").read_bytes()
