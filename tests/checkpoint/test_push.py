"""Models to a hub: a server on this machine that speaks its protocol, real commands, and whatever may go wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import lapis
from lapis.checkpoint.commit import MANIFEST, commit
from lapis.checkpoint.hub.shipment import shipment
from lapis.checkpoint.remote import requests
from lapis.errors import CheckpointError, ConfigError, OutputError
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

from .hub_upload import WritableHub, writable

REPO = "aina/tiny-ms"
SENT = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model as lapis writes it, with what else may lie in such a folder."""
    folder = tmp_path / "here" / "model"
    torch.manual_seed(0)
    with commit(folder, kind="model") as staging:
        save(Transformer(ModelConfig(dim=32, layers=2, heads=2, ffn_dim=48, vocab=300, context=64)), staging.path)
        train_tokenizer(["in Malaysia they say Kuala Lumpur. " * 40], 290).save(staging.path)
        (staging.path / "training.json").write_text("{}")
    (folder / "optimizer.safetensors").write_bytes(b"state")
    (folder / "notes.txt").write_text("mine")
    (folder / ".env").write_text("SECRET=1")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    monkeypatch.setattr(requests, "PAUSE", 0.001)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with writable(WritableHub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the store of this hub speaks LFS
        yield hub


def test_a_model_is_sent_and_read_back_from_the_hub(hub: WritableHub, model: Path, run: Run) -> None:
    status, out, err = run("push", model, REPO, "--private")
    assert status == 0, err
    listing, _, end = out.partition("- there is no README.md")
    assert all(name in listing for name in SENT) and "sent: " in end and hub.url in end
    for name, why in {"optimizer.safetensors": "training state", "notes.txt": "not a part of the model",
                      ".env": "hidden", "pytorch_model.bin": "a pickle"}.items():  # fmt: skip
        assert f"stays  {name} ({why}" in listing
    there = hub.main(REPO)
    assert set(there) == SENT | {".gitattributes"}
    assert all(there[name] == (model / name).read_bytes() for name in SENT)
    assert hub.private[REPO] and hub.messages == ["model, by lapis"]
    assert "hf_writes" not in out + err
    opened = lapis.open(REPO)  # from the hub, through the other half of the code
    assert opened.nbytes == lapis.open(model).nbytes


def test_nothing_is_sent_by_a_dry_run(hub: WritableHub, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    status, out, _ = run("push", model, REPO, "--dry-run", "--json")
    result = json.loads(out)
    assert status == 0 and result["dry_run"] and set(result["files"]) == SENT and hub.asked == []
    assert result["bytes"] == sum((model / name).stat().st_size for name in SENT)
    assert result["left_out"]["training.json"] == "not a part of the model" and "url" not in result


def test_what_is_there_is_kept_unless_told_otherwise(hub: WritableHub, model: Path, run: Run) -> None:
    first = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"old", "README.md": b"# mine", "LICENSE": b"L"}
    head = hub.put(REPO, first)
    status, out, err = run("push", model, REPO)
    assert status == 1 and err.count("\n") == 1 and "on the hub already, with 4 file(s)" in err and "--overwrite" in err
    assert hub.main(REPO) == first and hub.objects == {}
    status, out, err = run("push", model, REPO, "--overwrite", "--message", "second try", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["removed"] == ["model-00001-of-00002.safetensors"] and not result["created"]
    assert set(hub.main(REPO)) == SENT | {"README.md", "LICENSE"}  # what is no part of the old model stays
    assert hub.parents == [head] and hub.messages == ["second try"]
    assert hub.repos[REPO][head] == first  # in its history


def test_a_repository_made_by_hand_and_empty_is_filled(hub: WritableHub, model: Path) -> None:
    hub.put(REPO, {".gitattributes": b""})
    assert lapis.push(model, REPO)["created"] is False and set(hub.main(REPO)) == SENT | {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_expired", "does not take the token (401)"),
        ("hf_reads", "the token may not write there (403)"),
    ],
)
def test_who_may_not_write_is_told_in_one_line(
    hub: WritableHub, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, says: str
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    status, out, err = run("push", model, REPO)
    assert status == 1 and err.count("\n") == 1 and says in err, err
    assert str(token) not in out + err and REPO not in hub.repos and hub.objects == {}


def test_the_login_of_the_command_line_counts(
    hub: WritableHub, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_writes")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert lapis.push(model, REPO)["created"]


def test_a_file_that_is_too_large_is_told(hub: WritableHub, model: Path, run: Run) -> None:
    hub.largest = 1000
    status, _, err = run("push", model, REPO)
    assert status == 1 and err.count("\n") == 1 and "Maximum file size exceeded" in err and "smaller shards" in err
    hub.largest, hub.status = 10**9, lambda method, path: 413 if path.startswith("/store/") else 0
    status, _, err = run("push", model, REPO)
    assert status == 1 and err.count("\n") == 1 and "model.safetensors: a file is larger than the hub takes" in err


def test_a_connection_that_is_cut(hub: WritableHub, model: Path, run: Run) -> None:
    """Once: it is tried again. For good: one line, nothing visible, and the same command goes on."""
    hub.cut = lambda method, path: path.startswith("/store/") and hub.cuts < 1
    assert run("push", model, "aina/first")[0] == 0 and hub.cuts == 1
    hub.objects.clear()
    hub.cut = lambda method, path: path.startswith("/store/")
    status, _, err = run("push", model, REPO)
    assert status == 1 and "the same command goes on" in err and "model.safetensors: the hub cannot be reached" in err
    assert err.startswith("lapis: ") and err.count("\n") == 1
    assert set(hub.main(REPO)) == {".gitattributes"}
    hub.cut = lambda method, path: "/commit/" in path
    assert run("push", model, REPO)[0] == 1 and len(hub.objects) == 1
    hub.cut = lambda method, path: False
    hub.asked.clear()
    assert run("push", model, REPO)[0] == 0 and set(hub.main(REPO)) == SENT | {".gitattributes"}
    assert not any(one.method == "PUT" for one in hub.asked)  # what was there was not sent again


@pytest.mark.parametrize("place", ["/api/models", "/api/repos/create", "/preupload/", "/objects/batch", "/commit/"])
def test_a_hub_that_fails_is_one_line(hub: WritableHub, model: Path, run: Run, place: str) -> None:
    def fail(method: str, path: str) -> int:
        return 503 if place in path else 0

    hub.status = fail
    if place == "/api/models":
        hub.fault = lambda asked: (503, {}, b"")
    status, _, err = run("push", model, REPO)
    assert status == 1 and err.count("\n") == 1 and err.startswith(f"lapis: {REPO}: ") and "503" in err


def test_a_hub_that_is_away_is_one_line(
    hub: WritableHub, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, _, err = run("push", model, REPO)
    assert status == 1 and err.count("\n") == 1 and "the server was tried 3 times" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, err = run("push", model, REPO)
    assert status == 1 and "HF_HUB_OFFLINE is set" in err


def test_somebody_else_was_quicker(hub: WritableHub, model: Path, run: Run) -> None:
    """A commit between the look and ours is not written over."""
    hub.put(REPO, {"config.json": b"{}"})

    def also(method: str, path: str) -> int:
        if path.endswith("/objects/batch"):
            hub.put(REPO, {"config.json": b'{"theirs": 1}'})
        return 0

    hub.status = also
    status, _, err = run("push", model, REPO, "--overwrite")
    assert status == 1 and "in the meantime (412); run again" in err
    assert hub.main(REPO) == {"config.json": b'{"theirs": 1}'}


def test_what_the_hub_has_afterwards_is_looked_at(hub: WritableHub, model: Path) -> None:
    taken = hub.put

    def lose(repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        return taken(repo, {name: body for name, body in files.items() if name != "tokenizer.json"}, branch)

    hub.put = lose  # type: ignore[method-assign]
    with pytest.raises(OutputError, match=r"the hub has no tokenizer.json after the commit"):
        lapis.push(model, REPO)


def test_the_card_beside_a_step_goes_with_it(hub: WritableHub, model: Path, run: Run, tmp_path: Path) -> None:
    card = model.parent / "card"
    card.mkdir()
    (card / "README.md").write_text("---\nlanguage: [ms]\nlicense: mit\n---\n# Won and lost\n")
    (card / "card.json").write_text(json.dumps({"steps": {"grafted": str(model)}}))
    assert lapis.push(model, REPO)["notes"] == [f"README.md is that of {card}"]
    assert hub.main(REPO)["README.md"] == (card / "README.md").read_bytes()
    (card / "card.json").write_text(json.dumps({"steps": {"grafted": "/another"}}))
    assert "README.md" not in shipment(model).files
    assert "README.md" in shipment(model, card).files
    (card / "card.json").write_text(json.dumps({"steps": {"grafted": str(model)}}))
    (model / "README.md").write_text("# mine")  # the user's own is not lapis', and stays
    assert shipment(model).files["README.md"] == model / "README.md"
    written = json.loads((model / MANIFEST).read_text())
    written["files"]["README.md"] = {"size": 6, "sha256": sha256(b"# mine").hexdigest()}
    (model / MANIFEST).write_text(json.dumps(written))  # what a merge wrote gives way to the card of the adaptation
    assert shipment(model).files["README.md"] == card / "README.md"
    (card / "README.md").write_text("---\nlicense: my own\n---\n")
    status, _, err = run("push", model, "aina/other", "--card", card)
    assert status == 1 and err.count("\n") == 1 and 'README.md: - "license" must be one of' in err
    with pytest.raises(ConfigError, match="is no card"):
        shipment(model, tmp_path)


def test_what_is_no_model_is_refused(hub: WritableHub, model: Path, tmp_path: Path, run: Run) -> None:
    for name in ("tiny", "a/b/c", "../x", "/a/b", "aina/tiny@main", "aina/..", ""):
        with pytest.raises(ConfigError, match="is no name on the hub; give owner/name"):
            lapis.push(model, name)
    for folder, says in (
        (tmp_path / "nothing", "there is no such folder"),
        (model.parent, f"is no model; give one of the models in it, such as {model}"),
        (model / "config.json", "is a file; give the folder"),
    ):
        with pytest.raises(CheckpointError, match=says):
            lapis.push(folder, REPO)
    staging = tmp_path / ".model.lapis"
    shutil.copytree(model, staging)
    with pytest.raises(CheckpointError, match="working folder of a job that is not done"):
        lapis.push(staging, REPO)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError):
        lapis.push(model, REPO)
    weights.write_bytes(whole[:-4] + b"\0\0\0\1")
    (tmp_path / "link").symlink_to(model)
    for place in (model, tmp_path / "link"):
        status, _, err = run("push", place, REPO)
        assert status == 1 and "is not what lapis wrote there" in err and err.count("\n") == 1
    weights.write_bytes(whole)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert "config.json was changed since lapis wrote it" in lapis.push(model, REPO)["notes"]
    (model / "tokenizer.json").unlink()
    os.symlink("/etc/hostname", model / "tokenizer.json")
    with pytest.raises(CheckpointError, match="leads outside of the folder"):
        lapis.push(model, "aina/linked")
    assert set(hub.repos) == {REPO}


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}', '{"files": {"config.json": 3}}', "{"])
def test_a_manifest_that_says_nothing_is_refused(model: Path, text: str) -> None:
    (model / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        shipment(model).check()


def test_adapters_and_gguf_files_are_models_too(hub: WritableHub, tmp_path: Path) -> None:
    adapter, gguf = tmp_path / "adapter", tmp_path / "gguf"
    adapter.mkdir()
    gguf.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"without adapter_model\.safetensors"):
        shipment(adapter)
    save_file({"a": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    (gguf / "model-q8_0.gguf").write_bytes(b"GGUF")
    (gguf / "Modelfile").write_text("FROM ./model-q8_0.gguf")
    assert set(lapis.push(adapter, "aina/adapter")["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(lapis.push(gguf, "aina/gguf")["files"]) == {"model-q8_0.gguf", "Modelfile"}


def test_the_command_as_it_is_typed(hub: WritableHub, model: Path) -> None:
    """In a process of its own, as a user's shell starts it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "lapis", "push", str(model), REPO, "--json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["commit"] == hub.branches[REPO]["main"] and not hub.private[REPO]
    assert "model.safetensors" in ran.stderr and "hf_writes" not in ran.stdout + ran.stderr  # listed first
    assert MANIFEST in json.loads(ran.stdout)["left_out"]
