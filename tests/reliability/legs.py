"""A job that grows (a tour, an adaptation), tried leg by leg: from a folder in which the parts before are whole.

A leg ends when its part of the working folder is in place. It is killed at its calls, run again, and killed once more
when the next leg begins: then the folder must be what it is there without kills. So a trial costs two legs, and not two
tours; the rest of the way is that of the next leg's trials.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .aimed import CHANGING, Job

FEW = 2  # calls of one kind on one file that are tried, from the first and from the last; of more, each is like these


@dataclass(frozen=True)
class Leg:
    """start, end: folders as they are where it begins and ends. until: what the next leg touches first; "" = nothing.

    calls: (kind, path) that change something, from its start on.
    """

    start: Path
    end: Path
    until: str
    calls: list[tuple[str, str]]


def legs(job: Job, room: Path) -> Iterator[Leg]:
    """The legs of a job, one after the other. room: for their folders, apart from the job's own place."""
    out = job.folder / job.outputs[0]
    calls = job.calls(CHANGING)
    ends = [n for n, (kind, path) in enumerate(calls) if kind in ("rename", "exchange") and _is_part(Path(path), out)]
    start = room / "0"
    job.prepare()
    shutil.copytree(job.folder, start)
    for number, last in enumerate(ends, 1):
        own, until = _part(calls[last][1], out), ""
        for _, path in calls[last + 1 :]:
            part = _part(path, out)
            if part and part != own:
                until = _steady(path, out)
                break
        shutil.rmtree(job.folder)
        shutil.copytree(start, job.folder)
        job.log.unlink(missing_ok=True)
        ended = job.run(kinds=CHANGING, FAULT_LOG=job.log, **({"FAULT_UNTIL": until} if until else {}))
        assert ended.was_killed == bool(until) and (until or ended.status == 0), f"{job.name}: {ended.told}"
        end = room / str(number)
        shutil.copytree(job.folder, end)
        yield Leg(start, end, until, job.logged())
        shutil.rmtree(start)
        start = end


def kill_legs(job: Job, room: Path, step: int = 1) -> None:
    """Kills a job at every `step`-th of the calls of every leg that differ (see FEW), and at the last ones."""
    for leg in legs(job, room):
        numbers = _numbers(leg.calls)
        for number in sorted({*numbers[::step], *numbers[-3:]}):
            kill_leg(job, leg, number)


def fail_legs(job: Job, room: Path, errors: dict[str, tuple[int, ...]], step: int) -> None:
    """Lets calls that change something fail: every `step`-th trial of every leg, the first among them."""
    for leg in legs(job, room):
        seen: dict[str, int] = {}
        trials = []
        for number, (kind, _) in enumerate(leg.calls, 1):
            seen[kind] = seen.get(kind, 0) + 1
            if number in _numbers(leg.calls):
                trials += [(kind, seen[kind], code) for code in errors[kind]]
        for kind, count, code in trials[::step]:
            if job.is_due():
                _restore(job, leg)
                job.fail_from_here(count, code, kind)


def kill_leg(job: Job, leg: Leg, number: int) -> None:
    """One trial: what is visible was whole, and the leg then ends as it does without kills."""
    if not job.is_due():
        return
    _restore(job, leg)
    where = f"{job.name}: {leg.end.name}: killed at call {number}, {' '.join(leg.calls[number - 1])}"
    killed = job.run(number, kinds=CHANGING)
    if not killed.was_killed:
        job.wrong.append(f"{where}: ended with {killed.status}: {killed.told[-300:]}")
        return
    job.kills += 1
    job.visible(where)
    again = job.run(kinds=CHANGING, **({"FAULT_UNTIL": leg.until} if leg.until else {}))
    if again.was_killed != bool(leg.until) or not (leg.until or again.status == 0):
        job.wrong.append(f"{where}: the rerun ended with {again.status}: {again.told[-300:]}")
    out = job.outputs[0]
    seen, wanted = job.content(job.folder / out), job.content(leg.end / out)
    if seen != wanted:
        names = sorted(name for name in {*seen, *wanted} if seen.get(name) != wanted.get(name))
        job.wrong.append(f"{where}: the rerun gives other files: {names}")
    if (left := _hidden(job.folder / out)) != (known := _hidden(leg.end / out)):
        job.wrong.append(f"{where}: the rerun leaves {sorted(left ^ known)}")


def _restore(job: Job, leg: Leg) -> None:
    shutil.rmtree(job.folder)
    shutil.copytree(leg.start, job.folder)


def _is_part(path: Path, out: Path) -> bool:
    return path.parent == out and not path.name.startswith(".")


def _part(path: str, out: Path) -> str:
    """The part that a call belongs to, by its name: `.base.lapis/x` and `base/x` are base's."""
    inside = Path(path).relative_to(out).parts if Path(path).is_relative_to(out) else ()
    return re.sub(r"^\.+|\.lapis(-\w+)?$", "", inside[0]) if inside else ""


def _steady(path: str, out: Path) -> str:
    """The beginning of a path that is the same in every run."""
    first = Path(path).relative_to(out).parts[0]
    return str(out / re.sub(r"(\.lapis-|-)\w+$", r"\1", first) if first.startswith(".") else out / first)


def _hidden(out: Path) -> set[str]:
    return {re.sub(r"-\w+$", "", path.name) for path in out.iterdir() if path.name.startswith(".")}


def _numbers(calls: list[tuple[str, str]]) -> list[int]:
    """The calls that are tried: of many of one kind on one file, one after the other, the first and last FEW."""
    numbers, n = [], 0
    while n < len(calls):
        end = n
        while end < len(calls) and calls[end] == calls[n]:
            end += 1
        run = range(n + 1, end + 1)
        numbers += sorted({*run[:FEW], *run[-FEW:]})
        n = end
    return numbers
