"""Interrupted equals uninterrupted, byte for byte on one thread; and what is lost or changed is told."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.checkpoint.commit import sha256_of
from lapis.checkpoint.tensor_file import read_tensors, write_tensors
from lapis.config import load_yaml, override
from lapis.errors import DataError, OutputError, TrainingError
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.changes import differences
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.loop.state import CheckpointJournal, newest_of
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.run import read_settings, run

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=12, batch=4, lr=1e-2, warmup=2, log_every=3, precision="float32", threads=1, sample_every=0, save_every=3,
    keep=10,
)  # fmt: skip


class StopError(Exception):
    """Ends a run from within, as a kill would."""


class Heard(Silent):
    """Keeps the notes."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_at = stop_at

    def row(self, row: Any) -> None:
        if row["step"] == self.stop_at:
            raise StopError

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def objective(tokenizer: Tokenizer, documents: list[Document]) -> Causal:
    return Causal(tokenizer, documents, context=32)


@pytest.fixture
def stopped(new_model: Make, objective: Causal, tmp_path: Path) -> Path:
    """A run that broke off after step 9, before it was saved; its journal."""
    with pytest.raises(StopError):
        train(new_model(), objective, CONFIG, tmp_path / "out", watch=Heard(stop_at=9))
    journal = tmp_path / ".out.lapis" / ".journal"
    assert [path.name for path in CheckpointJournal(journal).checkpoints] == ["step-6", "step-3"]
    return journal


def resumed(
    make: Make, objective: Any, out: Path, config: TrainConfig = CONFIG, **more: Any
) -> tuple[bytes, list[str]]:
    heard = Heard()
    train(make(), objective, config, out, watch=heard, **more)
    return (out / "model.safetensors").read_bytes(), heard.notes


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted(new_model: Make, objective: Causal, tmp_path: Path, optimizer: Any) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole, _ = resumed(new_model, objective, tmp_path / "whole", config)
    for stop in (3, 9):  # twice, at other places
        with pytest.raises(StopError):
            train(new_model(), objective, config, tmp_path / "out", watch=Heard(stop_at=stop))
    parts, notes = resumed(new_model, objective, tmp_path / "out", config)
    assert parts == whole
    assert "going on from" in notes[0] and "step-6" in notes[0]
    curve = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    expected = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert curve == expected


def test_the_curve_does_not_tell_when_a_run_was_saved(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    """Saves and samples come by the clock, where nobody counts them in steps."""
    config = replace(CONFIG, log_every=5)
    resumed(new_model, objective, tmp_path / "once", replace(config, save_every=100))
    resumed(new_model, objective, tmp_path / "often", replace(config, save_every=2, sample_every=1e-9))
    with pytest.raises(StopError):
        train(new_model(), objective, replace(config, save_every=4), tmp_path / "cut", watch=Heard(stop_at=10))
    resumed(new_model, objective, tmp_path / "cut", replace(config, save_every=3))
    curves = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("once", "often", "cut")]
    assert curves[0] == curves[1] == curves[2]
    assert [json.loads(line)["step"] for line in curves[0].splitlines()] == [5, 10, 12]
    assert any("sample" in row for row in json.loads((tmp_path / "often" / "times.json").read_text())["curve"])


