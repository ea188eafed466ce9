"""What of packed data is learned from, in figures and in lines: coverage(data), lines(data).

Leaves out: the rows themselves, in color (cli/data.py).
"""

from typing import Any

from lapis.text.rows.mixture import Data, Mixture


def coverage(data: Data) -> dict[str, float]:
    """Shares: `supervised` of the tokens carry loss, `padding` of the places hold none, `cut` of the tokens went."""
    counts = data.counts
    cut = counts.get("cut_tokens", 0)
    return {
        "supervised": counts["supervised"] / max(1, counts["tokens"]),
        "padding": counts["padding"] / (len(data) * data.length),
        "cut": cut / max(1, counts["tokens"] + cut),
    }


def lines(data: Data) -> list[str]:
    """Lines for a reader: how much there is, coverage, what was dropped, and of each source of a mixture its part."""
    counts, shares = data.counts, coverage(data)
    texts = counts["chats"] if data.chats else counts["documents"]
    found = [
        f"{len(data):,} rows of {data.length:,} tokens from {texts:,} {data.info['kind']}",
        f"{shares['supervised']:.1%} of tokens carry loss, {shares['padding']:.1%} of places are padding, "
        f"{shares['cut']:.1%} of tokens were cut",
    ]
    if data.chats:
        found.append(
            f"cut: {counts['cut_chats']:,} chats; dropped: {counts['dropped_long']:,} too long, "
            f"{counts['dropped_silent']:,} with nothing of the assistant left"
        )
    if counts.get("empty"):
        found.append(f"skipped: {counts['empty']:,} documents without text")
    if isinstance(data, Mixture):
        for name, rows, weight in zip(data.names, data.sources, data.weights, strict=True):
            times = weight * len(data) / len(rows)
            found.append(f"{weight:.1%} {name}: {len(rows):,} rows, read {_times(times)} in an epoch of {len(data):,}")
    return found


def figures(data: Data) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "kind": data.info["kind"],
        "rows": len(data),
        "length": data.length,
        "counts": data.counts,
        "coverage": coverage(data),
        "digest": data.digest,
    }


def _times(number: float) -> str:
    return f"{number:.2f} times"
