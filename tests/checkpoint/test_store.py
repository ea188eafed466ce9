"""A folder opens by headers alone, and nothing outside of it is ever read; faults 9 and 20 to 33 by number."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError

ONE = {"model.embed_tokens.weight": torch.arange(12.0).view(4, 3), "lm_head.weight": torch.ones(4, 3)}
TWO = {"model.layers.0.mlp.up_proj.weight": torch.randn(5, 3).bfloat16()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two shards with an index."""
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "unheard-of"}')
    save_file(ONE, root / "model-00001-of-00002.safetensors")
    save_file(TWO, root / "model-00002-of-00002.safetensors")
    write_index(root, {n: f"model-0000{i}-of-00002.safetensors" for i, t in ((1, ONE), (2, TWO)) for n in t})
    return root


def write_index(root: Path, weight_map: dict[str, str]) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(root: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(root)
    assert "\n" not in str(caught.value)


def test_reads_whole_rows_and_ranges(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name, tensor in {**ONE, **TWO}.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read_rows("lm_head.weight", 1, 3), ONE["lm_head.weight"][1:3])
    assert checkpoint.read_range("model.embed_tokens.weight", 5, 7).tolist() == [5.0, 6.0]
    assert checkpoint.part("model.layers.0.mlp.up_proj.weight").layer == 0
    with pytest.raises(CheckpointError, match="no rows 3 to 9"):
        checkpoint.read_rows("lm_head.weight", 3, 9)


def test_digest_knows_shapes_and_not_values(folder: Path) -> None:
    before = open_checkpoint(folder).digest()
    save_file({name: tensor + 1 for name, tensor in TWO.items()}, folder / "model-00002-of-00002.safetensors")
    assert open_checkpoint(folder).digest() == before
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(5, 4)}, folder / "model-00002-of-00002.safetensors")
    assert open_checkpoint(folder).digest() != before


def test_fault_09_a_tensor_in_two_shards(folder: Path) -> None:
    save_file({**TWO, "lm_head.weight": torch.ones(4, 3)}, folder / "model-00002-of-00002.safetensors")
    refused(folder, "lm_head.weight stands in both")


def test_fault_20_a_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "1 of 2 shards is missing: model-00002-of-00002")


def test_fault_21_the_index_names_a_tensor_that_the_shard_lacks(folder: Path) -> None:
    write_index(folder, {"lm_head.weight": "model-00002-of-00002.safetensors"})
    refused(folder, "puts lm_head.weight in model-00002-of-00002.safetensors, which lacks it")


def test_fault_22_tensors_outside_the_index_are_reported(folder: Path) -> None:
    write_index(folder, {"lm_head.weight": "model-00001-of-00002.safetensors"})
    assert any("not in model.safetensors.index.json" in note for note in open_checkpoint(folder).notes)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors"])
def test_faults_25_and_26_an_index_that_leaves_the_folder(folder: Path, path: str) -> None:
    save_file(ONE, folder.parent / "secret.safetensors")
    (folder / "sub").mkdir()
    write_index(folder, {"lm_head.weight": path})
    refused(folder, "outside of the folder")


def test_fault_27_links_out_fifos_and_folders(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(folder.parent / "outside.safetensors")
    shard.symlink_to(folder.parent / "outside.safetensors")
    refused(folder, "link that leads outside")
    shard.unlink()
    os.mkfifo(shard)
    refused(folder, "not a regular file")
    shard.unlink()
    shard.mkdir()
    refused(folder, "not a regular file")


def test_links_into_the_blobs_of_a_hub_cache_are_followed(folder: Path) -> None:
    cache = folder.parent / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    root = folder.rename(cache / "snapshots" / "0123")
    shard = root / "model-00002-of-00002.safetensors"
    shard.rename(cache / "blobs" / "abc")
    shard.symlink_to("../../blobs/abc")
    assert torch.equal(open_checkpoint(root).read(next(iter(TWO))), next(iter(TWO.values())))


def test_fault_28_pickles_are_never_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert any("pickles are never read" in note for note in open_checkpoint(folder).notes)
    for path in folder.glob("model*"):
        path.unlink()
    refused(folder, "is a pickle, which can run code")


def test_fault_29_single_file_and_index_that_differ(folder: Path) -> None:
    save_file({**ONE, **TWO}, folder / "model.safetensors")
    assert any("stands beside" in note for note in open_checkpoint(folder).notes)
    save_file(ONE, folder / "model.safetensors")
    refused(folder, "both there and differ")


def test_fault_32_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="changed while"):
        for name in ONE:
            checkpoint.read(name)


def test_fault_33_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", \n "hidden')
    refused(folder, "config.json: not JSON at line 2")
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    refused(folder, '"a" stands twice')


def test_files_beside_the_index_are_named_once(folder: Path) -> None:
    save_file(ONE, folder / "consolidated.safetensors")
    notes = open_checkpoint(folder).notes
    assert sum("consolidated.safetensors" in note for note in notes) == 1


@pytest.mark.parametrize(
    ("make", "says"), [("nothing", "no such folder"), ("file", "is a file"), ("empty", "config.json")]
)
def test_what_is_no_model(tmp_path: Path, make: str, says: str) -> None:
    root = tmp_path / "x"
    if make == "file":
        root.touch()
    elif make == "empty":
        root.mkdir()
    refused(root, says)
