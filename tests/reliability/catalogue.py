"""The numbered faults that lapis claims to survive, and which tests name them.

A test names a fault in its own name (`test_fault_33_...`, `test_faults_25_and_26_...`) or, where one test tries many
inputs, in the key of an input ("11_unknown_dtype").
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]

CLAIMED = {
    1: "a file that is empty or under 8 bytes", 2: "a header that is cut", 3: "a header longer than its file",
    4: "a header that claims 100 GB", 5: "100,000 tensors, deep nesting", 6: "offsets that overlap",
    7: "holes and trailing bytes", 8: "a name twice in a header", 9: "a tensor in two shards",
    10: "names that are no text", 11: "an unknown dtype", 12: "shapes that overflow", 13: "bytes unlike the shape",
    14: "a scalar", 15: "a tensor without elements", 16: "FP8 and FP4", 17: "int8 without a scale",
    18: "dtypes that differ", 19: "NaN and infinity", 20: "a shard that is missing", 21: "an index that names too much",
    22: "tensors outside the index", 23: "a tensor absent from one model", 24: "shapes that differ",
    25: "an index path that leads out", 26: "an absolute path", 27: "links, FIFOs, devices", 28: "pickles",
    29: "one file and an index that differ", 30: "tied, without a head", 31: "tied, beside another head",
    32: "files that change while they are read", 33: "JSON that is cut", 34: "a field that is missing",
    35: "a size of a billion", 36: "a layer count unlike the tensors", 37: "vocab_size unlike the rows",
    38: "tokens beyond the rows", 39: "tokenizers that differ", 40: "code in a config", 41: "unknown fields",
    42: "a template that escapes", 43: "a template that never ends", 44: "a template that eats memory",
    45: "a template with an error", 46: "special tokens that a user types", 47: "an empty file of data",
    48: "bytes that are no UTF-8", 49: "a byte order mark", 50: "NUL bytes", 51: "a line of a gigabyte",
    52: "another schema", 53: "mixed types", 54: "twin keys, NaN literals", 55: "longer than the context",
    56: "nothing supervised", 57: "unknown roles", 58: "archives that are cut", 59: "data that changed since",
    60: "SIGKILL at any moment", 61: "SIGKILL while saving", 62: "SIGTERM", 63: "a disk that fills up",
    64: "the latest checkpoint damaged", 65: "a lost optimizer", 66: "a loss that is NaN", 67: "other world sizes",
    68: "another config", 69: "a process that dies or stops", 70: "two runs in one folder", 71: "a clock that jumps",
    72: "out of memory", 73: "SIGKILL while a shard is written", 74: "SIGKILL between renames",
    75: "too little disk", 76: "an output that cannot be written", 77: "an output that is an input",
    78: "an output that exists", 79: "stale files beside new ones", 80: "two writers", 81: "a connection that drops",
    82: "no answer", 83: "200 for a range", 84: "another Content-Range", 85: "another ETag", 86: "too few bytes",
    87: "other bytes of the same length", 88: "401, 404, 429, 5xx", 89: "a redirect to another host",
    90: "another encoding", 91: "a body that is too large", 92: "JSON that is none", 93: "deep nesting in a body",
    94: "a million replies, or fewer than one", 95: "a prompt beyond the context", 96: "a client that is gone",
    97: "a slow sender", 98: "a slow reader", 99: "hundreds of requests", 100: "heads too large or of no kind",
    101: "a model that is not served", 102: "a public address without a key", 103: "a wrong key",
    104: "a foreign Host or Origin", 105: "a grammar without an end", 106: "SIGTERM amid a reply",
}  # fmt: skip


def named() -> dict[int, list[str]]:
    """Number -> the tests that name it."""
    result: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[str] = []
            if isinstance(node, ast.FunctionDef) and (run := re.search(r"_faults?_((?:\d+_|and_)+)", f"{node.name}_")):
                found = re.findall(r"\d+", run[1])
            elif isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
                found = [key[:2] for key in keys if re.match(r"\d\d_[a-z]", key)]
            for number in found:
                result[int(number)].append(path.relative_to(TESTS).as_posix())
    return dict(result)


def count() -> tuple[int, int]:
    """How many faults are claimed, and how many tests or inputs name one."""
    return len(CLAIMED), sum(len(places) for places in named().values())
