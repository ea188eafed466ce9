"""A run whose state is shared out over processes has the losses, the weights and the folder of one process."""

import errno
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.checkpoint.commit import MANIFEST
from lapis.cli.main import main
from lapis.config import dump_yaml
from lapis.errors import ConfigError, DataError, TrainingError
from lapis.families.config import ModelConfig
from lapis.model.size import activation_bytes
from lapis.model.transformer import Transformer
from lapis.training.config import TrainConfig
from lapis.training.distributed import sharding
from lapis.training.distributed.parallel import Processes
from lapis.training.distributed.pieces import own, piece_like, scale, total_norm, whole
from lapis.training.distributed.sharded_state import ShardedSaves, has_shards
from lapis.training.loop.progress import Silent
from lapis.training.loop.update import Updater
from lapis.training.objectives.supervised.cross_entropy import head_cross_entropy
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.run import read_settings, run


@pytest.mark.parametrize("case", ["muon", "lora", "grpo"])
def test_two_processes_have_the_losses_of_one(bench: Any, place: Path, case: str) -> None:
    """Muon gathers each matrix, and a step has two parts; LoRA has frozen parts and trained rows; GRPO generates."""
    figures = bench.compare(place, case, 4, 2)
    assert figures.get("loss", 1.0) <= 1e-5 and figures["weights"] <= 1e-5, figures


def test_hybrid_of_two_machines_has_the_losses_of_one(bench: Any, place: Path) -> None:
    figures = bench.compare(place, "muon", 4, 4, shard="hybrid", local=2, accumulate=1)
    assert figures.get("loss", 1.0) <= 1e-5 and figures["weights"] <= 1e-5, figures


def test_four_processes_then_two_then_one(bench: Any, place: Path) -> None:
    """Four write pieces, two cut them anew, and one joins theirs and reads the rest of the data."""
    figures = bench.resume(place, 20, (4, 2, 1))
    assert figures["data_equal"] and figures["loss"] <= 1e-5 and figures["weights"] <= 1e-6, figures
    first, second = figures["stops"]
    assert first["codes"] == [1] * 4 and second["codes"] == [1] * 2 and 0 < first["step"] < second["step"] < 20
    assert "Run the same command again" in first["shown"]


@pytest.mark.parametrize(("case", "sizes"), [
    ("causal", (1, 2)), ("chat", (2, 1)), ("lora", (1, 2)), ("dpo", (2, 1)),
])  # fmt: skip
def test_a_checkpoint_is_cut_or_joined(bench: Any, place: Path, case: str, sizes: tuple[int, ...]) -> None:
    figures = bench.resume(place, 12, sizes, case)
    assert figures["data_equal"] and figures["loss"] <= 1e-5 and figures["weights"] <= 1e-6, figures


def test_fault_69_a_killed_rank_ends_all(bench: Any, place: Path) -> None:
    figures = bench.ends(place, 2, 1, signal.SIGKILL)
    assert figures["codes"] == [1, -signal.SIGKILL] and len(figures["lines"]) == 1, figures
    assert "run the same command again to go on from the last checkpoint, " in figures["lines"][0]


