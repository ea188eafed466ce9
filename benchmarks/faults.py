"""The same damaged or unfit checkpoints given to lapis, mergekit and transformers: who notices?

    python benchmarks/faults.py --peer-python /path/to/mergekit-venv/bin/python --table benchmarks/results/faults.md

Each case builds three small models (base, chat, onto), damages one, and runs a graft (lapis), the same merge (mergekit)
and a load of the damaged model (transformers) as processes of their own. A cell says what came of it: "refused" with
the message's beginning, or "exit 0" and what is wrong with what was written. Numbers are those of the catalogue.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
DIM, FFN, VOCAB, LAYERS = 64, 96, 256, 2
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def model(seed: int, base: Tensors | None = None) -> Tensors:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,), "lm_head.weight": (VOCAB, DIM)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (DIM, DIM) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (FFN, DIM) for p in ("up", "gate")}
        shapes |= {f"{at}.mlp.down_proj.weight": (DIM, FFN)}
        shapes |= {f"{at}.{p}_layernorm.weight": (DIM,) for p in ("input", "post_attention")}
    drawn = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    if base is None:
        return {name: (value * 0.05).bfloat16() for name, value in drawn.items()}
    return {name: (base[name].float() + 0.003 * value).bfloat16() for name, value in drawn.items()}


def write(folder: Path, tensors: Tensors, shards: int = 1, **config: object) -> None:
    folder.mkdir(parents=True)
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": DIM, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    placed = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(placed.values())):
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def edit(folder: Path, change: Callable[[Tensors], None], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def cut(place: Path) -> None:
    path = place / "chat" / "model.safetensors"
    os.truncate(path, path.stat().st_size * 2 // 3)


def twice(place: Path) -> None:
    """Names a tensor twice in the header, first with the bytes of another: a reader that keeps the last is content."""
    path = place / "chat" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    false = json.dumps(header[UP.replace("up_proj", "gate_proj")])
    raw = (f'{{"{UP}": {false}, ' + json.dumps(header)[1:]).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def outside(place: Path) -> None:
    shutil.rmtree(place / "chat")
    write(place / "chat", load_file(place / "base" / "model.safetensors"), shards=2)
    index = place / "chat" / "model.safetensors.index.json"
    file = "model-00002-of-00002.safetensors"
    (place / "chat" / file).rename(place / "secret.safetensors")
    index.write_text(index.read_text().replace(file, "../secret.safetensors"))


def shard_gone(place: Path) -> None:
    shutil.rmtree(place / "chat")
    write(place / "chat", load_file(place / "base" / "model.safetensors"), shards=2)
    (place / "chat" / "model-00002-of-00002.safetensors").unlink()


def shard_lacks(place: Path) -> None:
    shutil.rmtree(place / "chat")
    write(place / "chat", load_file(place / "base" / "model.safetensors"), shards=2)
    names = json.loads((place / "chat" / "model.safetensors.index.json").read_text())["weight_map"]
    edit(place / "chat", lambda t: t.pop(UP), names[UP])


def config(place: Path, **changes: object) -> None:
    path = place / "chat" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_int8(tensors: Tensors) -> None:
    for name in [n for n in tensors if "_proj" in n]:
        tensors[name] = (tensors[name].float() * 500).round().clamp(-127, 127).to(torch.int8)


def set_nan(tensors: Tensors) -> None:
    tensors[UP][3, 5] = float("nan")


def narrow(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP][:-8].clone()


def old_output(place: Path) -> None:
    """An older result in two shards, whose index would be read before the new single file."""
    write(place / "out", model(77), shards=2)


CASES: dict[str, Callable[[Path], None]] = {
    "2 truncated file": cut,
    "8 a name twice in a header": twice,
    "17 int8 without a scale": lambda place: edit(place / "chat", as_int8),
    "19 NaN in a weight": lambda place: edit(place / "chat", set_nan),
    "20 missing shard": shard_gone,
    "21 index names a tensor that its shard lacks": shard_lacks,
    "23 tensor absent from one model": lambda place: edit(place / "chat", lambda t: t.pop(UP)),
    "24 shapes differ": lambda place: edit(place / "chat", narrow),
    "25 index path with ../": outside,
    "35 a size of 10^9 in the config": lambda place: config(place, intermediate_size=10**9),
    "36 layer count differs from the tensors": lambda place: config(place, num_hidden_layers=3),
    "37 vocab_size differs from the rows": lambda place: config(place, vocab_size=300),
    "76 output cannot be written": lambda place: None,
    "77 output is an input": lambda place: None,
    "78 output exists": old_output,
}

LOAD = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
state = {n: t for n, t in model.state_dict().items()}
torch.save({n: t for n, t in state.items()}, sys.argv[2])
"""


