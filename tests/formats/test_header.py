"""GGUF headers are untrusted: each lie is refused in one line, and no mutation of a header does anything else."""

import os
import random
import struct
from pathlib import Path

import pytest

from lapis.errors import CheckpointError
from lapis.formats.gguf.header import read_gguf
from lapis.formats.gguf.keys import read_shape
from lapis.formats.vocabulary.reading import FileTokenizer, read_file_vocabulary

MUTATIONS = 200_000 if os.environ.get("LAPIS_RELIABILITY") else 400


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_bytes(pairs: list[bytes], tensors: list[bytes], data: int = 4096, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def small() -> bytes:
    """A Llama of one block with a byte-level tokenizer of seven tokens."""

    def whole(key: str, value: int) -> bytes:
        return pair(key, 4, struct.pack("<I", value))

    tokens, merges = ["a", "b", "c", "ab", "abc", "<s>", "Ġ"], ["a b", "ab c"]
    pairs = [
        pair("general.architecture", 8, text("llama")),
        *(whole(f"llama.{key}", value) for key, value in (
            ("context_length", 32), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 32),
            ("attention.head_count", 2), ("attention.head_count_kv", 1), ("rope.dimension_count", 16),
        )),
        pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        pair("tokenizer.ggml.model", 8, text("gpt2")),
        pair("tokenizer.ggml.pre", 8, text("gpt-2")),
        pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens))),
        pair("tokenizer.ggml.token_type", 9, struct.pack("<IQ7i", 5, 7, 1, 1, 1, 1, 1, 3, 1)),
        pair("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, len(merges)) + b"".join(map(text, merges))),
        whole("tokenizer.ggml.eos_token_id", 5),
    ]  # fmt: skip
    shapes = {
        "token_embd": (32, 7), "blk.0.attn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 16),
        "blk.0.attn_v": (32, 16), "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32), "output_norm": (32,),
    }  # fmt: skip
    tensors, offset = [], 0
    for name, shape in shapes.items():
        tensors.append(tensor(f"{name}.weight", shape, 0, offset))
        offset += 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    return file_bytes(pairs, tensors, offset)


def read_all(path: Path) -> None:
    """Everything that an import does before it reads a weight."""
    file = read_gguf(path)
    read_shape(file)
    FileTokenizer(read_file_vocabulary(file.fields)).encode("ab c<s>")


def test_a_small_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(small())
    file = read_gguf(path)
    config, family, layout = read_shape(file)
    assert (config.dim, config.layers, config.vocab, config.tied, family.name, layout.arch) == (
        32, 1, 7, True, "llama", "llama",
    )  # fmt: skip
    assert FileTokenizer(read_file_vocabulary(file.fields)).encode("abc a<s>", special=True) == [4, 6, 0, 5]
    assert file.tensors["blk.0.attn_k.weight"].shape == (16, 32)


GOOD = pair("a.b", 4, struct.pack("<I", 7))
LIES = {
    "empty": (b"", "needs 4 bytes where 0 are left"),
    "magic": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "version": (file_bytes([], [], version=9), "is GGUF version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian machine"),
    "pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(64), "claims 1,152,921,.* key-value pairs"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0) + bytes(64), "claims .* tensors in 88 bytes"),
    "key length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40) + bytes(64), "a text of 1,099,511,627,776 bytes"),
    "key twice": (file_bytes([GOOD, GOOD], []), "holds the key a.b twice"),
    "key unprintable": (file_bytes([pair("a\x07", 4, bytes(4))], []), "a key is not printable text"),
    "value type": (file_bytes([pair("a", 77, bytes(4))], []), "value type 77"),
    "value not UTF-8": (file_bytes([pair("a", 8, text(b"\xff\xfe"))], []), "a: is not UTF-8 at byte 45"),
    "array of arrays": (file_bytes([pair("a", 9, struct.pack("<IQ", 9, 1))], []), "an array of type 9"),
    "array length": (file_bytes([pair("a", 9, struct.pack("<IQ", 10, 1 << 61))], []), "claims .* entries of a"),
    "texts": (file_bytes([pair("a", 9, struct.pack("<IQ", 8, 1 << 50))], []), "claims .* texts of a"),
    "alignment": (file_bytes([pair("general.alignment", 4, struct.pack("<I", 33))], []), "general.alignment is 33"),
    "alignment 0": (file_bytes([pair("general.alignment", 4, bytes(4))], []), "general.alignment is 0"),
    "alignment text": (file_bytes([pair("general.alignment", 8, text("x" * 4000))], []), "general.alignment is 'xxx"),
    "dimensions": (file_bytes([], [text("t") + struct.pack("<I", 1 << 31) + bytes(64)]), "has 2147483648 dimensions"),
    "no dimension": (file_bytes([], [text("t") + struct.pack("<I", 0) + bytes(64)]), "has 0 dimensions"),
    "type": (file_bytes([], [tensor("t", (32,), 99, 0)]), "tensor type 99"),
    "shape 0": (file_bytes([], [tensor("t", (0, 4), 0, 0)]), "is no shape of F32"),
    "shape beyond": (file_bytes([], [tensor("t", (1 << 40, 1 << 40), 0, 0)]), "is no shape of F32"),
    "block": (file_bytes([], [tensor("t", (33, 2), 8, 0)]), "2x33 is no shape of Q8_0, whose blocks hold 32"),
    "offset": (file_bytes([], [tensor("t", (8,), 0, 4)]), "begins at byte 4, which is not a multiple of 32"),
    "beyond the end": (file_bytes([], [tensor("t", (8,), 0, 1 << 40)]), "truncated, fetch it again"),
    "offset overflow": (file_bytes([], [tensor("t", (8,), 0, (1 << 64) - 32)]), "truncated, fetch it again"),
    "overlap": (file_bytes([], [tensor("t", (64,), 0, 0), tensor("u", (8,), 0, 32)]), "u overlaps t"),
    "name twice": (file_bytes([], [tensor("t", (8,), 0, 0), tensor("t", (8,), 0, 32)]), "under a name that"),
    "parts": (file_bytes([pair("split.count", 2, struct.pack("<H", 3))], []), "one of 3 parts"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    raw, message = LIES[lie]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_gguf(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400 and str(refusal.value).isprintable()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no.gguf", "is missing"),
                          (tmp_path / "pipe.gguf", "not a regular file")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    raw, path = small(), tmp_path / "x.gguf"
    for length in range(0, len(raw), 97):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read_all(path)


def test_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes, numbers and whole pieces of a header are changed: it is read, or refused in a line."""
    draw = random.Random(5)
    raw, path = small(), tmp_path / "x.gguf"
    header = raw.index(b"output_norm") + 60
    refused = 0
    for _ in range(MUTATIONS):
        changed = bytearray(raw)
        for _ in range(draw.choice((1, 1, 2, 4))):
            place = draw.randrange(4, header)
            match draw.randrange(5):
                case 0:
                    changed[place] = draw.randrange(256)
                case 1:
                    changed[place : place + 8] = struct.pack(
                        "<Q", draw.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                    )
                case 2:
                    changed[place : place + 4] = struct.pack("<I", draw.choice((0, 1, 8, 9, 12, 2**31, 2**32 - 1)))
                case 3:
                    del changed[place : place + draw.randrange(1, 40)]
                case 4:
                    other = draw.randrange(4, header)
                    changed[place:place] = changed[other : other + draw.randrange(1, 40)]
        path.write_bytes(changed)
        try:
            read_all(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable()
    assert refused > MUTATIONS // 3
