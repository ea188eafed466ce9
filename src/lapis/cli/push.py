"""`lapis push`: a model folder to the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.checkpoint.hub.shipment import Shipment

SHOWN = 20  # files that are not sent


def push(
    folder: Path,
    name: str,
    /,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    card: Path | None = None,
    message: str = "",
    json: bool = False,
) -> None:
    """Send a model to the hub. What is sent is listed first; what is there already is kept unless --overwrite is given.

    The token is that of `hf auth login`, or HF_TOKEN; HF_ENDPOINT names another hub.

    Args:
        folder: A model, an adapter, or GGUF files with what belongs to them.
        name: owner/name on the hub.
        private: A new repository is private, or with --no-private public; by default what the hub's own rule says,
            which is public unless an organization has another.
        overwrite: Replace the model that the repository holds; its history keeps it.
        dry_run: List what would be sent, and ask nobody.
        card: A folder of `lapis card`, whose README.md goes with it; by default the folder's own, or that of the card
            beside it.
        message: Of the commit.
        json: Print one JSON object.
    """
    from lapis.checkpoint.hub.push import push as run
    from lapis.cli.output import line, notes, progress, show, size

    def list_files(what: "Shipment") -> None:
        line(f"{size(what.bytes)} in {format_count(len(what.files), 'file')}, to {name}:", error=json)
        for file, count in what.sizes.items():
            line(f"  {size(count):>10}  {file}", error=json)
        for file, why in list(what.left_out.items())[:SHOWN]:
            line(f"        stays  {file} ({why})", "dim", error=json)
        if (more := len(what.left_out) - SHOWN) > 0:
            line(f"        stays  and {more:,} more", "dim", error=json)

    result = run(
        folder, name, private=private, overwrite=overwrite, dry_run=dry_run, card=card, message=message,
        listed=list_files, bar=lambda label: progress(label, "bytes"),
    )  # fmt: skip

    def render() -> None:
        for file in result["removed"]:
            line(f"      removed  {file} (of the model that was there)", "dim")
        notes(result["notes"])
        line("nothing was sent" if dry_run else f"sent: {result['url']} (commit {result['commit'][:8]})")

    show(result, json, render)
