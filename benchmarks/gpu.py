"""lapis on one GPU, in one command and at most eight minutes: is it right, and how fast is it?

    PYTHONPATH=src python benchmarks/gpu.py [--json gpu.json] [--only parity,train] [--write]

Needs torch, transformers, safetensors, tokenizers, huggingface_hub, rich, PyYAML and numpy, and no data: texts, models
and their weights are made here. Every section runs in a process of its own with a limit of its own; one that fails or
takes too long is noted as such, and the next goes on. What a section has measured by then counts: it prints one JSON
object per figure. Without a GPU everything runs in a smaller form on the CPU. Merges and diffs lapis computes on the
CPU, with a GPU or without. Prints a table to standard error and one JSON object to standard output; --write adds the
table to results/gpu.md. Exits with 1 where a section or a figure failed, or a figure is beyond its bound; what the
machine lacks (a library, a GPU) is noted as absent, and fails nothing.
"""

import argparse
import asyncio
import contextlib
import datetime
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hardware import processor
from results_file import add_table
from train import NoTokenizer, peak_flops

from lapis.wording import format_count

BUDGET = 480.0  # seconds, for everything
Note = Callable[..., None]  # note(name, figure=...): a line of the result, at once

ROOT = Path(__file__).parents[1]
EQUAL = 1e-4  # of a logit in float32, beside transformers
ROUNDED = 3.0  # in bfloat16: how many times as far from float64 as transformers is
RESUMED = {"cpu": 0.0, "cuda": 1e-3}  # of a weight: not every CUDA kernel has a form that repeats its sums
MERGED, COMPARED = 1e-4, 1e-6  # the share of a merge's numbers that are rounded otherwise; a gap of a diff's figures
SHAPES = {
    "124 M": {"dim": 768, "layers": 12, "heads": 12, "ffn_dim": 2048, "vocab": 50304, "context": 1024},
    "1 B": {"dim": 2048, "layers": 16, "heads": 16, "ffn_dim": 8192, "vocab": 50304, "context": 2048},
    "tiny": {"dim": 64, "layers": 2, "heads": 4, "ffn_dim": 128, "vocab": 512, "context": 64},
}
ROWS = {"124 M": 32, "1 B": 8, "tiny": 4}


def cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if cuda() else "cpu")


def sizes() -> list[str]:
    return ["124 M", "1 B"] if cuda() else ["tiny"]


def settle() -> None:
    """Waits for the GPU."""
    if cuda():
        torch.cuda.synchronize()


def new_model(name: str) -> Any:
    from lapis.families.config import ModelConfig
    from lapis.model.transformer import Transformer

    torch.manual_seed(0)
    with device():
        return Transformer(ModelConfig(**SHAPES[name], family="qwen3", qk_norm=True, tied=True))


def random_rows(name: str, count: int = 64) -> Any:
    """Packed rows of random tokens."""
    import numpy as np

    from lapis.text.rows.rows import Rows

    length, vocab = SHAPES[name]["context"], SHAPES[name]["vocab"]
    tokens = np.random.default_rng(0).integers(3, vocab, count * length).astype("uint16")
    info = {"kind": "documents", "length": length, "rows": count, "digest": "random",
            "counts": {"bytes": 4 * len(tokens), "supervised": len(tokens)}, "end": 0, "pad": 0, "vocab": vocab,
            "tokenizer": "none"}  # fmt: skip
    return Rows(info, {"tokens": tokens, "starts": np.arange(0, len(tokens) + 1, length, dtype="int64")})


