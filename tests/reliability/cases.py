"""What is mutated, and what reads it: for each kind of file a case that takes a seeded generator.

`make_good(folder)` gives the good files, `CASES[kind](good, place)` what reads a mutated version of one; it may raise
LapisError, with one line, and nothing else.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

import lapis
from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.adapter import open_adapter
from lapis.checkpoint.commit import MANIFEST
from lapis.checkpoint.tensor_file import DELTA, read_header
from lapis.errors import LapisError
from lapis.evaluation.choices import read_choices
from lapis.families.config import ModelConfig
from lapis.model.check import plan_load
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.report.pages.working_folder import report_of
from lapis.text.corpus.corpus import chats, documents
from lapis.text.corpus.labels import labeled
from lapis.text.corpus.pairs import pairs
from lapis.text.rows.rows import Rows
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.run import read_settings
from lapis.weights.delta.apply import delta_apply
from lapis.weights.delta.extract import delta_extract
from lapis.weights.graft.graft import graft
from lapis.weights.graft.scale import read_scale
from lapis.weights.merge.merge import merge

from .mutate import bytes_of, mutated, text_of

Case = Callable[[random.Random], Any]


def make_good(root: Path) -> SimpleNamespace:
    """A small model, a fine-tune of it, an adapter, and a tokenizer, in a folder that is there."""
    words = train_tokenizer(["Saya suka makan nasi lemak. The cat sleeps. user assistant"] * 5, 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, vocab=words.rows, context=32))
    for name in ("base", "chat"):
        save(model, root / name)
        words.save(root / name)
        (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.5}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    (root / "adapter").mkdir()
    pair = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight": torch.zeros(shape)
            for kind, shape in (("A", (2, 16)), ("B", (16, 2)))}  # fmt: skip
    save_file(pair, root / "adapter" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"],
               "alpha_pattern": {}, "rank_pattern": {"q_proj": 2}, "use_dora": False, "bias": "none",
               "modules_to_save": None, "base_model_name_or_path": str(root / "base")}  # fmt: skip
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    return SimpleNamespace(root=root, base=root / "base", chat=root / "chat", adapter=root / "adapter", words=words)


def copied(folder: Path, out: Path, **files: bytes) -> Path:
    """A folder that is another one but for some files, of which the others are links within it."""
    out.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in files and not (out / path.name).exists():
            (out / path.name).write_bytes(path.read_bytes())
    for name, raw in files.items():
        (out / name).write_bytes(raw)
    return out


def headers_case(good: SimpleNamespace, place: Path) -> Case:
    """Numbers 1 to 15."""
    raw = (good.base / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, path = json.loads(raw[8 : 8 + length]), place / "x.safetensors"

    def case(rng: random.Random) -> None:
        text = text_of(header, rng)
        size = rng.choice((len(text),) * 9 + (rng.randrange(2**16), 2**40, 2**63))
        path.write_bytes(struct.pack("<Q", size) + text + raw[8 + length : rng.choice((None, None, -5))])
        read_header(path)

    return case


def config_case(good: SimpleNamespace, place: Path) -> Case:
    """Numbers 33 to 41: a config.json that lies about a model, looked at, counted, grafted and merged with."""
    config = json.loads((good.base / "config.json").read_text())
    config |= {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}, "auto_map": {"AutoModel": "x.py"}, "_secret": [1]}  # fmt: skip

    def case(rng: random.Random) -> None:
        folder = copied(good.base, place / "model", **{"config.json": text_of(config, rng)})
        for act in (
            lambda: plan_load(open_checkpoint(folder), to_run=False), lambda: load(folder),
            lambda: graft(base=good.base, chat=good.chat, onto=folder, out=place / "out", dry_run=True),
            lambda: lapis.diff(good.base, folder),
        ):  # fmt: skip
            with suppress(LapisError):
                act()
        open_checkpoint(folder)

    return case


def index_case(good: SimpleNamespace, place: Path) -> Case:
    """Numbers 20 to 29."""
    names = list(open_checkpoint(good.base).index)
    index = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, "model.safetensors")}

    def case(rng: random.Random) -> None:
        raw = {"model.safetensors.index.json": text_of(index, rng)}
        plan_load(open_checkpoint(copied(good.base, place / "model", **raw)))

    return case


def recipes_case(good: SimpleNamespace, place: Path) -> Case:
    """Recipes, scales and settings in YAML."""
    base, chat = str(good.base), str(good.chat)
    recipes: list[Any] = [
        {"merge_method": "ties", "base_model": base, "dtype": "float32", "seed": 3, "chat_template": "auto",
         "models": [{"model": base}, {"model": chat, "parameters": {"weight": 0.5, "density": [0.2, 0.8]}}],
         "parameters": {"normalize": True, "weight": [{"filter": "mlp", "value": 1.0}, {"value": 0.5}]},
         "tokenizer": {"source": "union", "pad_to_multiple_of": 8, "tokens": {"a": {"source": chat, "force": True}}}},
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": base, "layer_range": [0, 2]}]},
                                                  {"sources": [{"model": chat, "layer_range": [1, 2]}]}]},
    ]  # fmt: skip
    scale = {"default": 0.5, "scales": [{"layers": "0-1", "components": ["mlp"], "scale": 0.3}], "embeddings": "keep"}
    train = {"objective": "causal", "new": {"dim": 16, "layers": 2, "heads": 2, "ffn_dim": 24}, "steps": 2, "lr": 1e-3,
             "data": {"a.txt": 1.0, "b.txt": 2}, "tokenizer": base, "context": 16,
             "lora": {"rank": 2, "targets": ["attn"]}, "tune": ["mlp"], "seed": 1, "compile": "auto",
             "out": str(place / "out")}  # fmt: skip
    path = place / "x.yaml"

    def case(rng: random.Random) -> None:
        what = rng.randrange(4)
        document = (recipes[0], recipes[1], scale, train)[what]
        text = yaml.safe_dump(mutated(document, rng), allow_unicode=True).encode("utf-8", "surrogatepass")
        path.write_bytes(bytes_of(text, rng) if rng.random() < 0.4 else text)
        if what < 2:
            merge(path, place / "out", dry_run=True)
        elif what == 2:
            read_scale(str(path))
        else:
            from lapis.config import load_yaml

            read_settings(load_yaml(path), str(path))

    return case


RECORDS: list[Any] = [
    {"text": "Saya suka nasi lemak."},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}], "tools": []},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                  {"role": "assistant",
                   "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                  {"role": "tool", "content": "1", "name": "f"}, {"role": "assistant", "content": "c"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": None}}}}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}, {"text": "a", "label": "x"},
    {"text": "a", "label": 1},
    {"prompt": "a", "choices": ["b", "c"], "answer": 1},
    {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
     "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
]  # fmt: skip


def records_case(good: SimpleNamespace, place: Path) -> Case:
    """Numbers 47 to 57."""
    lines, array, choices = place / "x.jsonl", place / "x.json", place / "c.jsonl"

    def case(rng: random.Random) -> None:
        good = rng.choice(RECORDS)
        records = [text_of(good, rng) if rng.random() < 0.5 else json.dumps(good).encode() for _ in range(3)]
        lines.write_bytes(b"\n".join(records))
        choices.write_bytes(b"\n".join(records))
        array.write_bytes(b"[" + b",".join(records) + b"]")
        readers: list[Callable[[Path], Any]] = [documents, chats, pairs, labeled]
        for path in (lines, array):
            for read in readers:
                with suppress(LapisError):
                    list(read(path))
        read_choices(choices)

    return case


def adapters_case(good: SimpleNamespace, place: Path) -> Case:
    config = json.loads((good.adapter / "adapter_config.json").read_text())
    raw = (good.adapter / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length]) | {"__metadata__": {"id2label": '{"0": "a"}'}}

    def case(rng: random.Random) -> None:
        text = text_of(header, rng) if rng.random() < 0.3 else json.dumps(header).encode()
        files = {"adapter_config.json": text_of(config, rng),
                 "adapter_model.safetensors": struct.pack("<Q", len(text)) + text + raw[8 + length :]}  # fmt: skip
        folder = copied(good.adapter, place / "adapter", **files)
        with suppress(LapisError):
            load(folder)
        open_adapter(folder)

    return case


def deltas_case(good: SimpleNamespace, place: Path) -> Case:
    """Description, header, or stored numbers of a delta are others, under a manifest that fits; some are applied."""
    raws = []
    for name, how in (("exact", {}), ("four", {"bits": 4}), ("thin", {"rank": 2})):
        delta_extract(good.base, good.chat, place / name, **how)  # type: ignore[arg-type]
        raws.append((place / name, (place / name / DELTA).read_bytes()))
    shutil.copytree(raws[0][0], place / "delta")

    def case(rng: random.Random) -> None:
        folder, raw = rng.choice(raws)
        length = int.from_bytes(raw[:8], "little")
        header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        what = rng.randrange(3)
        if what == 0:
            header["__metadata__"]["delta"] = text_of(json.loads(header["__metadata__"]["delta"]), rng).decode(
                "utf-8", "replace"
            )
        text = text_of(header, rng) if what == 1 else json.dumps(header).encode()
        body = bytes_of(body, rng)[: len(body)].ljust(len(body), b"\0") if what == 2 else body
        made = struct.pack("<Q", len(text)) + text + body
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][DELTA] = {"size": len(made), "sha256": sha256(made).hexdigest()}
        out = copied(folder, place / "delta", **{DELTA: made, MANIFEST: json.dumps(manifest).encode()})
        delta_apply([out], good.base, place / "applied", dry_run=what != 2, overwrite=True)

    return case


def tokenizers_case(good: SimpleNamespace, place: Path) -> Case:
    """Also the files beside tokenizer.json, and the templates in them."""
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    documents_ = {name: json.loads((good.base / name).read_text()) for name in names}

    def case(rng: random.Random) -> None:
        name = rng.choice((names[0], names[1], names[1], names[2]))
        words = Tokenizer.open(copied(good.base, place / "words", **{
            **{other: json.dumps(documents_[other]).encode() for other in names}, name: text_of(documents_[name], rng),
        }))  # fmt: skip
        for text in ("nasi lemak <|im_end|> 123", "", "é字😀 \u0301\u200d\ufdfa  \n\t\0'll", "aaaa" * 50):
            words.decode(words.encode(text, add_special_tokens=True))
        for index in (0, 1, 255, 299, 300, 5000):
            words.decode([index])
        _ = words.end_ids, words.digest(), words.rows, words.adds_bos

    return case


def rows_case(good: SimpleNamespace, place: Path) -> Case:
    from lapis.text.rows.packing import pack

    (place / "text.txt").write_text("nasi lemak " * 300)
    pack([place / "text.txt"], good.words, place / "packed", 32)
    info = json.loads((place / "packed" / "rows.json").read_text())
    manifest = json.loads((place / "packed" / MANIFEST).read_text())

    def case(rng: random.Random) -> None:
        raw = text_of(info, rng)
        manifest["files"]["rows.json"] = {"size": len(raw), "sha256": sha256(raw).hexdigest()}
        made = {"rows.json": raw, MANIFEST: json.dumps(manifest).encode()}
        rows = Rows.open(copied(place / "packed", place / "rows", **made))
        rows.batch(rows.start(0), 2)
        _ = rows.digest, rows.counts, rows.bytes_per_token
        rows.verify()

    return case


def report_case(good: SimpleNamespace, place: Path) -> Case:
    model, words = lapis.load(good.base)
    table = json.loads(json.dumps(lapis.diff(good.base, good.chat).to_json(), default=str))
    trace = json.loads(json.dumps(lapis.lens(model, words, "nasi lemak", track=["nasi"]).to_json(), default=str))
    step = {"step": 1, "loss": 2.0, "lr": 0.1, "tokens": 5, "seconds": 1.0, "held_out": {"nll": 2.0}}
    files: dict[str, Any] = {
        "diff.json": table, "lens.json": trace, "training.json": {"objective": "causal", "tokens": 5, "name": "a"},
        "lapis-merge.json": {"command": "graft", "counts": {"merged": 2, "copied": 1, "skipped": 0}, "inputs": {},
                             "tensors": [{"name": "a", "action": "merged", "scale": 1.0, "lost_to_rounding": 0.1}],
                             "recipe": {"scale": 1.0}, "notes": ["n"], "lost_to_rounding": 0.1, "lapis": "1"},
        "scores.json": {"model": "m", "text": {"bits_per_byte": 1.0}, "chats": {"response_nll": 1.0, "stop_rate": 0.5}},
        "classes.json": {"confusion": [[1, 2], [3, 4]], "labels": ["a", "b"], "accuracy": 0.5},
        "inspect.json": {"family": "llama", "parameters": {"total": 5, "embedding": 1, "block": 2, "head": 1},
                         "memory": {"weights_bytes": 5}, "flops": {"per_token": 3},
                         "layers": [{"layer": 0, "attn": 2}]},
        "plan.json": {"pieces": [{"layer": 0, "component": "mlp", "style": 0.1, "knowledge": 0.2, "share": 0.5}],
                      "tune": ["mlp"], "finding": "f", "goal": "style", "budget": 0.5, "control": {}},
    }  # fmt: skip
    folder = place / "drawn"
    folder.mkdir()

    def case(rng: random.Random) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / "log.jsonl").write_bytes(
            b"\n".join(text_of(step, rng) if rng.random() < 0.3 else json.dumps(step).encode() for _ in range(4))
        )
        for name in rng.sample(list(files), 3):
            (folder / name).write_bytes(text_of(files[name], rng))
        report_of([folder]).render()

    return case


CASES: dict[str, Callable[[SimpleNamespace, Path], Case]] = {
    "headers": headers_case,
    "config": config_case,
    "index": index_case,
    "recipes": recipes_case,
    "records": records_case,
    "adapters": adapters_case,
    "deltas": deltas_case,
    "tokenizers": tokenizers_case,
    "rows": rows_case,
    "report": report_case,
}
