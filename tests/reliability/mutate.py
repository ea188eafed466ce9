"""Wrong versions of good files: values of other types and sizes, keys that are gone or renamed, bytes that changed."""

import copy
import json
import random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 10**9, 10**22, 2**31,
    2**63, -(10**20), "", "x", "x" * 3000, "../../etc/passwd", "/etc/passwd", "[/red]", "\x1b[2J", "\u202e", "\0",
    "nan", "1e999", [], {}, [None], [[]], [1, 2], [-1, "a"], ["a", "b"], {"a": 1}, {"": {}}, {"type": "x"}, [{}],
    [[[[1]]]], {"name": 1}, [10**12], [0] * 40, "model.layers.0", "float32", "auto", ["LlamaForCausalLM"],
]  # fmt: skip

_INSERTED = (b"[" * 200, b"9" * 5000, b'"\\ud800"', b"\xff", b"\0", b"{", b"}", b",", b"NaN")


def mutated(document: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to four changes."""
    result = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, key = _place(result, rng)
        if place is None:
            result = copy.deepcopy(rng.choice(ODD))
            continue
        match rng.randrange(7):
            case 0 if isinstance(place, dict):
                del place[key]
            case 0:
                place.pop(key)
            case 1 if isinstance(place, dict):
                place[str(copy.deepcopy(rng.choice(ODD)))[:50]] = place.pop(key)
            case 2:
                place[key] = [place[key]] * rng.choice((1, 2, 50))
            case 3:
                other, name = _place(result, rng)
                if other is not None:
                    place[key] = copy.deepcopy(other[name])
            case _:
                place[key] = copy.deepcopy(rng.choice(ODD))
    return result


def text_of(document: Any, rng: random.Random) -> bytes:
    """A mutated document as JSON, now and then with bytes that are wrong."""
    raw = json.dumps(mutated(document, rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return bytes_of(raw, rng) if rng.random() < 0.3 else raw


def bytes_of(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes with a few that are changed, gone, or there twice."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] = rng.randrange(256)
            case 1:
                del data[at : at + rng.choice((1, 2, 30))]
            case 2:
                data[at:at] = rng.choice(_INSERTED)
            case 3:
                data[at:at] = data[at : at + 40]
            case 4:
                del data[at:]
            case _ if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container in the document and one of its keys; None for the document itself."""
    place, key, node = None, None, document
    while isinstance(node, (dict, list)) and node and (place is None or rng.random() < 0.75):
        place, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    return place, key