def training(model: Any, name: str, steps: int, **options: Any) -> dict[str, Any]:
    """Steps of the run that `lapis train` makes, without its files: the median after the first two, and the peak."""
    from lapis.training.config import TrainConfig
    from lapis.training.distributed import parallel
    from lapis.training.loop.loop import TrainingRun
    from lapis.training.loop.progress import Silent
    from lapis.training.loop.stop_request import StopRequest
    from lapis.training.objectives.supervised.next_token import Causal
    from lapis.training.setup.blocks import compiled

    given = {"batch": ROWS[name], "optimizer": "adamw", "compile": "off", "shard": "none",
             "precision": "bf16" if cuda() else "float32"}  # fmt: skip
    config = TrainConfig(steps=steps, sample_every=0, threads=1, **{**given, **options})
    objective = Causal(NoTokenizer(), random_rows(name), context=SHAPES[name]["context"])
    if cuda():
        torch.cuda.reset_peak_memory_stats()
    times = []
    run = TrainingRun(model, objective, config, parallel.join(), None, Silent(), StopRequest(), device())
    with run.computing(), compiled(run.model, bool(run.facts.get("compile"))):
        batches = objective.batches(run.state)
        for _ in range(steps):
            started = time.perf_counter()
            run.step(batches)
            settle()
            times.append(time.perf_counter() - started)
    from lapis.model.size import measure

    tokens = config.batch * SHAPES[name]["context"]
    rate = tokens / statistics.median(times[2:] or times)
    flops = 3 * measure(model.config, SHAPES[name]["context"]).flops_per_token * rate
    return {
        "tokens_per_second": rate, "mfu": flops / peak_flops("cuda") if cuda() else None, "rows": config.batch,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda() else None,
    }  # fmt: skip


# -- sections: each notes what it measures as it goes


