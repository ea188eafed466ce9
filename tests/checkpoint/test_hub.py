"""Models of the hub, through a server on this machine: what is asked for, what is kept, and what becomes of faults."""

import json
import re
import time

import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors.torch import load_file

import lapis
from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.hub.models import hub_id
from lapis.checkpoint.remote import ranges, requests
from lapis.cli.main import main
from lapis.errors import CheckpointError
from lapis.families.config import ModelConfig
from lapis.model.adapter import write_adapter
from lapis.model.load import save
from lapis.model.lora import LoraConfig, wrap
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.weights.fuse.fuse import fuse
from lapis.weights.fuse.opening import open_model

from .hub_server import Hub, serving

REPO = "aina/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Two models of one shape, as the files that lie on the hub."""
    result = {}
    for name, seed in (("base", 0), ("chat", 1)):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        shape = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "vocab": 300, "context": 64}
        save(Transformer(ModelConfig(**shape, family="llama")), folder)
        train_tokenizer(["in Malaysia they say Kuala Lumpur. " * 40], 290).save(folder)
        result[name] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    return result


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """A hub with one model, an empty cache, short pauses, and a token."""
    monkeypatch.setattr(requests, "PAUSE", 0.001)
    with serving(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        hub.put(REPO, files["base"])
        yield hub


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("aina/tiny") == ("aina/tiny", None) and hub_id("a/b.c-d@refs/pr/1") == ("a/b.c-d", "refs/pr/1")
    for source in ("tiny", "a/b/c", "/a/b", "./b", "../a", "a/..", "a//b", "~/b", "a/b@", "a/b@../c"):
        assert hub_id(source) is None, source
    (tmp_path / "runs").mkdir()
    assert hub_id("runs/bsae") is None and hub_id("runs/bsae@main") is not None
    with pytest.raises(CheckpointError, match="runs/bsae: there is no such folder"):
        open_checkpoint("runs/bsae")


def test_opening_reads_headers_only(hub, files):
    result = lapis.open(REPO)
    assert result.family.name == "llama" and result.nbytes > 50_000
    assert hub.weights_sent() <= ranges_first() and {a.path.rsplit("/", 1)[1] for a in hub.asked} >= {"config.json"}
    assert not any("tokenizer" in a.path for a in hub.asked)
    assert result.root.parent.name == "snapshots" and result.root.name == hub.branches[REPO]["main"]


def ranges_first() -> int:
    return ranges.FIRST


def settled(hub) -> int:
    """Bytes of weights sent, once the server has noted all answers: it notes one after the client has read it."""
    last = -1
    while (now := hub.weights_sent()) != last:
        last = now
        time.sleep(0.2)
    return now


def test_tensors_are_read_by_ranges_and_equal_the_file(hub, files, monkeypatch, tmp_path):
    monkeypatch.setattr(ranges, "PIECE", 1000)
    monkeypatch.setattr(ranges, "NEAR", 1000)
    (tmp_path / "here").mkdir()
    for name, body in files["base"].items():
        (tmp_path / "here" / name).write_bytes(body)
    there, here = lapis.open(REPO), lapis.open(tmp_path / "here")
    assert there.digest() == here.digest()
    before = settled(hub)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(there.read(name), here.read(name))
    assert hub.weights_sent() - before <= here.info(name).nbytes + 4 * 1000
    for name in here.names:
        assert torch.equal(there.read(name), here.read(name))
    assert torch.equal(there.read_rows("model.embed_tokens.weight", 7, 9), here.read("model.embed_tokens.weight")[7:9])
    assert not (there.root / WEIGHTS).exists()


def test_a_difference_of_two_models_downloads_neither(hub, files, tmp_path):
    hub.put("aina/chat", files["chat"])
    result = lapis.diff(REPO, "aina/chat")
    for name in ("base", "chat"):
        (tmp_path / name).mkdir()
        for file, body in files[name].items():
            (tmp_path / name / file).write_bytes(body)
    assert result.tensors == lapis.diff(tmp_path / "base", tmp_path / "chat").tensors
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
    assert any("what only looks does not" in note for note in result.notes)


def test_loading_keeps_a_snapshot_that_serves_offline(hub, tmp_path, monkeypatch):
    model, tokenizer = lapis.load(REPO)
    ids = torch.tensor([tokenizer.encode("in Malaysia")])
    logits = model(ids)
    blob = (open_checkpoint(REPO).root / WEIGHTS).resolve()
    assert blob.parent.name == "blobs"
    for name in (WEIGHTS, "config.json"):  # and the library whose cache it is finds them there
        assert try_to_load_from_cache(REPO, name, cache_dir=tmp_path / "cache", revision="main")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, _ = lapis.load(REPO)
    assert torch.equal(again(ids), logits) and hub.asked == []
    assert Tokenizer.open(REPO).encode("in Malaysia") == ids[0].tolist()
    with pytest.raises(CheckpointError, match=r"aina/absent: .*cache of the hub does not hold it \(HF_HUB_OFFLINE"):
        lapis.open("aina/absent")


def test_a_revision_is_pinned_to_its_commit(hub, files):
    first = hub.branches[REPO]["main"]
    hub.put(REPO, files["chat"], "v2")
    old, new = lapis.open(REPO), lapis.open(f"{REPO}@v2")
    assert old.root.name == first and new.root.name == hub.branches[REPO]["v2"] != first
    hub.branches[REPO]["main"] = new.root.name  # somebody pushes while we read
    name = "model.norm.weight"
    old_weights = torch.frombuffer(bytearray(files["base"][WEIGHTS]), dtype=torch.uint8)
    info = old.info(name)
    assert torch.equal(old.read(name).view(torch.uint8), old_weights[info.start : info.end])
    assert lapis.open(f"{REPO}@{first}").root.name == first
    assert all(first in a.path or new.root.name in a.path for a in hub.asked if "resolve" in a.path)
    with pytest.raises(CheckpointError, match=r"aina/tiny@v3: the hub has the model, but no such revision; its page"):
        lapis.open(f"{REPO}@v3")


def test_the_command_line_takes_hub_ids(hub, capsys):
    main(["inspect", REPO, "--json"])
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    assert hub.weights_sent() <= ranges_first()
    main(["lens", REPO, "in Malaysia", "--track", "Kuala", "--json"])
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "aina/absent"])
    error_text = capsys.readouterr().err.strip()
    assert stopped.value.code == 1 and error_text.count("\n") == 0 and "the hub has no such model" in error_text


