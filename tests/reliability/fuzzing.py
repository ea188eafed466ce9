"""One mutated file: what came of it, how long it took, and the memory that it added."""

import os
import random
import resource
import sys
import tempfile
from dataclasses import dataclass

from lapis.errors import LapisError

from .cases import Case

LONGEST_REFUSAL = 4000  # characters


@dataclass(frozen=True)
class Outcome:
    """refused: with one line. crash: what is wrong, "" where nothing is. seconds: of the processor. grown: bytes."""

    refused: bool
    crash: str
    seconds: float
    grown: int


def tried(kind: str, case: Case, seed: int, number: int) -> Outcome:
    """Tries one case, which is the same for the same kind, seed and number."""
    rng, crash, refused = random.Random(f"{kind} {seed} {number}"), "", False
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, processor_seconds()
    told, kept = tempfile.TemporaryFile(), os.dup(2)
    os.dup2(told.fileno(), 2)  # where a library in another language tells of itself
    try:
        case(rng)
    except LapisError as error:
        refused, text = True, str(error).strip()
        if "\n" in text or len(text) >= LONGEST_REFUSAL:
            crash = f"{len(text):,} characters, {text.count(chr(10))} line breaks: {text[:200]!r}"
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        crash = f"{type(error).__name__}: {error!s:.300}"
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        with told:
            told.seek(0)
            panics = [line for line in told.read().decode(errors="replace").splitlines() if "panicked" in line]
    crash = crash or "".join(panics)
    if crash:
        crash = f"{kind}, seed {seed}, number {number}: {crash}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    return Outcome(refused, crash, processor_seconds() - started, grown)


def processor_seconds() -> float:
    """Of the processor, those of ended children among them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
