"""How fast are graft and merge, in how much memory, beside mergekit, a state-dict script, and the floor?

    python benchmarks/merge.py --size 0.5b --rounds 3 --peer-python /path/to/venv-with-mergekit/bin/python

Makes three checkpoints of a real shape with random weights, then runs every contestant in turn, round after round, as a
whole process (start-up and imports included). Time is the median over rounds; memory is the kernel's count of the
process's resident pages at their peak, anonymous and mapped alike. The floor reads the inputs once with cat and writes
one output with dd. Contestants whose interpreter is missing are left out, and the table says so.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from lapis.checkpoint.tensor_file import header_bytes  # noqa: E402

SHAPES = {  # dim, layers, heads, kv heads, ffn, vocab, tied, tensors files
    "tiny": (256, 4, 4, 2, 704, 8192, True, 1),
    "0.05b": (512, 12, 8, 4, 1536, 32000, True, 1),
    "0.5b": (896, 24, 14, 2, 4864, 151936, True, 1),
    "1.1b": (2048, 22, 32, 4, 5632, 32000, False, 1),
    "2.4b": (2560, 32, 32, 8, 6912, 32000, False, 1),
    "7b": (4096, 32, 32, 8, 14336, 32000, False, 3),
}
METHODS = {
    "task_arithmetic": {},
    "slerp": {"t": 0.5},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.5},
}


def make(folder: Path, size: str, seed: int, near: Path | None = None) -> None:
    """A Llama-shaped bf16 checkpoint of random weights; with `near`, that model plus small differences."""
    dim, layers, heads, kv, ffn, vocab, tied, count = SHAPES[size]
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocab, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    width = dim // heads * kv
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (dim,), f"{at}.mlp.down_proj.weight": (dim, ffn),
            f"{at}.mlp.gate_proj.weight": (ffn, dim), f"{at}.mlp.up_proj.weight": (ffn, dim),
            f"{at}.post_attention_layernorm.weight": (dim,), f"{at}.self_attn.k_proj.weight": (width, dim),
            f"{at}.self_attn.o_proj.weight": (dim, dim), f"{at}.self_attn.q_proj.weight": (dim, dim),
            f"{at}.self_attn.v_proj.weight": (width, dim),
        }  # fmt: skip
    shapes["model.norm.weight"] = (dim,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, dim)
    names = list(shapes)
    share = -(-len(names) // count)
    placed = {}
    noise = torch.Generator().manual_seed(seed)
    pool = torch.randn((1 << 22) + 7919, generator=noise)
    source = None if near is None else {p.name: p.open("rb") for p in near.glob("*.safetensors")}
    for number in range(count):
        mine = names[number * share : (number + 1) * share]
        file = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
        head = header_bytes({n: ("BF16", shapes[n]) for n in mine}, {"format": "pt"})
        placed |= dict.fromkeys(mine, file)
        left = sum(torch.Size(shapes[n]).numel() for n in mine)
        with (folder / file).open("wb") as out:
            out.write(head)
            if source is not None:
                source[file].seek(len(head))
            while left:
                n, at = min(left, 1 << 22), left % 7919
                drawn = pool[at : at + n]
                if source is None:
                    values = drawn * 0.02
                else:
                    values = torch.frombuffer(bytearray(source[file].read(2 * n)), dtype=torch.bfloat16).float()
                    values.add_(drawn, alpha=3e-4)
                out.write(memoryview(values.bfloat16().view(torch.uint8).numpy()))
                left -= n
    if count > 1:
        index = {
            "metadata": {"total_size": 2 * sum(torch.Size(s).numel() for s in shapes.values())},
            "weight_map": placed,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


STATE_DICTS = """
import sys, torch
from transformers import AutoModelForCausalLM
base, chat, onto = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.bfloat16) for p in sys.argv[1:4])
b, c, t = base.state_dict(), chat.state_dict(), onto.state_dict()
with torch.no_grad():
    for name, tensor in t.items():
        tensor += c[name] - b[name]
