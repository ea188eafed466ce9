"""What is kept of fetched bytes: it gives what came, to whoever comes after a kill, and to nobody else."""

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.checkpoint.remote import shared_memory

FILES = [shared_memory.file_key(name, "v1", 10_000) for name in ("a", "b")]


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shared memory of this test alone, with room for 4096 bytes."""
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(shared_memory, "PLACE", place)
    monkeypatch.setattr(shared_memory, "ROOM", 4096)
    return place


def assert_nothing_is_kept(staging: Path) -> None:
    with shared_memory.keeping(staging):
        assert shared_memory.current() is None


def content(file: bytes, start: int, size: int) -> bytes:
    """What a file holds."""
    return bytes((file[0] + 7 * at) % 251 for at in range(start, start + size))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(FILES), st.integers(0, 5000), st.integers(1, 1024), st.floats(0, 1), st.booleans(),
            st.booleans(),
        ),
        max_size=40,
    )
)  # fmt: skip
def test_it_gives_what_came_and_nothing_else(steps: list[tuple[bytes, int, int, float, bool, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "ROOM", 4096)
        patch.setattr(shared_memory, "BLOCK", 64)
        handle = os.memfd_create("ring")
        os.posix_fallocate(handle, 0, 4096 + (1 << 15))
        ring = shared_memory.SharedRing(handle)
        in_use: list[shared_memory.SharedPiece] = []
        for file, start, size, share, release, again in steps:
            piece = ring.take(file, start, size)
            if piece is not None:
                came = int(share * size)
                piece.memory[:came] = content(file, start, came)
                if came == size:
                    piece.came()
                in_use.append(piece)
            for one in in_use:
                assert bytes(one.memory[: one.filled]) == content(one.file, one.start, one.filled)
            if release and in_use:
                in_use.pop(0).release()
            if again:  # killed, and another process goes on
                ring, in_use = shared_memory.SharedRing(handle), []
            for other in FILES:
                parts = ring.copy(other, 1000, 3000)
                assert all(data == content(other, 1000 + first, len(data)) for first, data in parts)
                ends = [0, *(first + len(data) for first, data in parts)]
                assert all(end <= first for end, (first, _) in zip(ends, parts, strict=False)) and ends[-1] <= 3000
            if piece is not None:
                parts = ring.copy(file, start, size)
                whole = came if came == size else max(0, came - 8) // 64 * 64 if again else 0
                assert sum(len(data) for first, data in parts if first < whole) >= whole
        os.close(handle)


def test_only_the_same_job_finds_it_and_only_after_a_kill(shared: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    def fill(staging: str) -> None:
        with shared_memory.keeping(tmp_path / staging):
            piece = shared_memory.current().take(FILES[0], 0, 100)
            piece.memory[:] = content(FILES[0], 0, 100)
            piece.came()
            os._exit(0)

    def found(staging: str) -> list[tuple[int, bytes]]:
        with shared_memory.keeping(tmp_path / staging):
            return shared_memory.current().copy(FILES[0], 0, 100)

    if (child := os.fork()) == 0:
        fill("one")
    os.waitpid(child, 0)
    (path,) = shared.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert found("two") == [] and path.exists()
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_nothing_is_kept(tmp_path / "one")
    assert found("one") == [(0, content(FILES[0], 0, 100))] and found("one") == []
    assert list(shared.iterdir()) == []


def test_what_a_job_that_is_gone_left_is_removed(shared: Path, tmp_path: Path) -> None:
    for name in ("gone", "old", "here"):
        (tmp_path / name).mkdir()
        if (child := os.fork()) == 0:
            with shared_memory.keeping(tmp_path / name):
                os._exit(0)
        os.waitpid(child, 0)
    assert len(list(shared.iterdir())) == 3
    (tmp_path / "gone").rmdir()
    old = shared_memory._path(tmp_path / "old")
    os.utime(old, (0, 0))
    with shared_memory.keeping(tmp_path / "new"):
        left = {path.name for path in shared.iterdir()}
    assert shared_memory._path(tmp_path / "here").name in left and old.name not in left
    assert shared_memory._path(tmp_path / "gone").name not in left


@pytest.mark.parametrize("how", ["link", "locked", "absent", "full"])
def test_where_it_cannot_be_had_nothing_is_kept(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = shared_memory._path(tmp_path / "job")
    other = None
    if how == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif how == "locked":
        other = path.open("wb")
        fcntl.flock(other, fcntl.LOCK_EX)
    elif how == "absent":
        monkeypatch.setattr(shared_memory, "PLACE", tmp_path / "none")
    else:
        monkeypatch.setattr(shared_memory, "ROOM", 1 << 62)
    assert_nothing_is_kept(tmp_path / "job")
    assert not (tmp_path / "elsewhere").exists()
    if other is not None:
        other.close()