def test_fault_89_another_host_gets_no_token(hub):
    lapis.open(REPO).read("model.norm.weight")
    tokens = {(asked.host, asked.token) for asked in hub.asked}
    assert ("127.0.0.1", "Bearer hf_secret") in tokens and ("localhost", None) in tokens
    assert not any(host == "localhost" and token for host, token in tokens)


def on_weights(*answers):
    """A fault that gives these answers to the first reads of weights, and then none. None lets one pass."""
    left = list(answers)

    def fault(asked):
        if not asked.path.startswith("/store/") or asked.method == "HEAD" or not left:
            return None
        answer = left.pop(0)
        return answer(asked) if callable(answer) else answer

    return fault


def cut(hub, files, keep: int):
    """An answer whose body ends after `keep` bytes, though its length says more."""

    def answer(asked):
        first, last = map(int, asked.range.removeprefix("bytes=").split("-"))
        whole = files["base"][WEIGHTS]
        body = whole[first : last + 1]
        import hashlib

        headers = {"Content-Length": str(len(body)), "Content-Range": f"bytes {first}-{last}/{len(whole)}",
                   "ETag": f'"{hashlib.sha256(whole).hexdigest()}"'}  # fmt: skip
        return 206, headers, body[:keep]

    return answer


def test_faults_81_and_86_a_broken_body_goes_on_where_it_was(hub, files):
    hub.fault = on_weights(cut(hub, files, 100), cut(hub, files, 50))
    result = lapis.open(REPO)
    asked = [int(a.range.removeprefix("bytes=").split("-")[0]) for a in hub.asked if a.path.startswith("/store/")]
    assert asked == [0, 100, 150] and len(result.names) == 21


