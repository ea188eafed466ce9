"""Options of `lapis serve`. Needs no torch, so that the command line can read it at once."""

from dataclasses import dataclass

from lapis.config import check_numbers
from lapis.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """Where to listen, for whom, and how much at once. Raises ConfigError for a value out of range."""

    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen at. Another than this machine's own loopback needs a key."""
    api_key_env: str | None = None
    """Environment variable that holds the key which clients must send."""
    rows: int = 8
    """Replies that are computed at once, for each model."""
    queue: int = 64
    """Requests that may wait; more are sent away with status 429."""
    context: int | None = None
    """Tokens that prompt and reply may have together; default: what the model has and the memory holds."""
    allow_host: tuple[str, ...] = ()
    """Another name of this server in a Host header; may be given again."""
    cors: tuple[str, ...] = ()
    """A page's origin (https://example.org) that may call the server; may be given again."""

    def __post_init__(self) -> None:
        check_numbers(self, "serve")
        for name, fits, expected in (
            ("port", 0 <= self.port < 65536, "0 to 65535"),
            ("host", bool(self.host), "an address or a name"),
            ("rows", 1 <= self.rows <= 256, "1 to 256"),
            ("queue", 0 <= self.queue <= 100_000, "0 to 100,000"),
            ("context", self.context is None or self.context >= 2, "2 or more"),
        ):
            if not fits:
                raise ConfigError(f"serve: {name} is {getattr(self, name)!r}; expected {expected}")
        if self.host not in LOOPBACK and self.api_key_env is None:
            raise ConfigError(
                f"serve: {self.host} can be reached from other machines; name a variable that holds a key with "
                "--api-key-env, or keep --host 127.0.0.1"
            )
