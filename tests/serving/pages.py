"""The chat page as a reader has it: opened in Chromium against a real server of two tiny models."""

import contextlib
from collections.abc import Iterator
from typing import Any

LONG = "a-word-without-any-place-to-break-" * 8


class Visitor:
    """An opened page. complaints: whatever it said on the console, and requests to anybody but its server."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append("a dialog"), dialog.dismiss()))
        page.on("request", self._watch)

    def _watch(self, request: Any) -> None:
        if not request.url.startswith((f"{self.url}/", f"blob:{self.url}")):
            self.complaints.append(request.url)

    def open(self) -> "Visitor":
        """Loads the page and waits until it has met the server."""
        self.page.goto(self.url)
        self.page.wait_for_selector("html[data-ready]", timeout=60_000)
        return self

    def set(self, **fields: object) -> None:
        """Fills in settings."""
        if not self.page.locator("#fold").evaluate("fold => fold.open"):
            self.page.locator("summary").click()
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))

    def send(self, text: str) -> None:
        """Sends a message as a reader does, and does not wait."""
        self.page.fill("#message", text)
        self.page.locator("#message").press("Enter")

    def talk(self, text: str) -> None:
        """Sends a message and waits for all replies."""
        self.send(text)
        self.settle()

    def settle(self) -> None:
        """Until no reply is being written."""
        self.page.locator("#send:visible").wait_for(timeout=60_000)

    def texts(self, turn: int = -1) -> list[str]:
        """The replies to a turn, as text."""
        return [place.inner_text() for place in self.turn(turn).locator(".reply .text").all()]

    def turn(self, number: int = -1) -> Any:
        """The block of a turn."""
        return self.page.locator("article").nth(number)

    def look(self, reply: int = 0) -> Any:
        """Opens the inside of a reply to the last turn; the reply."""
        place = self.turn().locator(".reply").nth(reply)
        place.locator("[data-name=look]").click()
        place.locator("[role=listbox]").wait_for()
        return place


@contextlib.contextmanager
def visiting(browser: Any, url: str, width: int = 1280, **context: Any) -> Iterator[Visitor]:
    """An opened page in a browser of its own; at the end nothing may have gone wrong."""
    opened = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True, **context)
    try:
        visitor = Visitor(opened.new_page(), url).open()
        yield visitor
        assert visitor.complaints == []
    finally:
        opened.close()
