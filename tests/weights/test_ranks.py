"""One output made by several processes: the bytes are those of one, whoever dies, whoever comes late."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from lapis.checkpoint.commit import verify
from lapis.config import dump_yaml
from lapis.errors import CheckpointError
from lapis.weights.delta.extract import delta_extract
from lapis.weights.diff import ranks as diff_ranks
from lapis.weights.diff.diff import diff
from lapis.weights.diff.pairs import Comparison
from lapis.weights.engine import ranks
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge

from .conftest import near, weights, words, write_model

RANK = """
import os, signal, sys
from lapis.weights.delta import ranks as pieces
from lapis.weights.engine import ranks
ranks.PART = pieces.PART = 4000
dies, *command = sys.argv[1:]
if dies.startswith("delta "):
    encode, seen = pieces.write_piece, []
    def write_piece(*arguments, **named):
        seen.append(1)
        if len(seen) == int(dies[6:]):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*arguments, **named)
    pieces.write_piece = write_piece
elif dies:  # with a part in its hands, half of it written
    real, calls = ranks.stream_part, []
    def stream_part(file, outputs, folder, at, **named):
        calls.append(1)
        if len(calls) == int(dies):
            with (folder / file).open("r+b") as half:
                half.seek(at)
                half.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, outputs, folder, at, **named)
    ranks.stream_part = stream_part