def parity(note: Note) -> None:
    """Every model_type beside transformers on the same device: the largest difference of a logit in float32, and in
    bfloat16 how far ours and theirs are from float64 at the tokens where they are nearest, a quarter of all."""
    import transformers

    from lapis.model.load import load

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.oracles.small_models import MODELS, make_theirs

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False

    def compare(kind: str, options: dict[str, Any], folder: str) -> dict[str, float]:
        exact = make_theirs(kind, options)
        exact.save_pretrained(folder)
        exact.config._experts_implementation = "eager"  # others have no float64
        torch.manual_seed(1)
        image = "image_size" in options
        inputs = torch.randn(2, 3, 24, 24) if image else torch.randint(3, 96, (2, 20))  # no token is padding
        expected = exact.double()(inputs.double() if image else inputs).logits

        def both(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            given = inputs.to(device(), dtype) if image else inputs.to(device())
            theirs = type(exact).from_pretrained(folder, dtype=dtype).to(device()).eval()
            theirs.config._experts_implementation = "eager"
            return load(folder, dtype, device())(given).double().cpu(), theirs(given).logits.double().cpu()

        def apart(logits: torch.Tensor) -> float:  # where rounding chose another expert, a token is far away
            return (logits - expected).abs().amax(-1).quantile(0.25).item()

        (a, b), rounded = both(torch.float32), both(torch.bfloat16)
        return {"float32": (a - b).abs().max().item(), "bfloat16": apart(rounded[0]), "theirs": apart(rounded[1])}

    for name, (kind, options) in MODELS.items():
        if not hasattr(transformers, kind):
            note(name, absent=f"transformers {transformers.__version__} has no {kind}")
            continue
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            attempt(note, name, lambda k=kind, o=options, f=folder: compare(k, o, f))  # type: ignore[misc]


def train(note: Note) -> None:
    """Tokens per second, MFU (model FLOPs over the data sheet's) and memory: compiled or not, AdamW and Muon."""
    steps = 12 if cuda() else 3
    for name in sizes():
        ways = [("eager", "adamw", "off"), ("compiled", "adamw", "on")]
        if name != "1 B":
            ways.append(("compiled, Muon", "muon", "on"))
        for way, optimizer, compile_ in ways if cuda() else ways[:1]:
            attempt(note, f"{name} {way}", lambda n=name, o=optimizer, c=compile_: training(  # type: ignore[misc]
                new_model(n), n, steps, optimizer=o, compile=c))  # fmt: skip


def fsdp(note: Note) -> None:
    """The same with FSDP2, on the one GPU: what its hooks and copies cost."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda() else "gloo", rank=0, world_size=1)
    for name in sizes()[::-1]:
        for way in ("on", "off") if cuda() else ("off",):
            attempt(note, f"{name} FSDP2{', compiled' if way == 'on' else ''}",
                    lambda n=name, w=way: training(new_model(n), n, 10 if cuda() else 3, shard="full", compile=w))  # type: ignore[misc]  # fmt: skip
    dist.destroy_process_group()


def adapters(note: Note) -> None:
    """LoRA on the larger shape: over float32, bfloat16, and NF4 where bitsandbytes is there."""
    from lapis.training.setup import lora

    name = sizes()[-1]
    for base in ("float32", "bfloat16", "nf4"):
        if base == "nf4" and (lacking := lacks_nf4()):
            note(f"{name} LoRA over {base}", absent=lacking)
            continue

        def act(base: str = base) -> dict[str, Any]:
            config = lora.LoraConfig(rank=16, base=base)
            model = new_model(name)
            lora.hold(model, config, device())
            lora.wrap(model.to(device()), config, "random")
            return training(model, name, 10 if cuda() else 3)

        attempt(note, f"{name} LoRA over {base}", act)


def decode(note: Note) -> None:
    """Tokens per second of greedy decoding: lapis, transformers, and transformers in CUDA graphs (a static cache)."""
    from lapis.generation.generate import Decoding
    from lapis.generation.options import Sampling
    from lapis.generation.ready import ready
    from lapis.model.load import load

    tokens, dtype = (128, torch.bfloat16) if cuda() else (8, torch.float32)
    for name in sizes():
        with tempfile.TemporaryDirectory() as folder:
            write_model(name, Path(folder), dtype)
            ours = ready(load(folder, dtype, device()))
            theirs = peer_model(folder, dtype)

            def lapis_rate(rows: int, model: Any = ours) -> dict[str, Any]:
                decoding = Decoding(model, prompts(rows), Sampling(temperature=0, max_tokens=tokens + 4), range(rows))
                for _ in range(3):
                    decoding.step()
                settle()
                started = time.perf_counter()
                for _ in range(tokens):
                    decoding.step()
                settle()
                return {"tokens_per_second": rows * tokens / (time.perf_counter() - started)}

            def peer_rate(rows: int, model: Any = theirs, **options: Any) -> dict[str, Any]:
                seconds = [peer_seconds(model, rows, count, **options) for count in (4, 4, tokens + 4)]  # one compiles
                return {"tokens_per_second": rows * tokens / (seconds[2] - seconds[1])}

            for rows in (1, 8, 64) if cuda() else (1,):
                attempt(note, f"{name} lapis, {format_count(rows, 'row')}", lambda r=rows: lapis_rate(r))  # type: ignore[misc]
                attempt(note, f"{name} transformers, {format_count(rows, 'row')}", lambda r=rows: peer_rate(r))  # type: ignore[misc]
            if cuda():
                attempt(note, f"{name} transformers, CUDA graphs, 1 row",
                        lambda: peer_rate(1, cache_implementation="static"))  # fmt: skip


def serve(note: Note) -> None:
    """Tokens per second of the server's engine, without HTTP: clients that each want a reply, at once. Beside it
    `generate` of transformers with as many rows, which all start and end together."""
    from lapis.generation.options import DecodingRuntime, Sampling
    from lapis.serving.engine.engine import Engine
    from lapis.serving.engine.order import Order
    from lapis.serving.engine.served import open_models

    name, tokens, dtype = sizes()[0], 128 if cuda() else 8, torch.bfloat16 if cuda() else torch.float32
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(name, folder, dtype)
        (served,) = open_models([str(folder)], DecodingRuntime(), 64, 512 if cuda() else 64)

        async def rate(clients: int) -> dict[str, Any]:
            engine = Engine([served], rows=clients, queue=2 * clients)
            engine.start(asyncio.get_running_loop())
            try:
                orders = [Order(served.name, prompt, Sampling(temperature=0, max_tokens=tokens))
                          for prompt in prompts(clients)]  # fmt: skip
                started = time.perf_counter()

                async def read(stream: Any) -> int:
                    made = 0
                    async for chunk in stream:
                        made = max(made, chunk.tokens)
                    return made

                made = await asyncio.gather(*map(read, engine.submit(orders)))
                return {"tokens_per_second": sum(made) / (time.perf_counter() - started), "tokens": sum(made)}
            finally:
                await asyncio.to_thread(engine.stop)

        theirs = peer_model(folder, dtype)
        peer_seconds(theirs, 1, 4)  # a first call, in which kernels are loaded

        def peer_rate(rows: int) -> dict[str, Any]:
            return {"tokens_per_second": rows * tokens / peer_seconds(theirs, rows, tokens), "tokens": rows * tokens}

        asyncio.run(rate(1))
        for clients in (1, 8, 64) if cuda() else (2,):
            attempt(note, f"{name}, {format_count(clients, 'client')}", lambda c=clients: asyncio.run(rate(c)))  # type: ignore[misc]
            attempt(note, f"{name} transformers, {format_count(clients, 'row')}", lambda r=clients: peer_rate(r))  # type: ignore[misc]


def weights(note: Note) -> None:
    """A merge and a diff, which lapis computes on the CPU, beside the same by torch on this device in float64."""
    import lapis

    name = sizes()[0]
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / letter for letter in "abc"]
        for number, folder in enumerate(folders):
            write_model(name, folder, torch.bfloat16, noise=0.002 * number)
        a, b, c = map(str, folders)
        loaded = [
            {n: t.detach().to(device()).double() for n, t in lapis.load(f)[0].named_parameters()} for f in (a, b, c)
        ]

        def merged() -> dict[str, Any]:
            started = time.perf_counter()
            lapis.merge(f"{a} + 0.8*({c} - {b})", f"{place}/out")
            seconds = time.perf_counter() - started
            settle()
            moment = time.perf_counter()
            expected = {n: (loaded[0][n] + 0.8 * (loaded[2][n] - loaded[1][n])).bfloat16() for n in loaded[0]}
            settle()
            there = time.perf_counter() - moment
            out = dict(lapis.load(f"{place}/out", dtype=torch.bfloat16)[0].named_parameters())
            unequal = sum(int((out[n].to(device()) != expected[n]).sum()) for n in expected)
            return {"seconds": seconds, "seconds_of_arithmetic_there": there, "unequal": unequal,
                    "of": sum(t.numel() for t in out.values())}  # fmt: skip

        def compared() -> dict[str, Any]:
            started = time.perf_counter()
            table = lapis.diff(a, b)
            seconds = time.perf_counter() - started
            norms = [float((loaded[1][n] - loaded[0][n]).norm() / loaded[0][n].norm()) for n in loaded[0]]
            cosines = [float((loaded[1][n] * loaded[0][n]).sum() / loaded[1][n].norm() / loaded[0][n].norm())
                       for n in loaded[0]]  # fmt: skip
            rows = table.to_json()["tensors"]
            pairs = [(sorted(row["relative_norm"] for row in rows), sorted(norms)),
                     (sorted(row["cosine"] for row in rows), sorted(cosines))]  # fmt: skip
            gaps = [max(abs(x - y) for x, y in zip(*pair, strict=True)) for pair in pairs]
            return {"seconds": seconds, "norm_gap": gaps[0], "cosine_gap": gaps[1]}

        attempt(note, f"{name} merge", merged)
        attempt(note, f"{name} diff", compared)


def resume(note: Note) -> None:
    """A run that is killed (SIGKILL) after its first checkpoint, and run again, beside one that was not."""
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        write_texts(Path(place))
        command = [sys.executable, __file__, "--run", place, "--out"]
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # with which cuBLAS repeats its sums
        one = subprocess.Popen([*command, "one"], env=environment)
        other = subprocess.Popen([*command, "other"], env=environment)
        try:
            while not list(Path(place, ".other.lapis", ".journal").glob("step-*/state.json")):
                if other.poll() is not None:
                    raise RuntimeError(f"the run ended with {other.returncode} before it was killed")
                time.sleep(0.02)
            other.send_signal(signal.SIGKILL)
            other.wait()
            again = subprocess.run([*command, "other"], env=environment, check=False)
            codes = [one.wait(), again.returncode]
        finally:
            for child in (one, other):
                child.kill()
        if any(codes):
            note("killed and resumed", failed=f"the runs ended with {codes[0]} and {codes[1]}", codes=codes)
            return
        from lapis.model.load import load

        a, b = (load(Path(place) / out).state_dict() for out in ("one", "other"))
        gap = max((a[n].double() - b[n].double()).abs().max().item() for n in a)
        note("killed and resumed", codes=codes, largest_difference=gap, seconds=time.perf_counter() - started)


SECTIONS: dict[str, tuple[Callable[[Note], None], float]] = {  # with its limit in seconds
    "parity": (parity, 120), "train": (train, 120), "fsdp": (fsdp, 80), "adapters": (adapters, 60),
    "decode": (decode, 90), "serve": (serve, 60), "weights": (weights, 40), "resume": (resume, 120),
}  # fmt: skip


# -- what sections share


def lacks_nf4() -> str:
    """What NF4 needs and this machine has not; "" where it has all."""
    if not cuda():
        return "no CUDA GPU"
    return "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def attempt(note: Note, name: str, act: Callable[[], dict[str, Any]]) -> None:
    """Notes what `act` measures, or why it did not, and lets the memory go."""
    try:
        figures = act()
    except Exception as error:
        figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
    note(name, **figures)
    if cuda():
        torch.cuda.empty_cache()


def peer_model(folder: Path | str, dtype: torch.dtype) -> Any:
    """A folder as transformers runs it, with no token that ends a reply."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device()).eval()
    model.generation_config.eos_token_id = None
    return model


def peer_seconds(model: Any, rows: int, count: int, **options: Any) -> float:
    """How long its `generate` takes for so many tokens of each of so many prompts."""
    ids_BT = torch.tensor(prompts(rows), device=device())
    given = {"attention_mask": torch.ones_like(ids_BT), "do_sample": False, "pad_token_id": 0, **options}
    settle()
    started = time.perf_counter()
    model.generate(ids_BT, max_new_tokens=count, min_new_tokens=count, **given)
    settle()
    return time.perf_counter() - started


def prompts(rows: int) -> list[list[int]]:
    return [[100 + (i + row) % 200 for i in range(16)] for row in range(rows)]


def write_model(name: str, folder: Path, dtype: torch.dtype, noise: float = 0.0) -> None:
    """A folder with random weights of a shape, and a small tokenizer."""
    from lapis.model.load import save

    model = new_model(name).cpu()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter) * noise)
    save(model, folder, dtype)
    small_tokenizer().save(folder)


