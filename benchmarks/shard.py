"""Runs whose state is shared out over processes, beside one process: losses, weights, restarts, deaths.

    python benchmarks/shard.py [--steps 50] [--only loss,resume,ends,elastic,pause] [--write]

Tiny models on the CPU, float32, gloo; every process one thread. Processes are forks of this one, in the environment
that torchrun gives them, so that nothing is imported again; `elastic` is a real torchrun. Prints one JSON object, and
with --write adds a dated table to results/shard.md. Exits with 1 where a figure is beyond its bound.
"""

import argparse
import datetime
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # imported before the forks
import torch.distributed.fsdp
from hardware import processor
from results_file import add_table

from lapis.config import dump_yaml
from lapis.model.load import load
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.training.distributed.sharded_state import ShardedSaves
from lapis.training.loop.progress import Silent
from lapis.training.loop.update import Updater
from lapis.training.run import read_settings, run

TEXTS = [
    f"The cat number {i} sat on the mat and counted to {i * 7 % 13}. It slept under tree {i % 5}." for i in range(90)
]
SHAPE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "tied": True, "context": 96}
PAUSED = {"dim": 256, "layers": 8, "heads": 4, "ffn_dim": 768}  # 7 M parameters, for `pause`
BOUND = 1e-5  # of a loss, for 50 steps
RESUMED = 1e-6  # of a weight, after a run that went on with other numbers of processes
ENDS = 30.0  # seconds, in which all have ended after one has died
PATIENCE = 15  # seconds that a process may compute without an end


def prepare(place: Path) -> None:
    """A tokenizer, texts, chats, pairs and prompts, and a model that has read the texts."""
    place.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save(place / "tok")
    chats, pairs, prompts = [], [], []
    for i in range(24):
        ask, reply = f"Where does cat {i} sleep?", f"Under tree {i % 5}."
        chats.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]})
        pairs.append({"prompt": ask, "chosen": reply, "rejected": "On the mat."})
        prompts.append({"prompt": ask, "answer": reply})
    for name, records in (("texts", [{"text": t} for t in TEXTS]), ("chats", chats), ("pairs", pairs),
                          ("prompts", prompts)):  # fmt: skip
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train_here(place, {**settings(place, "causal", 20), "out": str(place / "base")})


def settings(place: Path, case: str, steps: int) -> dict[str, Any]:
    """Those of a run."""
    common = {
        "steps": steps, "batch": 8, "lr": 3e-3, "threads": 1, "precision": "float32", "log_every": 1, "sample_every": 0,
        "save_every": 1000, "warmup": 5,
    }  # fmt: skip
    base = {"model": str(place / "base")}
    new = {"new": SHAPE, "tokenizer": str(place / "tok"), "optimizer": "adamw"}
    rewards = [{"name": "exact", "options": {"partial": True}}, {"name": "length", "options": {"most": 3}}]
    own: dict[str, dict[str, Any]] = {
        "causal": {"objective": "causal", **new, "data": "texts", "context": 32},
        "muon": {"objective": "causal", **new, "optimizer": "muon", "data": "texts", "context": 32, "accumulate": 2},
        "chat": {"objective": "chat", **base, "data": "chats", "context": 96, "ema": 0.9},
        "lora": {"objective": "chat", **base, "data": "chats", "context": 96,
                 "lora": {"rank": 4, "targets": ["attn", "mlp.down"], "tokens": [7, 9]}},
        "dpo": {"objective": "dpo", **base, "data": "pairs", "context": 96, "lr": 1e-3},  # see `resume`
        "grpo": {"objective": "grpo", **base, "data": "prompts", "context": 96, "rewards": rewards, "group": 4,
                 "max_tokens": 8, "kl": 0.05, "updates": 2, "lr": 1e-3},
    }  # fmt: skip
    chosen = {**common, **own[case]}
    return {**chosen, "data": str(place / f"{chosen['data']}.jsonl"), "out": str(place / f"{case}-{steps}-one")}


def train_here(place: Path, wanted: dict[str, Any]) -> None:
    shutil.rmtree(wanted["out"], ignore_errors=True)
    run(read_settings(wanted, "shard"), watch=Silent())


