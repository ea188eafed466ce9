"""How much of a difference do adapters of one rank keep: `lapis delta extract --rank --peft` and mergekit-extract-lora?

    python benchmarks/extract_lora.py --peer-python /path/to/venv-with-mergekit/bin/python

Makes a base of random weights and a chat version whose differences have singular values that fall over noise, as those
of fine-tunes do, lets both write an adapter of each rank, and reads the two with one and the same program: the error is
|difference - scale * B A| over |difference|, by norm, of all matrices that both have. The best there can be is that of
the exact singular values in float64. Adds a dated table to benchmarks/results/extract_lora.md.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hardware import processor
from merge import ROOT, SHAPES, make
from results_file import add_table
from safetensors.torch import load_file, save_file

RANKS = (16, 64)
SIZES = {
    "narrow": (512, 4, 8, 4, 1536, 1000, True, 1),  # every matrix is decomposed exactly
    "wide": (1280, 1, 10, 10, 1536, 1000, True, 1),  # every matrix is projected at random first
}
LAYERS = "model.layers."


def tuned(base: Path, chat: Path, seed: int) -> None:
    """A chat version: matrices of layers plus a difference of falling singular values, and noise."""
    torch.manual_seed(seed)
    chat.mkdir()
    shutil.copy(base / "config.json", chat)
    tensors = load_file(base / "model.safetensors")
    for name, weight in tensors.items():
        if name.startswith(LAYERS) and weight.dim() == 2:
            rows, columns = weight.shape
            count = min(rows, columns, 256)
            left, right = torch.randn(rows, count), torch.randn(count, columns)
            falling = 1 / torch.arange(1, count + 1) ** 0.8
            change = (left * falling) @ right
            change = change / change.std() * 1e-3 + torch.randn_like(weight.float()) * 3e-4
            tensors[name] = (weight.float() + change).bfloat16()
    save_file(tensors, chat / "model.safetensors", metadata={"format": "pt"})


def differences(base: Path, chat: Path) -> dict[str, torch.Tensor]:
    one, two = (load_file(folder / "model.safetensors") for folder in (base, chat))
    names = [name for name in one if name.startswith(LAYERS) and one[name].dim() == 2]
    return {name.removesuffix(".weight"): two[name].double() - one[name].double() for name in names}


def products(folder: Path) -> dict[str, torch.Tensor]:
    """scale * B A of each module of an adapter, as PEFT has it."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    scales = config.get("alpha_pattern") or {}
    result = {}
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace("lora_A", "lora_B")]
        alpha = next((value for name, value in scales.items() if module.endswith(name)), config["lora_alpha"])
        result[module] = b.double() @ a.double() * (alpha / len(a))
    return result


def error(wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor], names: list[str]) -> float:
    lost = sum(float((wanted[name] - given[name]).square().sum()) for name in names)
    return (lost / sum(float(wanted[name].square().sum()) for name in names)) ** 0.5


def cpu(command: list[str]) -> float:
    """Processor seconds of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="an interpreter that has mergekit 0.1.5")
    given = parser.parse_args()
    lines = [f"## {datetime.date.today()}, {os.cpu_count()} cores, {processor()}", ""]
    lines += [
        "| matrices | rank | modules | error, best possible | lapis | mergekit 0.1.5 | CPU seconds | mergekit's |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(prefix="lapis-lora-") as folder:
        for size, shape in SIZES.items():
            SHAPES[size] = shape
            base, chat = (Path(folder) / f"{size}-{role}" for role in ("base", "chat"))
            make(base, size, 0)
            tuned(base, chat, 1)
            wanted = differences(base, chat)
            values = {name: torch.linalg.svdvals(change) for name, change in wanted.items()}
            for rank in RANKS:
                places = tuple(Path(folder) / f"{size}-{rank}-{who}" for who in ("lapis", "mergekit"))
                seconds = [
                    cpu([sys.executable, "-m", "lapis", "delta", "extract", "--base", str(base), "--chat", str(chat),
                         "--out", str(places[0]), "--rank", str(rank), "--peft", "--no-smoke"]),
                    cpu([given.peer_python, "-m", "mergekit.scripts.extract_lora", "--model", str(chat),
                         "--base-model", str(base), "--out-path", str(places[1]), "--max-rank", str(rank)]),
                ]  # fmt: skip
                adapters = [products(place) for place in places]
                names = sorted(set(wanted).intersection(*adapters))
                whole = sum(float(values[name].square().sum()) for name in names)
                best = (sum(float(values[name][rank:].square().sum()) for name in names) / whole) ** 0.5
                ours, theirs = (error(wanted, adapter, names) for adapter in adapters)
                lines.append(
                    f"| {size} | {rank} | {len(names)} of {len(wanted)} | {best:.4%} | {ours:.4%} | {theirs:.4%} "
                    f"| {seconds[0]:.1f} | {seconds[1]:.1f} |"
                )
                print(lines[-1], flush=True)
    add_table(__file__, "Adapters taken from a difference", lines)


if __name__ == "__main__":
    main()
