"""Experts in MXFP4: the numbers of transformers, in every room that reads a folder, and written as bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError
from lapis.model.load import load, save
from lapis.model.size import measure
from lapis.weights.diff.diff import diff
from lapis.weights.graft.graft import graft

SIZES = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
         "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 3,
         "num_experts_per_tok": 2}  # fmt: skip
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with its experts in MXFP4, and the same model with them in bfloat16 by transformers' own function."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES)
    theirs = transformers.GptOssForCausalLM(config).bfloat16()
    theirs.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = plain[name].shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (count, rows, columns // 32), dtype=torch.uint8)
        packed |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = convert_moe_packed_tensors(packed[name + "_blocks"], packed[name + "_scales"])
        del packed[name]
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    put(tmp_path / "packed", packed, {**config_of(tmp_path / "plain"), "quantization_config": QUANTIZED})
    return tmp_path / "packed", tmp_path / "plain"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def put(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_every_number_is_transformers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = folders
    ours = load(packed)
    save(ours, tmp_path / "saved")
    written, expected = load_file(tmp_path / "saved" / "model.safetensors"), load_file(plain / "model.safetensors")
    assert set(written) == set(expected) and "quantization_config" not in config_of(tmp_path / "saved")
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    assert any("MXFP4 are read as bfloat16" in note for note in ours.notes)
    again, report = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(0, 61, (1, 9))
    torch.testing.assert_close(load(packed, torch.float32)(ids), again.float()(ids).logits, atol=1e-4, rtol=0)
    assert sum(info.elements for info in open_checkpoint(packed).index.values()) == measure(ours.config).total


def test_it_is_compared_and_grafted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = folders
    assert all(row["identical"] for row in diff(packed, plain).tensors)
    graft(base=plain, chat=packed, onto=packed, out=tmp_path / "grafted", norms="add")
    grafted, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "grafted", plain))
    assert all(torch.equal(grafted[name], tensor) for name, tensor in expected.items())
    assert config_of(tmp_path / "grafted").get("quantization_config") is None


def test_blocks_without_their_scales_are_refused(folders: tuple[Path, Path]) -> None:
    packed, _ = folders
    tensors, config = load_file(packed / "model.safetensors"), config_of(packed)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    lost = tensors.pop(name)
    put(packed, tensors, config)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks has no down_proj_scales beside it; fetch"):
        open_checkpoint(packed)
    put(packed, {**tensors, name: lost[:, :1].contiguous()}, config)
    with pytest.raises(CheckpointError, match="and its scales are"):
        open_checkpoint(packed)
