"""Every call of every job: killed there, or failing; faults 60, 61, 63, 73, 74, 75 and 79 by number.

Commands run in forks of one process with faults.c in front of the C library. Here a few calls of each job are tried,
the last ones of a commit among them; all are tried by `make reliability` (benchmarks/reliability.py).
"""

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from .aimed import CHANGING, ERRORS, Forks, digest, fail_each, kill_each
from .jobs import jobs, lookers

WRITERS = ("graft over an old output", "fuse", "data pack", "tokenizer train", "train")
LOOKERS = ("inspect", "eval")


@pytest.mark.parametrize("name", WRITERS)
def test_faults_60_61_73_74_and_79_killed_at_calls(forks: Forks, place: Path, name: str) -> None:
    before = digest(place / "inputs")
    job = jobs(forks, place)[name]()
    kill_each(job, step=40, last=7)
    assert not job.wrong and job.kills > 6
    assert digest(place / "inputs") == before


@pytest.mark.parametrize("name", [*WRITERS, *LOOKERS])
def test_faults_63_and_75_calls_that_fail(forks: Forks, place: Path, name: str) -> None:
    before = digest(place / "inputs")
    job = {**jobs(forks, place), **lookers(forks, place)}[name]()
    fail_each(job, step=60)
    assert not job.wrong and job.errors > 0
    assert digest(place / "inputs") == before


@pytest.mark.parametrize("name", ["graft over an old output", "data pack"])
@pytest.mark.parametrize("kind", ["lock", "allocate", "direct", "exchange"])
def test_a_file_system_without_something_gives_the_same(forks: Forks, place: Path, name: str, kind: str) -> None:
    """Network disks, exFAT, overlays: every call of a kind fails, the job does without, and says so once."""
    job = jobs(forks, place)[name]()
    tried = {}
    for code in [code for code in ERRORS[kind] if code not in (errno.EIO, errno.ENOSPC)]:
        job.prepare()
        ended = job.run(-1, code, [kind])
        assert ended.status == 0 and job.seen() == job.after, (code, ended.told)
        assert not [path for path in job.folder.iterdir() if path.name.startswith(".")]
        tried[code] = ended.told.count("note: this file system")
    met = kind in {found for found, _ in job.calls(tuple(ERRORS))}
    assert set(tried.values()) == {int(met)}, tried


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("graft", ("--scale", "0.5"), "a merge of the same inputs with other settings"),
        ("graft", ("--base", "../inputs/onto"), "another merge (base ../inputs/base, chat ../inputs/chat, onto"),
        ("data pack", ("--length", "16"), "a packing of the same inputs with other settings"),
        ("data pack", ("pack", "../inputs/other.txt"), "another packing (../inputs/text.txt)"),
    ],
)
def test_another_jobs_staging_folder_is_left_alone(
    forks: Forks, place: Path, name: str, other: Sequence[str], says: str
) -> None:
    """An interrupted job's own command goes on; another one with the same --out is refused, and touches nothing."""
    job = jobs(forks, place)[name]()
    job.prepare()
    assert job.run(30, kinds=CHANGING).was_killed
    before = digest(job.folder)
    arguments = list(job.arguments)
    if other[0] in arguments:
        arguments[arguments.index(other[0]) + 1] = other[1]
    else:
        arguments += other
    refused = forks.run(arguments, job.folder)
    assert refused.status == 1 and says in refused.told and refused.told.count("\n") == 1, refused.told
    assert "finish it with its own command, remove that folder to give it up" in refused.told
    assert digest(job.folder) == before
    assert job.run().status == 0 and job.seen() == job.after


@pytest.mark.parametrize("jump", [10**9, -(10**6)])
def test_fault_71_a_clock_that_jumps(forks: Forks, place: Path, jump: int) -> None:
    """Decades to and fro at each look at the wall clock: the same training, and a packing by two."""
    for name in ("train", "data pack by two"):
        job = jobs(forks, place)[name]()
        job.prepare()
        ended = forks.run(job.arguments, job.folder, FAULT_CLOCK=jump)
        assert ended.status == 0 and job.seen() == job.after, ended.told


def test_fault_72_memory_that_runs_out_names_the_lever(forks: Forks, place: Path) -> None:
    """A real limit on memory, which the step of a large batch meets."""
    script = (
        "import resource\nfrom pathlib import Path\nfrom lapis.cli.main import main\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "limit = pages * resource.getpagesize() + 300_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "main(['train', '../inputs/job.yaml', 'batch=16384', 'out=large'])\n"
    )
    folder = place / "work"
    folder.mkdir(exist_ok=True)
    ended = forks.run(["-c", script], folder)
    assert ended.status == 1 and "Traceback" not in ended.told, ended.told
    assert "out of memory; raise accumulate" in ended.told.splitlines()[-1], ended.told
    assert not (folder / "large").exists() and not (folder / ".large.lapis").exists()


