"""Merging models that lie on a server: how fast beside the local merge, in how much memory, and what do kills cost?

    python benchmarks/stream.py --size 0.5b --rounds 3 --peer-python /path/to/venv-with-mergekit/bin/python
    python benchmarks/stream.py --size tiny --kills 50

Makes three checkpoints of a real shape with random weights and serves them from this machine (stream_server.py): once
as fast as it can, once with round trips of 50 ms and a line of 1 Gbit/s, both slept in user space. Each contestant runs
in turn, round after round, as a whole process: lapis on the folders, lapis on either server; by the slow line also a
bare client that reads the same bytes and keeps nothing, which is what can be had of this machine, and mergekit after
huggingface_hub has downloaded all three models. --slower 32 has round trips and line slower by that much: where the
processors are shared, what is waited for then shows, and not what is computed. While lapis runs, the cache and the
temporary folder are looked at every 50 ms: the largest sum of bytes is what it kept of its inputs. All outputs of lapis
must be the same bytes. With --kills the merge from the server is killed at random tiles, run to its end, and
compared; what the server sent in all, less what one run and the openings need, was fetched twice. Adds a dated table
to benchmarks/results/stream.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from hardware import processor
from merge import ROOT, make, measured, recipe
from results_file import add_table

from lapis.checkpoint.staging import staging_of
from lapis.weights.engine.ahead import AHEAD
from lapis.weights.engine.journal import NAME as JOURNAL
from lapis.weights.engine.tiles import TILE
from lapis.weights.merge.merge import merge

ROLES = ("base", "chat", "onto")
DELAY, RATE = 0.05, 125e6  # seconds of a round trip; bytes a second
CLIENT, ADDRESS = "a client that keeps nothing, by that line", "ADDRESS"
DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download, model_info
for name in sys.argv[2:]:
    for file in model_info(name).siblings:
        hf_hub_download(name, file.rfilename, local_dir=f"{sys.argv[1]}/{name[2:]}")
"""
BARE = """
import sys, threading
from lapis.checkpoint.remote.connections import HttpFile
from lapis.checkpoint.remote.ranges import CONNECTIONS, PIECE
address, size, *names = sys.argv[1:]
size = int(size)
files = [HttpFile(n, f"{address}/{n}/resolve/{'a' * 40}/model.safetensors", size, {}) for n in names]
left = [(file, first) for first in reversed(range(0, size, PIECE)) for file in files]
def work():
    buffer = memoryview(bytearray(PIECE))
    while left:
        file, first = left.pop()
        done, count = 0, min(PIECE, size - first)
        while done < count:
            done += file.read(first + done, buffer[done:count])
workers = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
for worker in workers: worker.start()
for worker in workers: worker.join()
"""


