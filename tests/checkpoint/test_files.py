"""Headers are believed only when every length, name and offset fits; faults 1 to 15 by number."""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lapis.checkpoint.tensor_file import header_bytes, read_header
from lapis.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FAULTS = {
    "01_under_8_bytes": (b"1234567", "too short"),
    "02_truncated_header": (struct.pack("<Q", 100) + b'{"a":', "truncated"),
    "03_header_beyond_the_file": (struct.pack("<Q", 10**6) + b"{}", "truncated"),
    "04_header_of_100_gb": (struct.pack("<Q", 10**11) + b"{}", "limit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_raw_bytes(tmp_path: Path, fault: str) -> None:
    data, says = FAULTS[fault]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        read_header(path)


def test_fault_01_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="0 bytes"):
        read_header(path)


def test_fault_05_a_hundred_thousand_tensors_and_deep_nesting(tmp_path: Path) -> None:
    """Memory that grows with the header's length, and no more; a depth of it is refused and not followed."""
    many = {f"t{i}": entry("U8", (1,), (i, i + 1)) for i in range(100_000)}
    path = write(tmp_path / "many", many, bytes(100_000))
    tracemalloc.start()
    assert len(read_header(path).tensors) == 100_000
    assert tracemalloc.get_traced_memory()[1] < 30 * path.stat().st_size
    for deep in (b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(CheckpointError, match=r"not JSON|nested"):
            read_header(write(tmp_path / "deep", deep))
        assert tracemalloc.get_traced_memory()[1] - before < 30 * len(deep) + 1_000_000
    tracemalloc.stop()


HEADER_FAULTS: dict[str, tuple[Any, bytes, str]] = {
    "06_overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "overlaps"),
    "07_hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "hole"),
    "07_trailing_bytes": ({"a": entry()}, bytes(9), "belong to none"),
    "08_twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "twice"),
    "10_control_character": ({"a\u0007b": entry()}, bytes(8), "printable"),
    "10_bad_utf8": (b'{"\xff\xfe":{}}', b"", "UTF-8"),
    "11_unknown_dtype": ({"a": entry("Q7")}, bytes(8), "unknown dtype"),
    "12_negative": ({"a": entry(shape=(-2,))}, bytes(8), "not a shape"),
    "12_overflow": ({"a": entry(shape=(2**61, 2**61))}, bytes(8), "data_offsets hold 8"),
    "12_bool": ({"a": entry(shape=(True,))}, bytes(8), "not a shape"),
    "13_bytes_and_shape": ({"a": entry(shape=(3,))}, bytes(8), "data_offsets hold 8"),
    "02_data_cut": ({"a": entry()}, bytes(4), "truncated"),
    "11_fields": ({"a": {"dtype": "F32"}}, b"", "expected dtype"),
    "not_an_object": (b"[]", b"", "not an object"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_fault_header(tmp_path: Path, fault: str) -> None:
    header, data, says = HEADER_FAULTS[fault]
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(write(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_faults_14_and_15_scalars_and_empty_tensors_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"scalar": torch.tensor(3.0), "none": torch.zeros(0, 4), "some": torch.ones(2, 2)}, path)
    tensors = read_header(path).tensors
    assert tensors["scalar"].shape == () and tensors["none"].shape == (0, 4)


NAMES = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)


@given(st.dictionaries(NAMES, st.lists(st.integers(0, 5), max_size=3), max_size=6))
def test_what_we_write_the_safetensors_library_reads(tmp_path_factory: Any, shapes: dict[str, list[int]]) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    head = header_bytes({n: ("F32", tuple(t.shape)) for n, t in tensors.items()}, {"format": "pt"})
    path.write_bytes(head + b"".join(t.numpy().tobytes() for t in tensors.values()))
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert {n: info.shape for n, info in read_header(path).tensors.items()} == {n: tuple(s) for n, s in shapes.items()}


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read_never_a_crash(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("r") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", max(len(data) - 4, 0)) + data)
    try:
        read_header(path)
    except CheckpointError:
        pass