def test_fault_64_damaged_newest_falls_back_aloud(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    weights = stopped / "step-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    parts, notes = resumed(new_model, objective, tmp_path / "out")
    assert "step-6 is damaged (model.safetensors)" in notes[0] and "step-3" in notes[1]
    assert parts == resumed(new_model, objective, tmp_path / "whole")[0]


def test_a_damaged_checkpoint_is_never_the_last_good(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    """Neither named as that, nor kept in place of a whole one."""
    weights = stopped / "step-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    journal = CheckpointJournal(stopped)
    assert journal.newest() == stopped / "step-3" and journal.last_good().endswith("step-3")
    assert newest_of(tmp_path / "out") == stopped / "step-3" and (stopped / "damaged-step-6").is_dir()
    with pytest.raises(StopError):
        train(new_model(), objective, replace(CONFIG, keep=1, save_every=4), tmp_path / "out", watch=Heard(stop_at=6))
    assert [path.name for path in stopped.glob("*step-*")] == ["step-4"]


def test_an_allowed_change_of_length_outlives_a_kill(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    longer, allow = replace(CONFIG, steps=20), {"allow_change": ("steps",)}
    with pytest.raises(StopError):  # before its first checkpoint
        train(new_model(), objective, longer, tmp_path / "out", watch=Heard(stop_at=9), **allow)
    assert not (stopped / "step-9").exists()
    resumed(new_model, objective, tmp_path / "out", longer)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 20


def test_fault_64_all_damaged_is_refused(stopped: Path, new_model: Make, objective: Causal, tmp_path: Path) -> None:
    for folder in ("step-3", "step-6"):
        (stopped / folder / "state.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"is whole \(step-6: state.json; step-3: state.json damaged\); start anew"):
        resumed(new_model, objective, tmp_path / "out")
    assert resumed(new_model, objective, tmp_path / "out", fresh=True)[1] == []


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_fault_64_a_damaged_record_is_read_elsewhere(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path, content: str | None
) -> None:
    """Each checkpoint says what the run was begun with, too."""
    (stopped / "run.json").unlink() if content is None else (stopped / "run.json").write_text(content)
    with pytest.raises(TrainingError, match=r"differs: config.lr was 0.01, is 0.02"):
        resumed(new_model, objective, tmp_path / "out", replace(CONFIG, lr=0.02))
    (stopped / "run.json").unlink()
    parts, notes = resumed(new_model, objective, tmp_path / "out")
    assert "run.json is lost or damaged; " in notes[0] and "step-6/state.json says what" in notes[0]
    assert parts == resumed(new_model, objective, tmp_path / "whole")[0]


def test_a_checkpoint_of_a_newer_lapis_is_refused(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    """As a newer lapis would write it: whole, and of another format."""
    place, manifest = stopped / "step-6" / "state.json", stopped / "step-6" / "lapis-manifest.json"
    place.write_text(place.read_text().replace('"format": 1', '"format": 2'))
    listed = json.loads(manifest.read_text())
    listed["files"]["state.json"] = {"size": place.stat().st_size, "sha256": sha256_of(place)}
    manifest.write_text(json.dumps(listed))
    with pytest.raises(TrainingError, match=r"step-6 is a checkpoint of format 2; this lapis reads format 1; install"):
        resumed(new_model, objective, tmp_path / "out")


def test_fault_61_killed_while_saving_uses_the_checkpoint_before(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    """What a kill within a save leaves: a hidden folder with some of the files, cut."""
    half = stopped / ".step-9.lapis"
    shutil.copytree(stopped / "step-6", half)
    (half / "lapis-manifest.json").unlink()
    os.truncate(half / "optimizer.safetensors", 100)
    parts, notes = resumed(new_model, objective, tmp_path / "out")
    assert "step-6" in notes[0] and parts == resumed(new_model, objective, tmp_path / "whole")[0]


@pytest.mark.parametrize("file", ["optimizer.safetensors", "rng.safetensors"])
def test_fault_65_lost_optimizer_or_rng_is_refused(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path, file: str
) -> None:
    (stopped / "step-6" / file).unlink()
    with pytest.raises(TrainingError, match=rf"step-6 lacks {file}"):
        resumed(new_model, objective, tmp_path / "out")


def test_fault_68_changed_config_is_refused_with_the_difference(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"differs: config.lr was 0.01, is 0.02; config.steps was 12, is 13"):
        resumed(new_model, objective, tmp_path / "out", replace(CONFIG, lr=0.02, steps=13))
    resumed(new_model, objective, tmp_path / "out", replace(CONFIG, save_every=5, keep=1, log_every=2))


def test_a_changed_list_is_told_by_its_ends() -> None:
    lines = [change.line for change in differences({"tokens": [*range(40)]}, {"tokens": [*range(30)]})]
    assert lines == ["tokens was [0, ..., 39] of 40, is [0, ..., 29] of 30"]
    alike = differences({"tokens": [1, 2, 3, 4, 5]}, {"tokens": [1, 2, 9, 4, 5]})
    assert alike[0].line == "tokens was [1, ..., 5] of 5, is [1, ..., 5] of 5, with others between"


def test_fault_59_changed_data_is_refused(
    stopped: Path, new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"data was .* is "):
        resumed(new_model, Causal(tokenizer, documents[:-1], context=32), tmp_path / "out")


def test_another_model_to_start_from_is_refused(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    def other() -> Transformer:
        model = new_model()
        with torch.no_grad():
            model.embed.weight[0, 0] += 1
        return model

    with pytest.raises(TrainingError, match="model was"):
        resumed(other, objective, tmp_path / "out")


def test_fault_71_a_clock_that_jumps_has_no_effect(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.cycle((0.0, 4e9, 1e9))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    assert resumed(new_model, objective, tmp_path / "out")[0] == resumed(new_model, objective, tmp_path / "whole")[0]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A limit on the size of files, in bytes, which stands in for the disk's end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_fault_63_full_disk_keeps_the_old_checkpoint(
    stopped: Path, new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    """The weights are the first file that is too large."""
    model = stopped / "step-6" / "model.safetensors"
    with files_of_at_most(model.stat().st_size // 2):
        with pytest.raises(OutputError, match=r"the disk is full .*; the last good checkpoint is .*step-6"):
            resumed(new_model, objective, tmp_path / "out")
    parts, notes = resumed(new_model, objective, tmp_path / "out")
    assert "step-6" in notes[0] and parts == resumed(new_model, objective, tmp_path / "whole")[0]


def test_fault_63_a_full_disk_is_no_damaged_record(stopped: Path) -> None:
    """run.json is written anew from a checkpoint; "start anew" would be the wrong thing to say where that fails."""
    (stopped / "run.json").unlink()
    with files_of_at_most(16), pytest.raises(OutputError, match=r"run\.json: the disk is full"):
        CheckpointJournal(stopped).earlier({})


def test_tensors_go_out_and_back(tmp_path: Path) -> None:
    tensors = {"b/x": torch.randn(3, 2), "a": torch.tensor(5.0), "c": torch.arange(4, dtype=torch.uint8)}
    tensors["d"] = torch.randn(2, 3).bfloat16().T
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "t.safetensors")
    assert set(back) == set(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)


# --- a process of its own, and signals

YAML = """
objective: causal
new: {dim: 32, layers: 2, heads: 4, ffn_dim: 48, tied: true}
tokenizer: tok
data: texts.jsonl
context: 32
out: out
steps: 90
batch: 4
lr: 0.003
threads: 1
precision: float32
compile: "off"
save_every: 7
sample_every: 0
log_every: 10
"""


@pytest.fixture
def place(data_folder: Path) -> Path:
    (data_folder / "run.yaml").write_text(YAML)
    return data_folder


def start(place: Path, *settings: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "lapis", "train", "run.yaml", *settings],
        cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def test_fault_60_killed_and_run_again_gives_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = place / ".out.lapis" / ".journal"
    for step, late in ((14, 0.0), (42, 0.013)):  # right after a save, and somewhere between two
        process = start(place)
        wait_for(lambda step=step: any(int(p.name[5:]) >= step for p in journal.glob("step-*")), process)
        time.sleep(late)
        process.kill()
        process.communicate()
        assert not (place / "out").exists()
    process = start(place)
    _, error_text = process.communicate(timeout=60)
    assert process.returncode == 0 and "going on from" in error_text

    monkeypatch.chdir(place)
    settings = override(load_yaml("run.yaml"), ["out=whole"])
    run(read_settings(settings, "run.yaml"), watch=Silent())
    of_run = {"times.json", "certificate.json", "certificate.html", "lapis-manifest.json"}
    names = {path.name for path in (place / "whole").iterdir()} - of_run
    assert {path.name for path in (place / "out").iterdir()} == names | of_run
    assert names > {"model.safetensors", "config.json", "tokenizer.json", "log.jsonl", "training.json"}
    for name in names:
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_62_a_stop_saves_and_says_how_to_go_on(place: Path, number: signal.Signals) -> None:
    process = start(place, "steps=100000", "save_every=1000000")
    log = place / ".out.lapis" / ".journal" / "run.json"
    wait_for(log.exists, process)
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(number)
    _, error_text = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert process.returncode == 1 and "Traceback" not in error_text
    last = error_text.strip().splitlines()[-1]
    assert f"stopped by {number.name} after step" in last and "Run the same command again to go on" in last
    (checkpoint,) = (place / ".out.lapis" / ".journal").glob("step-*")
    assert str(checkpoint.name) in last


def test_fault_59_rows_changed_on_the_disk(
    new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    """They are not gone on with, though path, size and time are what they were."""
    pack(documents, tokenizer, tmp_path / "rows", 32)
    with pytest.raises(StopError):
        rows = Causal(tokenizer, str(tmp_path / "rows"), context=32)
        train(new_model(), rows, CONFIG, tmp_path / "out", watch=Heard(stop_at=9))
    file = tmp_path / "rows" / "tokens-00000.bin"
    before, raw = file.stat(), bytearray(file.read_bytes())
    raw[0], raw[2] = raw[2], raw[0]
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"tokens-00000\.bin: is not as it was packed; restore it, or pack"):
        Causal(tokenizer, str(tmp_path / "rows"), context=32)
    raw[0], raw[2] = raw[2], raw[0]
    file.write_bytes(raw)
    rows = Causal(tokenizer, str(tmp_path / "rows"), context=32)
    heard = Heard()
    train(new_model(), rows, CONFIG, tmp_path / "out", watch=heard)
    assert any("going on from" in note for note in heard.notes)