from lapis.cli.main import main
main(command)
"""


def start(number, world, *command, dies=""):
    environment = {**os.environ, "RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    arguments = [sys.executable, "-c", RANK, dies, *map(str, command)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(processes):
    """The exit status, standard output and standard error of each."""
    return [(*process.communicate(), process.returncode) for process in processes]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def recipe(tmp_path):
    base = weights(1, tied=False)
    for i, name in enumerate(("base", "one", "two")):
        write_model(tmp_path / name, near(base, i) if i else base, vocab=words(), shards=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml({
        "merge_method": "dare_ties", "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in ("one", "two")],
        "parameters": {"weight": 0.6, "density": 0.5},
    }))  # fmt: skip
    return path


@pytest.fixture
def alone(recipe, tmp_path):
    merge(recipe, tmp_path / "alone" / "out")
    return all_bytes(tmp_path / "alone" / "out")


def test_the_bytes_are_those_of_one_process(recipe, alone, tmp_path):
    out = tmp_path / "out"
    done = ended([start(number, 3, "merge", recipe, "--out", out, "--json") for number in range(3)])
    assert [status for _, _, status in done] == [0, 0, 0], done
    assert all_bytes(out) == alone and not verify(out) and not (tmp_path / ".out.lapis").exists()
    result = json.loads(done[0][0])
    assert result["sha256"] and result["lost_to_rounding"] > 0 and result["tensors"]["merged"] == 21
    assert done[1][0] == done[2][0] == "", "the first one speaks for all"
    ((text, err, status),) = ended([start(1, 3, "merge", recipe, "--out", out)])  # comes when all is done
    assert status == 0 and all_bytes(out) == alone, (text, err)


def test_a_rank_that_dies_is_made_up_for_by_the_others(recipe, alone, tmp_path):
    out = tmp_path / "out"
    doomed = start(0, 2, "merge", recipe, "--out", out, dies="2")
    assert doomed.wait() == -signal.SIGKILL
    journal = tmp_path / ".out.lapis" / ".journal"
    assert (journal / "0.json").exists() and not (journal / "1.json").exists() and not out.exists()
    before = (journal / "0.json").stat().st_mtime_ns
    assert before
    ((_, err, status),) = ended([start(1, 2, "merge", recipe, "--out", out)])
    assert status == 0, err
    assert all_bytes(out) == alone


def test_a_rerun_by_one_process_goes_on_with_what_ranks_did(recipe, alone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert start(0, 2, "merge", recipe, "--out", out, dies="3").wait() == -signal.SIGKILL
    monkeypatch.setattr(ranks, "PART", 4000)
    made = []
    real = ranks.stream_part  # type: ignore[attr-defined]
    monkeypatch.setattr(ranks, "stream_part", lambda *given, **named: made.append(given[3]) or real(*given, **named))
    merge(recipe, out)
    assert all_bytes(out) == alone
    assert 0 < len(made) == len(ranks_parts(alone)) - 2, "what was done is not done again"


def ranks_parts(files):
    """How many parts of 4,000 bytes the one file of weights has."""
    raw = files["model.safetensors"]
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    parts, size = [], 0
    for name, entry in header.items():
        if name != "__metadata__":
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
            if size >= 4000:
                parts.append(name)
                size = 0
    return parts + ["rest"] * bool(size)


def test_what_a_power_cut_took_is_done_again(recipe, alone, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    assert start(0, 2, "merge", recipe, "--out", out, dies="3").wait() == -signal.SIGKILL
    file = tmp_path / ".out.lapis" / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) - 20 : len(data)] = bytes(20)
    head = 8 + int.from_bytes(data[:8], "little")
    data[head + 100 : head + 132] = bytes(32)  # in a part that was said to be done
    file.write_bytes(data)
    monkeypatch.setattr(ranks, "PART", 4000)
    merge(recipe, out)
    assert all_bytes(out) == alone
    assert any("are not what was written; done again" in record.message for record in caplog.records)


def test_inputs_that_changed_are_not_mixed(recipe, tmp_path):
    out = tmp_path / "out"
    assert start(0, 2, "merge", recipe, "--out", out, dies="3").wait() == -signal.SIGKILL
    tensors = near(weights(1, tied=False), 7)
    write_model(tmp_path / "other", tensors, vocab=words(), shards=2)
    for path in (tmp_path / "other").glob("*.safetensors"):
        path.rename(tmp_path / "two" / path.name)
    done = ended([start(number, 2, "merge", recipe, "--out", out) for number in range(2)])
    assert [status for *_, status in done] == [0, 0], done
    merge(recipe, tmp_path / "again" / "out")
    assert all_bytes(out) == all_bytes(tmp_path / "again" / "out")


def test_all_ranks_raise_what_one_met(tmp_path):
    base = weights(1, tied=False)
    bad = near(base, 1)
    bad["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    write_model(tmp_path / "base", base, vocab=words())
    write_model(tmp_path / "bad", bad, vocab=words())
    line, out = f"{tmp_path}/base + 0.5*({tmp_path}/bad - {tmp_path}/base)", tmp_path / "out"
    done = ended([start(number, 2, "merge", line, "--out", out) for number in range(2)])
    assert [status for *_, status in done] == [1, 1], done
    assert all("holds 1 NaN or Inf" in err for _, err, _ in done) and not out.exists()
    with pytest.raises(CheckpointError, match="holds 1 NaN or Inf"):
        merge(line, out)
    done = ended([start(number, 2, "merge", line, "--out", out, "--allow-nonfinite") for number in range(2)])
    assert [status for *_, status in done] == [0, 0], done


def test_a_graft_by_ranks_under_torchrun(trio, tmp_path):
    folders = trio(tied=False)
    roles = [word for role in ("base", "chat", "onto") for word in (f"--{role}", str(folders[role]))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lapis"]
    done = subprocess.run(
        [*command, "graft", *roles, "--out", str(tmp_path / "out"), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    graft(folders["base"], folders["chat"], folders["onto"], tmp_path / "alone" / "out")
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "alone" / "out")
    assert result["lost_to_rounding"] >= 0


@pytest.mark.parametrize("bits", ["exact", "1"])
def test_a_delta_by_ranks_one_of_which_dies(trio, tmp_path, bits):
    folders = trio(tied=False)
    command = ["delta", "extract", "--base", folders["base"], "--chat", folders["chat"], "--bits", bits, "--no-smoke"]
    doomed = start(0, 3, *command, "--out", tmp_path / "out", dies="delta 2")
    assert doomed.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = ended([start(number, 3, *command, "--out", tmp_path / "out", "--json") for number in (0, 1)])
    assert [status for *_, status in done] == [0, 0], done
    alone = delta_extract(folders["base"], folders["chat"], tmp_path / "alone" / "out", bits)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "alone" / "out")
    result = json.loads(done[0][0])
    assert result.get("relative_error") in (alone.relative_error, None)  # None: it came when the other had done all
    assert result["errors"] == alone.errors and len(alone.errors) > 10
    assert result["base"] == alone.base and result["sha256"] == alone.sha256


@pytest.fixture
def compared(trio, monkeypatch):
    folders = trio(tied=False)
    monkeypatch.setattr(diff_ranks, "PART", 1000)
    return partial(diff, folders["base"], folders["chat"], rows=True, spectra=True)


def test_a_difference_by_ranks_one_of_which_dies(compared, tmp_path, monkeypatch):
    alone = compared(out=tmp_path / "alone" / "out")
    assert alone.to_json() == compared().to_json()
    monkeypatch.setenv("WORLD_SIZE", "2")
    real, calls = Comparison.measure, []

    def measure(self, pairs):
        calls.append(pairs[0].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, pairs)

    monkeypatch.setattr(Comparison, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        compared(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert compared(out=tmp_path / "out").to_json() == alone.to_json()
    assert len(calls) == len(set(calls)) + 1 > 5, "what was measured is not measured again"
    late = compared(out=tmp_path / "out")
    assert late.to_json() == alone.to_json() and not late.bytes_read
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "alone" / "out")
    assert json.loads((tmp_path / "out" / "diff.json").read_bytes())["tensors"] == alone.tensors
    assert not verify(tmp_path / "out") and not (tmp_path / ".out.lapis").exists()


def test_ranks_keep_no_difference_that_says_nothing(tmp_path, monkeypatch):
    base = weights(1)
    turned = {n: torch.stack([-t.view(-1, 2)[:, 1], t.view(-1, 2)[:, 0]], 1).view(t.shape) for n, t in base.items()}
    for name, tensors in (("one", base), ("other", turned)):
        write_model(tmp_path / name, tensors)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="not parent and child"):
        diff(tmp_path / "one", tmp_path / "other", out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.lapis").exists()


def test_an_output_that_is_there_is_refused_by_all(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = ended([start(number, 2, "merge", recipe, "--out", tmp_path / "out") for number in range(2)])
    assert all(status == 1 and "exists already" in err for _, err, status in done)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "mine.txt"]
    assert not (tmp_path / ".out.lapis").exists()
    done = ended([start(number, 2, "merge", recipe, "--out", tmp_path / "out", "--overwrite") for number in range(2)])
    assert [status for *_, status in done] == [0, 0] and not (tmp_path / "out" / "mine.txt").exists()
