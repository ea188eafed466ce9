"""Grafts and merges of models on a server: the bytes of the local ones, nothing kept, nothing fetched twice, all of it
compared with what the server lists."""

import hashlib
import os
import signal
import time
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.remote import digest, ranges, requests, shared_memory
from lapis.checkpoint.staging import staging_of
from lapis.errors import CheckpointError
from lapis.weights.diff.diff import diff
from lapis.weights.engine import ahead, tiles
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge

from ..checkpoint.hub_server import Asked, Hub, serving

ROLES = ("base", "chat", "onto")
WEIGHTS = "model.safetensors"
SMALL = 256  # bytes of a piece, so that small models have many


class Stop(Exception):
    pass


@pytest.fixture
def hub(trio, tmp_path, monkeypatch):
    """Three relatives on a hub as o/base, o/chat, o/onto, and here as folders; tiles of 64 elements."""
    monkeypatch.setattr(tiles, "TILE", 64)
    monkeypatch.setattr(ranges, "PIECE", SMALL)
    monkeypatch.setattr(ranges, "QUICK", 0.0)
    monkeypatch.setattr(ranges, "NEAR", SMALL)
    monkeypatch.setattr(ranges, "GAP", 0)
    monkeypatch.setattr(ahead, "AHEAD", 4 * SMALL)
    monkeypatch.setattr(requests, "PAUSE", 0.001)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    models = trio(tied=False)
    with serving(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for role in ROLES:
            hub.put(f"o/{role}", files_of(Path(models[role])))
        hub.here = models
        yield hub


def there() -> dict[str, str]:
    return {role: f"o/{role}" for role in ROLES}


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_cache(tmp_path: Path) -> list[Path]:
    """Weights that were written into the cache."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 20_000]


def sent(hub: Any, role: str) -> list[int]:
    """How often each byte of a model's weights was sent."""
    size = len(weights(Path(hub.here[role])))
    times = [0] * size
    for one in hub.asked:
        if one.path.startswith(f"/store/o/{role}/") and one.status == 206:
            first, last = map(int, one.range.removeprefix("bytes=").split("-"))
            for at in range(first, last + 1):
                times[at] += 1
    return times


def recipe(place: Path, models: dict[str, str]) -> Path:
    lines = ["merge_method: task_arithmetic", f"base_model: {models['base']}", "dtype: bfloat16", "models:"]
    lines += [f"  - {{model: {models[role]}, parameters: {{weight: 0.5}}}}" for role in ("chat", "onto")]
    place.write_text("\n".join(lines))
    return place


def test_a_graft_and_a_merge_give_the_local_bytes(hub, tmp_path):
    graft(**hub.here, out=tmp_path / "local", scale=0.5)
    result = graft(**there(), out=tmp_path / "graft", scale=0.5)
    assert weights(tmp_path / "graft") == weights(tmp_path / "local") and in_cache(tmp_path) == []
    assert "onto: all of it was read and agrees with the sha256 that the server lists" in result.notes
    assert any(note.startswith("base, chat: not compared with a sha256: not all of it") for note in result.notes)
    merge(recipe(tmp_path / "here.yaml", hub.here), tmp_path / "local-merge")
    hub.asked.clear()
    result = merge(recipe(tmp_path / "there.yaml", there()), tmp_path / "merge")
    assert weights(tmp_path / "merge") == weights(tmp_path / "local-merge") and in_cache(tmp_path) == []
    assert [note for note in result.notes if "agrees with the sha256" in note and "base" in note and "chat" in note]
    for role in ROLES:  # the header, and then each byte once
        assert max(sent(hub, role)[ranges.FIRST :], default=1) == 1
    assert not any(one.host == "localhost" and one.token for one in hub.asked)


def test_what_is_asked_for_first_is_asked_for_together(hub, tmp_path, monkeypatch):
    """None of three models is answered before all are asked for, and no sample before four are."""
    monkeypatch.setattr(ranges, "FIRST", 8)
    together = {"/api/": Barrier(3), "/store/": Barrier(4)}
    waited = dict.fromkeys(together, 0)

    def wait(asked: Asked) -> None:
        for place, barrier in together.items():
            first, _, last = (asked.range or "bytes=0-0").removeprefix("bytes=").partition("-")
            sample = place == "/store/" and int(last) - int(first) >= 64  # a header is asked for in smaller pieces
            if asked.path.startswith(place) and waited[place] < barrier.parties and (sample or place == "/api/"):
                waited[place] += 1
                barrier.wait(60)

    hub.fault = wait
    merge(recipe(tmp_path / "there.yaml", there()), tmp_path / "out", dry_run=True)
    assert waited == {"/api/": 3, "/store/": 4}


@pytest.mark.parametrize(("quick", "some"), [(60.0, 1), (0.0, ranges.FEW + 1)])
def test_a_server_that_answers_at_once_is_asked_by_few(hub, tmp_path, monkeypatch, quick, some):
    monkeypatch.setattr(ranges, "QUICK", quick)
    monkeypatch.setattr(ranges, "_fetchers", ranges._Fetchers())
    monkeypatch.setattr(ahead, "AHEAD", 64 * SMALL)
    lock, at_once = Lock(), [0]

    def count(asked: Asked) -> None:
        with lock:
            at_once.append(at_once[-1] + 1)
        time.sleep(0.01)
        with lock:
            at_once.append(at_once[-1] - 1)

    hub.fault = count
    merge(recipe(tmp_path / "there.yaml", there()), tmp_path / "out")
    assert some <= max(at_once) <= (ranges.FEW if quick else ranges.CONNECTIONS)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_interrupted_merge_fetches_nothing_again(hub, tmp_path, monkeypatch, share):
    monkeypatch.setattr(ranges, "FIRST", 8)  # or opening alone fetches the whole of these small models
    place = recipe(tmp_path / "there.yaml", there())
    whole = merge(place, tmp_path / "whole")
    hub.asked.clear()
    merge(place, tmp_path / "out", dry_run=True)  # headers, and samples that tell relatives from strangers
    opening = {role: sent(hub, role) for role in ROLES}
    hub.asked.clear()

    def stop(done: int, total: int) -> None:
        if done > share * total:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        merge(place, out, progress=stop)
    result = merge(place, out)
    assert files_of(out) == files_of(tmp_path / "whole") and result.bytes_resumed > share * whole.bytes_written - 1000
    assert [note for note in result.notes if "agrees with the sha256" in note and "chat" in note]  # over both runs
    for role in ROLES:
        again = sum(max(0, n - 1 - 2 * known) for n, known in zip(sent(hub, role), opening[role], strict=True))
        unfinished = 3 * tiles.THREADS * 64 * 2  # tiles that wait for an earlier one
        assert again <= ahead.AHEAD + 2 * SMALL + unfinished  # what was on its way


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_killed_merge_fetches_almost_nothing_again(hub, tmp_path, monkeypatch, share):
    """What had come is taken from shared memory: only what was on its way comes twice."""
    monkeypatch.setattr(ahead, "AHEAD", 64 * SMALL)
    monkeypatch.setattr(shared_memory, "PLACE", tmp_path)
    monkeypatch.setattr(ranges, "FIRST", 64)
    path = recipe(tmp_path / "r.yaml", there())
    merge(path, "looked at", dry_run=True)
    merge(path, "whole")
    once = {role: sum(sent(hub, role)) for role in ROLES}  # with two openings
    hub.asked.clear()
    if (child := os.fork()) == 0:

        def stop(done: int, total: int) -> None:
            if done >= share * total:
                time.sleep(0.5)  # until what was asked for has come
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            merge(path, "killed", progress=stop)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (ring,) = tmp_path.glob("lapis-*")
    done = merge(path, "killed")
    assert done.bytes_resumed > 0 and not ring.exists()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    for role in ROLES:
        assert sum(sent(hub, role)) - once[role] <= 2 * SMALL, role


def test_without_openssl_a_resumed_file_is_said_to_be_unchecked(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "_openssl", lambda: None)
    place = recipe(tmp_path / "there.yaml", there())
    assert any("agrees with the sha256" in note for note in merge(place, tmp_path / "whole").notes)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        merge(place, tmp_path / "out", progress=stop)
    notes = merge(place, tmp_path / "out").notes
    assert any("not compared with a sha256" in note for note in notes)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_byte_that_is_another_is_found_and_nothing_is_kept(hub, tmp_path):
    """The server lists one sha256 and sends other bytes, under the right headers."""
    place = recipe(tmp_path / "there.yaml", there())
    good = weights(Path(hub.here["chat"]))

    def evil(asked: Asked):
        if not asked.path.startswith("/store/o/chat/"):
            return None
        first, last = map(int, asked.range.removeprefix("bytes=").split("-"))
        body = bytearray(good[first : last + 1])
        if first > len(good) // 2:
            body[0] ^= 1
        headers = {
            "ETag": f'"{hashlib.sha256(good).hexdigest()}"',
            "Content-Range": f"bytes {first}-{last}/{len(good)}",
        }
        return 206, headers, bytes(body)

    hub.fault = evil
    with pytest.raises(CheckpointError, match=r"o/chat: model.safetensors: all of it was read, and its sha256 is"):
        merge(place, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not staging_of(tmp_path / "out").exists()
    hub.fault = None
    merge(place, tmp_path / "out")


def test_a_hub_that_is_down_is_said_once(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for role, run in (
        ("base (o/base), chat (o/chat), onto (o/onto)", lambda: graft(**there(), out=tmp_path / "out")),
        ("o/base, o/chat, o/onto", lambda: merge(recipe(tmp_path / "r.yaml", there()), tmp_path / "out")),
    ):
        with pytest.raises(CheckpointError) as caught:
            run()
        assert f": {role}: there is no such folder" in str(caught.value)
        assert str(caught.value).count("http://127.0.0.1:9: the server was tried") == 1


def test_a_revision_that_moved_is_not_mixed(hub, tmp_path):
    """Between two runs of a job: other weights are refused, other words beside them are not."""
    place, out = recipe(tmp_path / "there.yaml", there()), tmp_path / "out"
    merge(place, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        merge(place, out, progress=stop)
    first, files = hub.branches["o/chat"]["main"], hub.find("o/chat", "main")[1]
    changed = bytearray(files[WEIGHTS])
    changed[-1] ^= 1
    hub.put("o/chat", {**files, WEIGHTS: bytes(changed)})
    with pytest.raises(
        CheckpointError, match=rf"o/chat: model.safetensors is another than .* at o/chat@{first}; remove"
    ):
        merge(place, out)
    hub.put("o/chat", {**files, "README.md": b"new words"})
    assert merge(place, out).bytes_resumed > 0
    assert weights(out) == weights(tmp_path / "whole")


def test_a_store_whose_addresses_end_is_asked_for_new_ones(hub, tmp_path):
    """Addresses of a store hold for some minutes; the hub is asked again, and not before."""
    counted = {"store": 0}

    def ends(asked: Asked):
        if asked.path.startswith("/store/"):
            counted["store"] += 1
            if counted["store"] % 10 == 0:
                return 403, {}, b"expired"
        return None

    hub.fault = ends
    checkpoint = open_checkpoint("o/base")
    here = open_checkpoint(hub.here["base"])
    assert all(torch.equal(checkpoint.read(name), here.read(name)) for name in here.names)
    resolved = [one for one in hub.asked if "/resolve/" in one.path and one.path.endswith(WEIGHTS)]
    assert 0 < len(resolved) <= 2 + counted["store"] // 9


def test_progress_says_how_far_each_source_is(hub, tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}

    class Watch:
        def __call__(self, done: int, total: int) -> None:
            pass

        def source(self, role: str, done: int, total: int) -> None:
            seen.setdefault(role, []).append((done, total))

    graft(**there(), out=tmp_path / "out", progress=Watch())
    assert set(seen) == set(ROLES)
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1] and len({total for _, total in steps}) == 1


def test_a_difference_reads_each_byte_once(hub, tmp_path):
    table = diff("o/base", "o/chat")
    assert table.tensors == diff(hub.here["base"], hub.here["chat"]).tensors
    assert max(sent(hub, "base")[ranges.FIRST :], default=1) == 1 and in_cache(tmp_path) == []
