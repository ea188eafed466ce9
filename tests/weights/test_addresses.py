"""Model folders at addresses: a web server, object stores (where moto and gcsfs are installed), fsspec's own memory."""

import hashlib
import json
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.commit import MANIFEST
from lapis.checkpoint.remote import requests
from lapis.checkpoint.remote.folder import is_address
from lapis.errors import CheckpointError, MissingExtra
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge

from ..checkpoint.hub_server import Asked, Hub, part, serving

WEIGHTS = "model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def web(trio, monkeypatch):
    """Three relatives under http://.../models/NAME; hub.files may be changed, hub.swap gives an answer of its own."""
    monkeypatch.setattr(requests, "PAUSE", 0.001)
    models = trio(tied=False)
    with serving(Hub()) as hub:
        hub.here, hub.swap = models, lambda asked: None
        hub.files = {f"/models/{role}/{name}": body for role in models for name, body in files_of(models[role]).items()}

        def answer(asked: Asked):
            if (swapped := hub.swap(asked)) is not None:
                return swapped
            body = hub.files.get(asked.path)
            if body is None:
                return 404, {}, b"no such page"
            return part(asked, body, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

        hub.fault = answer
        hub.models = {role: f"{hub.url}/models/{role}" for role in models}
        yield hub


def refused(source: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_graft_of_web_folders_gives_the_local_bytes(web, tmp_path):
    graft(**web.here, out=tmp_path / "local", scale=0.5)
    result = graft(**web.models, out=tmp_path / "out", scale=0.5)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "local" / WEIGHTS).read_bytes()
    assert any("its server lists no sha256" in note for note in result.notes)
    assert any("unverified" in note for note in open_checkpoint(web.models["base"]).notes)
    assert Tokenizer.open(web.models["chat"]).chat_template == Tokenizer.open(web.here["chat"]).chat_template


def test_a_manifest_gives_the_digests(web, tmp_path):
    out = tmp_path / "made"
    graft(**web.here, out=out)
    web.files |= {f"/models/made/{name}": body for name, body in files_of(out).items()}
    made = f"{web.url}/models/made"
    recipe = {"merge_method": "linear", "models": [{"model": made, "parameters": {"weight": 1.0}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = merge(tmp_path / "recipe.yaml", tmp_path / "again")
    assert any("agrees with the sha256" in note for note in result.notes)
    bad = bytearray(web.files[f"/models/made/{WEIGHTS}"])
    bad[-1] ^= 1
    web.files[f"/models/made/{WEIGHTS}"] = bytes(bad)
    with pytest.raises(CheckpointError, match="its sha256 is"):
        merge(tmp_path / "recipe.yaml", tmp_path / "third")
    web.files[f"/models/made/{WEIGHTS}"] = bytes(bad[:-4])
    assert f"and {MANIFEST} says" in refused(made)


def test_what_a_web_server_may_do_is_one_line(web):
    base = web.models["base"]
    assert "there is no such folder" in refused(f"{web.url}/models/none")
    for odd in ("http://user:secret@127.0.0.1/x", "https://host/x?token=secret"):
        assert "secret" not in refused(odd) and "without a user" in refused(odd)
    checkpoint = open_checkpoint(base)
    body = bytearray(web.files[f"/models/base/{WEIGHTS}"])
    body[-1] ^= 1
    web.files[f"/models/base/{WEIGHTS}"] = bytes(body)
    with pytest.raises(CheckpointError, match="changed on the server"):
        checkpoint.read(checkpoint.names[0])
    web.swap = lambda asked: (200, {"ETag": '"a"'}, b"x" * 50) if asked.path.endswith(WEIGHTS) else None
    assert "sends no ranges" in refused(base)
    web.swap = lambda asked: (
        (206, {"Content-Encoding": "gzip", "Content-Range": "bytes 0-0/9"}, b"x") if asked.range else None
    )
    assert "encoded it as gzip" in refused(base)
    web.swap = lambda asked: (429, {"Retry-After": "4000"}, b"")
    assert "asks to wait for 4,000 s" in refused(base)
    web.swap = lambda asked: (503, {}, b"")
    assert "was tried 5 times: status 503" in refused(base)
    with pytest.raises(CheckpointError, match="wants it here"):
        web.swap = lambda asked: None
        open_checkpoint(base).fetched()


def test_an_index_without_its_shard(web):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    web.files["/models/base/model.safetensors.index.json"] = json.dumps(index).encode()
    assert refused(web.models["base"]) == (
        f"{web.models['base']}: 1 of 1 shard is missing: model-00001-of-00002.safetensors; ask its owner for the "
        "whole model"
    )


def same_weights(source: str, folder: Path) -> None:
    there, here = open_checkpoint(source), open_checkpoint(folder)
    assert sorted(there.names) == sorted(here.names)
    for name in here.names:
        assert torch.equal(there.read(name), here.read(name))


def test_a_folder_in_fsspecs_memory(trio, tmp_path):
    pytest.importorskip("fsspec")
    import fsspec

    models, system = trio(shards=2), fsspec.filesystem("memory")
    for role, folder in models.items():
        for name, body in files_of(folder).items():
            system.pipe_file(f"/{tmp_path.name}/{role}/{name}", body)
    there = {role: f"memory://{tmp_path.name}/{role}" for role in models}
    same_weights(there["onto"], models["onto"])
    graft(**models, out=tmp_path / "local")
    graft(**there, out=tmp_path / "out")
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    checkpoint = open_checkpoint(there["base"])
    system.pipe_file(f"/{tmp_path.name}/base/{WEIGHTS}", files_of(models["base"])[WEIGHTS])  # the same bytes, later
    with pytest.raises(CheckpointError, match="changed on the server"):
        checkpoint.read(checkpoint.names[0])
    assert "there is no such folder" in refused(f"memory://{tmp_path.name}/none")


def test_an_address_of_a_kind_that_nobody_reads():
    pytest.importorskip("fsspec")
    assert is_address("s3://a/b") and not is_address("a/b") and not is_address("file:///etc")
    with pytest.raises((CheckpointError, MissingExtra)) as caught:
        open_checkpoint("nosuch://bucket/model")
    assert "\n" not in str(caught.value)


def test_a_folder_in_s3(trio, tmp_path, monkeypatch):
    """Against moto's server, through s3fs with its own credentials and endpoint."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")
        import boto3

        models, client = trio(shards=2), boto3.client("s3")
        client.create_bucket(Bucket="models")
        for role, folder in models.items():
            for name, body in files_of(folder).items():
                client.put_object(Bucket="models", Key=f"{role}/{name}", Body=body)
        there = {role: f"s3://models/{role}" for role in models}
        graft(**models, out=tmp_path / "local")
        graft(**there, out=tmp_path / "out")
        for file in (tmp_path / "local").glob("*.safetensors"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
        checkpoint = open_checkpoint(there["base"])
        body = bytearray(files_of(models["base"])[WEIGHTS])
        body[-1] ^= 1
        client.put_object(Bucket="models", Key=f"base/{WEIGHTS}", Body=bytes(body))
        with pytest.raises(CheckpointError, match="changed on the server"):
            checkpoint.read(checkpoint.names[0])
        assert "there is no such folder" in refused("s3://models/none")
        assert "there is no such folder" in refused("s3://nobody/none")
    finally:
        server.stop()


def test_gs_is_what_fsspec_reads_by_that_name(trio, tmp_path, monkeypatch):
    """Without Cloud Storage: its name, paths and generations over fsspec's memory."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Cloud(MemoryFileSystem):
        protocol, store, pseudo_dirs = ("gs", "gcs"), {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.split("://")[-1].strip("/")

        def info(self, path, **more):
            entry = super().info(path, **more)
            body = self.store[entry["name"]].getvalue() if entry["type"] == "file" else b""
            return entry | {"created": None, "generation": hashlib.md5(body).hexdigest()}

    monkeypatch.setitem(_registry, "gs", Cloud)
    models, system = trio(shards=2), fsspec.filesystem("gs")
    for role, folder in models.items():
        for name, body in files_of(folder).items():
            system.pipe_file(f"gs://models/{role}/{name}", body)
    graft(**models, out=tmp_path / "local")
    graft(**{role: f"gs://models/{role}" for role in models}, out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    checkpoint = open_checkpoint("gs://models/base")
    system.pipe_file(f"gs://models/base/{WEIGHTS}", files_of(models["base"])[WEIGHTS][:-1] + b"?")
    with pytest.raises(CheckpointError, match="changed on the server"):
        checkpoint.read(checkpoint.names[0])
    assert "there is no such folder" in refused("gs://models/none")


def weights_of(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def test_a_folder_in_gs(trio, tmp_path, monkeypatch):
    """Through gcsfs, against the three calls of Cloud Storage's JSON interface that it makes, on this machine."""
    pytest.importorskip("gcsfs")
    models = trio(shards=2)
    there = {role: {f"model/{name}": body for name, body in files_of(models[role]).items()} for role in models}
    with serving(Hub()) as hub:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
        monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        hub.fault = partial(cloud_storage, there)
        graft(**models, out=tmp_path / "local")
        graft(**{role: f"gs://{role}/model" for role in models}, out=tmp_path / "out")
        assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
        checkpoint = open_checkpoint("gs://base/model")
        shard = next(name for name in there["base"] if name.endswith(".safetensors"))
        there["base"][shard] = there["base"][shard][:-1] + b"?"
        with pytest.raises(CheckpointError, match="changed on the server"):
            for name in checkpoint.names:
                checkpoint.read(name)
        assert "there is no such folder" in refused("gs://nobody/model")


def cloud_storage(buckets: dict[str, dict[str, bytes]], asked: Asked):
    """Objects of buckets, listed, described, and read in ranges."""
    bucket, _, name = unquote(asked.path).partition("/b/")[2].partition("/o")
    objects, name = buckets.get(bucket, {}), name.removeprefix("/")
    described = {
        each: {"name": each, "bucket": bucket, "size": str(len(body)), "updated": "2026-01-01T00:00:00Z",
               "generation": str(int(hashlib.md5(body).hexdigest()[:12], 16)), "kind": "storage#object"}
        for each, body in objects.items()
    }  # fmt: skip
    if bucket in buckets and not name:
        found: dict[str, object] = {"items": list(described.values())}
    elif name in objects and not asked.path.startswith("/download/"):
        found = described[name]
    elif name in objects:
        return part(asked, objects[name], {"ETag": f'"{described[name]["generation"]}"'})
    else:
        return 404, {"Content-Type": "application/json"}, b'{"error": {"code": 404, "message": "Not Found"}}'
    return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
