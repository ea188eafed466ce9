"""Written whole or not at all; faults 63, 70 and 73 to 80 by number, for whatever lapis writes."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lapis.checkpoint.commit import MANIFEST, commit, commit_file, verify
from lapis.checkpoint.staging import staging_of
from lapis.errors import OutputError


def fill(out: Path, text: str, **options: bool) -> None:
    with commit(out, **options) as staging:
        (staging.path / "a.txt").write_text(text)
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "b.txt").write_text(text * 2)


def test_a_commit_is_whole_and_can_be_verified(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    fill(out, "one")
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", MANIFEST, "sub"]
    assert verify(out) == []
    (out / "sub" / "b.txt").write_text("oneonE")
    assert verify(out) == ["sub/b.txt"]
    assert not staging_of(out).exists()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), commit(tmp_path / "out") as staging:
        (staging.path / "a").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_resumable_job_finds_its_work_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), commit(out, resumable=True) as staging:
        (staging.path / "half").write_text("x")
        (staging.root / ".journal").write_text("1")
        raise RuntimeError
    assert not out.exists()
    with commit(out, resumable=True) as staging:
        assert not staging.fresh and (staging.root / ".journal").read_text() == "1"
    assert sorted(p.name for p in out.iterdir()) == ["half", MANIFEST]


@pytest.mark.parametrize("journal", [True, False])
def test_what_a_finished_job_left_is_not_taken_for_output(tmp_path: Path, journal: bool) -> None:
    """Killed while it removed its staging folder; then somebody removes the output, and runs the job again."""
    out = tmp_path / "out"
    root = staging_of(out)
    root.mkdir()
    (root / "sealed.json").write_text('{"inode": 1}')
    if journal:
        (root / ".journal.jsonl").write_text("{}")
    with commit(out, kind="merge", resumable=True) as staging:
        assert staging.fresh
        (staging.path / "a").touch()
    assert sorted(p.name for p in out.iterdir()) == ["a", MANIFEST] and not root.exists()


def test_faults_78_and_79_existing_outputs_refused_or_swapped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    (out / "stale.txt").touch()
    with pytest.raises(OutputError, match="exists already"):
        fill(out, "new")
    assert (out / "a.txt").read_text() == "old"
    fill(out, "new", overwrite=True)
    assert (out / "a.txt").read_text() == "new" and not (out / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fault_77_the_output_is_an_input(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    link = tmp_path / "link"
    link.symlink_to(source)
    for out in (source, link, source / "deeper"):
        with pytest.raises(OutputError, match="is the input"), commit(out, inputs=[source], overwrite=True):
            pass


def test_fault_75_a_disk_that_is_too_small_is_predicted(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"are needed and .* are free; make room, or give another"),
        commit(tmp_path / "out", needs_bytes=10**18),
    ):
        pass


def test_faults_63_and_75_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on the size of files makes real writes fail half way, in a process of its own."""
    fill(tmp_path / "out", "old")
    script = (
        "from lapis.checkpoint.commit import commit\n"
        "from lapis.errors import OutputError\n"
        "try:\n"
        "    with commit('out', overwrite=True) as staging:\n"
        "        (staging.path / 'a.txt').write_bytes(bytes(10**6))\n"
        "except OutputError as error: print(error)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert "the disk is full" in run.stdout
    assert (tmp_path / "out" / "a.txt").read_text() == "old" and verify(tmp_path / "out") == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fault_76_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (Path("/proc/out"), tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match="cannot be written"), commit(out):
            pass


def test_faults_70_and_80_a_second_writer_is_refused(tmp_path: Path) -> None:
    with commit(tmp_path / "out"):
        with pytest.raises(OutputError, match="out: another lapis is writing it; wait"), commit(tmp_path / "out"):
            pass


def test_faults_73_and_74_killed_at_any_moment(tmp_path: Path) -> None:
    """Kill a process that swaps the output again and again: what is at the output path is always whole."""
    out = tmp_path / "out"
    fill(out, "0" * 1000)
    script = (
        "import sys\nfrom lapis.checkpoint.commit import commit\nprint('go', flush=True)\n"
        "for i in range(10**6):\n"
        "    with commit('out', overwrite=True) as s:\n"
        "        for name in 'abcdef': (s.path / name).write_text(str(i % 10) * 1000)\n"
    )
    for delay in (0.0, 0.003, 0.011, 0.017, 0.029, 0.041):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert verify(out) == []
        assert len({path.read_text()[:1] for path in out.iterdir() if path.name != MANIFEST and path.is_file()}) == 1
    fill(out, "last", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_one_file(tmp_path: Path) -> None:
    with commit_file(tmp_path / "x.html") as path:
        path.write_text("hello")
    assert (tmp_path / "x.html").read_text() == "hello"
    with pytest.raises(OutputError, match="exists already"), commit_file(tmp_path / "x.html"):
        pass
    with pytest.raises(RuntimeError), commit_file(tmp_path / "y.html") as path:
        path.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]
