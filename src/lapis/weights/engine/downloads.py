"""What a run reads from servers: sources in; how far each is, and whether its bytes are those that are listed, out.

The state of each sha256 is noted with the journal's lines, as of the first byte that a rerun will read, so that a file
that is read in several runs is checked as a whole.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from lapis.checkpoint.remote.ranges import RemoteFile
from lapis.weights.engine.outputs import Output
from lapis.weights.engine.sources import RowsOf, Source, Stored

Report = Callable[[str, int, int], None]
"""Called with a source's role, and how many of how many bytes of it were read."""


class Downloads:
    """The files on servers that some outputs are made from.

    Args:
        report: Called as they are read.
    """

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._files: dict[tuple[str, str], RemoteFile] = {}
        self._totals: dict[str, float] = defaultdict(float)
        self._before: dict[int, int] = {}

    def add(self, output: Output, share: float) -> None:
        """One output of which a share is left to do."""
        for source in output.sources if output.kernel else output.sources[:1]:
            stored = _stored(source)
            if stored is None or (file := stored.remote) is None:
                continue
            if file.digest is not None and (source.role, file.name) not in self._files:
                file.digest.drop_early()
            self._files[source.role, file.name] = file
            self._before.setdefault(id(file), file.delivered)
            self._totals[source.role] += share * (stored.place(prod(source.shape)) - stored.place(0))

    def report(self) -> None:
        """Says how far each source is."""
        if self._report is None:
            return
        came: dict[str, int] = defaultdict(int)
        for (role, _), file in self._files.items():
            came[role] += file.delivered - self._before[id(file)]
        for role, total in self._totals.items():
            self._report(role, min(came[role], int(total)), int(total))

    def states(self, sources: Sequence[Source], last: int) -> dict[str, list[Any]]:
        """For the journal: how far the digests are of what ends with element `last` of some sources."""
        states: dict[str, list[Any]] = {}
        for source in sources:
            if isinstance(source, Stored) and (file := source.remote) is not None and file.digest is not None:
                place = source.place(last)
                if (state := file.digest.state(place)) is not None:
                    states[f"{source.role} {file.name}"] = [place, state]
        return states

    def restore(self, states: Mapping[str, Sequence[Any]]) -> None:
        """Goes on with digests where an earlier run was."""
        for (role, name), file in self._files.items():
            if file.digest is not None and (known := states.get(f"{role} {name}")):
                file.digest.restore(*known)

    def findings(self) -> list[str]:
        """Lines that say which files agree with the sha256 that their server lists, and which were not compared."""
        agree, apart = [], defaultdict(list)
        for (role, _), file in self._files.items():
            if file.digest is not None and file.digest.hexdigest() is not None:
                agree.append(role)
            else:
                apart["its server lists no sha256" if file.digest is None else file.digest.why].append(role)
        lines = (
            [f"{_names(agree)}: all of it was read and agrees with the sha256 that the server lists"] if agree else []
        )
        return lines + [f"{_names(roles)}: not compared with a sha256: {why}" for why, roles in apart.items()]

    def forget(self) -> None:
        """Nothing more will be read."""
        for file in self._files.values():
            file.forget()


def _stored(source: Source) -> Stored | None:
    inner = source.inner if isinstance(source, RowsOf) else source
    return inner if isinstance(inner, Stored) else None


def _names(roles: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(roles))