def judge(place: Path, out: Path, status: int, told: str, before: dict[str, bytes]) -> str:
    """What came of a merge, in a few words."""
    told = told.replace(f"{place}/", "").strip().removeprefix("lapis: ").removeprefix("graft: ")
    if status:
        after = {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}
        changed = [n for n in before if n.startswith(("base/", "chat/", "onto/", "out")) and after.get(n) != before[n]]
        left = " (and left the output changed)" if changed else ""
        if (out / "config.json").exists() and f"{out.name}/config.json" not in before:
            left += " (and left a partial output)"
        if "Traceback" in told:
            last = [line for line in told.strip().splitlines() if line.strip()][-1]
            return f"exit {status}, traceback: {last[:70]}{left}"
        return f"refused: {told.strip().splitlines()[-1][:110]}{left}"
    wrong = []
    if any(after != before[n] for n, after in _inputs(place).items() if n in before):
        wrong.append("the input was overwritten")
    try:
        found = {}
        index = out / "model.safetensors.index.json"
        if index.is_file():
            for name, file in json.loads(index.read_text())["weight_map"].items():
                found[name] = load_file(out / file)[name]
        else:
            found = load_file(out / "model.safetensors")
        if index.is_file() and (out / "model.safetensors").is_file():
            wrong.append("old and new weights side by side")
        if not all(torch.isfinite(t.float()).all() for t in found.values()):
            wrong.append("NaN in the output")
        base, onto = (load_file(place / role / "model.safetensors") for role in ("base", "onto"))
        far = [
            n
            for n, t in found.items()
            if n in base and t.shape == base[n].shape and float((t.float() - onto[n].float()).abs().max()) > 0.2
        ]
        if far:
            wrong.append(f"{len(far)} tensors are far from every parent")
        rows = json.loads((out / "config.json").read_text())["vocab_size"]
        if rows != found["model.embed_tokens.weight"].shape[0]:
            wrong.append("vocab_size and rows disagree: cannot be loaded")
        missing = [n for n in onto if n not in found]
        if missing:
            wrong.append(f"{len(missing)} tensors are missing")
    except Exception as error:
        wrong.append(f"{type(error).__name__} on reading it back")
    return f"exit 0: {'; '.join(wrong) if wrong else 'done'}"


def _inputs(place: Path) -> dict[str, bytes]:
    files = [p for role in ("base", "chat", "onto") for p in (place / role).rglob("*") if p.is_file()]
    return {str(p.relative_to(place)): p.read_bytes() for p in files}


def run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr + ("" if done.stderr.strip() else done.stdout)


def case(name: str, damage: Callable[[Path], None], who: str, peer: str | None) -> str:
    place = Path(tempfile.mkdtemp(prefix="lapis-faults-"))
    base = model(1)
    for role, tensors in (("base", base), ("chat", model(2, base)), ("onto", model(3, base))):
        write(place / role, tensors)
    damage(place)
    out = {"76": Path("/proc/no-such-place/out"), "77": place / "chat"}.get(name[:2], place / "out")
    before = {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}
    folders = [str(place / role) for role in ("base", "chat", "onto")]
    try:
        if who == "lapis":
            command = [
                sys.executable,
                "-m",
                "lapis",
                "graft",
                "--base",
                folders[0],
                "--chat",
                folders[1],
                "--onto",
                folders[2],
            ]
            status, told = run([*command, "--out", str(out), "--no-smoke"])
        elif who == "mergekit":
            recipe = place / "recipe.yaml"
            models = [{"model": folder, "parameters": {"weight": 1.0}} for folder in folders[1:]]
            recipe.write_text(
                json.dumps(
                    {"merge_method": "task_arithmetic", "base_model": folders[0], "models": models, "dtype": "bfloat16"}
                )
            )
            status, told = run([str(peer), "-m", "mergekit.scripts.run_yaml", str(recipe), str(out), "--quiet"])
        elif int(name.split()[0]) > 70:
            return "-"
        else:
            saved = place / "state.pt"
            status, told = run([sys.executable, "-c", LOAD, folders[1], str(saved)])
            return judge_load(place, status, told, saved)
        return judge(place, out, status, told, before)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def judge_load(place: Path, status: int, told: str, saved: Path) -> str:
    if status:
        last = [line for line in told.strip().splitlines() if line.strip()][-1]
        return f"exit {status}: {last[:80]}"
    state = torch.load(saved, weights_only=True)
    base = load_file(place / "base" / "model.safetensors")
    if not all(torch.isfinite(t.float()).all() for t in state.values()):
        return "exit 0: NaN is loaded"
    odd = [
        n
        for n in base
        if n in state
        and (state[n].shape != base[n].shape or float((state[n].float() - base[n].float()).abs().max()) > 0.02)
    ]
    return f"exit 0: {len(odd)} tensors hold other numbers than the model's" if odd else "exit 0: loaded"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--peer-python", help="an interpreter that has mergekit 0.1.5")
    options.add_argument("--table", type=Path, help="write the table to this file")
    options.add_argument("--only", default="", help="cases whose name holds this text")
    given = options.parse_args()
    peers = ["lapis", *(["mergekit"] if given.peer_python else []), "transformers"]
    lines = [
        f"## Faults, {time.strftime('%Y-%m-%d')}",
        "",
        f"| fault | {' | '.join(peers)} |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for name, damage in CASES.items():
        if given.only in name:
            cells = [case(name, damage, who, given.peer_python).replace("|", "/") for who in peers]
            lines.append(f"| {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if given.table:
        given.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
