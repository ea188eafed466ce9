"""The engine: same bytes whatever the tiles, the threads, the interruptions; nothing half-done is ever visible."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.staging import Staging, staging_of
from lapis.errors import CheckpointError, OutputError
from lapis.weights.engine import stream as engine
from lapis.weights.engine import tiles
from lapis.weights.engine.journal import NAME, Journal
from lapis.weights.engine.sources import RowsOf, Stored
from lapis.weights.engine.stream import Kernel, Output, stream
from lapis.weights.graft.graft import graft
from lapis.weights.graft.layout import GraftPlan

ROOT = Path(__file__).parents[2]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Exception):
    pass


@pytest.fixture
def small(monkeypatch):
    """Tiles of 64 elements and a journal line for every 256 bytes, so that small models have many of both."""
    monkeypatch.setattr(tiles, "TILE", 64)
    monkeypatch.setattr(engine, "RECORD", 256)


def stop_after(share: float):
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise Stop

    return progress


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("shards", [1, 3])
def test_fault_73_an_interrupted_graft_gives_the_same_bytes(trio, tmp_path, small, shards, share):
    models = trio(shards=shards, tied=False)
    graft(**models, out=tmp_path / "whole", scale=0.5)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        graft(**models, out=out, scale=0.5, progress=stop_after(share))
    assert not out.exists()
    result = graft(**models, out=out, scale=0.5)
    assert result.bytes_resumed > share * (result.bytes_written + result.bytes_resumed) - 1000
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not staging_of(out).exists()


def test_damage_to_finished_ranges_is_found_and_redone(trio, tmp_path, small):
    models, out = trio(), tmp_path / "out"
    graft(**models, out=tmp_path / "whole")
    with pytest.raises(Stop):
        graft(**models, out=out, progress=stop_after(0.8))
    journal = staging_of(out) / NAME
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    done = [line["done"] for line in lines[1:]]
    with (staging_of(out) / "out" / "model.safetensors").open("r+b") as file:
        file.seek(done[len(done) // 2] + 1)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    journal.write_bytes(journal.read_bytes()[:-7])  # and a line that a kill has cut
    result = graft(**models, out=out)
    assert result.bytes_resumed == done[len(done) // 2]
    assert files_of(out) == files_of(tmp_path / "whole")


def test_another_job_is_refused_until_the_folder_is_removed(trio, tmp_path, small):
    models, out = trio(), tmp_path / "out"
    graft(**models, out=tmp_path / "whole", scale=0.5)
    with pytest.raises(Stop):
        graft(**models, out=out, scale=1.0, progress=stop_after(0.8))
    before = files_of(staging_of(out) / "out")
    with pytest.raises(OutputError, match="a merge of the same inputs with other settings that was interrupted"):
        graft(**models, out=out, scale=0.5)
    assert files_of(staging_of(out) / "out") == before
    shutil.rmtree(staging_of(out))
    assert graft(**models, out=out, scale=0.5).bytes_resumed == 0
    assert files_of(out) == files_of(tmp_path / "whole")


def replaced(file: Path, tensors) -> None:
    """Another file of the same size in its place, with its times restored, as cp -p, rsync and tar do."""
    before = file.stat()
    save_file(tensors, file.with_name("new"), metadata={"format": "pt"})
    assert file.with_name("new").stat().st_size == before.st_size
    file.with_name("new").replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("role", ["base", "chat", "onto"])
@pytest.mark.parametrize("shards", [1, 3])
def test_fault_32_an_input_replaced_between_two_runs(trio, tmp_path, small, caplog, role, shards):
    """Never a mix of two models: what the interrupted run made of the other one is made anew, aloud."""
    models, out = trio(shards=shards, tied=False), tmp_path / "out"
    with pytest.raises(Stop):
        graft(**models, out=out, scale=0.5, progress=stop_after(0.7))
    for file in Path(models[role]).glob("*.safetensors"):
        tensors = load_file(file)
        replaced(file, {name: tensor + 0.01 for name, tensor in tensors.items()})
    with caplog.at_level("WARNING", "lapis"):
        result = graft(**models, out=out, scale=0.5)
    graft(**models, out=tmp_path / "whole", scale=0.5)
    assert files_of(out) == files_of(tmp_path / "whole")
    assert result.bytes_resumed < 0.6 * (result.bytes_resumed + result.bytes_written)
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert ".safetensors is another file than when this was interrupted" in logged


def test_inputs_that_were_copied_are_gone_on_with(trio, tmp_path, small, caplog, monkeypatch):
    """A whole folder that went to another machine: what was read is compared, it is the same, and nothing is lost."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    models, out = {}, Path("out")
    for role, folder in trio(tied=False).items():
        shutil.copytree(folder, first / role)
        models[role] = role
    monkeypatch.chdir(first)
    graft(**models, out=tmp_path / "whole", scale=0.5)
    with pytest.raises(Stop):
        graft(**models, out=out, scale=0.5, progress=stop_after(0.7))
    shutil.copytree(first, second)
    monkeypatch.chdir(second)
    with caplog.at_level("WARNING", "lapis"):
        result = graft(**models, out=out, scale=0.5)
    assert result.bytes_resumed > 0.5 * result.bytes_written
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "is another file" in logged and f"{result.bytes_resumed:,} bytes of what was done are gone on with" in logged
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_part_that_was_replaced_is_made_anew_from_there(trio, tmp_path, small):
    """And a rerun that is killed again goes on from what both agree on."""
    models, out = trio(tied=False), tmp_path / "out"
    with pytest.raises(Stop):
        graft(**models, out=out, scale=0.5, progress=stop_after(0.8))
    file = Path(models["chat"]) / "model.safetensors"
    tensors = load_file(file)
    name = max(open_checkpoint(models["chat"]).index.items(), key=lambda item: item[1].start)[0]
    middle = sorted(tensors)[len(tensors) // 2]
    replaced(file, {n: tensor + 0.01 if n in (name, middle) else tensor for n, tensor in tensors.items()})
    with pytest.raises(Stop):
        graft(**models, out=out, scale=0.5, progress=stop_after(0.9))
    assert 0 < graft(**models, out=out, scale=0.5).bytes_resumed
    graft(**models, out=tmp_path / "whole", scale=0.5)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_another_tokenizer_between_two_runs_is_another_job(trio, tmp_path, small):
    """Which rows belong together comes from the tokenizers, which no weight file shows."""
    models, out = trio(tied=False), tmp_path / "out"
    with pytest.raises(Stop):
        graft(**models, out=out, embeddings="add", progress=stop_after(0.8))
    file = Path(models["chat"]) / "tokenizer.json"
    text = file.read_text()
    assert '"w1"' in text and '"w2"' in text
    file.write_text(text.replace('"w1"', '"swap"').replace('"w2"', '"w1"').replace('"swap"', '"w2"'))
    with pytest.raises(OutputError, match="holds a merge of the same inputs with other settings"):
        graft(**models, out=out, embeddings="add")


def test_saved_training_at_the_same_place_is_not_swept_away(trio, tmp_path):
    out = tmp_path / "out"
    (staging_of(out) / ".journal" / "step-100").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds a training that was interrupted"):
        graft(**trio(), out=out)
    assert (staging_of(out) / ".journal" / "step-100").is_dir()


def test_faults_73_74_and_79_killed_at_random_moments(tmp_path):
    """The short version of benchmarks/kill.py, which kills 200 times."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill.py", "--rounds", "5", "--seed", "3"],
        capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] == result["rounds"] and result["wrong_visible"] == 0
    assert list(tmp_path.iterdir()) == []


def test_fault_75_a_full_disk_is_predicted(trio, tmp_path, monkeypatch):
    monkeypatch.setattr(GraftPlan, "disk_bytes", property(lambda self: 10**18))
    with pytest.raises(OutputError, match="are needed"):
        graft(**trio(), out=tmp_path / "out")


def test_fault_75_a_disk_that_fills_up_leaves_nothing_visible(trio, tmp_path):
    """A limit on file size stands in for the full disk; the kernel answers in the same place."""
    models = trio()
    script = (
        "import resource, signal, sys; from lapis.cli.main import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        "main(sys.argv[1:])"
    )
    command = ["graft", "--out", str(tmp_path / "out"), "--no-smoke"]
    for role, folder in models.items():
        command += [f"--{role}", str(folder)]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 1 and "full" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_fault_76_an_unwritable_place_is_refused_before_work(trio):
    seen = []
    with pytest.raises(OutputError):
        graft(**trio(), out="/proc/lapis-out", progress=lambda *_: seen.append(1))
    assert not seen


def test_faults_77_and_78_the_output_is_an_input_or_exists(trio, tmp_path):
    models = trio()
    for role in models:
        with pytest.raises(OutputError, match="is the input"):
            graft(**models, out=models[role], overwrite=True)
    graft(**models, out=tmp_path / "out", scale=0.5)
    (tmp_path / "out" / "model-00001-of-00001.safetensors").write_bytes(b"stale")
    before = files_of(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        graft(**models, out=tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    graft(**models, out=tmp_path / "out", overwrite=True)
    graft(**models, out=tmp_path / "clean")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")  # fault 79: nothing stale remains


def test_fault_80_a_second_writer_is_refused(trio, tmp_path):
    models, out = trio(), tmp_path / "out"
    refused = []

    def second(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(OutputError, match="another lapis is writing"):
                graft(**models, out=out)
            refused.append(True)

    graft(**models, out=out, progress=second)
    assert refused and open_checkpoint(out)


@pytest.mark.parametrize("change", ["touched", "cut", "written"])
def test_fault_32_an_input_that_changes_while_it_is_read(trio, tmp_path, small, change):
    """It is told by name; a file that is cut ends nothing, since it is read and never mapped."""
    models = trio()

    def spoil(done: int, total: int) -> None:
        path = models["chat"] / "model.safetensors"
        if change == "touched":
            os.utime(path, ns=(time.time_ns(), time.time_ns()))
        elif change == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            with path.open("r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"spoiled!")

    with pytest.raises(CheckpointError, match=r"chat.*model\.safetensors.*changed while it was being read"):
        graft(**models, out=tmp_path / "out", progress=spoil)
    assert not (tmp_path / "out").exists()


def double(tile, _state):
    return tile.inputs[0] * 2, tile.inputs[0]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6),
    tile=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_shapes_and_tiles(tmp_path_factory, shapes, tile, dtype):
    folder = tmp_path_factory.mktemp("model")
    given_ = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    save_file(given_, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    model = open_checkpoint(folder)
    outputs = [
        Output(n, dtype, tuple(t.shape), (Stored("a", model, n),), Kernel(double) if i % 2 else None)
        for i, (n, t) in enumerate(given_.items())
    ]
    before, tiles.TILE = tiles.TILE, tile
    try:
        (folder / "work").mkdir()
        account = stream(
            {"out.safetensors": outputs}, folder / "work", Journal(Staging(folder / "work", folder), "job")
        )
    finally:
        tiles.TILE = before
    made = load_file(folder / "work" / "out.safetensors")
    for i, (name, tensor) in enumerate(given_.items()):
        assert torch.equal(made[name], (tensor.float() * 2).to(dtype) if i % 2 else tensor)
        if i % 2 and tensor.numel():
            assert account.figures[name].delta_sq == pytest.approx(float((tensor.double() ** 2).sum()), rel=1e-5)


def test_passes_see_every_tile_before_the_result(tmp_path, small):
    """A softmax over the whole tensor: the maximum, then the sum, then the result."""
    values = {f"t{i}": torch.randn(50 * i + 3) for i in range(6)}
    save_file(values, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = open_checkpoint(tmp_path)

    def largest(tile, _state):
        return float(tile.inputs[0].max())

    def total(tile, state):
        return float((tile.inputs[0] - state["max"]).exp().sum())

    def fold(step, partials, state):
        return {"max": max(partials)} if step == 0 else {**state, "sum": sum(partials)}

    def apply(tile, state):
        return (tile.inputs[0] - state["max"]).exp() / state["sum"], None

    kernel = Kernel(apply, (largest, total), fold)
    outputs = [Output(n, torch.float32, tuple(t.shape), (Stored("a", model, n),), kernel) for n, t in values.items()]
    (tmp_path / "work").mkdir()
    stream({"out.safetensors": outputs}, tmp_path / "work", Journal(Staging(tmp_path / "work", tmp_path), "job"))
    made = load_file(tmp_path / "work" / "out.safetensors")
    for name, tensor in values.items():
        torch.testing.assert_close(made[name], tensor.softmax(0))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(-1, 6), min_size=1, max_size=12), cut=st.integers(1, 9))
def test_rows_in_any_order_and_any_tiles(tmp_path_factory, rows, cut):
    folder = tmp_path_factory.mktemp("rows")
    tensor = torch.arange(21.0).view(7, 3)
    save_file({"t": tensor}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    source = RowsOf(Stored("a", open_checkpoint(folder), "t"), rows)
    made = torch.full((len(rows) * 3,), 99.0)
    for first in range(0, len(made), cut):
        last = min(first + cut, len(made))
        source.read(first, last, memoryview(made[first:last].view(torch.uint8).numpy()))
    expected = torch.stack([tensor[row] if row >= 0 else torch.zeros(3) for row in rows])
    assert torch.equal(made.view(-1, 3), expected)
