"""The eight commands as they are typed, with PEFT's adapters of each kind, beside its merge_and_unload."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.oracles.test_adapter_inputs import KINDS, make
from tests.serving.conftest import HTTP, serving

Run = Callable[..., tuple[int, str, str]]
MODELS = ("adapter", "base+adapter", "merged")  # PEFT's own last
CHATS = [
    {"messages": [{"role": "user", "content": f"the {a}"}, {"role": "assistant", "content": f"sat on the {b}"}]}
    for a, b in (("cat", "mat"), ("dog", "cat"), ("mat", "dog"), ("dog", "mat"))
]


@pytest.fixture(params=KINDS)
def place(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, onto, an adapter of one kind, and PEFT's merge; it is the current one."""
    make(tmp_path, "llama", request.param)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the cat sat on the mat and the dog\n" * 6)
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return tmp_path


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of what --json prints, by where it stands, but for what is the run's own."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not any(word in key for word in ("seconds", "peak", "bytes_read", "bytes_written", "sha256")):
                yield from numbers(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from numbers(inner, f"{name}.{number}")
    elif isinstance(value, (int, float)):
        yield name, float(value)


@pytest.mark.parametrize(
    "command",
    [
        ("diff", "base", "MODEL"),
        ("lens", "MODEL", "the cat sat"),
        ("eval", "MODEL", "--text", "text.txt", "--chats", "chats.jsonl"),
        ("plan", "--base", "base", "--chat", "MODEL", "--chats", "chats.jsonl", "--text", "text.txt"),
        ("plan", "--merge", "recipe.yaml", "--chats", "chats.jsonl", "--text", "text.txt", "--evaluations", 2),
    ],
    ids=lambda command: " ".join(command[:2]) if command[1] == "--merge" else command[0],
)
def test_what_is_measured_is_measured_of_both(place: Path, run: Run, command: tuple[Any, ...]) -> None:
    seen = []
    for model in MODELS:
        write_recipe(model)
        status, out, err = run(*(model if word == "MODEL" else word for word in command), "--json")
        assert status == 0, err
        seen.append(dict(numbers(json.loads(out))))
    assert seen[0] and seen[2]
    near = {name: room(name, seen[2]) for name in seen[2]}
    for ours in seen[:2]:
        assert ours.keys() == seen[2].keys()
        assert [name for name, figure in ours.items() if abs(figure - seen[2][name]) > near[name]] == []


def room(name: str, figures: dict[str, float]) -> float:
    """How far a figure may be off. A style is a share of what the replies gain, which rounding divides by."""
    home, full = (figures.get(f".measured.{which}.response_nll", 0.0) for which in ("home", "full"))
    return 2e-5 + (1e-7 / abs(home - full) if ".style" in name else 0.0)


@pytest.mark.parametrize("command", ["graft of it", "graft onto it", "merge"])
def test_what_is_written_is_written_of_both(place: Path, run: Run, command: str) -> None:
    seen = []
    for number, model in enumerate(MODELS):
        write_recipe(model)
        chat, onto = ("onto", model) if command == "graft onto it" else (model, "onto")
        graft = ("graft", "--base", "base", "--chat", chat, "--onto", onto, "--norms", "add", "--embeddings", "add")
        arguments = ("merge", "recipe.yaml") if command == "merge" else (*graft, "--allow-unrelated")
        status, _, err = run(*arguments, "--out", str(number))
        assert status == 0, err
        seen.append(load_file(f"{number}/model.safetensors"))
    for ours in seen[:2]:
        assert ours.keys() == seen[2].keys()
        for name, theirs in seen[2].items():
            torch.testing.assert_close(ours[name], theirs, rtol=0, atol=2e-6)


def write_recipe(model: str) -> None:
    """A merge of a model, written as mergekit writes it, and another."""
    inputs = [{"model": name, "parameters": {"weight": weight}} for name, weight in ((model, 0.4), ("onto", 0.6))]
    Path("recipe.yaml").write_text(json.dumps({"merge_method": "linear", "models": inputs, "dtype": "float32"}))


def test_what_is_exported_is_exported_of_both(place: Path, run: Run) -> None:
    gguf = pytest.importorskip("gguf")
    seen = []
    for number, model in enumerate(MODELS):
        status, _, err = run("export", model, "--gguf", f"{number}.gguf", "--type", "f32")
        assert status == 0, err
        seen.append({tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(f"{number}.gguf").tensors})
    for ours in seen[:2]:
        assert ours.keys() == seen[2].keys()
        for name, theirs in seen[2].items():
            torch.testing.assert_close(ours[name], theirs, rtol=0, atol=2e-6)


def test_what_is_served_is_served_of_both(place: Path) -> None:
    with serving(*MODELS, "--dtype", "float32") as server:
        fields = {"prompt": "the cat", "max_tokens": 5, "temperature": 0, "logprobs": 1}
        names = [model["id"] for model in HTTP.get(f"{server.url}/v1/models").json()["data"]]
        answers = [HTTP.post(f"{server.url}/v1/completions", json={"model": n, **fields}).json() for n in names]
    chosen = [answer["choices"][0] for answer in answers]
    assert len(names) == 3 and len({choice["text"] for choice in chosen}) == 1
    likely = [choice["logprobs"]["token_logprobs"] for choice in chosen]
    assert likely[0] == pytest.approx(likely[2], abs=2e-5) and likely[1] == pytest.approx(likely[2], abs=2e-5)