class Told(Silent):
    """Says what a run notes."""

    def note(self, text: str) -> None:
        os.write(2, f"{text}\n".encode())


def journal_of(out: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return out.with_name(f".{out.name}.lapis") / ".journal"


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


class Ranks:
    """The processes of one run, as forks.

    local: how many of them count as one machine; before: called in each; watch: of the first.
    """

    def __init__(
        self, size: int, wanted: dict[str, Any], *, local: int | None = None, before: Callable[[], None] | None = None,
        watch: type[Silent] = Silent,
    ) -> None:  # fmt: skip
        self.folder = Path(tempfile.mkdtemp(prefix="shard-"))
        world = {"WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port(),
                 "LOCAL_WORLD_SIZE": local or size}  # fmt: skip
        self.watch = watch
        self.ids = [self._fork(rank, world, wanted, before) for rank in range(size)]
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int, world: dict[str, Any], wanted: dict[str, Any], before: Callable[[], None] | None) -> int:
        child = os.fork()
        if child:
            return child
        os.environ |= {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        with open(self.folder / f"{rank}.txt", "wb", 0) as shown:
            os.dup2(shown.fileno(), 2)
        code = 1
        try:
            if before is not None:
                before()
            run(read_settings(wanted, "shard"), watch=Silent() if rank else self.watch())
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            if os.environ.get("SHARD_TRACE"):
                import traceback

                traceback.print_exc()
        os._exit(code)

    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, child in enumerate(self.ids):
            if rank not in self.codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.ids)) if rank not in self.codes]

    def end(self, seconds: float = 300.0) -> tuple[list[int], str]:
        """Exit statuses, and what all wrote, when all have ended; those that have not by then are killed."""
        until = time.monotonic() + seconds
        while self.alive() and time.monotonic() < until:
            time.sleep(0.05)
        for rank in self.alive():
            os.kill(self.ids[rank], signal.SIGKILL)
            self.codes[rank] = -99
            os.waitpid(self.ids[rank], 0)
        shown = "".join((self.folder / f"{rank}.txt").read_text(errors="replace") for rank in range(len(self.ids)))
        shutil.rmtree(self.folder)
        return [self.codes[rank] for rank in range(len(self.ids))], shown

    def wait_for(self, journal: Path, after: int = 0) -> None:
        """Until a checkpoint later than step `after` is there."""
        while not any(int(path.name[5:]) > after for path in journal.glob("step-*") if (path / "state.json").exists()):
            if not self.alive():
                raise SystemExit(f"the run has ended: {self.end()}")
            time.sleep(0.02)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def furthest(one: Path, other: Path) -> float:
    """The largest difference of a weight; NaN where names, shapes or files differ."""
    names = {path.name for path in one.iterdir()}, {path.name for path in other.iterdir()}
    a, b = load(one).state_dict(), load(other).state_dict()
    if names[0] != names[1] or {n: t.shape for n, t in a.items()} != {n: t.shape for n, t in b.items()}:
        return float("nan")
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def compare(place: Path, case: str, steps: int, size: int, **more: Any) -> dict[str, Any]:
    """A run of several processes beside the same one in one process."""
    local = more.pop("local", None)
    wanted = settings(place, case, steps)
    one, out = Path(wanted["out"]), place / f"{case}-{size}"
    if not one.exists():
        train_here(place, wanted)
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    codes, shown = Ranks(size, {**wanted, "shard": "full", "out": str(out), **more}, local=local).end()
    if any(codes):
        return {"codes": codes, "shown": shown[-2000:]}
    loss = max(abs(a - b) for a, b in zip(losses(one), losses(out), strict=True))
    return {"loss": loss, "weights": furthest(one, out), "seconds": time.monotonic() - started}


