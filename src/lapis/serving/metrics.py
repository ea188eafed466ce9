"""What a server has done so far, as text for Prometheus."""

from collections import Counter
from collections.abc import Iterator, Mapping

HELP = {
    "lapis_requests_total": ("counter", "Requests by route and status."),
    "lapis_request_seconds": ("summary", "Seconds from a request to the end of its reply, by route."),
    "lapis_rows_running": ("gauge", "Replies that are computed."),
    "lapis_rows_waiting": ("gauge", "Replies that wait for a place."),
    "lapis_prompt_tokens_total": ("counter", "Tokens of prompts that were read."),
    "lapis_shared_tokens_total": ("counter", "Tokens of prompts that an earlier prompt had read."),
    "lapis_reply_tokens_total": ("counter", "Tokens of replies."),
}
FIGURES = {
    "lapis_rows_running": "running", "lapis_rows_waiting": "waiting", "lapis_prompt_tokens_total": "read_tokens",
    "lapis_shared_tokens_total": "shared_tokens", "lapis_reply_tokens_total": "written_tokens",
}  # fmt: skip


class Metrics:
    """Counts of requests; routes are those of the app, so that no client can make up labels."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    def add(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        self._requests[route, status] += 1
        self._seconds[route] += seconds  # type: ignore[assignment]

    def render(self, figures: Mapping[str, Mapping[str, int]]) -> str:
        """The text. figures: of each model, as the engine counts them."""
        return "".join(f"{line}\n" for line in self._lines(figures))

    def _lines(self, figures: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        for name, (kind, text) in HELP.items():
            yield f"# HELP {name} {text}"
            yield f"# TYPE {name} {kind}"
            if name == "lapis_requests_total":
                for (route, status), count in sorted(self._requests.items()):
                    yield f'{name}{{route="{_label(route)}",status="{status}"}} {count}'
            elif name == "lapis_request_seconds":
                for route, seconds in sorted(self._seconds.items()):
                    count = sum(n for (other, _), n in self._requests.items() if other == route)
                    yield f'{name}_sum{{route="{_label(route)}"}} {seconds:.6f}'
                    yield f'{name}_count{{route="{_label(route)}"}} {count}'
            else:
                for model, counts in figures.items():
                    yield f'{name}{{model="{_label(model)}"}} {counts[FIGURES[name]]}'


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
