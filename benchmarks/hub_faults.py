"""A hub that fails: 18 faults at many places of a download. Are other bytes ever taken for the model's?

    python benchmarks/hub_faults.py --offsets 100
    python benchmarks/hub_faults.py --offsets 20 --merge

A model is opened by its headers and then fetched whole, or with --merge three models are merged by ranges, from a
server on this machine that gives one wrong answer: to the request and at the byte that the offset says. What comes of
it must be the model (or the merge of the same models here), byte for byte, or one line and no output. Adds a dated
table to benchmarks/results/hub_faults.md.
"""

import argparse
import datetime
import hashlib
import json
import os
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hardware import processor
from results_file import add_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

Answer = tuple[int, dict[str, str], bytes]


def _changed(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :] if body else body


def _without(headers: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}


def _length(body: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(body))}


# name -> what becomes of the right answer (status, headers, body), at a byte
FAULTS: dict[str, Callable[[int, dict[str, str], bytes, int], Answer]] = {
    "the body is cut": lambda s, h, b, at: (s, h | _length(b), b[:at]),
    "no body": lambda s, h, b, at: (s, h | _length(b), b""),
    "a body that is too short, and says so": lambda s, h, b, at: (s, h, b[:at]),
    "a body that is too long": lambda s, h, b, at: (s, h, b + b"x" * (at + 1)),
    "a byte is another": lambda s, h, b, at: (s, h, _changed(b, at)),
    "zeros": lambda s, h, b, at: (s, h, b[:at] + bytes(len(b) - at)),
    "200 for a range": lambda s, h, b, at: (200, _without(h, "Content-Range"), b),
    "another range": lambda s, h, b, at: (s, h | {"Content-Range": f"bytes {at}-{at + 9}/{len(b)}"}, b),
    "no Content-Range": lambda s, h, b, at: (s, _without(h, "Content-Range"), b),
    "another ETag": lambda s, h, b, at: (s, h | {"ETag": f'"{at}"', "X-Linked-Etag": f'"{at:064}"'}, b),
    "an encoding": lambda s, h, b, at: (s, h | {"Content-Encoding": "gzip"}, b),
    "401": lambda s, h, b, at: (401, {}, b""),
    "403": lambda s, h, b, at: (403, {}, b""),
    "404": lambda s, h, b, at: (404, {}, b""),
    "429": lambda s, h, b, at: (429, {"Retry-After": "0"}, b""),
    "503": lambda s, h, b, at: (503, {}, b""),
    "a login page": lambda s, h, b, at: (200, {"Content-Type": "text/html"}, b"<html>log in</html>" * (at % 50 + 1)),
    "a redirect to itself": lambda s, h, b, at: (302, {"Location": "/"}, b""),
}


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--offsets", type=int, default=100)
    options.add_argument("--merge", action="store_true", help="three models by ranges in place of one as a whole")
    given = options.parse_args()
    os.environ.update(HF_HUB_OFFLINE="0", HF_TOKEN="hf_secret", HF_HUB_DISABLE_PROGRESS_BARS="1")

    import torch

    import lapis
    from lapis.checkpoint.remote import requests
    from lapis.errors import LapisError
    from lapis.families.config import ModelConfig
    from lapis.model.load import save
    from lapis.text.tokenizer.tokenizer import train_tokenizer
    from tests.checkpoint.hub_server import Hub, _Handler, serving

    requests.PAUSE = 0.0
    place = Path(tempfile.mkdtemp(prefix="lapis-hub-"))
    shape = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 24, "vocab": 290, "context": 32}
    torch.manual_seed(0)
    save(lapis.Transformer(ModelConfig(**shape, family="llama")), place)
    train_tokenizer(["one two three four " * 40], 280).save(place)
    files = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    wanted = hashlib.sha256(files["model.safetensors"]).hexdigest()
    wrong: list[str] = []
    ends: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
    with serving(Hub()) as hub:
        os.environ["HF_ENDPOINT"] = hub.url
        hub.put("o/m", files)
        three = {name: place / name for name in ("base", "one", "two")} if given.merge else {}
        for number, (name, folder) in enumerate(three.items()):
            folder.mkdir()
            torch.manual_seed(number)
            save(lapis.Transformer(ModelConfig(**shape, family="llama")), folder)
            train_tokenizer(["one two three four " * 40], 280).save(folder)
            hub.put(f"o/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})

        def merged(place: Path, sources: dict[str, str]) -> bytes:
            """The weights of a merge of three models."""
            (place / "recipe.yaml").write_text(json.dumps({
                "merge_method": "task_arithmetic", "base_model": sources["base"], "dtype": "float32",
                "models": [{"model": sources[name], "parameters": {"weight": 0.5}} for name in ("one", "two")],
            }))  # fmt: skip
            lapis.merge(place / "recipe.yaml", place / "out", allow_unrelated=True)
            return (place / "out" / "model.safetensors").read_bytes()

        def trial(number: int) -> str:
            """One download, or merge, with an empty cache."""
            with tempfile.TemporaryDirectory() as cache:
                os.environ["HF_HUB_CACHE"] = cache
                try:
                    if given.merge:
                        data = merged(Path(cache), {name: f"o/{name}" for name in three})
                        return "the model" if data == expected else "other bytes"
                    got = lapis.open("o/m").fetched()
                    data = (got.root / "model.safetensors").read_bytes()
                    beside = {name: (got.root / name).read_bytes() for name in files if (got.root / name).exists()}
                except LapisError as error:
                    if (Path(cache) / "out").exists():
                        return "an output beside a refusal"
                    return "a line" if "\n" not in str(error) else f"several lines: {error}"
                except BaseException as error:
                    return f"{type(error).__name__}: {error}"[:200]
                same = hashlib.sha256(data).hexdigest() == wanted and all(files[n] == b for n, b in beside.items())
                return "the model" if same else "other bytes"

        if given.merge:
            from lapis.checkpoint.remote import ranges

            ranges.PIECE = ranges.NEAR = ranges.FIRST = 4096  # so that small models have many ranges
            expected = merged(place, {name: str(folder) for name, folder in three.items()})
        assert trial(0) == "the model"
        count = len(hub.asked)
        for name, fault in FAULTS.items():
            for offset in range(given.offsets):
                hub.asked.clear()
                target = offset % count

                def once(asked: object, target: int = target, offset: int = offset, fault=fault) -> Answer | None:
                    if hub.asked[target : target + 1] != [asked] or hub.asked[target] is not asked:
                        return None
                    status, headers, body = _Handler._answer(types.SimpleNamespace(hub=hub), asked)
                    return fault(status, headers, body, min(offset * len(body) // given.offsets, max(0, len(body) - 1)))

                hub.fault = once
                end = trial(offset)
                ends[name][end if end in ("a line", "the model") else "wrong"] += 1
                if end not in ("a line", "the model"):
                    wrong.append(f"{name}, request {target + 1} of {count}, offset {offset}: {end}")
                if any(one.host == "localhost" and one.token for one in hub.asked):
                    wrong.append(f"{name}, offset {offset}: the token went to another host")
    print(json.dumps({"trials": len(FAULTS) * given.offsets, "requests": count, "wrong": len(wrong), "ends": ends}))
    print("\n".join(wrong[:40]))
    what = "a merge of three models by ranges" if given.merge else "a model fetched whole"
    trials = len(FAULTS) * given.offsets
    lines = [f"## {what}, {datetime.date.today()}, {processor()}", ""]
    lines += [
        f"{len(FAULTS)} faults at {given.offsets} offsets each, over {count} requests: {trials} trials, "
        f"{len(wrong)} wrong."
    ]
    lines += ["", "| fault | the right bytes | one line and no output | anything else |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {seen['the model']} | {seen['a line']} | {seen['wrong']} |" for name, seen in ends.items()]
    add_table(__file__, "A hub that fails", lines)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
