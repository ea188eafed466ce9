"""Numbers 31, 40 and 41: what an output's config.json does not have, and what is said of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.weights.config_fields import carried_config
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge

ODD = {
    "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.P"}},
    "_attn_implementation": "evil", "_secret": 1, "my_field": [1, 2], "_name_or_path": "somebody/model",
}  # fmt: skip


def add(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("command", ["graft", "merge"])
def test_faults_40_and_41_fields_go_aloud(trio, tmp_path: Path, command: str) -> None:
    models = trio()
    before = json.loads((Path(models["onto"]) / "config.json").read_text())
    for folder in models.values():
        add(Path(folder), **ODD)
    if command == "graft":
        result = graft(**models, out=tmp_path / "out")
    else:
        result = merge(f"{models['onto']} + 0.5*({models['chat']} - {models['base']})", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == before | {"_name_or_path": "somebody/model"}
    said = " ".join(result.notes)
    for name in set(ODD) - {"_name_or_path"}:
        assert name in said
    account = json.loads((tmp_path / "out" / "lapis-merge.json").read_text())
    assert any("auto_map" in note for note in account["notes"])


def test_an_unknown_family_keeps_its_fields_but_no_code(trio) -> None:
    config = {"model_type": "someones", "my_field": 1, "text_config": {"auto_map": 1, "_x": 2, "dim": 3}, **ODD}
    result, notes = carried_config(config)
    assert result == {"model_type": "someones", "my_field": [1, 2], "text_config": {"dim": 3},
                      "_name_or_path": "somebody/model"}  # fmt: skip
    assert "text_config.auto_map" in " ".join(notes) and "text_config._x" in " ".join(notes)


@pytest.mark.parametrize("command", ["graft", "merge"])
def test_fault_31_a_head_that_the_file_ties_and_that_differs(trio, tmp_path: Path, command: str) -> None:
    models = trio(tied=False)
    for folder in models.values():
        add(Path(folder), tie_word_embeddings=True)

    def run(out: Path):
        if command == "graft":
            return graft(**models, out=out)
        return merge(f"{models['onto']} + 0.5*({models['chat']} - {models['base']})", out)

    result = run(tmp_path / "apart")
    config = json.loads((tmp_path / "apart" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "lm_head.weight" in open_checkpoint(tmp_path / "apart").index
    assert any("ties the head to the embedding, but in" in note for note in result.notes)
    for folder in models.values():
        path = Path(folder) / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, metadata={"format": "pt"})
    result = run(tmp_path / "equal")
    assert json.loads((tmp_path / "equal" / "config.json").read_text())["tie_word_embeddings"] is True
    made = load_file(tmp_path / "equal" / "model.safetensors")
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])
