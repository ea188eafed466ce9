"""One request to a server: an address in, a checked answer out, tried again where it broke off, within a bounded time.

The client, its proxies and its certificates are huggingface_hub's. A server, a mirror, or whatever stands in between
may answer anything: a status becomes one line, a body that ends early or comes too slowly is asked for again, and
nothing is waited for without an end. Leaves out: what the bodies are (hub/repository.py), and ranges (connections.py).
"""

import contextlib
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from lapis.errors import CheckpointError

TRIES = 5
PAUSE = 0.5  # seconds before the second try, give or take half; each further one waits twice as long
LONGEST = 300.0  # seconds of Retry-After that are waited for: the hub counts requests over five minutes
TIMEOUT = 30.0  # seconds without a byte
ANSWER = 60.0  # seconds until the headers of an answer are there, redirects included
QUICK = 0.01  # seconds from a request to its answer that are at once
LOWEST = 2_000  # bytes a second, over each WINDOW
WINDOW = 30.0  # seconds

_AGAIN = (408, 429, 500, 502, 503, 504)


class Refused(CheckpointError):
    """An answer that trying again does not change. status: the server's, or 0. code: the hub's own word for it."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class ShortReadError(Exception):
    """A body that ended early, or came too slowly."""


class AgainError(Exception):
    """An answer to wait for and try again. after: seconds that the server asked for, or None."""

    def __init__(self, message: str, after: float | None) -> None:
        super().__init__(message)
        self.after = after


@contextlib.contextmanager
def opened(name: str, url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The answer to GET, its body unread; headers and redirects are waited for ANSWER seconds at most.

    Args:
        name: What the address is called in messages.
        url: The address.
        headers: Of the request, besides the refusal of encodings.

    Yields:
        httpx's response, with `headers`, `status_code` and `iter_raw`.
    """
    from huggingface_hub import get_session

    client: Any = get_session()
    request = client.build_request("GET", url, headers={**headers, "Accept-Encoding": "identity"}, timeout=TIMEOUT)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    late = threading.Event()

    def send() -> None:
        try:
            answer = client.send(request, stream=True, follow_redirects=True)
        except BaseException as error:
            answers.put(error)
            return
        answers.put(answer)
        if late.is_set():
            answer.close()

    threading.Thread(target=send, daemon=True, name="lapis-hub").start()
    try:
        answer = answers.get(timeout=ANSWER)
    except queue.Empty:
        late.set()
        raise ShortReadError(f"no answer in {ANSWER:.0f} s") from None
    if isinstance(answer, BaseException):
        raise answer
    try:
        check_encoding(name, answer.headers)
        yield answer
    finally:
        answer.close()


def check_encoding(name: str, headers: Mapping[str, str]) -> None:
    """Raises Refused for a body that is not sent as it is."""
    encoding = headers.get("content-encoding") or "identity"
    if encoding != "identity":
        raise Refused(
            f"{name}: the server encoded it as {encoding:.40}, and a range of that is not the file's; ask its owner to "
            "send it as it is, go around the proxy that may do it (NO_PROXY), or download the model and give its folder"
        )


def body(answer: Any, limit: int) -> Iterator[bytes]:
    """The pieces of a body. Raises ShortReadError where it comes too slowly, and Refused beyond `limit` bytes."""
    begin, held, total = time.monotonic(), 0, 0
    for piece in answer.iter_raw():
        total += len(piece)
        held += len(piece)
        if total > limit:
            raise Refused(f"the server sent more than the {limit:,} bytes that were asked for")
        yield piece
        waited = time.monotonic() - begin
        if waited >= WINDOW:
            if held < LOWEST * waited:
                raise ShortReadError(f"{held / waited:,.0f} bytes a second came, which is too slow to go on")
            begin, held = time.monotonic(), 0


class Attempt(contextlib.AbstractContextManager["Attempt"]):
    """One try, as a context: what may pass is swallowed and waited for, the last one becomes a line.

    Attributes:
        done: Whether it was the last that is needed.
        useful: Set by the caller where the try brought something, so that the next one counts as the first.
    """

    def __init__(self, name: str, number: int, last: bool) -> None:
        self.name, self.number, self.last = name, number, last
        self.done = self.useful = False

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            self.done = True
            return False
        if isinstance(error, Refused) and not str(error).startswith(self.name):
            raise Refused(f"{self.name}: {error}", error.status, error.code) from None
        if not isinstance(error, (AgainError, ShortReadError, OSError)) and not _of_network(error):
            return False
        if self.last and not self.useful:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            times = self.number + 1
            raise CheckpointError(f"{self.name}: the server was tried {times} times: {why}; try later") from None
        after = error.after if isinstance(error, AgainError) else None
        if after is not None and after > LONGEST:
            raise CheckpointError(f"{self.name}: the server asks to wait for {after:,.0f} s; try then") from None
        if after is None:
            after = PAUSE * 2**self.number * random.uniform(0.5, 1.5)
        elif after:
            after += random.uniform(0, PAUSE)  # others were given the same time
        time.sleep(after)
        return True


def patiently(name: str, tries: int = 0) -> Iterator[Attempt]:
    """Up to `tries` (default: TRIES) attempts in a row that bring nothing; leave the loop when one is done."""
    tries, number = tries or TRIES, 0
    while number < tries:
        attempt = Attempt(name, number, number + 1 == tries)
        yield attempt
        number = 0 if attempt.useful else number + 1


def refusal(name: str, status: int, headers: Mapping[str, str], what: str = "model") -> Exception:
    """What a status means: something to try again, or the end.

    Args:
        name: What was asked for.
        status: The server's.
        headers: Of the answer.
        what: What the hub was asked for, in words.
    """
    if status in _AGAIN:
        words = f"status {status}" + (" (too many requests)" if status == 429 else "")
        return AgainError(words, retry_after(headers.get("retry-after", "")))
    code = headers.get("x-error-code", "")
    by_code = {
        "GatedRepo": "is gated; ask for access on its page, and log in with `hf auth login`",
        "RevisionNotFound": f"the hub has the {what}, but no such revision; its page lists those that it has",
        "RepoNotFound": f"there is no such folder, and the hub has no such {what}, or it is private; log in with "
        "`hf auth login`",
        "EntryNotFound": "is not on the hub",
    }
    by_status = {
        401: "the hub wants a login (401); log in with `hf auth login`, or set HF_TOKEN",
        403: "the hub refuses access (403); ask for it on the page of the model, and log in with `hf auth login`",
        404: "is not on the hub (404)",
    }
    why = by_code.get(code) or by_status.get(status) or f"the server answered with status {status}"
    return Refused(f"{name}: {why}", status, code if code in by_code else "")


def retry_after(text: str) -> float | None:
    """The seconds of a Retry-After header, which is a number or a date (RFC 9110, section 10.2.3); None for others."""
    if re.fullmatch(r"\d{1,6}(\.\d+)?", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    left = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, left)


def call_patiently(name: str, call: Callable[[], None], tries: int = 0) -> None:
    """Calls until it is done, as often as that may help."""
    for attempt in patiently(name, tries):
        with attempt:
            call()
        if attempt.done:
            return


def _of_network(error: BaseException) -> bool:
    """True for what the HTTP library raises; beneath huggingface_hub it has had several names."""
    from huggingface_hub import errors

    base: Any = errors.HTTPError  # type: ignore[attr-defined]  # httpx's, whichever httpx it is
    return isinstance(error, base) or type(error).__module__.startswith(("httpx", "httpcore", "h11", "http.client"))