def test_fault_88_what_passes_is_tried_again(hub, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.fault = on_weights((503, {}, b""), (429, {"Retry-After": "7"}, b""), (500, {}, b""))
    assert len(lapis.open(REPO).names) == 21
    assert [round(s) for s in slept if s >= 1] == [7]
    hub.fault = on_weights(*[(502, {}, b"")] * 9)
    with pytest.raises(CheckpointError, match=r"aina/tiny: model.safetensors: the server was tried 5 times: .* 502"):
        lapis.open(REPO)


@pytest.mark.parametrize(("answer", "message"), [
    ((200, {}, b"x" * 100), "sends no ranges"),  # fault 83
    ((206, {"Content-Range": "bytes 5-9/77", "ETag": '"a"'}, b"x" * 5), "answered with the range"),  # fault 84
    ((206, {"ETag": '"a"'}, b"x" * 5), "answered with the range"),
    ((401, {}, b""), "wants a login"), ((403, {}, b""), "refuses access"), ((404, {}, b""), "is not on the hub"),
    ((410, {}, b""), "status 410"),
])  # fmt: skip
def test_faults_83_84_88_wrong_answers_are_never_data(hub, answer, message):
    hub.fault = on_weights(answer)
    with pytest.raises(CheckpointError, match=f"aina/tiny: model.safetensors: .*{message}") as caught:
        lapis.open(REPO)
    assert "\n" not in str(caught.value)


def test_fault_85_a_file_that_changes_while_it_is_read(hub, files):
    result = lapis.open(REPO)
    commit = hub.branches[REPO]["main"]
    changed = bytearray(files["base"][WEIGHTS])
    changed[-1] ^= 1
    hub.repos[REPO][commit] = {**files["base"], WEIGHTS: bytes(changed)}
    with pytest.raises(CheckpointError, match="changed on the server"):
        result.read("model.norm.weight")


def test_fault_87_other_bytes_of_the_same_length(hub, files):
    result = lapis.open(REPO)
    good = files["base"][WEIGHTS]
    bad = good[:-4] + b"evil"
    hub.fault = lambda asked: (
        (200, {"ETag": '"x"'}, bad) if asked.path.startswith("/store/") and asked.method == "GET" else None
    )
    with pytest.raises(CheckpointError, match="came with other bytes than the hub lists; load again"):
        result.fetched()
    hub.fault = None
    assert torch.equal(result.fetched().read("lm_head.weight"), result.read("lm_head.weight"))


def test_fault_90_an_encoded_range_is_refused(hub, files):
    body = files["base"][WEIGHTS]
    headers = {"Content-Range": f"bytes 0-{min(len(body), ranges_first()) - 1}/{len(body)}", "ETag": '"a"'}
    hub.fault = on_weights((206, headers | {"Content-Encoding": "gzip"}, b"x"))
    with pytest.raises(CheckpointError, match=r"encoded it as gzip, .* or download the model and give its folder"):
        lapis.open(REPO)


@pytest.mark.parametrize(("status", "code", "message"), [
    (401, "RepoNotFound", "the hub has no such model, or it is private"),
    (403, "GatedRepo", "is gated; ask for access on its page"),
    (404, "RepoNotFound", "the hub has no such model"),
    (500, "", r"the cache of the hub does not hold it \(http\S+: the server was tried 3 times: status 500"),
])  # fmt: skip
def test_fault_88_a_model_that_is_not_given(hub, status, code, message):
    hub.fault = lambda asked: (status, {"X-Error-Code": code}, b"{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        lapis.open(REPO)
    assert str(caught.value).startswith("aina/tiny: ") and "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    lapis.load(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert lapis.load(REPO)  # from the cache
    with pytest.raises(CheckpointError, match="aina/other: there is no such folder, and the cache of the hub does not"):
        lapis.open("aina/other")


def test_a_hub_that_goes_down_after_the_config(hub, monkeypatch):
    """The cache then holds a config and no weights; what is said is that the hub is down."""
    lapis.open(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"^aina/tiny: its server cannot be asked \(.*\), and no weights of it are"
    ):
        lapis.open(REPO)


def test_an_index_without_its_shard_on_the_hub(hub, files):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    side = {name: body for name, body in files["base"].items() if name != WEIGHTS}
    hub.put("aina/half", {**side, f"{WEIGHTS}.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match=r"^aina/half: 1 of 1 shard is missing: .*; ask its owner"):
        lapis.open("aina/half")


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/passwd", "a/../../b.json"])
def test_fault_25_names_that_lead_outside_are_left_out(hub, files, name, tmp_path):
    hub.put("aina/evil", {**files["base"], name: b"{}"})
    result = lapis.open("aina/evil")
    assert name not in result.snapshot.sizes
    result.beside()
    assert not (tmp_path / "cache" / "evil.json").exists()


def test_a_pickle_alone_is_refused_and_a_cut_file_noticed(hub, files):
    side = {name: body for name, body in files["base"].items() if name != WEIGHTS}
    hub.put("aina/pickle", {**side, "pytorch_model.bin": b"x"})
    with pytest.raises(CheckpointError, match="is a pickle"):
        lapis.open("aina/pickle")
    hub.put("aina/cut", {**side, WEIGHTS: files["base"][WEIGHTS][:-10]})
    with pytest.raises(CheckpointError, match=WEIGHTS):
        lapis.open("aina/cut")


def test_importing_lapis_imports_no_hub_library():
    import subprocess
    import sys

    code = "import sys, lapis.checkpoint, lapis.checkpoint.hub.models; print('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(("quick", "most"), [(60.0, 4 * 512), (0.0, 512)])
def test_a_server_that_answers_at_once_is_asked_for_more(hub, monkeypatch, quick, most):
    """Requests to one that is far away stay short, since whoever reads waits for the whole of one."""
    for name, value in (("PIECE", 512), ("QUICK", quick), ("FIRST", 512), ("GAP", 0)):
        monkeypatch.setattr(ranges, name, value)
    model = lapis.open(REPO)
    name = "model.embed_tokens.weight"
    size = model.info(name).end - model.info(name).start
    hub.asked.clear()
    for place in range(0, size, 512):
        model.prefetch(name, place, min(512, size - place))
    data = bytearray(size)
    model.read_into(name, 0, memoryview(data))
    raw = hub.find(REPO, "main")[1][WEIGHTS]
    assert bytes(data) == raw[model.info(name).start : model.info(name).end]
    spans = [tuple(map(int, one.range[6:].split("-"))) for one in hub.asked if one.path.startswith("/store/")]
    assert max(last + 1 - first for first, last in spans) == most


def test_an_adapter_of_the_hub_on_a_base_of_the_hub(hub, files, tmp_path):
    """`owner/name+owner/adapter`, as mergekit writes it; and the adapter alone, which names its base."""
    torch.manual_seed(3)
    for name, data in files["base"].items():
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(data)
    model, _ = lapis.load("base")
    wrap(model, LoraConfig(rank=2), REPO)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    write_adapter(model, "here")
    hub.put("aina/lora", {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()})
    fuse("here", "fused", base="base")
    fuse("aina/lora", "fused-of-the-hub")
    wanted = (tmp_path / "fused" / WEIGHTS).read_bytes()
    assert (tmp_path / "fused-of-the-hub" / WEIGHTS).read_bytes() == wanted
    whole = load_file("fused/" + WEIGHTS)
    for source in ("aina/tiny+aina/lora", "aina/tiny@main+aina/lora@main", "base+aina/lora", "aina/lora"):
        opened = open_model(source)
        assert all(torch.equal(opened.read(name), tensor) for name, tensor in whole.items()), source
    for source, words in (
        ("base+aina/tiny", "aina/tiny: holds no adapter"),
        ("aina/tiny+aina/gone", "aina/gone"),
        ("aina/gone+aina/lora", "aina/gone"),
        ("nowhere+aina/lora", "nowhere+aina/lora: there is no such folder"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(words)) as refusal:
            open_model(source)
        assert "\n" not in str(refusal.value)