def resume(place: Path, steps: int, sizes: tuple[int, ...] = (4, 2, 1), case: str = "causal") -> dict[str, Any]:
    """One run, stopped by SIGTERM and gone on with by other numbers of processes.

    The bound is one of rounding: one process that computes each step of DPO in two parts, at a rate of 3e-3, is 1.5e-5
    away in a weight after 50 of them, so that case has the rate of the policies.
    """
    wanted = {**settings(place, case, steps), "save_every": 5}
    one, out, at, pieces = place / f"{case}-whole", place / "resumed", 0, place / "pieces"
    for folder in (one, out, pieces):
        shutil.rmtree(folder, ignore_errors=True)
    pieces.mkdir()
    read = place / "read-whole.jsonl", place / "read.jsonl"
    for file in read:
        file.unlink(missing_ok=True)
    codes, shown = Ranks(1, {**wanted, "out": str(one)}, before=lambda: note_cursors(read[0])).end()
    if any(codes):
        return {"codes": codes, "shown": shown[-2000:]}
    wanted |= {"out": str(out), "shard": "full"}
    journal, stops = journal_of(out), []

    def before(size: int, slow: bool = False) -> None:
        count_reads(pieces / str(size))
        note_cursors(read[1])
        if slow:
            slow_steps()

    for size in sizes[:-1]:
        ranks = Ranks(size, wanted, before=partial(before, size, slow=True))
        ranks.wait_for(journal, at)
        os.kill(ranks.ids[-1], signal.SIGTERM)
        codes, shown = ranks.end()
        at = max(int(path.name[5:]) for path in journal.glob("step-*"))
        stops.append({"processes": size, "step": at, "codes": codes, "shown": shown.strip()[-300:]})
    codes, shown = Ranks(sizes[-1], wanted, before=partial(before, sizes[-1])).end()
    if any(codes):
        return {"stops": stops, "codes": codes, "shown": shown[-2000:]}
    curves = losses(one), losses(out)
    return {
        "stops": stops, "data_equal": read[0].read_text() == read[1].read_text(),
        "loss": max(abs(a - b) for a, b in zip(*curves, strict=True)), "weights": furthest(one, out),
        "read": {int(folder.name): max(float(file.read_text()) for file in folder.iterdir())
                 for folder in sorted(pieces.iterdir())},
    }  # fmt: skip


def slow_steps(seconds: float = 0.2) -> None:
    """From now on each step takes a while, so that a signal comes before the last one on a busy machine, too."""
    update = Updater.update

    def slowed(self: Any, *given: Any) -> Any:
        time.sleep(seconds)
        return update(self, *given)

    Updater.update = slowed  # type: ignore[method-assign]


def note_cursors(file: Path) -> None:
    """From now on the first process adds a line for each step: the place in the data after it."""
    update = Updater.update

    def noted(self: Any, *given: Any) -> Any:
        sums = update(self, *given)
        if sums is not None and os.environ["RANK"] == "0":
            with file.open("a") as lines:
                lines.write(json.dumps([self.state.step, sums.cursor]) + "\n")
        return sums

    Updater.update = noted  # type: ignore[method-assign]