@pytest.mark.parametrize("machines", [1, 2])
def test_a_killed_worker_is_started_again(bench: Any, place: Path, machines: int) -> None:
    """By the engine of torchrun --max-restarts 2, with forks as its workers: all go on from the last checkpoint.

    Of two machines each has an agent with one worker. The second worker falls before it meets the first, which counts
    as a restart on its own machine alone; in the next round it is killed at step 9.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    out, began, fell = place / f"elastic{machines}", place / f"began{machines}", place / f"fell{machines}"
    wanted = {**bench.settings(place, "causal", 30), "save_every": 4, "shard": "full"}
    undisturbed = place / "undisturbed"
    if not undisturbed.exists():
        codes, shown = bench.Ranks(2, {**wanted, "out": str(undisturbed)}).end()
        assert codes == [0, 0], shown

    def worker() -> None:
        last, count = os.environ["RANK"] == "1", os.environ["TORCHELASTIC_RESTART_COUNT"]
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "LAPIS_PATIENCE": "20"}
        with (place / f"rounds{machines}").open("a") as rounds:
            rounds.write(f"{os.environ['RANK']}:{count} ")
        if last and machines == 2 and count == "0":
            os._exit(1)
        update = Updater.update

        def dies(self: Any, *given: Any) -> Any:
            if last and not fell.exists() and self.state.step == 9:
                fell.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if last and fell.exists() and not began.exists():
                began.write_text(str(self.state.step))
            return update(self, *given)

        Updater.update = dies  # type: ignore[method-assign]
        run(read_settings({**wanted, "out": str(out)}, "run.yaml"), watch=Silent())

    how = LaunchConfig(
        machines, machines, 2 // machines, run_id="one", max_restarts=2, monitor_interval=0.05, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint=f"localhost:{bench.free_port()}", rdzv_configs={"join_timeout": 30},
    )  # fmt: skip
    agents = []
    for _ in range(machines):
        if not (child := os.fork()):
            try:
                elastic_launch(how, worker)()
                os._exit(0)
            finally:
                os._exit(1)
        agents.append(child)
    assert [ended(agent, 60) for agent in agents] == [0] * machines
    assert began.read_text() in ("4", "8")  # a checkpoint is written beside the next steps
    if machines == 2:
        assert (place / "rounds2").read_text().split()[2:4] in (["0:0", "1:1"], ["1:1", "0:0"])
    for path in undisturbed.iterdir():
        if path.name not in (MANIFEST, "times.json", "certificate.json", "certificate.html"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def ended(agent: int, seconds: float) -> int:
    """The exit status of an agent, which is told to end where it has not by then."""
    until = time.monotonic() + seconds
    while not (found := os.waitpid(agent, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(agent, signal.SIGTERM)
            found = os.waitpid(agent, 0)
            break
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(found[1])


def refusal(bench: Any, place: Path, case: str, before: Callable[[], None] | None = None, **more: Any) -> str:
    """What two processes say, in one line, before both end with 1. before: called in each."""
    given = {**bench.settings(place, case, 4), "out": str(place / "refused"), **more}
    codes, shown = bench.Ranks(2, given, before=before).end()
    assert codes == [1, 1] and len(shown.strip().splitlines()) == 1, shown
    return str(shown)


def test_what_all_processes_refuse_is_told_once(bench: Any, place: Path) -> None:
    """As it is typed: an unknown key, a plan of several; and what the second alone cannot read is told by that one."""
    yaml = place / "typed.yaml"
    yaml.write_text(dump_yaml({**bench.settings(place, "causal", 4), "out": str(place / "typed")}))

    def typed(*settings: str, missing: str = "") -> str:
        def command() -> None:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
            main(["train", str(yaml.with_stem("missing") if os.environ["RANK"] == missing else yaml), *settings])

        codes, shown = bench.Ranks(2, {}, before=command).end()
        assert codes == [1, 1] and len(shown.strip().splitlines()) == 1, shown
        return str(shown)

    assert 'typed.yaml: unknown key "lrr"; did you mean "lr"?' in typed("lrr=3")
    assert "missing.yaml" in typed(missing="0") and "missing.yaml" in typed(missing="1")
    line = typed("--plan-only")
    assert "--plan-only measures one process, and torchrun has started 2; start it without torchrun" in line
    assert "--gpus N for several, on paper" in line
    assert typed("--plan-only", "--gpus", "4", "--tflops", "100", "--bandwidth", "10") == line


@pytest.mark.parametrize(("ranks", "shard"), [("1", "full"), ("012", "full"), ("1", "none")])
def test_an_error_of_any_process_is_told_once(bench: Any, place: Path, ranks: str, shard: str) -> None:
    """Of the second alone of three; and of all alike, which the first tells."""
    loss = Causal.loss

    def fails(self: Causal, *given: Any) -> Any:
        if os.environ["RANK"] in ranks:
            raise DataError(f"rank {os.environ['RANK']} cannot")
        return loss(self, *given)

    def before() -> None:
        Causal.loss = fails  # type: ignore[method-assign]

    given = {**bench.settings(place, "causal", 4), "out": str(place / "fails"), "batch": 9, "shard": shard}
    codes, shown = bench.Ranks(3, given, before=before).end(60)
    assert codes == [1, 1, 1] and shown == f"DataError: rank {ranks[0]} cannot\n", shown


@pytest.mark.parametrize("fault", ["nan", "error"])
def test_a_checkpoint_that_is_being_written_is_not_lost(bench: Any, place: Path, fault: str) -> None:
    """Where the run ends by a fault meanwhile: it is waited for, and a guard names it."""
    out, loss, commit, calls = place / f"slow-{fault}", Causal.loss, ShardedSaves._commit, list[int]()

    def slow(self: ShardedSaves, *given: Any) -> None:
        time.sleep(2)
        commit(self, *given)

    def breaks(self: Causal, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 5 and fault == "error":
            raise DataError("it broke")
        total, *rest = loss(self, *given)
        return (total * float("nan") if len(calls) == 5 else total, *rest)

    def before() -> None:
        Causal.loss, ShardedSaves._commit = breaks, slow  # type: ignore[method-assign]

    given = {**bench.settings(place, "causal", 8), "out": str(out), "shard": "full", "save_every": 4}
    codes, shown = bench.Ranks(2, given, before=before).end(60)
    assert codes == [1, 1] and (bench.journal_of(out) / "step-4" / "state.json").exists(), shown
    assert fault == "error" or f"the last good checkpoint is {bench.journal_of(out)}/step-4" in shown, shown


def test_what_cannot_be_shared_out_is_one_line(bench: Any, place: Path) -> None:
    line = refusal(bench, place, "causal", shard="hybrid")
    assert "shard is hybrid, and 2 processes are not several machines with 2 each; use shard: full" in line
    line = refusal(bench, place, "causal", shard="full", weights="bf16")
    assert "weights: bf16 and shard: full do not go together" in line and "use weights: float32" in line


def test_a_batch_that_does_not_divide_names_what_does(bench: Any, place: Path) -> None:
    line = refusal(bench, place, "causal", batch=9)
    assert "batch 9 does not divide over 2 processes (accumulate 1); start 1 or 3 of them, or give batch=10," in line
    assert "to which an interrupted run changes with --allow-change batch" in line


def killed(ranks: Any) -> str:
    """Ends processes by SIGKILL; returns what they said."""
    for rank in ranks.alive():
        os.kill(ranks.ids[rank], signal.SIGKILL)
    return str(ranks.end()[1])


def test_what_the_first_process_refuses_ends_all_in_a_line(bench: Any, place: Path) -> None:
    """An output in use, a changed setting, a newer format; a checkpoint with a flipped byte is passed over aloud."""
    out = place / "stopped"
    given = {"steps": 100_000, "save_every": 4, "keep": 9, "shard": "full", "out": str(out)}
    ranks, journal = bench.Ranks(2, {**bench.settings(place, "causal", 4), **given}), bench.journal_of(out)
    ranks.wait_for(journal, 4)
    in_use = refusal(bench, place, "causal", **given)
    killed(ranks)
    assert f"{out}: another lapis is writing it; wait for it, or give another" in in_use
    line = refusal(bench, place, "causal", **{**given, "lr": 1e-3})
    assert "config.lr was 0.003, is 0.001. Undo the change to go on with it, allow it with --allow-change lr" in line
    newest = max(journal.glob("step-*"), key=lambda folder: int(folder.name[5:]))
    before = {name: (newest / name).read_bytes() for name in ("state.json", MANIFEST)}
    listed = json.loads(before[MANIFEST])
    newer = before["state.json"].replace(b'"format": 1', b'"format": 2')
    listed["files"]["state.json"] = {"size": len(newer), "sha256": hashlib.sha256(newer).hexdigest()}
    (newest / "state.json").write_bytes(newer)
    (newest / MANIFEST).write_text(json.dumps(listed))
    line = refusal(bench, place, "causal", **given)
    assert f"{newest} is a checkpoint of format 2; this lapis reads format 1; install a newer" in line
    for name, content in before.items():
        (newest / name).write_bytes(content)
    largest = max(newest.glob("**/*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    notes = bench.Ranks(2, {**bench.settings(place, "causal", 4), **given}, watch=bench.Told)
    known = {folder.name for folder in journal.glob("step-*")}
    while {folder.name for folder in journal.glob("step-*")} <= known:
        assert notes.alive(), notes.end()
        time.sleep(0.02)
    line = f"{newest} is damaged ({largest.relative_to(newest)}); falling back to the checkpoint before it"
    assert line in killed(notes)


@pytest.mark.parametrize("shard", ["full", "none"])
def test_fault_63_a_full_disk_under_one_piece_ends_all(bench: Any, place: Path, shard: str) -> None:
    """The second process cannot write its pieces of the second checkpoint, or the first one the whole of it."""
    out = place / f"disk-{shard}"

    def before() -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter as Writer

        from lapis.training.loop import state

        fails_in, owner, name = ("1", Writer, "write_data") if shard == "full" else ("0", state, "write_tensors")
        write = getattr(owner, name)

        def fails(*given: Any, **named: Any) -> Any:
            if os.environ["RANK"] == fails_in and list(journal.glob("step-3/state.json")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*given, **named)

        setattr(owner, name, fails)

    journal = bench.journal_of(out)
    given = {"steps": 12, "save_every": 3, "shard": shard, "compile": "off", "out": str(out)}
    shown = refusal(bench, place, "causal", before, **given)
    assert "No space left on device" in shown and f"the last good checkpoint is {journal}/step-3" in shown
    assert {path.name for path in journal.glob("step-*")} == {"step-3"}


@pytest.mark.parametrize("size", [1, 2])
def test_the_last_checkpoints_are_kept(bench: Any, place: Path, size: int) -> None:
    """Plain ones of one process, and pieces of two: the newest `keep` are there when a run is stopped."""
    out = place / f"kept{size}"

    def before() -> None:
        update = Updater.update

        def stops(self: Any, *given: Any) -> Any:
            if self.state.step == 14:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(self, *given)

        Updater.update = stops  # type: ignore[method-assign]

    given = {"save_every": 4, "keep": 2, "shard": "full", "compile": "off", "out": str(out)}
    codes, shown = bench.Ranks(size, {**bench.settings(place, "causal", 1000), **given}, before=before).end()
    kept = sorted(int(folder.name[5:]) for folder in bench.journal_of(out).glob("step-*"))
    assert codes == [1] * size and kept in ([12, 14], [12, 15]), (codes, kept, shown)


def test_auto_shares_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=300, context=64))
    config, world = TrainConfig(steps=1, batch=8, accumulate=2), Processes(0, 2)
    needed = sharding.state_bytes(model, config) + 2 * activation_bytes(model.config, 32, 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for memory, how in ((int(needed / 0.8) + 1, None), (int(needed / 0.8) - 1, "full")):
        assert sharding.choose_sharding(config, world, model, 32, memory) == how
        assert sharding.choose_sharding(config, Processes(), model, 32, memory) is None
        assert sharding.choose_sharding(replace(config, shard="full"), world, model, 32, memory) == "full"


@pytest.mark.parametrize("short", [0, 1])
def test_processes_with_unequal_memory_decide_alike(short: int, bench: Any, place: Path) -> None:
    """What does not fit one of them is shared out by all, and their gradients are added up at the same moments."""

    def before() -> None:
        memory = 1000 if int(os.environ["RANK"]) == short else 1 << 40
        sharding.device_bytes = lambda: memory  # type: ignore[assignment]

    given = {"compile": "off", "out": str(place / f"unequal-{short}")}
    ranks = bench.Ranks(2, {**bench.settings(place, "muon", 2), **given}, before=before, watch=bench.Told)
    codes, shown = ranks.end(60)
    assert codes == [0, 0] and "shared out over 2 processes" in shown, shown


def test_an_unknown_way_to_share_is_refused(place: Path, bench: Any) -> None:
    with pytest.raises(ConfigError, match="shard"):
        read_settings({**bench.settings(place, "causal", 4), "shard": "ful"}, "run.yaml")


def test_pieces_of_a_newer_lapis_are_refused(tmp_path: Path) -> None:
    assert not has_shards(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards.json").write_text(json.dumps({"format": 2, "processes": 4}))
    with pytest.raises(TrainingError, match="is a checkpoint of format 2; this lapis reads format 1; install a newer"):
        has_shards(tmp_path)


def test_whole_tensors_pass_through() -> None:
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert total_norm(tensors) == 5.0
    scale(tensors, 2.0)
    assert tensors[0].tolist() == [6.0, 0.0]
    for tensor in tensors:
        assert own(tensor) is tensor and whole(tensor) is tensor and piece_like(tensor, tensors[0]) is tensor


def test_a_batch_without_targets_has_a_zero_gradient() -> None:
    """Every process of a shared-out run needs a backward pass."""
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = head_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and weight.grad is not None and not weight.grad.any()


def test_alone_nothing_is_shared_out(bench: Any, place: Path) -> None:
    """shard: full in one process is the plain run, and a line says so."""
    assert "RANK" not in os.environ
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    settings = {**bench.settings(place, "causal", 2), "shard": "full", "out": str(place / "alone")}
    run(read_settings(settings, "run.yaml"), watch=Notes())
    assert (place / "alone" / "model.safetensors").is_file()
    (line,) = [note for note in notes if "shard" in note]
    assert "shard is full, and one process holds everything; start more of them with torchrun" in line