def small_tokenizer() -> Any:
    from lapis.text.tokenizer.tokenizer import train_tokenizer

    return train_tokenizer(texts(), 320)


def texts() -> list[str]:
    return [f"The cat number {i} sat on the mat and counted to {i * 7}. It slept in tree {i % 5}." for i in range(99)]


def write_texts(place: Path) -> None:
    small_tokenizer().save(place / "tok")
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))


def train_small(place: Path, out: str) -> None:
    """The run that `resume` kills. Kernels repeat their sums bit for bit where torch has such."""
    from lapis.training.loop.progress import Silent
    from lapis.training.run import read_settings, run

    torch.use_deterministic_algorithms(cuda(), warn_only=True)
    settings = {
        "objective": "causal", "new": {"dim": 128, "layers": 4, "heads": 4, "ffn_dim": 256, "tied": True},
        "tokenizer": str(place / "tok"), "data": str(place / "texts.jsonl"), "context": 64, "out": str(place / out),
        "steps": 200 if cuda() else 16, "batch": 16, "save_every": 5, "sample_every": 0, "threads": 1, "compile": "off",
        "precision": "bf16" if cuda() else "float32",
    }  # fmt: skip
    run(read_settings(settings, "gpu"), watch=Silent())


def free_port() -> int:
    import socket

    with socket.socket() as result:
        result.bind(("localhost", 0))
        return int(result.getsockname()[1])


