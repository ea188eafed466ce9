"""Are several processes as fast as one, and what would a checkpoint of 671 billion parameters take?

    python benchmarks/ranks.py --size 0.5b --rounds 3
    python benchmarks/ranks.py --large          the plan for the large one, from headers that this script makes

The first runs the same graft by one process, by one under torchrun, whose own start is not ours, and by two with a core
each, in turn; the output's bytes are compared. The second makes three checkpoints of DeepSeek-V3's shape whose files
are headers over holes, and plans a graft of them: what each of 1, 8 and 64 processes reads, writes and holds, and how
long that takes at two rates of a disk. Adds a dated table to benchmarks/results/ranks.md.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merge import ROOT, make
from results_file import add_table

LAYERS, DENSE, DIM, EXPERTS, WIDTH, FFN, VOCAB = 61, 3, 7168, 256, 2048, 18432, 129_280  # DeepSeek-V3's config.json
SHARD = 4_300_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode, and does not make it anew
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as folder:
        place = Path(folder)
        lines = plan_large(place) if options.large else compare(place, options)
    print("\n".join(lines))
    add_table(__file__, "Several processes", lines)


def compare(place: Path, options: argparse.Namespace) -> list[str]:
    make(place / "base", options.size, 0)
    make(place / "chat", options.size, 1, place / "base")
    make(place / "onto", options.size, 2, place / "base")
    roles = [word for role in ("base", "chat", "onto") for word in ("--" + role, str(place / role))]
    seen: dict[str, list[tuple[float, float]]] = {"1": [], "1 under torchrun": [], "2 under torchrun": []}
    run("1", ["graft", *roles, "--no-smoke", "--out", str(place / "out"), "--dry-run"])  # compiles what is imported
    for _ in range(options.rounds):
        for processes in seen:
            out = place / f"out {processes}"
            shutil.rmtree(out, ignore_errors=True)
            seen[processes].append(run(processes, ["graft", *roles, "--no-smoke", "--out", str(out)]))
    one, two = (
        {path.name: path.read_bytes() for path in (place / f"out {n}").iterdir()} for n in ("1", "2 under torchrun")
    )
    size = (place / "base" / "model.safetensors").stat().st_size
    head = f"## {options.size}, {options.rounds} rounds, {datetime.date.today()}, {os.cpu_count()} cores"
    lines = [f"{head}, model {size / 1e6:,.0f} MB", ""]
    lines += [f"All files have the same bytes: {'yes' if one == two else 'NO'}.", ""]
    lines += ["| processes | seconds (median) | least | times one | CPU seconds |", "|---:|---:|---:|---:|---:|"]
    alone = statistics.median(seconds for seconds, _ in seen["1"])
    for processes, rows in seen.items():
        seconds, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        least = min(seconds for seconds, _ in rows)
        lines.append(f"| {processes} | {seconds:.2f} | {least:.2f} | {seconds / alone:.2f} | {cpu:.2f} |")
    return lines


def run(processes: str, arguments: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds of one command, torchrun's included."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes[0]]
    command = [sys.executable, *(several if len(processes) > 1 else []), "-m", "lapis", *arguments]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr}")
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def large_shapes() -> dict[str, list[int]]:
    """Names and shapes of DeepSeek-V3's weights."""
    shapes = {"model.embed_tokens.weight": [VOCAB, DIM]}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": [DIM], at + "post_attention_layernorm.weight": [DIM],
                   at + "self_attn.q_a_proj.weight": [1536, DIM], at + "self_attn.q_a_layernorm.weight": [1536],
                   at + "self_attn.q_b_proj.weight": [128 * 192, 1536], at + "self_attn.kv_a_layernorm.weight": [512],
                   at + "self_attn.kv_a_proj_with_mqa.weight": [576, DIM],
                   at + "self_attn.kv_b_proj.weight": [128 * 256, 512],
                   at + "self_attn.o_proj.weight": [DIM, 128 * 128]}  # fmt: skip
        sizes = {"mlp.": FFN}
        if layer >= DENSE:
            shapes |= {at + "mlp.gate.weight": [EXPERTS, DIM], at + "mlp.gate.e_score_correction_bias": [EXPERTS]}
            sizes = {"mlp.shared_experts.": WIDTH} | {f"mlp.experts.{i}.": WIDTH for i in range(EXPERTS)}
        for name, width in sizes.items():
            shapes |= {at + name + "gate_proj.weight": [width, DIM], at + name + "up_proj.weight": [width, DIM],
                       at + name + "down_proj.weight": [DIM, width]}  # fmt: skip
    return shapes | {"model.norm.weight": [DIM], "lm_head.weight": [VOCAB, DIM]}


def make_large(folder: Path) -> int:
    """A checkpoint whose files are headers over holes; returns its parameters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": DIM,
        "num_hidden_layers": LAYERS, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": VOCAB,
        "intermediate_size": FFN, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }))  # fmt: skip
    shards: list[dict[str, list[int]]] = [{}]
    left, total = SHARD, 0
    for name, shape in large_shapes().items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        total += count
        if 2 * count > left:
            shards.append({})
            left = SHARD
        shards[-1][name] = shape
        left -= 2 * count
    places = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        entries, at = {}, 0
        for name, shape in shard.items():
            end = at + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            entries[name], at = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}, end
            places[name] = file
        raw = json.dumps(entries).encode()
        with (folder / file).open("wb") as written:
            written.write(len(raw).to_bytes(8, "little") + raw)
            written.truncate(8 + len(raw) + at)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def plan_large(place: Path) -> list[str]:
    total = max(make_large(place / role) for role in ("base", "chat", "onto"))
    roles = [word for role in ("base", "chat", "onto") for word in ("--" + role, str(place / role))]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lapis", "graft", *roles, "--out", str(place / "out"), "--dry-run", "--json",
         "--allow-unrelated", "--same-tokens"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = json.loads(done.stdout)
    lines = [f"## A graft of {total / 1e9:,.0f} billion parameters, planned, {datetime.date.today()}", "",
             f"{sum(result['tensors'].values()):,} tensors; the plan took {seconds:.0f} s, "
             f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime:.0f} of them of the processor, "
             f"and {peak / 1e9:.2f} GB of memory in each process. The folder takes "
             f"{result['needs']['disk_bytes'] / 1e12:.2f} TB of the shared disk.", "",
             "| processes | parts of the busiest | it reads | it writes | buffers of each | hours at 0.2 GB/s | at 2 |",
             "|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in result["division"]:
        moved = row["read_bytes"] + row["written_bytes"]
        hours = [moved / rate / 3600 for rate in (200e6, 2e9)]
        lines.append(
            f"| {row['processes']} | {row['parts']:,} | {row['read_bytes'] / 1e9:,.0f} GB "
            f"| {row['written_bytes'] / 1e9:,.0f} GB | {result['needs']['memory_bytes'] / 1e6:,.0f} MB "
            f"| {hours[0]:,.2f} | {hours[1]:,.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