@pytest.mark.parametrize("name", [*WRITERS, "merge", "tokenizer extend", "report", "diff", "plan"])
def test_fault_76_a_read_only_place_is_refused_at_once(forks: Forks, place: Path, name: str) -> None:
    """A file system that is read-only: before weights are read, text is packed, or a step is trained, of which lines
    would be on standard error."""
    job = jobs(forks, place)[name]()
    job.prepare()
    kinds = "open,direct,mkdir,unlink,rename,exchange,write,truncate,chmod"
    armed = {"FAULT_UNDER": f"{job.folder}", "FAULT_KINDS": kinds, "FAULT_AT": -1, "FAULT_ERRNO": errno.EROFS}
    ended = forks.run(job.arguments, job.folder, **armed)
    assert ended.status == 1 and ended.told.count("\n") == 1, ended.told
    option = {"diff": "--html", "train": "out="}.get(name, "--out")
    assert f"cannot be written: Read-only file system; give another {option}" in ended.told


def test_fault_74_what_a_kill_leaves_beside_a_part_goes(forks: Forks, tmp_path: Path) -> None:
    """A tour, or an adaptation, makes a part only where it is not there: then nobody else looks at what lies beside."""
    script = (
        "from pathlib import Path\nfrom lapis.checkpoint.commit import commit\n"
        "from lapis.checkpoint.staging import is_made\n"
        "if not is_made(Path('part')):\n"
        "    with commit(Path('part')) as staging:\n        (staging.path / 'file').write_text('whole')\n"
    )
    left = []
    for number in range(1, 60):
        armed = {"FAULT_UNDER": f"{tmp_path}/", "FAULT_KINDS": ",".join(CHANGING), "FAULT_AT": number}
        ended = forks.run(["-c", script], tmp_path, **armed)
        left.append(len(list(tmp_path.iterdir())))
        assert forks.run(["-c", script], tmp_path).status == 0
        assert [path.name for path in tmp_path.iterdir()] == ["part"], number
        assert (tmp_path / "part" / "file").read_text() == "whole"
        shutil.rmtree(tmp_path / "part")
        if not ended.was_killed:
            break
    assert left.count(2) >= 3, "both the part and its staging folder were there"


def test_a_file_cut_by_a_kill_before_its_last_trim(forks: Forks, tmp_path: Path) -> None:
    """Killed between the last padded write and the truncation: the rerun trims, and the file has its size."""
    script = (
        "from pathlib import Path\nfrom lapis.weights.engine.writer import Writer\n"
        "done = Path('done')\nstart = int(done.read_text()) if done.exists() else 0\n"
        "writer = Writer(Path('file'), 10_001, start)\nwriter.write(b'x' * (10_001 - start))\n"
        "done.write_text('10001')\nwriter.close()\n"
    )
    armed = {"FAULT_UNDER": f"{tmp_path}/", "FAULT_KINDS": "truncate", "FAULT_AT": 1}
    assert forks.run(["-c", script], tmp_path, **armed).was_killed
    assert forks.run(["-c", script], tmp_path).status == 0
    assert (tmp_path / "file").read_bytes() == b"x" * 10_001


def test_a_block_that_is_read_back_by_halves(forks: Forks, tmp_path: Path) -> None:
    """A rerun begins in the middle of a block, whose beginning it reads back."""
    script = (
        "from pathlib import Path\nfrom lapis.weights.engine.writer import Writer\n"
        "Path('file').write_bytes(b'a' * 3000)\n"
        "writer = Writer(Path('file'), 9000, 3000)\nwriter.write(b'b' * 6000)\nwriter.close()\n"
    )
    armed = {"FAULT_UNDER": f"{tmp_path}/", "FAULT_KINDS": "read", "FAULT_AT": -1, "FAULT_ERRNO": -1}
    assert forks.run(["-c", script], tmp_path, **armed).status == 0
    assert (tmp_path / "file").read_bytes() == b"a" * 3000 + b"b" * 6000


@pytest.mark.parametrize("size", [3000, (4 << 20) + 5000, 8 << 20])
def test_what_was_written_outlives_a_kill_in_its_blocks(forks: Forks, tmp_path: Path, size: int) -> None:
    """The process ends at once, with nothing of a writer's end done; the rerun goes on behind what it had written."""
    script = (
        "import os\nfrom pathlib import Path\nfrom lapis.weights.engine.writer import Writer, recover\n"
        f"file, blocks, size = Path('file'), Path('blocks'), {size}\n"
        "def writer(start):\n    return Writer(file, size + 10, start, blocks=blocks)\n"
        "data = bytes(i * i % 251 for i in range(size))\n"
        "if not blocks.exists():\n"
        "    killed = writer(0)\n    killed.write(data[:2000])\n    killed.write(data[2000:])\n    os._exit(9)\n"
        "recover(file, blocks)\nassert file.read_bytes()[:size] == data\n"
        "again = writer(size)\nagain.write(b'0123456789')\nagain.close()\n"
        "assert file.read_bytes() == data + b'0123456789'\n"
    )
    assert forks.run(["-c", script], tmp_path).status == 9
    assert forks.run(["-c", script], tmp_path).status == 0