# -- the whole


def section(name: str, seconds: float) -> dict[str, Any]:
    """A section's figures, from a process of its own that is killed after so many seconds."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--section", name]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    why = ""
    try:
        out, error = child.communicate(timeout=seconds)
        if child.returncode:
            why = f"ended with {child.returncode}: {(error.strip().splitlines() or [''])[-1][:300]}"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        out, _ = child.communicate()
        why = f"stopped after {seconds:.0f} s"
    figures = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError):
            figures |= json.loads(line)
    return {"seconds": time.monotonic() - started, "figures": figures, **({"failed": why} if why else {})}


def faults(result: dict[str, Any]) -> Iterator[str]:
    """What is wrong, a line each: sections and figures that failed, and figures beyond their bounds."""
    for name, part in result["sections"].items():
        if "failed" in part:
            yield f"{name}: {part['failed']}"
        elif not part["figures"]:
            yield f"{name}: no figure"
        for what, figures in part["figures"].items():
            if why := figures.get("failed") or beyond(name, figures, "cuda" if result["machine"]["gpu"] else "cpu"):
                yield f"{name}, {what}: {why}"


def beyond(section: str, figures: dict[str, Any], kind: str) -> str:
    """How a figure is beyond its bound; "" where it is not, or where there is none. kind: of device.

    A figure that is no number (NaN) is beyond any bound.
    """
    bounds: dict[str, float] = {}
    if section == "parity":
        bounds = {"float32": EQUAL, "bfloat16": ROUNDED * figures.get("theirs", 0.0)}
    elif section == "resume":
        bounds = {"largest_difference": RESUMED[kind]}
    elif section == "weights":
        bounds = {"unequal": MERGED * figures.get("of", 0), "norm_gap": COMPARED, "cosine_gap": COMPARED}
    return "; ".join(f"{name} is {shown(figures[name])}, more than {shown(bound)}"
                     for name, bound in bounds.items() if name in figures and not figures[name] <= bound)  # fmt: skip


def machine() -> dict[str, Any]:
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "python": sys.version.split()[0],
        "torch": torch.__version__, "gpu": torch.cuda.get_device_name() if cuda() else None, "gpu_memory_gb": memory,
        "processor": processor(), "peak_flops": peak_flops("cuda") if cuda() else None,
    }  # fmt: skip


def table(result: dict[str, Any]) -> Iterator[str]:
    """Every figure in a line."""
    here = result["machine"]
    place = here["gpu"] or f"a CPU and no GPU ({here['processor']})"
    yield f"## {here['date'][:10]}, {place}, torch {here['torch']}, Python {here['python']}"
    yield ""
    if not here["gpu"]:
        yield "From a CPU, in the smaller form: it shows that the script works, and not what a GPU gives."
        yield ""
    for name, part in result["sections"].items():
        yield f"**{name}** ({part['seconds']:.0f} s{', ' + part['failed'] if 'failed' in part else ''})"
        yield ""
        if keys := list(dict.fromkeys(key for figures in part["figures"].values() for key in figures)):
            yield f"| | {' | '.join(keys)} |"
            yield "|---|" + "--:|" * len(keys)
        for what, figures in part["figures"].items():
            yield f"| {what} | {' | '.join(shown(figures.get(key)) for key in keys)} |"
        yield ""
    yield from (f"- **beyond its bound, or failed**: {fault}" for fault in result["faults"])


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if math.isfinite(value) else str(value)
    return "" if value is None else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--json", type=Path, help="where the result goes, too")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        train_small(given.run, given.out)
        return 0
    if given.section:
        SECTIONS[given.section][0](lambda name, **figures: print(json.dumps({name: figures}), flush=True))
        return 0
    chosen = given.only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--only: {unknown[0]} is no section; it can be {', '.join(SECTIONS)}")
    ends = time.monotonic() + given.budget
    result: dict[str, Any] = {"machine": machine(), "sections": {}}
    for name in chosen:
        left = ends - time.monotonic()
        if left < 5:
            result["sections"][name] = {"seconds": 0.0, "figures": {}, "failed": "no time was left"}
            continue
        result["sections"][name] = section(name, min(SECTIONS[name][1], left))
        print(f"{name}: {result['sections'][name]['seconds']:.0f} s", file=sys.stderr, flush=True)
        if given.json:  # after every section, so that nothing is lost where the whole is ended from outside
            given.json.write_text(json.dumps(result, indent=1) + "\n")
    result["faults"] = list(faults(result))
    lines = list(table(result))
    print("\n".join(lines), file=sys.stderr)
    if given.write:
        add_table(__file__, "One GPU", lines)
    print(json.dumps(result))
    return int(bool(result["faults"]))


if __name__ == "__main__":
    sys.exit(main())