onto.save_pretrained(sys.argv[4])
"""

DIFF_STATE_DICTS = """
import sys, torch
from transformers import AutoModelForCausalLM
one, two = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.bfloat16) for p in sys.argv[1:3])
b = two.state_dict()
for name, x in one.state_dict().items():
    x, y = x.float().flatten(), b[name].float().flatten()
    d = y - x
    print(name, float(torch.nn.functional.cosine_similarity(x, y, 0)), float(d.norm() / x.norm()),
          float(d.abs().mean()), float(d.abs().max()), float((d == 0).float().mean()))
"""


def recipe(method: str, place: Path) -> dict:
    models = [{"model": str(place / name), "parameters": {"weight": 1.0}} for name in ("chat", "onto")]
    result = {"merge_method": method, "base_model": str(place / "base"), "models": models, "dtype": "bfloat16"}
    if method == "slerp":
        models[0]["model"], models[0]["parameters"] = str(place / "base"), {}
        models[1]["parameters"] = {}
    settings = dict(METHODS[method])
    if "density" in settings:
        density = settings.pop("density")
        for model in models:
            model["parameters"]["density"] = density
    return result | {"parameters": settings}


TOUCH = "b = bytearray({size})\nfor i in range(0, len(b), 4096): b[i] = 1"

LAUNCH = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
figures = [seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)]
open(sys.argv[1], "w").write(json.dumps(figures))
"""


def measured(command: list[str], log: Path, touch: int, warm: list[str]) -> tuple[float, int, float, int]:
    """Seconds, peak resident bytes, CPU seconds and exit status of one process.

    A small launcher starts it: the kernel counts the parent's pages at the time of the fork as the child's. Before it,
    `touch` bytes are written and freed, so that on a virtual machine no contestant waits for memory from the host, and
    the files `warm` are read into the page cache.
    """
    figures = log.with_suffix(".json")
    subprocess.run([sys.executable, "-S", "-c", TOUCH.format(size=touch)], check=True)
    if warm:
        subprocess.run(["cat", *warm], stdout=subprocess.DEVNULL, check=True)
    with log.open("wb") as told:
        subprocess.run(
            [sys.executable, "-S", "-c", LAUNCH, str(figures), *command], stdout=told, stderr=told, check=True
        )
    seconds, peak, cpu, status = json.loads(figures.read_text())
    return seconds, peak, cpu, status