@contextlib.contextmanager
def server(root: Path, *options: str) -> Iterator[str]:
    """The address of a hub that serves the models of a folder."""
    command = [sys.executable, str(Path(__file__).with_name("stream_server.py")), str(root), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def recipe_of(place: Path, name: str, models: dict[str, str]) -> Path:
    """The recipe of benchmarks/merge.py with other models."""
    text = json.dumps(recipe("task_arithmetic", place))
    for role, model in models.items():
        text = text.replace(json.dumps(str(place / role)), json.dumps(model))
    path = place.parent / f"{name}.yaml"
    path.write_text(text)
    return path


class Watch:
    """The largest sum of bytes that some folders held while the block ran, by a look every 50 ms."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.most, self._ended = folders, 0, threading.Event()

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            total = 0
            for folder in self.folders:
                for file in folder.rglob("*"):
                    with contextlib.suppress(OSError):
                        total += file.lstat().st_size if file.is_file() else 0
            self.most = max(self.most, total)


def environment(place: Path, address: str) -> dict[str, str]:
    """A cache and a temporary folder of one's own, empty."""
    for name in ("cache", "tmp"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).mkdir()
    return {
        "HF_ENDPOINT": address, "HF_HUB_CACHE": str(place / "cache"), "HF_HOME": str(place / "cache"),
        "TMPDIR": str(place / "tmp"), "PYTHONPATH": str(ROOT / "src"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip


def race(work: Path, given: argparse.Namespace) -> list[str]:
    place, out = work / "models", work / "out"
    hub = {role: f"o/{role}" for role in ROLES}
    near, far = recipe_of(place, "near", {role: str(place / role) for role in ROLES}), recipe_of(place, "far", hub)
    weights = sum(file.stat().st_size for file in place.glob("*/*.safetensors"))
    slow = ["--delay", str(DELAY * given.slower), "--rate", str(RATE / given.slower)]
    size = (place / "base" / "model.safetensors").stat().st_size
    lapis = [sys.executable, "-m", "lapis", "merge"]
    contestants: dict[str, tuple[list[str], list[str]]] = {
        "lapis, folders": ([], [*lapis, str(near), "--out", str(out), "--json"]),
        "lapis, server on this machine": ([], [*lapis, str(far), "--out", str(out), "--json"]),
        "lapis, 50 ms and 1 Gbit/s": (slow, [*lapis, str(far), "--out", str(out), "--json"]),
    }
    contestants[CLIENT] = (slow, [sys.executable, "-c", BARE, ADDRESS, str(size), *hub.values()])
    if given.peer_python:
        here = recipe_of(place, "downloaded", {role: str(work / "downloaded" / role) for role in ROLES})
        get = [given.peer_python, "-c", DOWNLOAD, str(work / "downloaded"), *hub.values()]
        run = [given.peer_python, "-m", "mergekit.scripts.run_yaml", str(here), str(out), "--quiet"]
        script = " && ".join(shlex.join(command) for command in (get, run))
        contestants["download by that line, then mergekit"] = (slow, ["sh", "-c", script])
    seen: dict[str, list[tuple[float, int, float, int]]] = {name: [] for name in contestants}
    digests = set()
    compiled = [*contestants["lapis, folders"][1], "--dry-run"]
    subprocess.run(compiled, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL, check=True)
    for turn in range(given.rounds):
        for name, (options, command) in contestants.items():
            for folder in (out, work / "downloaded"):
                shutil.rmtree(folder, ignore_errors=True)
            with server(place, *options) as address:
                os.environ.update(environment(work, address))
                with Watch(work / "cache", work / "tmp", work / "downloaded") as watch:
                    warm = [str(file) for file in place.glob("*/*.safetensors")]
                    command = [address if word == ADDRESS else word for word in command]
                    seconds, peak, cpu, status = measured(command, work / "log.txt", 1 << 28, warm)
            if status:
                raise SystemExit(f"{name}: {(work / 'log.txt').read_text()[-2000:]}")
            seen[name].append((seconds, peak, cpu, watch.most))
            print(f"round {turn + 1}: {name}: {seconds:.2f} s, CPU {cpu:.2f} s, {peak / 1e6:,.0f} MB, "
                  f"{watch.most:,} bytes kept", file=sys.stderr, flush=True)  # fmt: skip
            if name.startswith("lapis"):
                digests.add(tuple(sha256(file) for file in sorted(out.glob("*.safetensors"))))
    local, bare = (statistics.median(run[0] for run in seen[name]) for name in ("lapis, folders", CLIENT))
    lines = [f"The outputs of lapis are the same bytes: {'yes' if len(digests) == 1 else 'NO'}.", ""]
    lines += ["| contestant | seconds (median) | min to max | times the local one | of the line | of the bare client "
              "| CPU seconds | peak MB | of inputs on the disk, bytes |", "|---|" + "---:|" * 8]  # fmt: skip
    for name, runs in seen.items():
        seconds, cpu = (statistics.median(run[i] for run in runs) for i in (0, 2))
        share = f"{weights / RATE * given.slower / seconds:.0%} | {bare / seconds:.0%}" if contestants[name][0] else "|"
        spread = f"{min(run[0] for run in runs):.2f} to {max(run[0] for run in runs):.2f}"
        lines.append(
            f"| {name} | {seconds:.2f} | {spread} | {seconds / local:.2f} | {share} | {cpu:.2f} "
            f"| {max(run[1] for run in runs) / 1e6:,.0f} | {max(run[3] for run in runs):,} |"
        )
    return lines


def sha256(file: Path) -> str:
    return subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True).stdout.split()[0]


def kills(work: Path, given: argparse.Namespace) -> list[str]:
    """Kills a merge, runs it to its end, and counts what the server sent more than it had to."""
    place, out, chance = work / "models", work / "out", random.Random(given.seed)
    far = recipe_of(place, "far", {role: f"o/{role}" for role in ROLES})
    again: list[float] = []
    same = killed = resumed = 0
    with server(place) as address:
        os.environ.update(environment(work, address))

        def start(dry_run: bool = False) -> int:
            """The merge in a child, which need not import everything anew; returns its process id."""
            child = os.fork()
            if child == 0:
                try:
                    done = merge(far, out, dry_run=dry_run)
                    (work / "result.json").write_text(json.dumps(done.to_json()))
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            return child

        def sent() -> dict[str, int]:
            time.sleep(0.1)  # what is on its way is counted, too
            with urllib.request.urlopen(f"{address}/sent") as answer:
                counts = json.loads(answer.read())
            return {role: counts.get(role, 0) for role in ROLES}

        def cost(dry_run: bool = False) -> dict[str, int]:
            before = sent()
            os.waitpid(start(dry_run), 0)
            return {role: after - before[role] for role, after in sent().items()}

        cost(dry_run=True)
        opening = cost(dry_run=True)
        began = time.perf_counter()
        whole = cost()
        seconds = time.perf_counter() - began
        wanted, lines = content(out), (out / "model.safetensors").stat().st_size / (2 * TILE)
        while killed < given.kills:
            shutil.rmtree(out, ignore_errors=True)
            before, child, until = sent(), start(), chance.uniform(-0.1, 1.0) * lines
            if until < 0:  # before the weights
                time.sleep(chance.uniform(0.0, 0.5) * seconds)
            while until >= 0 and written(out) < until and not out.exists():
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if out.exists():
                continue
            killed += 1
            os.waitpid(start(), 0)
            resumed += json.loads((work / "result.json").read_text())["bytes_resumed"] > 0
            now = content(out)
            same += now == wanted
            if now != wanted:
                others = [name for name in {**now, **wanted} if now.get(name) != wanted.get(name)]
                print(f"kill {killed}: other bytes in {', '.join(others)}", file=sys.stderr)
            for role, after in sent().items():
                more = after - before[role] - whole[role] - opening[role]
                again.append(max(0, more))
            print(f"kill {killed}: {again[-3:]} bytes twice", file=sys.stderr, flush=True)
    tile = TILE * 2
    return [
        f"{killed} kills of a merge of three models of {whole['base'] / 1e6:,.0f} MB ({seconds:.1f} s): {resumed} went "
        f"on from a journal, {same} gave the same bytes.",
        "",
        "| fetched twice, a source and kill | bytes | tiles of the output |",
        "|---|---:|---:|",
        f"| median | {statistics.median(again):,.0f} | {statistics.median(again) / tile:.1f} |",
        f"| most | {max(again):,.0f} | {max(again) / tile:.1f} |",
        f"| of all sources, most at one kill | {max(sum(again[i : i + 3]) for i in range(0, len(again), 3)):,.0f} | |",
        f"| read ahead, a source (AHEAD / 3) | {AHEAD // 3:,} | {AHEAD / 3 / tile:.1f} |",
    ]


def written(out: Path) -> int:
    """How many tiles a job has noted as done."""
    try:
        return staging_of(out).joinpath(JOURNAL).read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


def content(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0, help="kill it so many times instead of racing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slower", type=float, default=1.0, help="round trips and line, by this factor")
    parser.add_argument("--peer-python", help="an interpreter that has mergekit 0.1.5")
    parser.add_argument("--no-table", action="store_true", help="print, and leave the results as they are")
    given = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode, and does not make it anew
    with tempfile.TemporaryDirectory(prefix="lapis-stream-") as folder:
        work = Path(folder)
        for number, role in enumerate(ROLES):
            make(work / "models" / role, given.size, number, work / "models" / "base" if number else None)
        lines = kills(work, given) if given.kills else race(work, given)
    what = f"{given.kills} kills" if given.kills else f"{given.rounds} rounds"
    what += f", round trips and line slower by {given.slower:g}" if given.slower > 1 else ""
    head = f"## {given.size}, {what}, {datetime.date.today()}, {os.cpu_count()} cores, {processor()}"
    print("\n".join([head, "", *lines]))
    if not given.no_table:
        add_table(__file__, "Merging from a server", [head, "", *lines])


if __name__ == "__main__":
    main()
