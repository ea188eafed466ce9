"""A user's reward functions, with a time limit: by name in a process that can be killed, or as a callable in a thread.

`package.module:function` and `file.py:function` are imported by another Python (worker.py), so that a function that
hangs, prints or crashes does so there. A callable from Python stays in this process, where a thread that hangs can only
be left behind.
"""

import inspect
import json
import os
import queue
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lapis.errors import ConfigError
from lapis.processes import process_environment, python
from lapis.training.distributed.forward import step_forward
from lapis.training.rewards.reward import Case, Failure, Record, as_number

SHAPE = "reward(prompt, reply, record) -> float"
_START_SECONDS = 60.0  # an import may take long
_HANGS = 3  # in one batch; what comes after is counted without being tried


def fits(function: Callable[..., Any], options: Mapping[str, Any]) -> str | None:
    """What is wrong with the signature, or None."""
    try:
        inspect.signature(function).bind(None, "", {}, **options)
    except TypeError as error:
        return str(error)
    except ValueError:  # a builtin without a signature
        return None
    return None


class InProcess:
    """A callable; with `limited` in a thread, which is left behind where it hangs.

    Raises ConfigError for another signature than SHAPE.
    """

    def __init__(self, name: str, function: Callable[..., Any], seconds: float, limited: bool = True) -> None:
        if not callable(function) or (wrong := fits(function, {})):
            why = "is no function" if not callable(function) else wrong
            raise ConfigError(f"reward {name}: {why}; write it as {SHAPE}")
        self.function, self.seconds, self.limited = function, seconds, limited

    def check(self, records: Sequence[tuple[Record, str]]) -> None:
        pass

    def score(self, cases: Sequence[Case]) -> list[float | Failure]:
        if not self.limited:
            return [self._one(case) for case in cases]
        values: list[float | Failure] = []
        hangs = 0
        while len(values) < len(cases):
            if hangs >= _HANGS:
                values += [Failure("not tried: it hung before in this batch")] * (len(cases) - len(values))
                break
            results: queue.SimpleQueue[float | Failure] = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(cases[len(values) :], results), daemon=True).start()
            try:
                while len(values) < len(cases):
                    values.append(results.get(timeout=self.seconds))
                    step_forward()
            except queue.Empty:
                hangs += 1
                values.append(_hung(cases[len(values)], self.seconds))
        return values

    def _run(self, cases: Sequence[Case], results: "queue.SimpleQueue[float | Failure]") -> None:
        for case in cases:
            results.put(self._one(case))

    def _one(self, case: Case) -> float | Failure:
        try:
            return as_number(self.function(case.prompt, case.reply, case.full_record), case.where)
        except Exception as error:
            return Failure(f"raised {type(error).__name__} for {case.where}: {_short(error)}")


class InWorker:
    """A function by name, in a process of its own, which is ended and started again where it hangs or dies.

    Raises ConfigError where it cannot be imported, or has another signature than SHAPE (and its options).
    """

    def __init__(self, name: str, target: str, options: Mapping[str, Any], seconds: float) -> None:
        self.name, self.target, self.options, self.seconds = name, target, dict(options), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._start()

    def check(self, records: Sequence[tuple[Record, str]]) -> None:
        pass

    def score(self, cases: Sequence[Case]) -> list[float | Failure]:
        values: list[float | Failure] = []
        hangs = 0
        for case in cases:
            step_forward()
            if hangs >= _HANGS:
                values.append(Failure("not tried: it hung before in this batch"))
                continue
            if self._process is None:
                try:
                    self._start()
                except ConfigError as error:  # it started before, so the name is right
                    values.append(Failure(f"did not start again: {error}"))
                    hangs += 1
                    continue
            answer = self._ask({"prompt": case.prompt, "reply": case.reply, "record": case.full_record}, self.seconds)
            if answer is None:
                died = self._process is not None and self._process.poll() is not None
                self.close()
                hangs += not died
                values.append(Failure(f"ended its process at {case.where}") if died else _hung(case, self.seconds))
            elif "error" in answer:
                values.append(Failure(f"{answer['error']} for {case.where}"))
            else:
                values.append(as_number(answer["value"], case.where))
        return values

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        here = os.path.join(os.path.dirname(__file__), "worker.py")
        self._rest = b""
        self._process = subprocess.Popen(
            python(here), env=process_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.getcwd(),
            start_new_session=True,  # Ctrl-C is for the run, which saves; this process ends when its input does
        )  # fmt: skip
        answer = self._ask({"target": self.target, "options": self.options}, _START_SECONDS)
        if answer is None or "error" in answer:
            self.close()
            why = "its process ended, or did not start in a minute" if answer is None else answer["error"]
            raise ConfigError(f"reward {self.name}: {why}; write it as {SHAPE}")

    def _ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Sends one line and reads one; None where none comes in time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            line = json.dumps(question).encode() + b"\n"
        except (TypeError, ValueError) as error:
            return {"error": f"cannot be given the record: {error}"}
        deadline = time.monotonic() + seconds
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError:
            process.wait(1)
            return None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                if ready:
                    process.wait(1)
                return None
            self._rest += piece
        answer, _, self._rest = self._rest.partition(b"\n")
        reply: dict[str, Any] = json.loads(answer)
        return reply


def _hung(case: Case, seconds: float) -> Failure:
    return Failure(f"took more than {seconds:g} s for {case.where}")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