def contestants(place: Path, methods: list[str], peer: str | None) -> dict[str, list[str]]:
    """Name -> command; {out} is replaced by a new folder."""
    base, chat, onto = (str(place / name) for name in ("base", "chat", "onto"))
    weights = [str(p) for name in ("base", "chat", "onto") for p in sorted((place / name).glob("*.safetensors"))]
    blocks = sum(p.stat().st_size for p in (place / "onto").glob("*.safetensors")) >> 20
    lapis = [sys.executable, "-m", "lapis"]
    floor = f"cat {' '.join(weights)} > /dev/null; dd if=/dev/zero of={{out}} bs=1M count={blocks} {{sync}} status=none"
    result = {
        "floor: cat, dd": ["sh", "-c", floor.replace("{sync}", "")],
        "floor: cat, dd, fsync": ["sh", "-c", floor.replace("{sync}", "conv=fsync")],
        "lapis graft": [*lapis, "graft", "--base", base, "--chat", chat, "--onto", onto, "--out", "{out}",
                        "--norms", "add", "--no-smoke", "--json"],
        "state dicts (transformers)": [sys.executable, str(place / "state_dicts.py"), base, chat, onto, "{out}"],
    }  # fmt: skip
    two = [str(p) for name in ("base", "chat") for p in sorted((place / name).glob("*.safetensors"))]
    result |= {
        "cat of two models": ["sh", "-c", f"cat {' '.join(two)} > /dev/null"],
        "lapis diff": [*lapis, "diff", base, chat, "--json"],
        "diff by state dicts": [sys.executable, str(place / "diff_state_dicts.py"), base, chat],
    }
    for method in methods:
        path = place / f"{method}.yaml"
        path.write_text(json.dumps(recipe(method, place)))
        result[f"lapis merge {method}"] = [*lapis, "merge", str(path), "--out", "{out}", "--json"]
        if peer:
            result[f"mergekit {method}"] = [peer, "-m", "mergekit.scripts.run_yaml", str(path), "{out}", "--quiet"]
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--size", choices=SHAPES, default="0.5b")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--methods", default="task_arithmetic", help=f"comma list of {', '.join(METHODS)}, or none")
    options.add_argument("--only", default="", help="comma list: run contestants whose name holds one of these")
    options.add_argument("--peer-python", help="an interpreter that has mergekit 0.1.5")
    options.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    options.add_argument("--keep", action="store_true", help="keep the checkpoints for the next run")
    options.add_argument("--table", type=Path, help="append the table to this file")
    given = options.parse_args()
    place = given.work / given.size
    if not (place / "done").exists():
        shutil.rmtree(place, ignore_errors=True)
        make(place / "base", given.size, 1)
        make(place / "chat", given.size, 2, place / "base")
        make(place / "onto", given.size, 3, place / "base")
        (place / "done").touch()
    (place / "state_dicts.py").write_text(STATE_DICTS)
    (place / "diff_state_dicts.py").write_text(DIFF_STATE_DICTS)
    methods = [m for m in given.methods.split(",") if m in METHODS]
    model_bytes = sum(p.stat().st_size for p in (place / "onto").glob("*.safetensors"))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    touch = min(model_bytes + (1 << 30), int(0.8 * free))  # never so much that inputs leave the page cache
    inputs = [str(p) for name in ("base", "chat", "onto") for p in sorted((place / name).glob("*.safetensors"))]
    warm = inputs if 5 * model_bytes < free else []  # inputs that do not fit stay on the disk for everybody
    seen: dict[str, list[tuple[float, int, float]]] = {}
    failed: dict[str, str] = {}
    for turn in range(given.rounds):
        for name, template in contestants(place, methods, given.peer_python).items():
            if not any(part in name for part in given.only.split(",")) or name in failed:
                continue
            out = place / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True) if out.is_file() else None
            log = place / "log.txt"
            command = [part.replace("{out}", str(out)) for part in template]
            seconds, peak, cpu, status = measured(command, log, touch, warm)
            if status:
                failed[name] = log.read_text(errors="replace").strip().splitlines()[-1][:200]
                print(f"{name}: exit {status}: {failed[name]}", file=sys.stderr)
                continue
            seen.setdefault(name, []).append((seconds, peak, cpu))
            print(
                f"round {turn + 1}: {name}: {seconds:.2f} s, CPU {cpu:.2f} s, {peak / 1e6:,.0f} MB",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
    lines = table(given.size, given.rounds, seen, failed)
    print(lines)
    if given.table:
        with given.table.open("a", encoding="utf-8") as file:
            file.write(lines + "\n")
    if not given.keep:
        shutil.rmtree(place)


def table(size: str, rounds: int, seen: dict[str, list[tuple[float, int, float]]], failed: dict[str, str]) -> str:
    date = time.strftime("%Y-%m-%d")
    lines = [f"## {size}, {rounds} rounds, {date}, {os.cpu_count()} cores, torch {torch.__version__}", ""]
    lines += ["| contestant | seconds (median) | min to max | CPU seconds | peak MB |", "|---|---:|---:|---:|---:|"]
    for name, runs in seen.items():
        times, peak = [run[0] for run in runs], max(run[1] for run in runs)
        cpu = statistics.median(run[2] for run in runs)
        spread = f"{min(times):.2f} to {max(times):.2f}"
        lines.append(f"| {name} | {statistics.median(times):.2f} | {spread} | {cpu:.2f} | {peak / 1e6:,.0f} |")
    lines += [f"| {name} | failed | {why} | | |" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