def count_reads(folder: Path) -> None:
    """From now on this process notes which share of a checkpoint's tensors it reads, of all their bytes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader as Reader

    read_data = Reader.read_data

    def counted(self: Any, plan: Any, planner: Any) -> Any:
        entries = planner.metadata.state_dict_metadata
        size = {name: entry.properties.dtype.itemsize for name, entry in entries.items()}
        mine = sum(math.prod(item.lengths) * size[item.storage_index.fqn] for item in plan.items)
        folder.mkdir(parents=True, exist_ok=True)
        whole = sum(math.prod(entry.size) * size[name] for name, entry in entries.items())
        (folder / os.environ.get("RANK", "0")).write_text(str(mine / whole))
        return read_data(self, plan, planner)

    Reader.read_data = counted  # type: ignore[method-assign]


def ends(place: Path, size: int, victim: int, number: int) -> dict[str, Any]:
    """A process is killed, or stopped: how long the others live on, and what they say."""
    out = place / f"ends-{size}-{victim}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    wanted = {**settings(place, "causal", 100_000), "save_every": 5, "shard": "full", "out": str(out)}
    ranks = Ranks(size, wanted)
    ranks.wait_for(journal_of(out))
    started = time.monotonic()
    os.kill(ranks.ids[victim], number)
    while set(ranks.alive()) - {victim} and time.monotonic() - started < 60:
        time.sleep(0.05)
    seconds = time.monotonic() - started
    if victim in ranks.alive():
        os.kill(ranks.ids[victim], signal.SIGKILL)
    codes, shown = ranks.end(5)
    shutil.rmtree(out.with_name(f".{out.name}.lapis"), ignore_errors=True)
    lines = [line for line in shown.splitlines() if "train:" in line]
    return {"seconds": seconds, "codes": codes, "lines": lines}


def hang(place: Path) -> dict[str, Any]:
    """A process that computes without an end within a step."""
    from lapis.training.distributed.parallel import join
    from lapis.training.objectives.supervised.next_token import Causal

    prepare_batch, calls, began = Causal.prepare, [], place / "hang-began"

    def stuck(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        if join().rank == 1 and len(calls) == 20:
            began.write_text(str(time.monotonic()))
            while True:
                time.sleep(0.001)
        return prepare_batch(self, model, batch)

    def before() -> None:
        os.environ["LAPIS_PATIENCE"] = str(PATIENCE)
        Causal.prepare = stuck  # type: ignore[method-assign]

    out = place / "hangs"
    wanted = {**settings(place, "causal", 200), "shard": "full", "out": str(out)}
    codes, shown = Ranks(2, wanted, before=before).end(120)
    shutil.rmtree(place / ".hangs.lapis", ignore_errors=True)
    return {"seconds": time.monotonic() - float(began.read_text()), "codes": codes,
            "lines": [line for line in shown.splitlines() if "train:" in line]}  # fmt: skip


def elastic(place: Path, steps: int) -> dict[str, Any]:
    """torchrun with one restart: a worker is killed, all are started again, and the run ends as if nothing had been."""
    wanted = {**settings(place, "causal", steps), "save_every": 5, "shard": "full"}
    one, out = Path(wanted["out"]), place / "elastic"
    if not one.exists():
        train_here(place, wanted)
    shutil.rmtree(out, ignore_errors=True)
    (place / "elastic.yaml").write_text(dump_yaml({**wanted, "out": str(out)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
               "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "-m", "lapis", "train", str(place / "elastic.yaml")]  # fmt: skip
    started = time.monotonic()
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    journal = journal_of(out)
    while not list(journal.glob("step-*/state.json")):
        if agent.poll() is not None:
            return {"code": agent.returncode, "shown": agent.communicate()[1][-2000:]}
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    shown = agent.communicate(timeout=600)[1]
    if agent.returncode:
        return {"code": agent.returncode, "shown": shown[-2000:]}
    return {"code": 0, "seconds": time.monotonic() - started, "weights": furthest(one, out),
            "loss": max(abs(a - b) for a, b in zip(losses(one), losses(out), strict=True))}  # fmt: skip


def pause(place: Path, last: int = 13, shape: dict[str, Any] = PAUSED) -> dict[str, Any]:
    """How long training stands still for a checkpoint: until the one before it is written, and to copy the state.

    Two processes; a checkpoint after each three of `last` steps.
    """
    figures = place / "pauses.json"

    def before() -> None:
        begin, seconds = ShardedSaves.begin, []

        def timed(self: Any, *given: Any) -> Path:
            started = time.perf_counter()
            self.finish()  # as `begin` does first
            written = time.perf_counter()
            folder = begin(self, *given)
            seconds.append({"wait": written - started, "copy": time.perf_counter() - written})
            if os.environ["RANK"] == "0":
                figures.write_text(json.dumps(seconds))
            return folder

        ShardedSaves.begin = timed  # type: ignore[method-assign]

    out = place / "pause"
    shutil.rmtree(out, ignore_errors=True)
    wanted = {**settings(place, "causal", last), "new": shape, "save_every": 3, "shard": "full", "out": str(out),
              "batch": 16}  # fmt: skip
    codes, shown = Ranks(2, wanted, before=before).end()
    if any(codes):
        return {"codes": codes, "shown": shown[-2000:]}
    curve = json.loads((out / "times.json").read_text())["curve"]
    steps = sorted(row["train_seconds"] for row in curve)
    return {"pauses": json.loads(figures.read_text()), "step": steps[len(steps) // 2]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", default="loss,resume,ends,elastic,pause")
    parser.add_argument("--cases", default="causal,muon,chat,lora,dpo,grpo")
    parser.add_argument("--sizes", default="2,4", help="processes of the runs whose losses are compared")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--place", type=Path, help="a folder to work in, which stays, and where figures add up")
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = given.place or Path(tempfile.mkdtemp(prefix="shard-"))
    os.environ |= {"OMP_NUM_THREADS": "1"}
    prepare(place) if not (place / "base").exists() else None
    parts, kept = given.only.split(","), place / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

    def note(name: str, figures: dict[str, Any]) -> None:
        results[name] = figures
        kept.write_text(json.dumps(results))
        print(name, json.dumps(figures), file=sys.stderr, flush=True)

    if "loss" in parts:
        for case in given.cases.split(","):
            for size in map(int, given.sizes.split(",")):
                note(f"{case} {size}", compare(place, case, given.steps, size))
        if "causal" in given.cases:
            note("causal 4 hybrid", compare(place, "causal", given.steps, 4, shard="hybrid", local=2, accumulate=2))
    if "resume" in parts:
        for case in given.cases.split(","):
            note(f"resume {case} 4 2 1", resume(place, given.steps, case=case))
        if "causal" in given.cases:
            note("resume causal 1 2", resume(place, given.steps, (1, 2)))
    if "ends" in parts:
        for size, victim in ((2, 0), (2, 1), (4, 2)):
            note(f"killed {victim} of {size}", ends(place, size, victim, signal.SIGKILL))
        note("stopped 1 of 2", ends(place, 2, 1, signal.SIGSTOP))
        note("hangs 1 of 2", hang(place))
    if "elastic" in parts:
        note("elastic", elastic(place, given.steps))
    if "pause" in parts:
        note("pause", pause(place))
    if given.place is None:
        shutil.rmtree(place)
    print(json.dumps(results))
    if given.write:
        add_table(__file__, "State shared out over processes", table(results, given.steps))
    return int(any(not good(name, figures) for name, figures in results.items()))


def good(name: str, figures: dict[str, Any]) -> bool:
    """Whether a part came out as it must."""
    if name.startswith(("killed", "stopped", "hangs")):
        return all(figures["codes"]) and figures["seconds"] < ENDS and len(figures["lines"]) == 1
    if name == "pause":
        return "pauses" in figures and max(map(whole, figures["pauses"])) <= figures["step"]
    if name.startswith("resume") and not (figures.get("data_equal") and figures["weights"] <= RESUMED):
        return False
    return bool(figures.get("loss", 1.0) <= BOUND)


def whole(pause: dict[str, float]) -> float:
    """Seconds of a pause."""
    return pause["wait"] + pause["copy"]


def table(results: dict[str, Any], steps: int) -> list[str]:
    """The dated lines."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [f"## {date}, {processor()}, torch {torch.__version__}, gloo, float32, one thread a process", ""]
    lines += [f"{steps} steps, `shard: full`; the largest difference to one process:", "",
              "| run | loss | weights |", "|---|--:|--:|"]  # fmt: skip
    lines += [f"| {name} | {r['loss']:.1e} | {r['weights']:.1e} |" for name, r in results.items() if "loss" in r]
    for name, r in results.items():
        if r.get("read"):
            shares = ", ".join(
                f"{share:.3f} with {size}" for size, share in sorted(r["read"].items(), key=lambda item: -int(item[0]))
            )
            lines += ["", f"{name}: the largest share of the checkpoint's bytes that a process read: {shares}."]
    if any("lines" in r for r in results.values()):
        lines += ["", "| what happens to a process | all have ended after, s | exit statuses | said |",
                  "|---|--:|---|---|"]  # fmt: skip
    for name, r in results.items():
        if "lines" in r:
            said = "; ".join(line.partition(" ([")[0] for line in r["lines"])[:160]
            lines.append(f"| {name} | {r['seconds']:.1f} | {' '.join(map(str, r['codes']))} | {said} |")
    if "pauses" in (figures := results.get("pause", {})):
        longest = max(figures["pauses"], key=whole)
        lines += ["", f"A checkpoint (7 M parameters, two processes) stops the training for {whole(longest):.3f} s at "
                  f"most: {longest['wait']:.3f} s until the one before it is written, and {longest['copy']:.3f} s to "
                  f"copy; a step takes {figures['step']:.3f} s."]  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.exit(main())
