"""The commands that are tried, on inputs as small as they can be: models, an adapter, a corpus, chats.

make_inputs(forks, folder)   what the commands read, in `folder`
jobs(forks, place)           name -> what makes the Job, for commands that write
lookers(forks, place)        the same for commands that only read and show
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .aimed import Forks, Job

WORDS = ("red green blue black white one two three four five six seven eight nine ten cat dog hen cow pig").split()
SHAPE = {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 16, "tied": True}
TIMES = ("times.json", "certificate.json", "certificate.html")  # what a clock said of a training
TOUR = (*TIMES, ".seconds")
_PARENTS = ("--base", "../inputs/base", "--chat", "../inputs/chat")
ADAPTED = (*TIMES, ".steps")  # notes on the steps hold the times of change of their files


def make_inputs(forks: Forks, folder: Path) -> None:
    """Everything that the commands read; each model is trained by `lapis train`."""
    folder.mkdir()
    lines = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(1, 60)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    for name, texts in (("text", lines), ("replay", [f"zebra {line} zenith" for line in lines[20:]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "other.txt").write_text("zebra zoology zigzag zenith\n" * 20)
    chats = [
        {"messages": [{"role": "user", "content": WORDS[i]}, {"role": "assistant", "content": f"{WORDS[-i - 1]}."}]}
        for i in range(len(WORDS))
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    common = {"steps": 2, "batch": 2, "seed": 0, "threads": 1, "precision": "float32", "compile": "off", "context": 32,
              "warmup": 0}  # fmt: skip
    text = {"objective": "causal", "data": "../inputs/text.txt", **common}
    chat = {"objective": "chat", "data": "../inputs/chats.jsonl", **common}
    runs = {
        "base": {**text, "new": SHAPE, "tokenizer": "../inputs/tokenizer", "steps": 4},
        "chat": {**chat, "model": "../inputs/base"},
        "onto": {**text, "model": "../inputs/base", "seed": 1},
        "adapter": {**text, "model": "../inputs/base", "lora": {"rank": 2, "targets": ["attn.q", "mlp.down"]}},
    }
    work = folder.parent / "work"
    work.mkdir()
    _made(forks, work, "tokenizer", "train", "../inputs/text.txt", "--vocab", "300", "--out", "../inputs/tokenizer")
    for name, settings in runs.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**settings, "out": f"../inputs/{name}"}))
        _made(forks, work, "train", f"../inputs/{name}.yaml")
    _made(forks, work, "delta", "extract", *_PARENTS, "--bits", "8", "--out", "../inputs/delta")
    _made(forks, work, "export", "../inputs/base", "--gguf", "../inputs/model.gguf")
    (folder / "job.yaml").write_text(json.dumps({**runs["base"], "steps": 3, "save_every": 1, "keep": 1, "out": "out"}))
    recipe = {
        "merge_method": "ties",
        "base_model": "../inputs/base",
        "models": [
            {"model": f"../inputs/{name}", "parameters": {"weight": 0.5, "density": 0.5}} for name in ("chat", "onto")
        ],
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    adaptation = {
        "base": "../inputs/base", "chat": "../inputs/chat", "text": ["../inputs/text.jsonl"],
        "replay": ["../inputs/replay.jsonl"], "chats": ["../inputs/chats.jsonl"], "vocab": 4, "context": 32, "batch": 2,
        "tokens": 256, "tokens_per_second": 1000.0, "scored": 2000, "out": "out",
        "train": {"threads": 1, "precision": "float32", "compile": "off"},
    }  # fmt: skip
    (folder / "adapt.yaml").write_text(json.dumps(adaptation))
    work.rmdir()


def _made(forks: Forks, work: Path, *arguments: str) -> None:
    done = forks.run(arguments, work)
    assert done.status == 0, done.told


_GRAFT = ("graft", *_PARENTS, "--onto", "../inputs/onto", "--out", "out")


def jobs(forks: Forks, place: Path) -> dict[str, Callable[[], Job]]:
    """The commands that write."""
    old = {"out": place / "inputs" / "base"}
    text, tokenizer = "../inputs/text.txt", ("--tokenizer", "../inputs/tokenizer")
    pack = ("data", "pack", text, *tokenizer, "--out", "out", "--length", "32", "--workers")
    extend = ("tokenizer", "extend", "../inputs/base", "../inputs/other.txt", "--add", "8", "--least", "2")
    plan = ("plan", *_PARENTS, "--goal", "style", "--budget", "0.5")
    page: dict[str, object] = {"outputs": ["page.html"]}
    every: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
        "graft": ((*_GRAFT, "--no-smoke"), {}),
        "graft over an old output": ((*_GRAFT, "--no-smoke", "--overwrite"), {"old": old}),
        "graft and a look at it": (_GRAFT, {}),
        "merge": (("merge", "../inputs/recipe.yaml", "--out", "out"), {}),
        "fuse": (("fuse", "../inputs/adapter", "--out", "out"), {}),
        "data pack": ((*pack, "1"), {}),
        "data pack by two": ((*pack, "2"), {}),
        "tokenizer extend": ((*extend, "--out", "out"), {}),
        "tokenizer train": (("tokenizer", "train", text, "--vocab", "300", "--out", "out"), {}),
        "train": (("train", "../inputs/job.yaml"), {"loose": TIMES}),
        "train over an old output": (("train", "../inputs/job.yaml", "--overwrite"), {"loose": TIMES, "old": old}),
        "tour": (("tour", "--minutes", "0.1", "--out", "out"), {"loose": TOUR, "seconds": 600.0, "grows": True}),
        "adapt": (("adapt", "../inputs/adapt.yaml"), {"loose": ADAPTED, "seconds": 600.0, "grows": True}),
        "delta extract": (("delta", "extract", *_PARENTS, "--out", "out"), {}),
        "delta apply": (("delta", "apply", "../inputs/delta", "--onto", "../inputs/onto", "--out", "out", "--no-smoke"),
                        {}),
        "card": (("card", "../inputs/base", "../inputs/chat", "--text", text, "--replay", "../inputs/other.txt",
                  "--chats", "../inputs/chats.jsonl", "--out", "out"), {}),
        "export": (("export", "../inputs/base", "--gguf", "model.gguf"), {"outputs": ["model.gguf"]}),
        "import": (("import", "../inputs/model.gguf", "--out", "out"), {}),
        "report": (("report", "../inputs/base", "../inputs/chat", "--out", "page.html"), page),
        "diff": (("diff", "../inputs/base", "../inputs/chat", "--html", "page.html"), page),
        "plan": ((*plan, "--chats", "../inputs/chats.jsonl", "--text", text, "--out", "plan.yaml"),
                 {"outputs": ["plan.yaml"]}),
    }  # fmt: skip
    return {name: partial(Job, name, arguments, place, forks, **more) for name, (arguments, more) in every.items()}  # type: ignore[arg-type]


def lookers(forks: Forks, place: Path) -> dict[str, Callable[[], Job]]:
    """Commands that only read."""
    every: dict[str, tuple[str, ...]] = {
        "inspect": ("inspect", "../inputs/chat"),
        "tokens": ("tokens", "../inputs/chat", "red green"),
        "data show": ("data", "show", "../inputs/text.txt", "--tokenizer", "../inputs/tokenizer"),
        "eval": ("eval", "../inputs/base", "--text", "../inputs/text.txt"),
        "lens": ("lens", "../inputs/base", "red green"),
        "generate": ("generate", "../inputs/base", "red", "--max-tokens", "2"),
    }
    return {name: partial(Job, name, arguments, place, forks, outputs=()) for name, arguments in every.items()}
