"""Every system call at the end of a job, killed once each; faults 60, 61, 63, 73, 74, 75 and 79 by number.

Jobs run in processes of their own with tests/reliability/faults.c in front of the C library. The long form, with more
jobs and random calls from the middle of long ones, is `make reliability`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .aimed import Job, build, digest, was_killed

LONG = bool(os.environ.get("LAPIS_RELIABILITY"))  # every call of every job, not only of its end

COMMIT = """
import sys
from lapis.checkpoint.commit import commit
with commit("out", kind="test", overwrite=len(sys.argv) > 1) as staging:
    (staging.path / "a").write_text("new")
    (staging.path / "sub").mkdir()
    (staging.path / "sub" / "b").write_text("new" * 100)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


def every_kill(job: Job, prepare: Callable[[], None], before: dict[str, str], after: dict[str, str]) -> int:
    """Kills the job at each of its calls: what is visible is the old or the new output, and a rerun gives the new."""
    out = job.folder / "out"
    prepare()
    assert job.run().returncode == 0
    count = len(job.calls())
    for number in range(1 if LONG else max(1, count - 12), count + 1):
        prepare()
        killed = job.run(at=number)
        seen = digest(out) if out.exists() else {}
        assert seen in (before, after), f"call {number} of {count}: {sorted(seen)}"
        if not was_killed(killed):
            continue  # fewer calls than in the first run
        again = job.run()
        assert again.returncode == 0 or (seen == after and "exists already" in again.stderr), again.stderr
        assert digest(out) == after, f"call {number} of {count}"
        left = [path.name for path in job.folder.iterdir() if path.name.startswith(".out")]
        assert not left, f"call {number} of {count} leaves {left}"
    return count


@pytest.mark.parametrize("overwrite", [False, True])
def test_faults_74_and_79_a_commit_killed_anywhere(library: Path, tmp_path: Path, overwrite: bool) -> None:
    folder = tmp_path / "place"
    script = tmp_path / "job.py"
    script.write_text(COMMIT)
    job = Job([str(script), *(["overwrite"] if overwrite else [])], folder, library)
    old = tmp_path / "old"
    old.mkdir()
    (old / "stale").write_text("old")

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if overwrite:
            shutil.copytree(old, folder / "out")

    prepare()
    assert job.run().returncode == 0
    after = digest(folder / "out")
    assert every_kill(job, prepare, digest(old) if overwrite else {}, after) > 15


def test_a_file_cut_by_a_kill_before_its_last_trim(library: Path, tmp_path: Path) -> None:
    """Killed between the last padded write and the truncation: the rerun trims, and the manifest tells the truth."""
    folder = tmp_path / "place"
    folder.mkdir()
    script = tmp_path / "job.py"
    script.write_text(
        "from pathlib import Path\nfrom lapis.weights.engine.writer import Writer\n"
        "done = Path('done')\nstart = int(done.read_text()) if done.exists() else 0\n"
        "writer = Writer(Path('file'), 10_001, start)\nwriter.write(b'x' * (10_001 - start))\n"
        "done.write_text('10001')\nwriter.close()\n"
    )
    job = Job([str(script)], folder, library)
    assert was_killed(job.run(at=1, kinds="truncate"))
    assert job.run().returncode == 0
    assert (folder / "file").read_bytes() == b"x" * 10_001


def test_faults_60_and_61_the_end_of_a_training_killed_anywhere(library: Path, tmp_path: Path) -> None:
    """From the last checkpoint on, every call that touches the output: nothing is lost, the result is the same."""
    folder = tmp_path / "place"
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 40)
    script = tmp_path / "job.py"
    script.write_text(
        "import torch, lapis\n"
        "from lapis.text.tokenizer.tokenizer import train_tokenizer\n"
        "from lapis.training.loop.progress import Silent\n"
        "tokenizer = train_tokenizer(['../text.txt'], 300)\n"
        "torch.manual_seed(0)\n"
        "shape = lapis.ModelConfig(dim=16, layers=1, heads=2, kv_heads=2, ffn_dim=16, vocab=tokenizer.vocab_size,\n"
        "                          context=32, tied=True)\n"
        "config = lapis.TrainConfig(steps=3, batch=2, save_every=2, seed=0, threads=1,\n"
        "                           precision='float32', compile='off')\n"
        "data = lapis.Causal(tokenizer, ['../text.txt'], context=16)\n"
        "lapis.train(lapis.Transformer(shape), data, config, 'out', watch=Silent())\n"
    )
    job = Job([str(script)], folder, library)

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    prepare()
    assert job.run().returncode == 0
    calls = job.calls()
    (tmp_path / "whole").mkdir()
    after = _without_seconds(folder / "out")
    last = len(calls) - 1 - calls[::-1].index("rename")  # the output's own rename
    tail = range(1 if LONG else last - 6, len(calls) + 1)
    lost = []
    for number in tail:
        prepare()
        if not was_killed(job.run(at=number)):
            continue
        out = folder / "out"
        seen = out.exists()
        again = job.run()
        if again.returncode != 0 and not (seen and "exists already" in again.stderr):
            lost.append((number, again.stderr[-200:]))
        elif _without_seconds(out) != after:
            lost.append((number, "other bytes"))
    assert not lost


def _without_seconds(out: Path) -> dict[str, str]:
    """Digests of a training's output, without what measures time."""
    files = digest(out)
    for name in ("lapis-manifest.json", "training.json", "log.jsonl"):
        files.pop(name, None)
    files["steps"] = str(json.loads((out / "training.json").read_text())["steps"])
    return files
